"""Whether a model's heads are sound: what each of them predicts, and whether decoding accepts as
much as a plain forward of the same text, without caches, says it should.

A text never shows that a head is untrained or in the wrong place, or that a drafter's cache went
stale: they only cost acceptance.

Letters: T tokens of a text, N heads, P scored positions, S steps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp.decode.contract import Completion, Place, Request
from mtp.decode.drafters import OwnHeads
from mtp.decode.loop import generate
from mtp.decode.sampling import TARGET, Sampling, for_laws

# Greedy text of a weak model runs in circles, where every head is right.
SAMPLING = Sampling(temperature=1.0)
SURE = 4.0  # standard errors that tell a difference from chance
NEAR_TIES = 0.01, 0.05  # share of choices that rounding may change: fp32 and wider, bf16 and fp16


class Health(NamedTuple):
    """hits (N, N + 1): how often head i's best token is the one that comes o + 1 places on.
    commonest: how often the commonest token comes. decoded, expected (N - 1,): how often the guess
    at each depth stood, and would have stood without caches, in the same steps. findings: what is
    wrong, in words.
    """

    hits: Tensor
    commonest: float
    decoded: Tensor
    expected: Tensor
    findings: list[str]

    def table(self) -> str:
        lines = ["head  right  best at  guess stood  without caches"]
        for i, hits in enumerate(self.hits):
            line = f"{i + 1:4}  {hits[i]:5.0%}  {int(hits.argmax()) + 1:7}"
            if i > 0:
                line += f"  {self.decoded[i - 1]:11.0%}  {self.expected[i - 1]:14.0%}"
            lines.append(line)
        return "\n".join([*lines, f"the commonest token alone: {self.commonest:.0%}"])


@torch.no_grad()
def health(
    model: Any,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]] | None = None,
    new_tokens: int = 96,
) -> Health:
    """Decode `prompts` with the model's own heads, at temperature 1, and score all heads on
    `texts`, best such that it was not trained on; None: on what it decoded. A thousand tokens of
    each say enough.
    """
    requests = [Request(prompt, new_tokens, seed) for seed, prompt in enumerate(prompts)]
    rows = -(-len(requests) // 2)  # each is refilled
    done = generate(model, requests, OwnHeads(), SAMPLING, batch_size=rows)
    replays = [_replay(model, r, c) for r, c in zip(requests, done, strict=True)]
    own, decoded, expected = (torch.cat(x) for x in zip(*replays, strict=True))
    if texts is None:
        texts = [[*r.prompt, *c.tokens] for r, c in zip(requests, done, strict=True)]
    right = torch.cat([_right(_logits(model, text).argmax(-1), text) for text in texts])
    commonest = _share_of_commonest(texts)
    findings = [
        *_about_heads(right, commonest, _copies(_logits(model, texts[0]))),
        *_about_caches(own, decoded, expected, NEAR_TIES[model.embedding.weight.itemsize < 4]),
    ]
    hits, stood, stands = (x.double().mean(0) for x in (right, decoded, expected))
    return Health(hits, commonest, stood, stands, findings)


def _logits(model: Any, text: Sequence[int]) -> Tensor:
    """(T, N, V), without caches."""
    ids = torch.tensor([list(text)], device=model.embedding.weight.device)
    return for_laws(model(ids, return_all_heads=True)[0])


def _right(best: Tensor, text: Sequence[int]) -> Tensor:
    """best (T, N) -> (P, N, N + 1): whether it is the token that comes o + 1 places on."""
    N = best.shape[1]
    if len(text) < N + 2:
        raise ValueError(f"a text of {len(text)} tokens is too short for {N} heads")
    ahead = torch.tensor(text[1:], device=best.device).unfold(0, N + 1, 1)
    return best[: len(ahead), :, None] == ahead[:, None]


def _share_of_commonest(texts: Iterable[Sequence[int]]) -> float:
    counts = torch.cat([torch.tensor(text) for text in texts]).bincount()
    return float(counts.max() / counts.sum())


def _replay(model: Any, request: Request, done: Completion) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each new token is head 1's own choice (T,), which guesses stood in each step, and
    which would have stood without caches (S, N - 1).
    """
    text, start = [*request.prompt, *done.tokens], len(request.prompt)
    agrees = _agreements(_logits(model, text), text, request.seed)
    N = len(agrees)
    # New tokens that were pending in a step, as long as a whole draft had room after them.
    pending = [j for j, head in enumerate(done.heads) if head == 1 and j + N < len(done.heads)]
    if not pending:
        raise ValueError(f"{len(done.tokens)} new tokens are too few to judge {N} heads by")
    stood = [[done.heads[j + depth] == 1 + depth for depth in range(1, N)] for j in pending]
    own, *guesses = agrees
    read = [start + j - 1 for j in pending]
    stands = torch.stack([x[read] for x in guesses], 1).long().cumprod(1).bool()
    return own[start - 1 :], torch.tensor(stood, device=stands.device), stands


def _agreements(logits: Tensor, text: Sequence[int], seed: int) -> list[Tensor]:
    """For each head whether what it chooses, with the noise of that place, is in the text."""
    T, N, _ = logits.shape
    noise = SAMPLING.noise(Place([seed], [1], T + N), logits, TARGET)
    assert noise is not None
    choices = [SAMPLING.scores(logits[:, i], noise[0, i : i + T]).argmax(-1) for i in range(N)]
    tokens = torch.tensor(text, device=logits.device)
    return [x[: T - 1 - i] == tokens[1 + i :] for i, x in enumerate(choices)]


def _copies(logits: Tensor) -> dict[int, int]:
    """Heads that predict what an earlier one does, and which."""
    return {
        i: j
        for i in range(logits.shape[1])
        for j in range(i)
        if torch.allclose(logits[:, i], logits[:, j])
    }


def _about_heads(right: Tensor, commonest: float, copies: dict[int, int]) -> Iterable[str]:
    hits = right.double().mean(0)
    for i, other in enumerate(hits.argmax(1).tolist()):
        own, better = float(hits[i, i]), float(hits[i, other])
        says = (
            f"head {i + 1} predicts the token {other + 1} ahead ({better:.0%}) better than its own"
        )
        if i in copies:
            yield f"head {i + 1} predicts the same as head {copies[i] + 1}: it is a copy"
        elif _surely_more(right[:, i, other], right[:, i, i]):
            if better == hits[:, other].max():
                yield f"{says}, {i + 1} ahead ({own:.0%}): the heads are in the wrong order"
            else:
                yield f"{says}, {i + 1} ahead ({own:.0%}), but worse than others: it is untrained"
        elif own <= commonest:
            yield (
                f"head {i + 1} is right about {own:.0%} of its tokens, no more than the commonest "
                f"token alone ({commonest:.0%}): it is untrained, or hardly trained"
            )


def _surely_more(one: Tensor, other: Tensor) -> bool:
    """one, other (P,): right or wrong at the same places."""
    more = one.double() - other.double()
    return bool(more.mean() > SURE * more.std() / len(more) ** 0.5)


def _about_caches(own: Tensor, decoded: Tensor, expected: Tensor, allowed: float) -> Iterable[str]:
    foreign = float((~own).double().mean())
    if foreign > allowed:
        yield (
            f"{foreign:.0%} of the decoded tokens are not head 1's choice when the text is read "
            f"without caches: a cache that the next token needs is stale, or a rule is wrong"
        )
    steps = float((decoded != expected).any(1).double().mean())
    if steps > allowed:
        yield (
            f"in {steps:.0%} of the steps other guesses stood than the heads make without "
            f"caches: a cache of the heads is stale"
        )
