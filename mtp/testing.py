"""Exactness checks that anyone can run on any decoder: it is a function from token ids to token
ids, and the reference one from token ids to logits. Nothing here knows a model, a drafter or a
library.

    decode = lambda prompt: generate(model, [Request(prompt, 64)], drafter)[0].tokens
    logits = lambda text: model(torch.tensor([text]))[0]
    assert_lossless(decode, logits, prompts)

Letters: T tokens of a text, V vocabulary, O outcomes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 5.0  # draws that a class of a chi-square test should expect


@dataclass
class Lossless:
    """What `assert_lossless` looked at. near_ties: tokens that are not the best one but within the
    bound; widest: the largest gap among them.
    """

    tokens: int = 0
    near_ties: int = 0
    widest: float = 0.0


def assert_lossless(
    decode: Callable[[list[int]], Sequence[int]],
    logits: Callable[[list[int]], Tensor],
    prompts: Iterable[Sequence[int]],
    near_tie: float = 0.0,
) -> Lossless:
    """Every new token is the reference's own greedy choice, given all the text before it.

    decode(prompt) -> the new tokens alone. logits(text of T tokens) -> (T, V), row t for the token
    after text[t]; for sampled text of known noise, what the sampler takes the argmax of. near_tie:
    how far below the best a token may lie, in units of logits. fp32 and fp64 want 0 or a little
    rounding; bf16 the rounding of its logits. AssertionError says which token of which prompt.
    """
    seen = Lossless()
    for number, prompt in enumerate(prompts):
        new = [int(token) for token in decode(list(prompt))]
        if not new:
            raise AssertionError(f"prompt {number}: nothing was decoded")
        scores = logits([*prompt, *new[:-1]])[len(prompt) - 1 :].cpu().double()
        for place, (token, row) in enumerate(zip(new, scores, strict=True)):
            where = f"prompt {number}, new token {place} (position {len(prompt) + place})"
            if not 0 <= token < len(row):
                raise AssertionError(f"{where}: {token} is not in the vocabulary")
            best = int(row.argmax())
            gap = float(row[best] - row[token])  # nan where the reference is
            if not gap <= near_tie:
                raise AssertionError(
                    f"{where}: {token} came, but the reference's choice is {best}, better by "
                    f"{gap:.3g}; near-ties may be {near_tie:.3g} apart"
                )
            seen.tokens += 1
            seen.near_ties += token != best
            seen.widest = max(seen.widest, gap)
    return seen


Law = Mapping[tuple[int, ...], float]


def law_of_texts(
    probs: Callable[[list[int]], Tensor], prompt: Sequence[int], length: int
) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of `length` tokens, by enumeration: V ** length of
    them. probs(text) -> (V,), of the token after it, with temperature and cuts.
    """
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        law = {
            (*text, token): mass * p
            for text, mass in law.items()
            if mass > 0
            for token, p in enumerate(probs([*prompt, *text]).tolist())
        }
    return law


def assert_law(
    sample: Callable[[int], Sequence[int]],
    law: Law,
    draws: int = 2000,
    false_alarm: float = 1e-4,
) -> float:
    """sample(seed), for seeds 0 .. draws - 1, follows `law`; -> p-value of the chi-square test.

    Outcomes that the law forbids or does not know fail at once. A correct sampler whose seeds are
    independent fails in about a share `false_alarm` of all choices of its noise.
    """
    total = math.fsum(law.values())
    if abs(total - 1) > 1e-4:
        raise ValueError(f"law: its probabilities add up to {total}, which must be 1")
    counts = Counter(tuple(int(token) for token in sample(seed)) for seed in range(draws))
    impossible = [text for text in counts if law.get(text, 0.0) <= 0]
    if impossible:
        text = impossible[0]
        raise AssertionError(f"{text} came up {counts[text]} times; it never should")
    came = torch.tensor([counts[text] for text in law])
    p = p_value(came, torch.tensor([*law.values()], dtype=torch.float64))
    if p <= false_alarm:
        raise AssertionError(
            f"{draws} draws do not follow the law: by chance they are as far from it with "
            f"probability {p:.1g}, and {false_alarm:.1g} counts as an error; "
            f"{_farthest(counts, law, draws)}"
        )
    return p


def _farthest(counts: Counter[tuple[int, ...]], law: Law, draws: int) -> str:
    """The outcome that speaks most against the law, in words."""

    def distance(text: tuple[int, ...]) -> float:
        expected = draws * law[text]
        return (counts[text] - expected) ** 2 / max(expected, LEAST)

    text = max(law, key=distance)
    return f"{text} came up {counts[text]} times, where {draws * law[text]:.1f} were expected"


def p_value(counts: Tensor, law: Tensor) -> float:
    """Pearson's chi-square of counts (O,): how often a sampler of `law` (O,) comes as far from it,
    or farther. The rarest outcomes are one class, which expects 5 draws; forbidden ones give 0.
    """
    law = law.double() / law.sum()
    if counts[law <= 0].any():
        return 0.0
    expected, order = (law * counts.sum())[law > 0].sort()
    came = counts[law > 0][order].double()
    if len(came) > 1:
        came, expected = _pooled(came, expected)
        if len(came) < 2:
            raise ValueError(f"{int(counts.sum())} draws are too few to tell two outcomes apart")
    statistic = ((came - expected).square() / expected).sum()
    freedom = max(1, len(came) - 1)
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), statistic / 2))


def _pooled(came: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the first classes, in ascending order of `expected`, until all expect enough."""
    rare = int((expected < LEAST).sum())
    enough = int((expected.cumsum(0) < LEAST).sum()) + 1
    first = max(rare, enough)
    came, expected = (torch.cat([x[:first].sum()[None], x[first:]]) for x in (came, expected))
    return came, expected
