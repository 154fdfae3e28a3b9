"""Measures on states made by hand, and their sums on collected ones."""

import doctest

import pytest
import torch
from test_decode import NEW, some_requests, target

import mtp.consistency.measures
from mtp.consistency.measures import (
    Collocation,
    Measures,
    collocations,
    counted,
    fast_forwarded,
    joined,
    measure,
    passes,
    stationary,
)
from mtp.consistency.trajectories import Collection, Trajectory

FINAL = [1, 2, 3, 4]
# Token by token; all at once; the first guess is right; the last token right from the start.
PLODDING = [[9, 9, 9, 9], [1, 9, 9, 9], [1, 2, 9, 9], [1, 2, 3, 9], FINAL]
LEAPING = [[9, 9, 9, 9], FINAL]
GIVEN = [FINAL]
EARLY = [[9, 9, 9, 4], [1, 9, 9, 4], [1, 2, 9, 4], FINAL]
# The last token is right, then wrong again, then right from the left.
WAVERING = [[9, 9, 9, 4], [1, 9, 9, 4], [1, 2, 9, 9], [1, 2, 3, 9], FINAL]


@pytest.mark.parametrize(
    "states, added, joins, still, needed",
    [
        (PLODDING, [1, 1, 1, 1], [1, 2, 3, 4], [], 4),
        (LEAPING, [4], [1, 1, 1, 1], [], 2),
        (GIVEN, [4], [1, 1, 1, 1], [], 1),
        (EARLY, [1, 1, 2], [1, 2, 3, 3], [3], 4),
        (WAVERING, [1, 1, 1, 1], [1, 2, 3, 4], [], 4),
        ([[1, 9], [1, 2]], [2], [1, 1], [0], 1),  # P_0 counts as 0 where a guess was right
    ],
)
def test_measures_of_one_window(states, added, joins, still, needed):
    assert fast_forwarded(states) == added
    assert joined(states) == joins
    assert [i for i, found in enumerate(stationary(states)) if found] == still
    assert passes(states) == needed


def test_only_what_belongs_to_the_response_counts():
    trajectory = Trajectory([5], [PLODDING, [[9, 9, 9, 9], [1, 2, 8, 9], [1, 2, 8, 8]]], 6)
    assert counted(trajectory) == [PLODDING, [[9, 9], [1, 2], [1, 2]]]


def test_means_are_over_states_then_windows_then_responses():
    one = Trajectory([5], [PLODDING, LEAPING], 8)  # 1 and 4
    two = Trajectory([5], [EARLY], 4)  # 4/3
    assert measure([one, two]) == Measures(
        responses=2,
        windows=3,
        fast_forwarded=pytest.approx((2.5 + 4 / 3) / 2),
        stationary_per_window=pytest.approx(1 / 3),
        stationary_per_response=0.5,
        convergence_steps=pytest.approx((4 + 1 + 3) / 3),
        tokens_per_pass=pytest.approx(12 / (4 + 2 + 4)),
    )
    with pytest.raises(ValueError, match="no trajectories to measure"):
        measure([])


def test_collected_windows_add_up():
    """Fast-forwarded tokens to the text, and passes to those that were made."""
    model = target("transformer", torch.device("cpu"))
    collection = Collection(model, some_requests(stop=False), 5, batch_size=1)
    trajectories = list(collection)
    windows = [states for trajectory in trajectories for states in counted(trajectory)]
    assert all(sum(fast_forwarded(states)) == len(states[0]) for states in windows)
    assert sum(map(passes, windows)) == collection.passes
    assert measure(trajectories).tokens_per_pass == 7 * NEW / collection.passes


def test_collocations_come_in_one_pass_more_often_than_others():
    leap = Trajectory([5], [LEAPING, LEAPING, [[7, 7, 7, 7], [1, 2, 8, 9], [1, 2, 3, 4]]], 12)
    plod = Trajectory([5], [PLODDING], 4)
    rows = {row.tokens: row for row in collocations([leap, plod], n=2)}
    assert rows[1, 2] == Collocation((1, 2), 4, 3) and rows[1, 2].share == 0.75
    assert rows[2, 3] == Collocation((2, 3), 4, 2)
    assert rows[3, 4] == Collocation((3, 4), 4, 3)
    assert len(rows) == 3  # none across windows


def test_collocations_are_ordered_by_how_often_they_are_fast_forwarded_then_rarest_first():
    rare = Trajectory([5], [[[9, 9], [7, 8]]] * 2, 4)
    plain = [[9, 9], [1, 9], [1, 2]]
    common = Trajectory([5], [[[9, 9], [1, 2]]] * 2 + [plain] * 2, 8)
    other = Trajectory([5], [[[9, 9], [3, 4]]], 2)
    rows = collocations([common, other, rare], n=2)
    assert [(row.tokens, row.count, row.fast_forwarded) for row in rows] == [
        ((7, 8), 2, 2),
        ((1, 2), 4, 2),
        ((3, 4), 1, 1),
    ]
    with pytest.raises(ValueError, match="n=1 must be at least 2"):
        collocations([], n=1)


def test_the_examples_hold():
    assert doctest.testmod(mtp.consistency.measures).failed == 0
