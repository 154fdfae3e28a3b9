"""How tokens are chosen, and the rules that decide which guesses stand.

Noise is a hash of (request seed, absolute position, purpose), never a stream: whoever asks for the
noise of a place gets the same, whatever was drafted, batched or rejected before. Under `match` a
guess therefore stands iff it *is* the target's own token, and the text equals autoregressive text
token for token, sampled text too. `exact` is the token-level rejection of speculative sampling
(Leviathan et al. 2023, theorem 1): same law, other text, and more acceptance when the draft's law
is close but not equal.

Letters: B rows, K guesses, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp.decode.contract import Draft, Place, Rule, Verdict

TARGET, GUESS, ACCEPT = 0, 1, 2  # purposes of noise: one independent stream each


def uniform(
    place: Place, count: int, width: int, purpose: int, device: torch.device | None = None
) -> Tensor:
    """Numbers in (0, 1), (B, count, width), for the `count` positions from place.first[b] on."""
    columns = torch.arange(count, device=device)
    seed, position = torch.tensor(place, device=device)[:, :, None]
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
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0")
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

    def noise(self, place: Place, like: Tensor, count: int, purpose: int) -> Tensor | None:
        """What `choose` adds to logits like these, (B, count, V); None: greedy needs none."""
        if self.temperature == 0:
            return None
        return gumbel(uniform(place, count, like.shape[-1], purpose, like.device))

    def choose(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """logits (B, K, V), noise of the same K positions and perhaps more -> tokens (B, K)."""
        if noise is None:
            return logits.argmax(-1)
        return (self.warp(logits) + noise[:, : logits.shape[1]]).argmax(-1)


class Match:
    """A guess stands iff it is the token that the target itself chooses under the same noise."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._kept: tuple[Any, Tensor | None] = None, None

    def _noise(self, place: Place, logits: Tensor, count: int) -> Tensor | None:
        """K guesses and the K + 1 choices that judge them have the same noise: it is made once."""
        key = (*place.seed, *place.first, count)
        if key != self._kept[0]:
            self._kept = key, self.sampling.noise(place, logits, count, TARGET)
        return self._kept[1]

    def draw(self, logits: Tensor, place: Place) -> Draft:
        return Draft(self.sampling.choose(logits, self._noise(place, logits, logits.shape[1] + 1)))

    def __call__(self, logits: Tensor, draft: Draft, place: Place) -> Verdict:
        choice = self.sampling.choose(logits, self._noise(place, logits, logits.shape[1]))
        if draft.tokens.shape[1] == 0:  # plain steps pay nothing for verification
            following = choice[:, 0]
            return Verdict(torch.zeros_like(following), following)
        accepted = (choice[:, :-1] == draft.tokens).long().cumprod(1).sum(1)
        return Verdict(accepted, choice.gather(1, accepted[:, None])[:, 0])


class Exact:
    """Token-level rejection: a guess x ~ q stands with probability min(1, p(x)/q(x)), else the next
    token ~ (p - q)+.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def draw(self, logits: Tensor, place: Place) -> Draft:
        noise = self.sampling.noise(place, logits, logits.shape[1], GUESS)
        return Draft(self.sampling.choose(logits, noise), self.sampling.probs(logits))

    def __call__(self, logits: Tensor, draft: Draft, place: Place) -> Verdict:
        p, tokens = self.sampling.probs(logits), draft.tokens
        offered = tokens >= 0
        q = (
            draft.probs
            if draft.probs is not None
            else F.one_hot(tokens.clamp(min=0), p.shape[-1]).double()
        )
        q = q * offered[..., None]
        at = tokens.clamp(min=0)[..., None]
        u = uniform(place, tokens.shape[1], 1, ACCEPT, tokens.device)
        stands = (u * q.gather(-1, at) < p[:, :-1].gather(-1, at)).squeeze(-1) & offered
        accepted = stands.long().cumprod(1).sum(1)
        row = torch.arange(len(tokens), device=tokens.device)
        beyond = torch.cat(
            [q, torch.zeros_like(p[:, :1])], 1
        )  # nothing was guessed after the last guess: the residual is p
        residual = (p[row, accepted] - beyond[row, accepted]).clamp(min=0)
        after = Place(
            place.seed, [n + a for n, a in zip(place.first, accepted.tolist(), strict=True)]
        )
        u = uniform(after, 1, p.shape[-1], TARGET, tokens.device)[:, 0]
        return Verdict(accepted, (residual.log() + gumbel(u)).argmax(-1))


RULES: dict[str, Callable[[Sampling], Rule]] = {"match": Match, "exact": Exact}
