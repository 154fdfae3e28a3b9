"""Consistency training (CLLMs, Kou et al. 2024): from a state of its own Jacobi trajectory, a model
learns to predict what it predicts from the fixed point, and so to reach it in fewer passes.

    loss = mean divergence(teacher || student) + ar_weight x mean cross-entropy

The student reads a state of a window, the teacher, which is the same model held constant, the fixed
point (global) or the next state (local); the cross-entropy is that of the response itself. All
windows of a response are one packed row, in one forward pass:

    [prompt] [state of window 0] [fixed point 0] [state of window 1] [fixed point 1] ...

Several states of a window may stand in a row, each seen by itself alone.

A state sees the prompt, the fixed points before it and itself, and stands at the positions of its
fixed point; fixed points do not see states. So each window's numbers are those of a pass over it
alone. A position is scored where the token that it predicts lies in the window, at or after the
state's first wrong token, and not after the response's end. Only head 1 learns.

Letters: B rows, T columns of a packed row, M scored columns of states, K predicted response tokens,
D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp.data import check_identity
from mtp.decode.contract import Layout
from mtp.loss import Metrics, StoredGradient, chunk_size, compute_dtype, sequential, wide
from mtp.trajectories import Trajectory

KINDS = ("global", "local")
TOO_LONG, ONE_STATE = "responses that are too long", "windows of one state"
PADDING = -1  # a branch of its own
MULTIPLE = 64  # row lengths are rounded up to it: few shapes to compile for


@dataclass
class ConsistencyConfig:
    """trajectories: the folder of a collection, of windows of `window` tokens. kind: the teacher
    reads the fixed point (global) or the state after the student's (local). The rest: see
    `ConsistencyLoss`.
    """

    trajectories: str | None = None
    window: int = 16
    kind: str = "global"
    states: int = 1  # of each window in a row
    divergence: str = "forward_kl"  # a key of DIVERGENCES
    ar_weight: float = 10.0
    consistency_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.states < 1:
            raise ValueError(f"consistency.states={self.states} must be at least 1")
        if self.kind not in KINDS:
            raise ValueError(
                f"consistency.kind={self.kind!r} is unknown: allowed are {', '.join(KINDS)}"
            )
        if self.kind == "local" and self.divergence == "hard":
            raise ValueError(
                "consistency.kind='local' compares with what the model says to the next state: "
                "divergence='hard', the fixed point's tokens, is for 'global'"
            )


# Divergences between predictions, (M, V) logits of student and teacher -> (M,).


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(teacher.log_softmax(-1), student.log_softmax(-1))


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(student.log_softmax(-1), teacher.log_softmax(-1))


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon: the mean of both KL divergences from the mixture."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    mixture = torch.logaddexp(p, q) - math.log(2)
    return (_kl(p, mixture) + _kl(q, mixture)) / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "hard": None,  # cross-entropy on the fixed point's own tokens: no teacher
}


# Trajectories -> packed rows.


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

    refresh: for on-policy training, new trajectories. Before each batch as many as it has rows take
    the places of the oldest; they are part of the state, and `refreshed` counts them.
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
        refresh: Iterator[Trajectory] | None = None,
        states: int = 1,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is unknown: allowed are {', '.join(KINDS)}")
        self.skipped: Counter[str] = Counter()
        self.refreshed = 0
        self._kind, self._batch_size, self._seed = kind, batch_size, seed
        self._max_columns, self._max_positions = max_columns, max_positions
        self._rank, self._world_size, self._refresh = rank, world_size, refresh
        self._states = states
        self._pool = list(self._fitting(trajectories))
        if not self._pool:
            raise ValueError(
                f"trajectories: of {self.skipped[TOO_LONG]} none fits in rows of {max_columns} "
                f"columns and texts of {max_positions} tokens"
            )
        self.fingerprint = _fingerprint(self._pool)
        self._identity = {"trajectories": self.fingerprint, "kind": kind, "seed": seed}
        self._identity |= {"states": states} if states > 1 else {}
        self._row = 0

    def __len__(self) -> int:
        """Responses of an epoch."""
        return len(self._pool)

    def __iter__(self) -> TrajectoryBatches:
        return self

    def __next__(self) -> PackedRows:
        for new in self._new():
            self._pool[self.refreshed % len(self._pool)] = new
            self.refreshed += 1
        first = self._row + self._rank * self._batch_size
        self._row += self._world_size * self._batch_size
        numbers = range(first, first + self._batch_size)
        return _join([self._draw(number) for number in numbers])

    def state_dict(self) -> dict[str, Any]:
        pool = [asdict(trajectory) for trajectory in self._pool] if self._refresh else None
        return {"row": self._row, "refreshed": self.refreshed, "pool": pool, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_identity(state, self._identity)
        self._row, self.refreshed = state["row"], state["refreshed"]
        if state["pool"] is not None:
            self._pool = [Trajectory(**trajectory) for trajectory in state["pool"]]

    def _draw(self, number: int) -> _Row:
        epoch, place = divmod(number, len(self._pool))
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._pool))
        trajectory = self._pool[order[place]]
        random = np.random.default_rng([self._seed, epoch, place])
        guesses = [len(states) - 1 for states in trajectory.windows]
        chosen = [random.choice(n, min(n, self._states), False).tolist() for n in guesses]
        return _pack(trajectory, chosen, self._kind)

    def _new(self) -> Iterator[Trajectory]:
        return islice(self._fitting(self._refresh or ()), self._batch_size)

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


# The loss.


def distil(
    divergence: Callable[[Tensor, Tensor], Tensor],
    latent_MD: Tensor,
    teacher_MD: Tensor,
    weight_VD: Tensor,
    scale: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """scale x the sum over M of the divergence between what two latents predict, and that sum,
    detached. Gradients reach the student's latents and the weight through them; the teacher is
    constant.

    As in `mtp.loss.sequential`, `chunk` positions are unembedded at a time, and gradients are made
    in forward.
    """
    grads = torch.zeros_like(latent_MD), torch.zeros_like(weight_VD, dtype=wide(weight_VD.dtype))
    value = _distil_chunks(
        divergence, (latent_MD, teacher_MD, weight_VD), grads, chunk or chunk_size(weight_VD)
    )
    total = scale * value
    for tensor, grad in zip((latent_MD, weight_VD), grads, strict=True):
        total = StoredGradient.apply(total, tensor, grad * scale)
    return total, value


@torch.no_grad()
def _distil_chunks(
    divergence: Callable[[Tensor, Tensor], Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    chunk: int,
) -> Tensor:
    """The sum; adds its gradients to those of the latents and the weight."""
    dtype = compute_dtype(tensors[0])
    latent, teacher, weight = (x.detach().to(dtype) for x in tensors)
    value = torch.zeros((), dtype=wide(dtype), device=latent.device)
    for start in range(0, len(latent), chunk):
        at = slice(start, start + chunk)
        constant, logits = (F.linear(x[at], weight).to(value.dtype) for x in (teacher, latent))
        with torch.enable_grad():
            one = divergence(logits.requires_grad_(), constant).sum()
        g = torch.autograd.grad(one, logits)[0].to(dtype)
        value += one.detach()
        grads[0][at] = g @ weight
        grads[1].add_(g.T @ latent[at])
    return value


@dataclass
class ConsistencyLoss:
    """consistency_weight x the mean divergence over states' scored columns + ar_weight x the mean
    cross-entropy over response tokens; published is 1 : 10. With consistency_weight=0 the model
    only trains on; the divergence is still measured.
    """

    divergence: str = "forward_kl"
    ar_weight: float = 10.0
    consistency_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence={self.divergence!r} is unknown: allowed are {', '.join(DIVERGENCES)}"
            )
        for key in ("ar_weight", "consistency_weight"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 0")

    def count(self, batch: PackedRows) -> Tensor:
        """(2,): columns that are compared, response tokens that are predicted."""
        return torch.tensor([len(batch.student), len(batch.clean)], device=batch.row.device)

    def __call__(
        self, model: nn.Module, batch: PackedRows, denominator: Tensor
    ) -> tuple[Tensor, Metrics]:
        dtype = wide(next(model.parameters()).dtype)
        weights = torch.tensor([self.consistency_weight, self.ar_weight], dtype=dtype)
        scale = weights.to(denominator.device) / denominator.clamp(min=1e-30)

        def score(fns, inputs, weights, params):
            latent = fns[0](inputs[0]).flatten(0, 1)
            compared = self._compare(latent, weights[0], batch, scale[0])
            predicted = _predict(latent[batch.clean], weights[0], batch.target, scale[1])
            return compared[0] + predicted[0], compared[1], predicted[1]

        loss, *sums = model(batch.row, score=score, cut="latents", upto=1, layout=batch.layout())
        counts = self.count(batch)
        return loss, {"consistency": (sums[0], counts[0]), "loss_1": (sums[1], counts[1])}

    def _compare(
        self, latent: Tensor, weight: Tensor, batch: PackedRows, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        student, divergence = latent[batch.student], DIVERGENCES[self.divergence]
        if divergence is None:
            return _predict(student, weight, batch.label, scale)
        return distil(divergence, student, latent.detach()[batch.teacher], weight, scale)


def _predict(
    latent_MD: Tensor, weight: Tensor, target_M: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """scale x the sum of cross-entropies, and that sum, detached."""
    targets, scales = target_M[None, None], scale.expand(1, 1, len(target_M))
    total, nll = sequential([lambda x: x], [latent_MD[None]], [weight], targets, scales)
    return total, nll.sum()
