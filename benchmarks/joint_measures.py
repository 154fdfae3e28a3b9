"""What `benchmarks.joint` measures of texts, and how a way to decode compares with the curve that
others span.

A way is a point: its loss (nats per token under the target, or what answers lack of a full score)
and its seconds per token; less is better of both. Who decodes some texts one way and the others
another way gets every point on the line between two, so the curve of several ways is their lower
convex hull, from the least loss to the least time; beyond either end it goes on level. (Of answers,
that line is straight if texts are equally long.)

Intervals are percentile bootstraps over prompts, which all ways share: each resample draws prompts
anew, for every point of the curve too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mtp.evaluate.scores import Interval

RESAMPLES = 4000
Rows = np.ndarray  # of prompts: (P,), or resampled (R, P)


@torch.inference_mode()
def text_nll(model: Any, prompt: Sequence[int], text: Sequence[int]) -> float:
    """Nats of the new tokens alone under the target's own law, before temperature and cuts. model:
    ids (1, T) -> logits (1, T, V).
    """
    rows = torch.tensor([[*prompt, *text]], device=model.embedding.weight.device)
    logp = model(rows)[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return -logp.gather(-1, rows[0, len(prompt) :, None]).sum().item()


def distinct(texts: Iterable[Sequence[int]], n: int) -> float:
    """Different n-grams in all the texts, over all n-grams in them (Li et al. 2016, distinct-n).

    >>> distinct([[1, 2, 1, 2], [1, 2]], 2)
    0.5
    """
    found = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(found)) / max(1, len(found))


class Measured(NamedTuple):
    """Of one way, over prompts, each (P,). loss: nats of the text, or what its answer lacks of
    a full score; weight: what to divide its sum by, tokens or 1 each.
    """

    loss: np.ndarray
    weight: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray

    def at(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Loss and seconds per token, of these prompts."""
        loss, weight, tokens, seconds = (x[rows].sum(-1) for x in self)
        return loss / weight, seconds / tokens

    @property
    def point(self) -> tuple[float, float]:
        loss, seconds = self.at(np.arange(len(self.loss)))
        return float(loss), float(seconds)


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Those that no other beats in one of loss and seconds and reaches in the other, the least loss
    first.

    >>> front({"a": (1.0, 5.0), "b": (2.0, 3.0), "c": (2.0, 4.0), "d": (3.0, 3.0)})
    ['a', 'b']
    """
    kept = [
        name
        for name, (loss, seconds) in points.items()
        if not any(
            x <= loss and y <= seconds and (x, y) != (loss, seconds) for x, y in points.values()
        )
    ]
    return sorted(kept, key=lambda name: points[name])


def curve(loss: Sequence[float], seconds: Sequence[float]) -> tuple[list[float], list[float]]:
    """The corners of the curve of these points, for `np.interp`.

    >>> curve([1.0, 3.0, 2.0, 2.0], [5.0, 1.0, 4.0, 2.0])
    ([1.0, 2.0, 3.0], [5.0, 2.0, 1.0])
    """
    corners: list[tuple[float, float]] = []
    for x, y in sorted(zip(loss, seconds, strict=True)):
        if corners and y >= corners[-1][1]:
            continue
        while len(corners) > 1 and _above(corners[-2], corners[-1], (x, y)):
            corners.pop()
        corners.append((x, y))
    return [x for x, _ in corners], [y for _, y in corners]


def _above(
    first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]
) -> bool:
    """Whether the middle point lies on or above the line from the first to the last."""
    (x, y), (x1, y1), (x2, y2) = first, middle, last
    return (y1 - y) * (x2 - x) >= (y2 - y) * (x1 - x)


def resampled(prompts: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).integers(prompts, size=(RESAMPLES, prompts))


def over_curve(
    exact: Sequence[Measured], others: Mapping[str, Measured], level: float
) -> dict[str, Interval]:
    """How many times as fast each of the others is as the curve of the exact ways at its own loss.
    level: of all the intervals together (Bonferroni).
    """
    draws = resampled(len(exact[0].loss))
    losses, times = (np.stack(x, -1) for x in zip(*(e.at(draws) for e in exact), strict=True))
    curves = [curve(x.tolist(), y.tolist()) for x, y in zip(losses, times, strict=True)]
    measured = curve(*zip(*(e.point for e in exact), strict=True))
    found = {}
    for name, other in others.items():
        loss, seconds = other.point
        ratio = float(np.interp(loss, *measured)) / seconds
        some = zip(*other.at(draws), curves, strict=True)
        ratios = np.array([np.interp(x, *corners) / y for x, y, corners in some])
        found[name] = _interval(ratio, ratios, 1 - (1 - level) / len(others))
    return found


class Against(NamedTuple):
    """One way against another on the same prompts: its loss less the other's, and how many times
    as fast it is.
    """

    loss: Interval
    speed: Interval


def against(one: Measured, other: Measured, level: float) -> Against:
    draws = resampled(len(one.loss))
    (loss, seconds), (loss0, seconds0) = one.at(draws), other.at(draws)
    (x, y), (x0, y0) = one.point, other.point
    return Against(
        _interval(x - x0, loss - loss0, level), _interval(y0 / y, seconds0 / seconds, level)
    )


def _interval(value: float, draws: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def compared(
    exact: Mapping[str, Measured], joint: Mapping[str, Measured], level: float = 0.95
) -> dict[str, Any]:
    """Where joint ways lie above the curve of exact ones, and the fastest of those that lose
    nothing against the fastest exact way: both are chosen here, so that their interval flatters.

    above: surely faster than the curve at their own loss. beyond: less loss than any exact way;
    they are held against the curve's end.
    """
    over = over_curve(list(exact.values()), joint, level)
    least = min(way.point[0] for way in exact.values())
    best = min(exact, key=lambda name: exact[name].point[::-1])
    no_worse = [name for name, way in joint.items() if way.point[0] <= exact[best].point[0]]
    chosen = min(no_worse, key=lambda name: joint[name].point[1], default=None)
    pair = None if chosen is None else against(joint[chosen], exact[best], level)
    return {
        "over_curve": {name: found._asdict() for name, found in over.items()},
        "above": [name for name, found in over.items() if found.low > 1],
        "beyond": [name for name, way in joint.items() if way.point[0] < least],
        "best_exact": best,
        "best_joint": chosen,
        "best_joint_against_best_exact": pair
        and {key: value._asdict() for key, value in pair._asdict().items()},
    }


def perplexity(way: Measured) -> float:
    """Of a way whose loss is in nats."""
    return math.exp(way.point[0])
