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

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtp.consistency.packing import KINDS, PackedRows
from mtp.divergence import Divergence, distil, forward_kl, jsd, reverse_kl
from mtp.loss import Metrics, sequential, wide


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


# name -> how two predictions differ.
DIVERGENCES: dict[str, Divergence | None] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "hard": None,  # cross-entropy on the fixed point's own tokens: no teacher
}


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
