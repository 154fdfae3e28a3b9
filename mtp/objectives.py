"""What heads can learn beside the paper's plain sum: weights that change during a run, and a last
head that learns a summary of the tokens to come.

A *schedule* gives each head a factor on its weight by the share of the run that is done. A
*summary* is a loss of (M, V) logits and a window of W tokens (W, M), -1 where there is none ->
(M,): what the last of n heads learns in place of token t + n, while heads 1..n-1 learn their tokens
as always. It is dropped in the end, or drafts for what it is worth.

Letters: as in `mtp.loss`; W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp.loss import (
    Batch,
    MultiTokenLoss,
    Schedule,
    Score,
    StoredGradient,
    chunk_size,
    compute_dtype,
    future_targets,
    sequential,
    wide,
)

# Schedules.


def forward(done: float, n: int) -> list[float]:
    """One head more in every n-th of the run, from the next token to all (Aynetdinov & Akbik 2025,
    arXiv 2505.22757).
    """
    return _first(_part(done, n) + 1, n)


def reverse(done: float, n: int) -> list[float]:
    """One head less in every n-th of the run, from all to the next token (as `forward`)."""
    return _first(n - _part(done, n), n)


def annealed(done: float, n: int) -> list[float]:
    """As `reverse`, but in each part the last head that counts fades from 1 to 0: no loss jumps
    (modded-nanogpt, record of 2025-12-22: three targets on one set of logits, with head_weights of
    1, 0.5 and 0.25).

    >>> annealed(0.0, 3), annealed(0.5, 3), annealed(0.9, 3)
    ([1.0, 1.0, 1.0], [1.0, 0.5, 0.0], [1.0, 0.0, 0.0])
    """
    part, factors = _part(done, n), reverse(done, n)
    if part < n - 1:
        factors[n - 1 - part] = 1 + part - done * n
    return factors


def _part(done: float, n: int) -> int:
    return min(n - 1, int(done * n))


def _first(k: int, n: int) -> list[float]:
    return [1.0] * k + [0.0] * (n - k)


SCHEDULES: dict[str, Schedule] = {"forward": forward, "reverse": reverse, "annealed": annealed}

# Summaries.

Summary = Callable[[Tensor, Tensor], Tensor]


def order(logits_MV: Tensor, window_WM: Tensor) -> Tensor:
    """Which tokens come, and how soon: ListNet's cross-entropy (Cao et al. 2007) between the
    softmax of logits and that of nearness, W less the distance to a token's next occurrence, minus
    infinity where it has none in the window. Token order prediction (Zuhri et al. 2025, arXiv
    2508.19228): there the head is `identity` with an unembedding of its own.
    """
    distance = torch.arange(len(window_WM), device=window_WM.device, dtype=logits_MV.dtype)
    nearness = torch.full_like(logits_MV, -torch.inf).scatter_reduce(
        -1,
        window_WM.clamp(min=0).mT,
        torch.where(window_WM < 0, -torch.inf, -distance[:, None]).mT,
        "amax",
    )
    return F.cross_entropy(logits_MV, nearness.softmax(-1).nan_to_num(), reduction="none")


def bag(logits_MV: Tensor, window_WM: Tensor) -> Tensor:
    """Which tokens come, in any order: the binary cross-entropy of every token of the vocabulary,
    summed. Future summary prediction by a bag of words (arXiv 2510.14751), of which the weights by
    rarity are left out.
    """
    there = torch.zeros_like(logits_MV).scatter_reduce(
        -1, window_WM.clamp(min=0).mT, (window_WM >= 0).to(logits_MV.dtype).mT, "amax"
    )
    return F.binary_cross_entropy_with_logits(logits_MV, there, reduction="none").sum(-1)


SUMMARIES: dict[str, Summary] = {"order": order, "bag": bag}


def summary_targets(window: int) -> Callable[[Batch, int], tuple[Tensor, Tensor]]:
    """For `MultiTokenLoss(targets=...)`: the targets of heads 1..n-1 and behind them the window of
    the last, (N-1+W, B, T). Its tokens are those that `future_targets` calls valid. A position
    counts that has any, unless its window is cut by the end of the row alone.
    """

    def targets(batch: Batch, n: int) -> tuple[Tensor, Tensor]:
        beyond = (0, max(0, window - n))
        row, doc, keep = batch
        longer = Batch(F.pad(row, beyond), F.pad(doc, beyond, value=-1), F.pad(keep, beyond))
        tokens, valid = future_targets(longer, n + beyond[1])
        inside = valid[:window]
        length, width = row.shape[1] - n, row.shape[1]
        whole = torch.arange(length, device=row.device) + window < width
        ended = doc[:, :length] != doc[:, -1:]
        counts = inside.any(0) & (whole | ended)
        seen = torch.where(inside, tokens[:window], -1)
        return torch.cat([tokens[: n - 1], seen]), torch.cat([valid[: n - 1], counts[None]])

    return targets


def summarised(summary: Summary, chunk: int | None = None) -> Score:
    """A score: heads 1..n-1 by `sequential`, the last one by its summary of the window."""

    def score(
        fns: Sequence[Callable[[Tensor], Tensor]],
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        targets: Tensor,
        scale_NBT: Tensor,
        params: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        last = len(fns) - 1
        tokens, window = targets[:last], targets[last:]
        total, nll = sequential(
            fns[:last], inputs, weights, tokens, scale_NBT[:last], params, chunk=chunk
        )
        latent, weight = fns[last](inputs[last % len(inputs)]), weights[last % len(weights)]
        rows = latent.flatten(0, -2), weight, window.flatten(1), scale_NBT[last].flatten()
        added, losses = _in_chunks(summary, *rows, chunk or chunk_size(weight))
        return total + added, torch.cat([nll, losses.view_as(scale_NBT[:1])])

    return score


def summary_loss(
    name: str, n_future_tokens: int, window: int, head_weights: Sequence[float] | None = None
) -> MultiTokenLoss:
    """The loss of heads of which the last learns the summary `name` of the next `window` tokens."""
    if n_future_tokens < 2:
        raise ValueError(
            f"n_future_tokens={n_future_tokens} must be at least 2: "
            f"objective={name} needs a head beside the next token's"
        )
    if window < 1:
        raise ValueError(f"window={window} must be at least 1")
    return MultiTokenLoss(
        n_future_tokens,
        head_weights,
        score=summarised(SUMMARIES[name]),
        targets=summary_targets(window),
    )


def _in_chunks(
    summary: Summary,
    latent_MD: Tensor,
    weight_VD: Tensor,
    window_WM: Tensor,
    scale_M: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The sum of scale x summary and each summary (M,), detached; as in `sequential`, `chunk`
    positions are unembedded at a time and gradients are made in forward.
    """
    dtype = compute_dtype(latent_MD)
    latent, weight = latent_MD.detach().to(dtype), weight_VD.detach().to(dtype)
    grads = torch.empty_like(latent), torch.zeros_like(weight, dtype=wide(dtype))
    losses = torch.empty(len(latent), dtype=wide(dtype), device=latent.device)
    for start in range(0, len(latent), chunk):
        at = slice(start, start + chunk)
        with torch.no_grad():
            logits = F.linear(latent[at], weight).to(losses.dtype)
        with torch.enable_grad():
            one = summary(logits.requires_grad_(), window_WM[:, at])
        (g,) = torch.autograd.grad(one, logits, scale_M[at].to(one.dtype))
        losses[at] = one.detach()
        grads[0][at] = g.to(dtype) @ weight
        grads[1].add_(g.to(dtype).T @ latent[at])
    total = (scale_M * losses).sum()
    for tensor, grad in zip((latent_MD, weight_VD), grads, strict=True):
        if torch.is_grad_enabled() and tensor.requires_grad:
            total = StoredGradient.apply(total, tensor, grad)
    return total, losses
