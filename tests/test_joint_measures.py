"""What the benchmark of joint decoding measures is what plain sums say, and its curve is what exact
ways reach.
"""

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import tiny

import benchmarks.joint_measures
from benchmarks.joint_measures import (
    Measured,
    against,
    compared,
    curve,
    distinct,
    front,
    over_curve,
    perplexity,
    text_nll,
)

PROMPT = [3, 1, 4, 1, 5]


# Measures.


def test_the_examples_hold():
    assert doctest.testmod(benchmarks.joint_measures).failed == 0


@torch.inference_mode()
def test_perplexity_is_that_of_the_new_tokens_one_by_one():
    model, texts = tiny(gain=2.0), [[9, 2, 6], [5, 3, 5, 8]]
    nats, tokens = [], 0
    for text in texts:
        known, nll = list(PROMPT), 0.0
        for token in text:
            nll -= model(torch.tensor([known]))[0, -1].softmax(-1)[token].log().item()
            known.append(token)
        assert text_nll(model, PROMPT, text) == pytest.approx(nll)
        nats.append(nll)
        tokens += len(text)
    way = measured(nats, [1.0, 1.0], tokens=[3, 4])
    assert perplexity(way) == pytest.approx(math.exp(sum(nats) / tokens))


def test_distinct_counts_over_all_texts_and_across_none():
    texts = [[1, 2, 3], [1, 2], [7]]
    assert distinct(texts, 1) == 4 / 6
    assert distinct(texts, 2) == 2 / 3
    assert distinct(texts, 3) == 1 and distinct(texts, 4) == 0


# Points and curves.


def measured(nats, seconds, tokens=None):
    """Texts of ten tokens if nothing else is said."""
    tokens = np.array(tokens or [10] * len(nats), dtype=float)
    return Measured(np.array(nats, dtype=float), tokens, tokens, np.array(seconds, dtype=float))


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = {str(i): tuple(x) for i, x in enumerate(rng.integers(6, size=(30, 2)).tolist())}

    def beaten(point):
        return any(
            other != point and other[0] <= point[0] and other[1] <= point[1]
            for other in points.values()
        )

    found = front(points)
    assert {*found} == {name for name, point in points.items() if not beaten(point)}
    assert [points[name] for name in found] == sorted(points[name] for name in found)


@pytest.mark.parametrize("seed", range(6))
def test_the_curve_is_the_best_mixture_of_two_points(seed):
    points = np.random.default_rng(seed).random((12, 2)) ** 2  # many near the corner
    corners = curve(*points.T.tolist())
    for loss in np.linspace(-0.2, 1.2, 29):
        times = [y for x, y in points if x <= loss]
        for (x, y), (x1, y1) in itertools.permutations(points, 2):
            if x <= loss <= x1:
                times.append(y + (y1 - y) * (loss - x) / (x1 - x))
        wanted = min(times) if times else min(points.tolist())[1]  # level before the least loss
        assert np.interp(loss, *corners) == pytest.approx(wanted)


def test_half_the_texts_each_way_lie_on_the_curve():
    slow, fast = measured([5, 5], [8, 8]), measured([15, 15], [2, 2])
    half = measured([5, 15], [8, 2])
    assert half.point == (1.0, 0.5)
    assert over_curve([slow, fast], {"half": half}, 0.9)["half"].mean == pytest.approx(1)


def test_a_way_is_held_against_the_curve_at_its_own_loss():
    exact = [measured([10] * 4, [4] * 4), measured([20] * 4, [2] * 4)]
    others = {
        "on it": measured([15] * 4, [3] * 4),
        "above": measured([15] * 4, [1.5] * 4),
        "below": measured([15] * 4, [6] * 4),
        "worse than all, faster": measured([40] * 4, [1] * 4),
        "better than all, slower": measured([5] * 4, [8] * 4),
    }
    found = {name: x.mean for name, x in over_curve(exact, others, 0.95).items()}
    assert found == pytest.approx(dict(zip(others, [1, 2, 0.5, 2, 0.5], strict=True)))


def noisy(seed, loss, seconds, prompts=40):
    """Prompts that are hard are hard for all, and slow for all."""
    own, shared = np.random.default_rng(seed), np.random.default_rng(0)
    hard, slow = shared.lognormal(0, 1, (2, prompts))
    return measured(
        10 * loss * hard * own.lognormal(0, 0.05, prompts),
        seconds * slow * own.lognormal(0, 0.05, prompts),
        [10] * prompts,
    )


def test_intervals_keep_the_pairs_and_widen_with_the_number_of_ways():
    exact, other = noisy(1, 1.0, 1.0), noisy(2, 1.0, 0.8)
    (found,) = over_curve([exact], {"a": other}, 0.95).values()
    assert found.low < 1.25 < found.high and found.low > 1.15  # alone, it is known to 0.3
    many = over_curve([exact], {name: other for name in "abcdefgh"}, 0.95)["a"]
    assert many.low < found.low and many.high > found.high
    pair = against(other, exact, 0.95)
    assert pair.loss.low < 0 < pair.loss.high and pair.speed.low > 1.15
    same = against(exact, exact, 0.95)
    assert same.loss == (0, 0, 0) and same.speed == (1, 1, 1)


def test_joint_ways_are_compared_with_the_fastest_exact_way():
    exact = {"greedy": noisy(1, 1.0, 2.0), "hot": noisy(2, 2.0, 1.0), "slow": noisy(3, 2.0, 4.0)}
    joint = {
        "above": noisy(4, 1.5, 1.0),
        "below": noisy(5, 1.5, 3.0),
        "worse": noisy(6, 3.0, 0.5),
        "beyond": noisy(7, 0.5, 3.0),
        "unsure": noisy(8, 1.5, 1.47),
    }
    found = compared(exact, joint)
    unsure = found["over_curve"]["unsure"]
    assert unsure["low"] < 1 < unsure["mean"]
    assert found["above"] == ["above", "worse"] and found["beyond"] == ["beyond"]
    assert (found["best_exact"], found["best_joint"]) == ("hot", "above")
    assert found["best_joint_against_best_exact"]["loss"]["high"] < 0
    lost = compared(exact, {"worse": joint["worse"]})
    assert lost["best_joint"] is lost["best_joint_against_best_exact"] is None
    assert lost["above"] == ["worse"]
