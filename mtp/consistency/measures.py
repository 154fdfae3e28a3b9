"""What trajectories say of a model, by the definitions of the consistency LLMs' own measurements.

States of a window are s = 0 .. S, S the fixed point y*. P_s is how many tokens from the left are
right, are those of y*, in state s; P_0 counts as 0. Of the last window only what belongs to the
response counts. The pass that would see that nothing changes any more has no state.

Fast-forwarded in state s: P_s - P_(s-1), what one pass adds to the right beginning. One token of
them is right anyway, given a right beginning (the free token): 1 is the least, for a model that
never jumps. A window whose first guess was right counts as one state.

Stationary: a token that is right longer than its place explains. It joins the right beginning in
some state j; going from left to right it would be right in the states j .. S. It is stationary if
it is right in more of the last states than these, before those on its left were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from mtp.consistency.trajectories import Trajectory

States = Sequence[Sequence[int]]  # of one window, cut to what counts


def counted(trajectory: Trajectory) -> list[States]:
    """The windows, the last one without what is behind the response."""
    n = len(trajectory.windows[0][0])
    return [
        [state[: trajectory.length - at * n] for state in states]
        for at, states in enumerate(trajectory.windows)
    ]


def right_beginnings(states: States) -> list[int]:
    """P_s of every state."""
    return [0, *(_common(state, states[-1]) for state in states[1:])]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    differ = (i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
    return next(differ, len(one))


def fast_forwarded(states: States) -> list[int]:
    """By state s = 1 .. S; their sum is the window's tokens.

    >>> fast_forwarded([[0, 0, 0, 0], [1, 0, 3, 0], [1, 2, 3, 0], [1, 2, 3, 4]])
    [1, 2, 1]
    """
    if len(states) == 1:
        return [len(states[0])]
    return [after - before for before, after in pairwise(right_beginnings(states))]


def joined(states: States) -> list[int]:
    """By token, the state in which it joined the right beginning.

    >>> joined([[0, 0, 0, 0], [1, 0, 3, 0], [1, 2, 3, 0], [1, 2, 3, 4]])
    [1, 2, 2, 3]
    """
    return [s for s, tokens in enumerate(fast_forwarded(states), 1) for _ in range(tokens)]


def stationary(states: States) -> list[bool]:
    """By token, whether it is stationary.

    >>> stationary([[0, 0, 0, 0], [1, 0, 3, 0], [1, 2, 3, 0], [1, 2, 3, 4]])
    [False, False, True, False]
    """
    last = max(1, len(states) - 1)
    runs = [_right_at_the_end([state[i] for state in states]) for i in range(len(states[0]))]
    return [run > last - j + 1 for run, j in zip(runs, joined(states), strict=True)]


def _right_at_the_end(column: Sequence[int]) -> int:
    """How many of the last states have the last one's token."""
    return _common([*reversed(column)], [column[-1]] * len(column))


def passes(states: States) -> int:
    """Of the model, until it is known that the last state is the fixed point. The last token of a
    window is, once all before it were read right: one pass less than comparing states needs.
    """
    only_last_was_missing = _common(states[-2:][0], states[-1]) == len(states[0]) - 1
    return len(states) - only_last_was_missing


@dataclass(frozen=True)
class Measures:
    """fast_forwarded: mean over states, then over windows, then over responses. stationary_*: mean
    tokens. convergence_steps: mean states of a window after the first guess. tokens_per_pass: all
    tokens over all passes, also those that only confirm.
    """

    responses: int
    windows: int
    fast_forwarded: float
    stationary_per_window: float
    stationary_per_response: float
    convergence_steps: float
    tokens_per_pass: float


def measure(trajectories: Iterable[Trajectory]) -> Measures:
    """ValueError: there are none."""
    every = [counted(trajectory) for trajectory in trajectories]
    windows = [states for of_one in every for states in of_one]
    if not windows:
        raise ValueError("no trajectories to measure")
    settled_early = [[sum(stationary(states)) for states in of_one] for of_one in every]
    return Measures(
        responses=len(every),
        windows=len(windows),
        fast_forwarded=fmean(
            fmean(fmean(fast_forwarded(states)) for states in of_one) for of_one in every
        ),
        stationary_per_window=fmean(count for of_one in settled_early for count in of_one),
        stationary_per_response=fmean(map(sum, settled_early)),
        convergence_steps=fmean(len(states) - 1 for states in windows),
        tokens_per_pass=sum(len(states[0]) for states in windows) / sum(map(passes, windows)),
    )


@dataclass(frozen=True)
class Collocation:
    """An n-gram of the responses: how often it comes within a window, and how often of these all of
    it was fast-forwarded in one pass.
    """

    tokens: tuple[int, ...]
    count: int
    fast_forwarded: int

    @property
    def share(self) -> float:
        return self.fast_forwarded / self.count


def collocations(trajectories: Iterable[Trajectory], n: int = 3) -> list[Collocation]:
    """Of n tokens each; those that were fast-forwarded most often come first, of these the rarest:
    they are what a model has learnt to say at once, more than its text is made of.
    """
    if n < 2:
        raise ValueError(f"n={n} must be at least 2: a single token is not fast-forwarded")
    every: Counter[tuple[int, ...]] = Counter()
    at_once: Counter[tuple[int, ...]] = Counter()
    for states in (states for trajectory in trajectories for states in counted(trajectory)):
        text, state_of = states[-1], joined(states)
        for i in range(len(text) - n + 1):
            every[tuple(text[i : i + n])] += 1
            at_once[tuple(text[i : i + n])] += state_of[i] == state_of[i + n - 1]
    rows = [Collocation(tokens, count, at_once[tokens]) for tokens, count in every.items()]
    return sorted(rows, key=lambda row: (-row.fast_forwarded, row.count, row.tokens))
