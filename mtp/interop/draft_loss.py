"""The loss of heads that are attached to a finished model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtp.loss import Batch, Metrics, future_targets, sequential


class DraftLoss:
    """Sum over heads of the mean cross-entropy over each one's valid targets, as `MultiTokenLoss`,
    with two things left out that a frozen model has no use for.

    vocabulary: the only ids that heads 2..n are scored on, as `OwnHeads(vocabulary=...)` will use
    them; other tokens are no targets of theirs. next_token: whether head 1 learns too, on all ids.
    A large vocabulary's unembedding is most of what heads take to train, and these save their share
    of it.
    """

    def __init__(
        self,
        n_future_tokens: int,
        vocabulary: Sequence[int] | Tensor | None = None,
        next_token: bool = False,
    ) -> None:
        if n_future_tokens < 2:
            raise ValueError(f"n_future_tokens={n_future_tokens} must be at least 2")
        self.n, self.next_token = n_future_tokens, next_token
        self.ids = None if vocabulary is None else torch.as_tensor(vocabulary).unique()

    def count(self, batch: Batch) -> Tensor:
        return self._targets(batch)[1].sum((1, 2))

    def __call__(
        self, model: nn.Module, batch: Batch, denominator: Tensor
    ) -> tuple[Tensor, Metrics]:
        targets_NBT, valid_NBT = self._targets(batch)
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        scale_NBT = valid_NBT / denominator.to(dtype).clamp(min=1e-30)[:, None, None]

        def score(fns, latents, weights, params):
            """Of every head its own latent, of all one matrix: what cut="latents" gives."""
            (weight,), later = weights, slice(1, None)
            rows = weight if self.ids is None else weight[self.ids.to(weight.device)]
            loss, nll = sequential(
                fns[later], latents[later], [rows], targets_NBT[later], scale_NBT[later], params
            )
            if not self.next_token:
                return loss, nll
            first, first_nll = sequential(
                fns[:1], latents[:1], weights, targets_NBT[:1], scale_NBT[:1], params
            )
            return first + loss, torch.cat([first_nll, nll])

        loss, nll = model(batch.row, score=score, cut="latents", **batch.known)
        scored = valid_NBT[-len(nll) :]
        sums, counts = (nll * scored).sum((1, 2)), scored.sum((1, 2))
        names = [f"loss_{i}" for i in range(self.n - len(nll) + 1, self.n + 1)]
        return loss, dict(zip(names, zip(sums, counts, strict=True), strict=True))

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Targets (N, B, T), of heads 2..n as numbers of their rows, and which are valid."""
        targets, valid = future_targets(batch, self.n)
        if self.ids is None:
            return targets, valid
        ids, later = self.ids.to(targets.device), targets[1:].contiguous()
        place = torch.searchsorted(ids, later).clamp(max=len(ids) - 1)
        valid = torch.cat([valid[:1], valid[1:] & (ids[place] == later)])
        return torch.cat([targets[:1], place]), valid
