"""Scores and how sure they are: pass@k, bootstrap intervals, paired comparisons, ROUGE-L.

Everything is over problems: with 164 of them and half solved, one standard error is 3.9 points,
however many samples each has. Of two models on the same problems ask `compare`, which sees that
hard problems are hard for both.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Tally = Mapping[str, tuple[int, int]]  # problem -> samples, how many of them passed
Rates = Mapping[str, float]  # problem -> a value, such as its pass@k


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold one of the c that passed.

    The unbiased estimator of Chen et al. 2021, 1 - C(n - c, k) / C(n, k), as a product that does
    not overflow. ValueError where k > n: the samples cannot say.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: allowed: 1 to {n}, the number of samples")
    if not 0 <= c <= n:
        raise ValueError(f"c={c}: allowed: 0 to {n}, the number of samples")
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def pass_rates(tally: Tally, k: int) -> dict[str, float]:
    """pass@k of every problem. ValueError names the problems with fewer than k samples."""
    short = [task for task, (n, _) in tally.items() if n < k]
    if short:
        raise ValueError(
            f"pass@{k} needs {k} samples of every problem: {short[0]} has {tally[short[0]][0]}"
            + (f", and {len(short) - 1} more have too few" if len(short) > 1 else "")
        )
    return {task: pass_at_k(n, c, k) for task, (n, c) in tally.items()}


def pass_table(tally: Tally, ks: Iterable[int]) -> list[dict[str, Any]]:
    """A line for every k: mean and 90 % interval, or "missing", which says why there is none."""
    lines: list[dict[str, Any]] = []
    for k in ks:
        try:
            lines.append({"k": k, **interval(list(pass_rates(tally, k).values()))._asdict()})
        except ValueError as error:
            lines.append({"k": k, "missing": str(error)})
    return lines


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def interval(
    values: Sequence[float], level: float = 0.9, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean: problems are drawn again, with replacement."""
    x = np.asarray(values, dtype=float)
    if not len(x):
        raise ValueError("no values: an interval needs at least one problem")
    draw = np.random.default_rng(seed).integers
    means = [x[draw(len(x), size=len(x))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high))


def over_seeds(values: Sequence[float], level: float = 0.9) -> Interval:
    """Student's interval of the mean over runs that differ in their seed; it is wide for few, as it
    should be. Not for problems, whose values are 0 or 1.
    """
    x, runs = np.asarray(values, dtype=float), len(values)
    if runs < 2:
        raise ValueError(f"{runs} runs: an interval over seeds needs at least 2")
    # With t = sqrt(runs - 1) tan(angle), the density of the angle is a power of its cosine.
    angle = np.linspace(0, math.pi / 2, 200_001)
    share = np.cumsum(np.cos(angle) ** (runs - 2))
    t = math.sqrt(runs - 1) * math.tan(float(np.interp(level, share / share[-1], angle)))
    half = t * float(x.std(ddof=1)) / math.sqrt(runs)
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


class Comparison(NamedTuple):
    """b less a. better, worse: on how many problems b is. p: McNemar's exact test, two-sided, where
    all values are 0 or 1, as greedy pass@1 is.
    """

    difference: Interval
    better: int
    worse: int
    p: float | None


def compare(a: Rates, b: Rates, level: float = 0.9) -> Comparison:
    """Two models on the same problems, by a bootstrap of the difference, which keeps the pairs."""
    if apart := sorted(a.keys() ^ b.keys()):
        raise ValueError(
            f"a comparison needs the same problems: {len(apart)} have a value of one model only, "
            f"such as {apart[0]}"
        )
    difference = np.array([b[task] - a[task] for task in a])
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    exact = {*a.values(), *b.values()} <= {0, 1}
    p = mcnemar(better, worse) if exact else None
    return Comparison(interval(difference.tolist(), level), better, worse, p)


def mcnemar(better: int, worse: int) -> float:
    """The chance of a split at least as uneven, if each problem that only one model solves were
    either's with equal chance.
    """
    n = better + worse
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)


def best_temperature(cells: Mapping[float, Rates]) -> tuple[float, Interval]:
    """The temperature with the highest mean, the lowest of equals, and that mean.

    It is chosen on the problems that it is scored on, as papers do for every model and k: too
    high by that choice, the interval too. Report it apart from fixed temperatures.
    """
    best = max(sorted(cells), key=lambda t: np.mean(list(cells[t].values())))
    return best, interval(list(cells[best].values()))


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script, in lower case.

    The widespread `rouge_score` keeps ASCII only, and finds no words in Persian or Thai.
    """
    return re.findall(r"[^\W_]+", text.lower())


def rouge_l(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """ROUGE-L, F-measure (Lin 2004, beta = 1): by the longest common subsequence of tokens.

    >>> rouge_l("the cat sat".split(), "the black cat".split())
    0.6666666666666666
    """
    total = len(candidate) + len(reference)
    return 2 * common_subsequence(candidate, reference) / total if total else 0.0


def common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest one, by Hyyro's bit vectors (2004): a row of the table is one number,
    whose bit i is 0 where the length grows at a[i].
    """
    places: dict[Hashable, int] = defaultdict(int)
    for i, token in enumerate(a):
        places[token] |= 1 << i
    every = row = (1 << len(a)) - 1
    for token in b:
        met = row & places[token]
        row = ((row + met) | (row - met)) & every
    return len(a) - row.bit_count()
