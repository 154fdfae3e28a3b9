"""Multi-token joint decoding (Qin et al. 2025, MTJD): the next tokens as one choice, by their joint
probability. `block_law` is the ideal; drafter=beam with rule=joint (MTAD) comes near it at the cost
of an ordinary step, and `calibrate` finds how low its threshold may be.

Token by token, sampling at temperature 1 draws from the joint law already: a gain in perplexity
comes from seeking its modes, as greedy decoding does too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

import torch

from mtp.decode.contract import Completion, Drafter, Request
from mtp.decode.loop import generate
from mtp.decode.sampling import Sampling

MOST_BLOCKS = 10**6  # that are enumerated
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
DOUBT = 0.05  # how probable a setting may be that breaks its budget, by the texts it was tried on

Loss = Callable[[Request, Completion], float]


@torch.no_grad()
def block_law(
    model: Any,
    text: Sequence[int],
    length: int,
    temperature: float = 1.0,
    width: int | None = None,
) -> dict[tuple[int, ...], float]:
    """The law of the `length` tokens after `text`, proportional to p(block) ** (1 / temperature),
    the most probable block first, which is the only one at temperature 0.

    width: a beam search over the target, of so many beginnings at each length, in place of all V **
    length blocks. ValueError if those are too many.
    """
    paths: list[tuple[int, ...]] = [()]
    vocabulary, device = model.config.vocab_size, model.embedding.weight.device
    if width is None and vocabulary**length > MOST_BLOCKS:
        raise ValueError(
            f"width=None enumerates {vocabulary} ** {length} blocks, more than {MOST_BLOCKS}: "
            f"give the width of a beam"
        )
    joint = torch.zeros(1, dtype=torch.double)
    for _ in range(length):
        rows = torch.tensor([[*text, *path] for path in paths], device=device)
        logp = model(rows)[:, -1].cpu().double().log_softmax(-1)
        grown = (joint[:, None] + logp).flatten()
        joint, at = grown.topk(min(width or len(grown), len(grown)))
        paths = [(*paths[i // vocabulary], i % vocabulary) for i in at.tolist()]
    if temperature == 0:
        return {paths[0]: 1.0}
    return dict(zip(paths, (joint / temperature).softmax(0).tolist(), strict=True))


class Rise(NamedTuple):
    """How much greater the loss is than without drafts: mean over texts, and its standard error;
    tokens per pass of the target.
    """

    mean: float
    error: float
    pace: float


@dataclass
class Calibrated:
    """found: on the texts that chose this drafter and threshold; checked: on others."""

    drafter: Drafter
    threshold: float
    budget: float
    found: Rise
    checked: Rise

    @property
    def kept(self) -> bool:
        return self.checked.mean <= self.budget


def nll(request: Request, completion: Completion) -> float:
    """Nats per token under the target's own law: 0.05 more are 5 % more perplexity."""
    return -fmean(completion.logprobs)


def calibrate(
    model: Any,
    requests: Sequence[Request],
    others: Sequence[Request],
    drafters: Sequence[Drafter],
    sampling: Sampling,
    budget: float,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    loss: Loss = nll,
    batch_size: int = 8,
) -> Calibrated:
    """Of all drafters (of several widths and depths, say) and thresholds the pair with the most
    tokens per pass whose mean loss is at most `budget` above that of decoding without drafts, under
    the same sampling. It is so with 95 % confidence, however many pairs are tried, as far as means
    of so many texts are normal; `others` check it. loss: of a text, whose completion has its
    logprobs; less is better.

    ValueError: fewer than two texts, or no pair keeps to the budget.
    """
    if min(len(requests), len(others)) < 2:
        raise ValueError("requests and others: a standard error needs two texts of each at least")

    settings: dict[str, Any] = {"batch_size": batch_size, "logprobs": True}

    def losses(texts: Sequence[Request], done: Sequence[Completion]) -> list[float]:
        return [loss(request, text) for request, text in zip(texts, done, strict=True)]

    def rise(texts: Sequence[Request], plain: list[float], pair: tuple[Drafter, float]) -> Rise:
        drafter, threshold = pair
        done = generate(
            model, texts, drafter, sampling, rule="joint", threshold=threshold, **settings
        )
        more = [x - p for x, p in zip(losses(texts, done), plain, strict=True)]
        steps = max(1, sum(text.steps for text in done))
        pace = 1 + sum(sum(text.accepted) for text in done) / steps
        return Rise(fmean(more), stdev(more) / len(more) ** 0.5, pace)

    plain, checking = (
        losses(texts, generate(model, texts, None, sampling, **settings))
        for texts in (requests, others)
    )
    pairs = list(product(drafters, thresholds))
    rises = [rise(requests, plain, pair) for pair in pairs]
    sure = NormalDist().inv_cdf(1 - DOUBT / len(pairs))  # Bonferroni
    most = [found.mean + sure * found.error for found in rises]
    fit = [i for i, x in enumerate(most) if x <= budget]
    if not fit:
        raise ValueError(
            f"budget={budget}: of {len(pairs)} pairs none keeps to it for sure, and the best may "
            f"lose {min(most):.3g}; allow more, give more requests, or use rule=block, which loses "
            f"nothing"
        )
    best = max(fit, key=lambda i: rises[i].pace)
    return Calibrated(*pairs[best], budget, rises[best], rise(others, checking, pairs[best]))
