"""Consistency training (CLLMs, Kou et al. 2024): from a state of its own Jacobi trajectory, a model
learns to predict what it predicts from the fixed point, and so to reach it in fewer passes.

    loss = mean divergence(teacher || student) + ar_weight x mean cross-entropy

The student reads a state of a window, the teacher, which is the same model held constant, the fixed
point (global) or the next state (local); the cross-entropy is that of the response itself. A
position is scored where the token that it predicts lies in the window, at or after the state's
first wrong token, and not after the response's end. Only head 1 learns. All in one pass over packed
rows, see `mtp.consistency.packing`.

Letters: M scored columns of states, K predicted response tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp.consistency.packing import KINDS, PackedRows
from mtp.loss import Metrics, StoredGradient, chunk_size, compute_dtype, sequential, wide


@dataclass
class ConsistencyConfig:
    """trajectories: the folder of a collection, of windows of `window` tokens, that the model made
    from which training starts. kind: the teacher reads the fixed point (global) or the state after
    the student's (local). augment, refresh_every: see `TrajectoryBatches`; refresh_every from 1 on
    is on-policy training: the model in training goes on with the collection's prompts, in the way
    it was made, and its cross-entropy is that of its own text. The rest: see `ConsistencyLoss`.
    """

    trajectories: str | None = None
    window: int = 16
    kind: str = "global"
    states: int = 1  # of each window in a row
    augment: bool = False
    refresh_every: int = 0  # batches; 0: only what was collected
    divergence: str = "forward_kl"  # a key of DIVERGENCES
    ar_weight: float = 10.0
    consistency_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.states < 1:
            raise ValueError(f"consistency.states={self.states} must be at least 1")
        if self.refresh_every < 0:
            raise ValueError(
                f"consistency.refresh_every={self.refresh_every} must be at least 0 (0: never)"
            )
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
        names = "loss_consistency", "loss_autoregressive"
        return loss, dict(zip(names, zip(sums, counts, strict=True), strict=True))

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
