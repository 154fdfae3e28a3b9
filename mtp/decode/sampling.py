"""How tokens are chosen, and the rules that decide which guesses stand.

Noise is a hash of (request seed, absolute position, purpose), never a stream: whoever asks for the
noise of a place gets the same, whatever was drafted, batched or rejected before. Under `match` a
guess therefore stands iff it *is* the target's own token, and the text equals autoregressive text
token for token, sampled text too. `exact` is the token-level rejection of speculative sampling
(Leviathan et al. 2023, theorem 1): same law, other text, and more acceptance when the draft's law
is close but not equal. `block` judges a chain as a whole (Sun et al. 2024, algorithm 2): same law,
and at least as many guesses stand as under `exact`. `joint` is lossy: it accepts the longest
beginning of a draft that the target finds nearly as probable as the drafter does (Qin et al. 2025).

Letters: B rows, K guesses, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp.decode.contract import Draft, Place, Rule, Verdict

TARGET, GUESS, ACCEPT, FILL = 0, 1, 2, 3  # purposes of noise: one independent stream each
# p (B, 1+K, V), q likewise with 0 where nothing is guessed, the guesses and their trials (B, K, 1)
# -> which stand, provided that all are offered (B, K, 1); weight of p in the residual (B, 1+K, 1).
Judge = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def uniform(place: Place, width: int, purpose: int, device: torch.device | None = None) -> Tensor:
    """Numbers in (0, 1), (B, count, width), for the `count` positions from place.first[b] on."""
    columns = torch.arange(place.count, device=device)
    seed, position = torch.tensor((place.seed, place.first), device=device)[:, :, None]
    x = (
        seed * 0x2545F4914F6CDD1D
        + (position + columns) * 0x9E3779B97F4A7C1
        + purpose * 0x3C6EF372FE94F82B
    )
    x = _mix(x)[:, :, None] + torch.arange(width, device=device) * 0x632BE59BD9B4E019
    return (((_mix(x) >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52  # exact: never 0 or 1


def gumbel(u: Tensor) -> Tensor:
    """Uniform numbers -> noise whose argmax over logits + noise is a draw from softmax(logits)."""
    return -(-u.log()).log()


def _mix(x: Tensor) -> Tensor:
    """Spread every bit over all 64 (multiplications wrap, shifts are logical)."""
    for multiplier in (0x7F51AFD7ED558CCD, 0x44CEB9FE1A85EC53):
        x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * multiplier
    return x ^ ((x >> 33) & 0x7FFFFFFF)


@dataclass
class Sampling:
    """temperature 0 is greedy. top_k and top_p cut the law after the temperature, top_k first; 0
    and 1 switch them off.

    Ties at the k-th logit all stay. top_p keeps the smallest set of most likely tokens whose mass
    reaches it. All in fp64.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be at least 0, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (0 keeps all)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")

    def warp(self, logits: Tensor) -> Tensor:
        """Logits (..., V) -> fp64 logits of the law that is sampled from, -inf where cut."""
        logits = logits.double() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(
                logits < logits.topk(self.top_k, -1).values[..., -1:], -math.inf
            )
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            mass = ordered.softmax(-1)
            beyond = mass.cumsum(-1) - mass >= self.top_p  # enough mass stands before it
            cut = torch.zeros_like(beyond).scatter(-1, order, beyond)
            logits = logits.masked_fill(cut, -math.inf)
        return logits

    def probs(self, logits: Tensor) -> Tensor:
        """The law itself (..., V), fp64; one-hot when greedy: no rule needs a second path."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        return self.warp(logits).softmax(-1)

    def noise(self, place: Place, like: Tensor, purpose: int) -> Tensor | None:
        """What `scores` adds to logits like these, (B, count, V); None: greedy needs none."""
        if self.temperature == 0:
            return None
        return gumbel(uniform(place, like.shape[-1], purpose, like.device))

    def scores(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Logits (B, K, V), noise of the same places -> what the chosen token has most of."""
        return logits if noise is None else self.warp(logits) + noise


class Match:
    """A guess stands iff it is the token that the target itself chooses under the same noise."""

    lossy = False

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._kept: tuple[Place | None, Tensor | None] = None, None

    def _noise(self, logits: Tensor, place: Place) -> Tensor | None:
        """Guesses and the choices that judge them have the same noise: it is made once a step."""
        if place != self._kept[0]:
            self._kept = place, self.sampling.noise(place, logits, TARGET)
        return self._kept[1]

    def scores(self, logits: Tensor, place: Place, ahead: int = 0) -> Tensor:
        noise = self._noise(logits, place)
        if noise is not None:
            noise = noise[:, ahead : ahead + logits.shape[1]]
        return self.sampling.scores(logits, noise)

    def branches(self, logits: Tensor, place: Place, ahead: int) -> tuple[Tensor, Tensor]:
        """As likely as they are under the noise that is known: luck has no part in it."""
        noise = self._noise(logits, place)
        if noise is not None:
            noise = noise[:, ahead : ahead + 1]
        weight = self.sampling.scores(logits, noise).log_softmax(-1)
        return weight, torch.zeros_like(weight[:, :1, :1])

    def draw(self, logits: Tensor, place: Place, ahead: int = 0) -> Draft:
        return Draft(self.scores(logits, place, ahead).argmax(-1))

    def __call__(self, logits: Tensor, draft: Draft, place: Place) -> Verdict:
        if draft.parents is not None:
            return self._in_tree(logits, draft, place)
        choice = self.scores(logits, place).argmax(-1)
        if draft.tokens.shape[1] == 0:  # plain steps pay nothing for verification
            following = choice[:, 0]
            return Verdict(torch.zeros_like(following), following, choice=choice)
        accepted = (choice[:, :-1] == draft.tokens).long().cumprod(1).sum(1)
        following = choice.gather(1, accepted[:, None])[:, 0]
        return Verdict(accepted, following, choice=choice)

    def _in_tree(self, logits: Tensor, draft: Draft, place: Place) -> Verdict:
        """The deepest guess that stands with all its ancestors; the first of them, if two agree."""
        lineage, noise = draft.lineage, self._noise(logits, place)
        assert draft.parents is not None
        depth = lineage.sum(-1) - 1
        if noise is not None:
            noise = noise.gather(1, depth[..., None].expand(-1, -1, noise.shape[-1]))
        choice = self.sampling.scores(logits, noise).argmax(-1)
        fails = draft.tokens != choice.gather(1, draft.parents + 1)
        stands = ~(lineage[:, :, 1:] & fails[:, None]).any(-1)
        best = torch.where(stands, depth, -1)
        accepted = best.amax(1)
        node = (best == accepted[:, None]).long().argmax(1)
        path = lineage[torch.arange(len(node), device=node.device), node]
        return Verdict(accepted, choice.gather(1, node[:, None])[:, 0], path, choice)


class Rejection:
    """Guesses x ~ q are tried against the target's p; `judge` says which stand, and the residual
    after them, (weight p - q)+, gives the next token. Takes chains; the word is for messages.
    """

    lossy = False

    def __init__(self, sampling: Sampling, word: str, judge: Judge) -> None:
        self.sampling, self.word, self.judge = sampling, word, judge

    def scores(self, logits: Tensor, place: Place, ahead: int = 0) -> Tensor:
        raise self._for_chains()

    def branches(self, logits: Tensor, place: Place, ahead: int) -> tuple[Tensor, Tensor]:
        raise self._for_chains()

    def _for_chains(self) -> ValueError:
        return ValueError(f"rule={self.word} takes chains of guesses: trees need rule=match")

    def draw(self, logits: Tensor, place: Place, ahead: int = 0) -> Draft:
        return _drawn(self.sampling, logits, place, ahead)

    def __call__(self, logits: Tensor, draft: Draft, place: Place) -> Verdict:
        if draft.parents is not None:
            raise self._for_chains()
        p, tokens = self.sampling.probs(logits), draft.tokens
        offered = (tokens >= 0).long().cumprod(1)[..., None]
        at = tokens.clamp(min=0)[..., None]
        q = F.one_hot(at[..., 0], p.shape[-1]).double() if draft.probs is None else draft.probs
        # Nothing was guessed after the last guess: q is 0 there, and the residual is p.
        q = torch.cat([q * offered, torch.zeros_like(p[:, :1])], 1)
        u = uniform(_of_step(place, 0, tokens.shape[1]), 1, ACCEPT, p.device)
        stands, weight = self.judge(p, q, at, u)
        stands = stands & offered.bool()
        count = torch.arange(1, tokens.shape[1] + 1, device=p.device)
        accepted = F.pad(stands[..., 0] * count, (1, 0)).amax(1)
        row = torch.arange(len(tokens), device=p.device)
        residual = (weight[row, accepted] * p[row, accepted] - q[row, accepted]).clamp(min=0)
        return Verdict(accepted, _following(residual.log(), place, accepted))


class Joint:
    """The acceptance of multi-token assisted decoding (Qin et al. 2025), in its authors' code: the
    longest beginning x of the draft with p(x) > threshold q(x) stands, also where a shorter one
    fails; p and q are the products of the laws that sampling makes of the logits. Of a tree, the
    deepest guess whose p exceeds threshold times the greatest q at its depth; of equals that of
    most p. Then the target draws a token. Guesses that were not drawn have q = 1.
    """

    lossy = True

    def __init__(self, sampling: Sampling, threshold: float = 0.5) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(
                f"threshold={threshold} must lie in (0, 1]: drafts stand that are more probable "
                f"under the target than that many times their probability under the drafter"
            )
        self.sampling, self.bar = sampling, math.log(threshold)

    def scores(self, logits: Tensor, place: Place, ahead: int = 0) -> Tensor:
        raise ValueError("rule=joint takes chains and beams of guesses: trees need rule=match")

    def branches(self, logits: Tensor, place: Place, ahead: int) -> tuple[Tensor, Tensor]:
        """With luck of its own for each token of each beam, the beams that go on are drawn from
        their weights / sum of weights, without replacement (Gumbel top-k): never one of them twice.
        """
        u = uniform(_of_step(place, ahead, 1), logits[0].numel(), GUESS, logits.device)
        return self.sampling.probs(logits).log(), gumbel(u).view(logits.shape)

    def draw(self, logits: Tensor, place: Place, ahead: int = 0) -> Draft:
        return _drawn(self.sampling, logits, place, ahead)

    def __call__(self, logits: Tensor, draft: Draft, place: Place) -> Verdict:
        draft = _as_tree(draft)
        law = self.sampling.probs(logits).log()
        p, q = (_of_paths(x, draft.lineage) for x in (_target_logp(law, draft), _logq(draft)))
        depth = draft.lineage.sum(-1) - 1
        rivals = depth[:, :, None] == depth[:, None]
        best_q = torch.where(rivals, q[:, None], -math.inf).amax(-1)
        stands = (p - best_q > self.bar) | (depth == 0)  # nan, of what was not offered, fails
        reached = torch.where(stands, depth, -1)
        accepted = reached.amax(1)
        node = torch.where(reached == accepted[:, None], p, -math.inf).argmax(1)
        row = torch.arange(len(node), device=node.device)
        following = _following(law[row, node], place, accepted)
        return Verdict(accepted, following, draft.lineage[row, node])


def _as_tree(draft: Draft) -> Draft:
    """A chain is a tree in which each guess follows the one before."""
    if draft.parents is not None:
        return draft
    parents = torch.arange(-1, draft.tokens.shape[1] - 1, device=draft.tokens.device)
    return replace(draft, parents=parents.expand_as(draft.tokens))


def _target_logp(law: Tensor, draft: Draft) -> Tensor:
    """law (B, 1+K, V), logs -> log p of each guess after those it follows (B, K)."""
    assert draft.parents is not None
    row = torch.arange(len(law), device=law.device)[:, None]
    logp = law[row, draft.parents + 1, draft.tokens.clamp(min=0)]
    return logp.masked_fill(draft.tokens < 0, -math.inf)


def _logq(draft: Draft) -> Tensor:
    """log q likewise; 0 for what was not drawn."""
    if draft.logq is not None:
        return draft.logq
    if draft.probs is None:
        return torch.zeros_like(draft.tokens, dtype=torch.double)
    return draft.probs.gather(-1, draft.tokens.clamp(min=0)[..., None])[..., 0].log()


def _of_paths(each: Tensor, lineage: Tensor) -> Tensor:
    """Logs of guesses (B, K) -> of the paths from the pending token to each column (B, 1+K)."""
    return torch.where(lineage, F.pad(each, (1, 0))[:, None], 0.0).sum(-1)


def _drawn(sampling: Sampling, logits: Tensor, place: Place, ahead: int) -> Draft:
    """Guesses from the drafter's own law, with noise that the target does not share."""
    noise = sampling.noise(_of_step(place, ahead, logits.shape[1]), logits, GUESS)
    return Draft(sampling.scores(logits, noise).argmax(-1), sampling.probs(logits))


def _following(weight: Tensor, place: Place, accepted: Tensor) -> Tensor:
    """The token (B,) that the target draws after what stands, from log weights (B, V)."""
    first = [n + a for n, a in zip(place.first, accepted.tolist(), strict=True)]
    u = uniform(Place(place.seed, first, 1), weight.shape[-1], TARGET, weight.device)[:, 0]
    return (weight + gumbel(u)).argmax(-1)


def _of_step(place: Place, ahead: int, count: int) -> Place:
    """Guesses and trials are keyed by their step too: what a verdict has looked at, also beyond
    what it accepts, may not come again.
    """
    seed = [
        (s * 0x2127599BF4325C37 + n * 0x1D8E4E27C47D124F) % 2**63
        for s, n in zip(place.seed, place.first, strict=True)
    ]
    return Place(seed, [n + ahead for n in place.first], count)


def _token_by_token(p: Tensor, q: Tensor, at: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Each guess stands with probability min(1, p(x)/q(x)), if all before it do."""
    stands = u * q[:, :-1].gather(-1, at) < p[:, :-1].gather(-1, at)
    return stands.long().cumprod(1).bool(), torch.ones_like(p[..., :1])


def _as_a_block(p: Tensor, q: Tensor, at: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The longest prefix of which a trial succeeds; what it keeps of its mass weighs the residual.

    w_i = min(1, w_{i-1} p(x_i) / q(x_i)), w_0 = 1; S_i = sum (w_i p_{i+1} - q_{i+1})+; a prefix of
    i guesses succeeds with probability S_i / (S_i + 1 - w_i), 1 where that is 0 / 0.
    """
    ratio = p[:, :-1].gather(-1, at) / q[:, :-1].gather(-1, at)
    weights = [torch.ones_like(p[:, 0, :1])]
    for i in range(at.shape[1]):
        weights.append((weights[-1] * ratio[:, i]).nan_to_num(0.0).clamp(max=1.0))
    weight = torch.stack(weights, 1)
    left = (weight * p - q).clamp(min=0).sum(-1, keepdim=True)
    success = left / (left + 1 - weight)
    return u <= success.nan_to_num(1.0)[:, 1:], weight


RULES: dict[str, Callable[[Sampling], Rule]] = {
    "match": Match,
    "exact": lambda sampling: Rejection(sampling, "exact", _token_by_token),
    "block": lambda sampling: Rejection(sampling, "block", _as_a_block),
    "joint": Joint,
}


def lacks_fp64(device: torch.device) -> bool:
    """Where laws cannot be made: Apple's GPUs."""
    return device.type == "mps"


def for_laws(logits: Tensor) -> Tensor:
    """Where they can be told apart in fp64: as they are, or on the host."""
    return logits.cpu() if lacks_fp64(logits.device) else logits


class OnHost:
    """A rule for a device without fp64: laws are made, and guesses judged, on the CPU. What goes
    back is ids, or as little as a tree or a beam is grown by, in fp32; laws of guesses stay.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule, self.lossy = rule, rule.lossy

    def scores(self, logits: Tensor, place: Place, ahead: int = 0) -> Tensor:
        return self.rule.scores(logits.cpu(), place, ahead).float().to(logits.device)

    def branches(self, logits: Tensor, place: Place, ahead: int) -> tuple[Tensor, Tensor]:
        weight, luck = self.rule.branches(logits.cpu(), place, ahead)
        return weight.float().to(logits.device), luck.float().to(logits.device)

    def draw(self, logits: Tensor, place: Place, ahead: int = 0) -> Draft:
        draft = self.rule.draw(logits.cpu(), place, ahead)
        return replace(draft, tokens=draft.tokens.to(logits.device))

    def __call__(self, logits: Tensor, draft: Draft, place: Place) -> Verdict:
        def on(device: Any, *parts: Tensor | None) -> list[Any]:
            return [None if x is None else x.to(device) for x in parts]

        here = Draft(*on("cpu", draft.tokens, draft.probs, draft.parents, draft.logq))
        return Verdict(*on(logits.device, *self.rule(logits.cpu(), here, place)))


def make_rule(name: str, sampling: Sampling, threshold: float | None = None) -> Rule:
    """A rule by its word; only "joint" takes a threshold, 0.5 where none is given."""
    if name not in RULES:
        raise ValueError(f"rule={name!r} is unknown: allowed are {', '.join(RULES)}")
    if threshold is None:
        return RULES[name](sampling)
    if name != "joint":
        raise ValueError(f"rule={name} takes no threshold=: only joint does")
    return Joint(sampling, threshold)
