"""Scores equal their definitions; intervals and comparisons behave as their names promise."""

import math
from itertools import combinations, product

import numpy as np
import pytest

from mtp.evaluate.scores import (
    best_temperature,
    common_subsequence,
    compare,
    interval,
    mcnemar,
    pass_at_k,
    pass_rates,
    pass_table,
    rouge_l,
    words,
)


def test_pass_at_k_is_the_share_of_subsets_with_a_pass():
    for n in range(1, 8):
        for c, k in product(range(n + 1), range(1, n + 1)):
            subsets = list(combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))


def test_pass_at_k_holds_for_many_samples():
    exact = 1 - math.comb(990, 100) / math.comb(1000, 100)
    assert pass_at_k(1000, 10, 100) == pytest.approx(exact)


@pytest.mark.parametrize("n, c, k", [(5, 1, 6), (5, 1, 0), (5, 6, 1), (5, -1, 1), (0, 0, 1)])
def test_what_samples_cannot_say_is_refused(n, c, k):
    with pytest.raises(ValueError, match="allowed"):
        pass_at_k(n, c, k)


def test_a_k_above_the_samples_is_reported_not_dropped():
    tally = {"a": (20, 3), "b": (10, 0), "c": (10, 10)}
    one, ten, many = pass_table(tally, [1, 10, 20])
    assert one["mean"] == pytest.approx((3 / 20 + 0 + 1) / 3)
    assert one["low"] <= one["mean"] <= one["high"] and "missing" not in ten
    assert many == {
        "k": 20,
        "missing": "pass@20 needs 20 samples of every problem: b has 10, and 1 more have too few",
    }
    with pytest.raises(ValueError, match="b has 10"):
        pass_rates(tally, 20)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    draws = np.random.default_rng(0).random((200, 60)) < 0.3
    found = [interval(row, resamples=400) for row in draws]
    covered = np.mean([low <= 0.3 <= high for _, low, high in found])
    assert 0.82 < covered < 0.96


def test_an_interval_of_zeros_and_ones_is_the_binomials():
    n, ones = 100, 30
    law = np.cumsum([math.comb(n, i) * 0.3**i * 0.7 ** (n - i) for i in range(n + 1)])
    exact = np.searchsorted(law, [0.05, 0.95]) / n
    assert interval([1.0] * ones + [0.0] * (n - ones))[1:] == pytest.approx(exact, abs=0.011)


def test_an_interval_is_repeatable_narrows_with_problems_and_needs_one():
    values = [0.0, 1.0] * 20
    assert interval(values) == interval(values)
    few, many = interval(values), interval(values * 9)
    assert many.high - many.low == pytest.approx((few.high - few.low) / 3, rel=0.2)
    assert interval([0.5] * 7)[1:] == (0.5, 0.5)
    with pytest.raises(ValueError, match="at least one problem"):
        interval([])


def test_pairs_show_what_two_separate_intervals_cannot():
    hard = np.random.default_rng(0).random(100)
    a = {str(i): x for i, x in enumerate(hard)}
    b = {str(i): x + 0.02 for i, x in enumerate(hard)}
    comparison = compare(a, b)
    assert comparison.difference.mean == pytest.approx(0.02)
    assert comparison.difference.low > 0 and comparison.better == 100
    assert interval(list(a.values())).high > interval(list(b.values())).low
    assert comparison.p is None


def test_greedy_pairs_have_mcnemars_test():
    a = dict(zip("abcdefghij", [1, 1, 1, 0, 0, 0, 0, 0, 0, 0], strict=True))
    b = dict(zip("abcdefghij", [1, 1, 0, 1, 1, 1, 1, 1, 1, 0], strict=True))
    comparison = compare(a, b)
    assert (comparison.better, comparison.worse) == (6, 1)
    outcomes = [sum(flips) for flips in product([0, 1], repeat=7)]
    as_uneven = np.mean([total <= 1 or total >= 6 for total in outcomes])
    assert comparison.p == pytest.approx(as_uneven)
    assert compare(b, a).p == comparison.p and compare(a, a).p == mcnemar(3, 3) == 1


def test_other_problems_are_no_comparison():
    with pytest.raises(ValueError, match="2 have a value of one model only, such as b"):
        compare({"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 0.0})


def test_the_best_temperature_is_the_lowest_of_equals():
    cells = {0.8: {"a": 1.0, "b": 0.0}, 0.2: {"a": 0.0, "b": 1.0}, 0.1: {"a": 0.0, "b": 0.5}}
    temperature, found = best_temperature(cells)
    assert temperature == 0.2 and found == interval([0.0, 1.0])


def longest(a, b):
    return max(
        len(x) for n in range(len(a) + 1) for x in combinations(a, n) if x in subsequences(b)
    )


def subsequences(b):
    return {x for n in range(len(b) + 1) for x in combinations(b, n)}


def test_rouge_l_is_by_the_longest_common_subsequence():
    random = np.random.default_rng(0)
    for _ in range(200):
        a, b = (random.integers(3, size=random.integers(1, 8)).tolist() for _ in range(2))
        common = longest(a, b)
        assert common_subsequence(a, b) == common
        precision, recall = common / len(a), common / len(b)
        f = 2 * precision * recall / (precision + recall) if common else 0
        assert rouge_l(a, b) == pytest.approx(f)


def test_rouge_l_of_nothing_is_nothing():
    assert rouge_l([], []) == rouge_l([], ["a"]) == 0


def test_words_are_of_any_script():
    assert words("The CAT_sat, äöü 42! سلام") == ["the", "cat", "sat", "äöü", "42", "سلام"]
