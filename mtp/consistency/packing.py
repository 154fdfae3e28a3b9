"""Trajectories -> packed rows: all windows of a response in one forward pass.

    [prompt] [state of window 0] [fixed point 0] [state of window 1] [fixed point 1] ...

Several states of a window may stand in a row, each seen by itself alone; what a teacher reads and
is no fixed point (local consistency) stands behind its student.

A state sees the prompt, the fixed points before it and itself, and stands at the positions of its
fixed point; fixed points do not see states. So each window's numbers are those of a pass over it
alone.

Letters: B rows, T columns of a packed row, M scored columns of states, K predicted response tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp.consistency.on_policy import OnPolicy
from mtp.consistency.trajectories import Trajectory, augmented
from mtp.data import check_identity
from mtp.decode.contract import Layout

KINDS = ("global", "local")
TOO_LONG, ONE_STATE = "responses that are too long", "windows of one state"
PADDING = -1  # a branch of its own
MULTIPLE = 64  # row lengths are rounded up to it: few shapes to compile for


class PackedRows(NamedTuple):
    """row (B, T+1): ids. position (B, T). branch (B, T): 0 for prompt and fixed points, which all
    later columns see; other numbers are seen by their own alone.

    Places count through the (B * T) columns: student and teacher (M,) are compared, label (M,) is
    the fixed point's token there; clean (K,) predict target (K,), the response.
    """

    row: Tensor
    position: Tensor
    branch: Tensor
    student: Tensor
    teacher: Tensor
    label: Tensor
    clean: Tensor
    target: Tensor

    def to(self, device: torch.device | str) -> PackedRows:
        return PackedRows(*(x.to(device, non_blocking=True) for x in self))

    def layout(self) -> Layout:
        B, T = self.branch.shape
        earlier = torch.ones(T, T, dtype=torch.bool, device=self.branch.device).tril()
        own = self.branch[:, :, None] == self.branch[:, None, :]
        seen = earlier & (own | (self.branch == 0)[:, None, :])
        where = torch.arange(B * T, device=self.branch.device)
        return Layout(slice(0, B), where, self.position, seen[:, None], T)


class _Row:
    """One packed row while it is written; places are columns."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.position: list[int] = []
        self.branch: list[int] = []
        self.student: list[int] = []
        self.teacher: list[int] = []
        self.label: list[int] = []
        self.clean: list[int] = []
        self.target: list[int] = []

    def add(self, ids: Sequence[int], position: int, branch: int) -> range:
        """-> the new columns."""
        start = len(self.ids)
        self.ids += ids
        self.position += range(position, position + len(ids))
        self.branch += [branch] * len(ids)
        return range(start, len(self.ids))


def _pack(trajectory: Trajectory, chosen: Sequence[Sequence[int]], kind: str) -> _Row:
    """With the states chosen[w] of window w."""
    row, end = _Row(), len(trajectory.prompt) + trajectory.length
    clean = [*row.add(trajectory.prompt, 0, branch=0)]
    branch = count(1)
    for states, some in zip(trajectory.windows, chosen, strict=True):
        fixed, position = states[-1], len(clean)
        pairs = []
        for j in some:
            student = row.add(states[j], position, next(branch))
            next_state = states[j + 1] if kind == "local" else fixed
            own = next_state != fixed  # else the teacher's columns are there anyway
            pairs.append((student, row.add(next_state, position, next(branch)) if own else None))
        columns = row.add(fixed, position, branch=0)
        clean += columns
        for j, (student, teacher) in zip(some, pairs, strict=True):
            places = scored(states[j], fixed, end - position)
            row.student += (student[i] for i in places)
            row.teacher += ((teacher or columns)[i] for i in places)
            row.label += (fixed[i + 1] for i in places)
    start = max(len(trajectory.prompt), 1)  # nothing predicts the first token of all
    row.clean = clean[start - 1 : end - 1]
    row.target = [row.ids[column] for column in clean[start:end]]
    return row


def scored(state: Sequence[int], fixed: Sequence[int], length: int) -> range:
    """Places in a window whose predictions are compared, if `length` of its tokens count: of those
    that predict a token of the window, from the first that predicts a wrong one on.

    That first one's own prefix is right, so that its gradient is zero.

    >>> scored([5, 6, 9, 9], [5, 6, 7, 8], 4), scored([5, 6, 9, 9], [5, 6, 7, 8], 3)
    (range(1, 3), range(1, 2))
    """
    pairs = enumerate(zip(state, fixed, strict=True))
    first = next((i for i, (a, b) in pairs if a != b), len(fixed))
    return range(max(first - 1, 0), min(len(fixed), length) - 1)


def _join(rows: Sequence[_Row]) -> PackedRows:
    T = -(-max(len(row.ids) for row in rows) // MULTIPLE) * MULTIPLE

    def padded(lists: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([x + [value] * (T - len(x)) for x in lists])

    def flat(lists: Iterable[list[int]], stride: int) -> Tensor:
        values = [b * stride + x for b, one in enumerate(lists) for x in one]
        return torch.tensor(values, dtype=torch.long)

    return PackedRows(
        row=F.pad(padded((row.ids for row in rows), 0), (0, 1)),
        position=padded((row.position for row in rows), 0),
        branch=padded((row.branch for row in rows), PADDING),
        student=flat((row.student for row in rows), T),
        teacher=flat((row.teacher for row in rows), T),
        label=flat((row.label for row in rows), 0),
        clean=flat((row.clean for row in rows), T),
        target=flat((row.target for row in rows), 0),
    )


class TrajectoryBatches:
    """Endless batches of B packed responses, in an order that depends on (seed, epoch) alone. Each
    epoch draws `states` of each window, any but the fixed point: more share a prompt's cost.

    What does not fit is skipped and counted in `skipped`: responses whose row could be longer than
    max_columns or whose text is longer than max_positions, and windows that are only a fixed point,
    which keep their cross-entropy. Ranks partition each global batch as `mtp.data.Batches` does.
    ValueError if no response fits.

    augment: states are read with some wrong tokens put right, others in each epoch, see
    `augmented`. refresh, for on-policy training: makes new trajectories. Before every
    `refresh_every`-th batch as many are drawn as it has rows, and those that fit take the places of
    the oldest; they are part of the state, and `refreshed` counts them.
    """

    def __init__(
        self,
        trajectories: Iterable[Trajectory],
        batch_size: int,
        max_columns: int,
        max_positions: int,
        kind: str = "global",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        states: int = 1,
        *,
        augment: bool = False,
        refresh: OnPolicy | None = None,
        refresh_every: int = 1,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is unknown: allowed are {', '.join(KINDS)}")
        self.skipped: Counter[str] = Counter()
        self.refreshed = 0
        self._kind, self._batch_size, self._seed = kind, batch_size, seed
        self._max_columns, self._max_positions = max_columns, max_positions
        self._rank, self._world_size = rank, world_size
        self._states, self._augment = states, augment
        self._refresh, self._refresh_every = refresh, refresh_every
        self._pool = list(self._fitting(trajectories))
        if not self._pool:
            raise ValueError(
                f"trajectories: of {self.skipped[TOO_LONG]} none fits in rows of {max_columns} "
                f"columns and texts of {max_positions} tokens"
            )
        self.fingerprint = _fingerprint(self._pool)
        self._identity = {"trajectories": self.fingerprint, "kind": kind, "seed": seed}
        # None where nothing is said, as in what runs saved before there was a choice.
        several = states if states > 1 else None
        self._identity |= {"states": several, "augment": augment or None}
        self._row = 0

    def __len__(self) -> int:
        """Responses of an epoch."""
        return len(self._pool)

    def __iter__(self) -> TrajectoryBatches:
        return self

    def __next__(self) -> PackedRows:
        self._draw_anew()
        first = self._row + self._rank * self._batch_size
        self._row += self._world_size * self._batch_size
        numbers = range(first, first + self._batch_size)
        return _join([self._draw(number) for number in numbers])

    def state_dict(self) -> dict[str, Any]:
        pool, drawn = None, 0
        if self._refresh:
            pool, drawn = [asdict(trajectory) for trajectory in self._pool], self._refresh.drawn
        counts = {"row": self._row, "refreshed": self.refreshed, "drawn": drawn}
        return {**counts, "pool": pool, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_identity(state, self._identity)
        self._row, self.refreshed = state["row"], state["refreshed"]
        if state["pool"] is not None:
            self._pool = [Trajectory(**trajectory) for trajectory in state["pool"]]
        if self._refresh:
            self._refresh.drawn = state.get("drawn", 0)  # not said where there was no refreshing

    def _draw(self, number: int) -> _Row:
        epoch, place = divmod(number, len(self._pool))
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._pool))
        trajectory = self._pool[order[place]]
        random = np.random.default_rng([self._seed, epoch, place])
        guesses = [len(states) - 1 for states in trajectory.windows]
        chosen = [random.choice(n, min(n, self._states), False).tolist() for n in guesses]
        if self._augment:
            trajectory = augmented(trajectory, int(random.integers(2**32)))
        return _pack(trajectory, chosen, self._kind)

    def _draw_anew(self) -> None:
        number = self._row // (self._world_size * self._batch_size) + 1
        if self._refresh is None or number % self._refresh_every:
            return
        for new in self._fitting(self._refresh.draw(self._batch_size)):
            self._pool[self.refreshed % len(self._pool)] = new
            self.refreshed += 1

    def _fitting(self, trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
        """Those whose rows are never too long; counts what is skipped."""
        branches = 1 + self._states * {"global": 1, "local": 2}[self._kind]
        for trajectory in trajectories:
            response = sum(len(states[-1]) for states in trajectory.windows)
            text, columns = (len(trajectory.prompt) + k * response for k in (1, branches))
            if columns > self._max_columns or text > self._max_positions:
                self.skipped[TOO_LONG] += 1
                continue
            self.skipped[ONE_STATE] += sum(len(states) == 1 for states in trajectory.windows)
            yield trajectory


def _fingerprint(trajectories: Iterable[Trajectory]) -> str:
    digest = hashlib.sha256()
    for trajectory in trajectories:
        digest.update(json.dumps(asdict(trajectory)).encode("ascii"))
    return digest.hexdigest()[:16]
