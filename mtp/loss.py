"""Multi-token prediction losses (Gloeckle et al. 2024, eq. 2) and the routine that keeps them
small.

The loss of a row is the sum over heads i = 1..n of the cross-entropy of token t + i given the
tokens up to t. Written plainly it holds n tensors of T x V logits. `sequential` runs forward and
backward through the heads one after another, and through each head's unembedding in chunks of
positions, so that neither n nor T multiplies V in the peak (section 2 of the paper: O(V + d)).

A *score* is any function `(fns, inputs, weights, params) -> result` that a model calls inside its
unembedding's own forward: latent i is `fns[i](inputs[i % len(inputs)])` and its logits are `latent
@ weights[i % len(weights)].T`. Objectives are scores.

Letters: B rows, T positions, N future tokens (heads), D width, V vocabulary, M = B * T positions in
a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Score = Callable[..., Any]
Schedule = Callable[[float, int], Sequence[float]]  # share of a run done, n -> factor of each head
# name -> (sum, count): a ratio is taken after all sums are in. What is learned is called loss_1,
# loss_2, ... of heads, else loss_ and the term's name.
Metrics = dict[str, tuple[Tensor, Tensor]]
CUTS = ("auto", "trunk", "latents")


class Batch(NamedTuple):
    """Packed rows of T + n tokens; head i at position t predicts `row[:, t + i]`, i = 1..n.

    row: (B, T+n) ids. doc: (B, T+n) document number, -1 where padded. keep: (B, T+n) bool, False
    where a token is no target.
    """

    row: Tensor
    doc: Tensor
    keep: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) for x in self))

    @property
    def known(self) -> dict[str, Tensor]:
        """What a model is told beside the row, by name: more in `mtp.interop.states`."""
        return {}


def plain_batch(row: Tensor) -> Batch:
    """Rows that are each one whole document, every token a target."""
    return Batch(row, torch.zeros_like(row), torch.ones_like(row, dtype=torch.bool))


def future_targets(batch: Batch, n: int) -> tuple[Tensor, Tensor]:
    """Targets (N, B, T) of every head, and which of them are valid: kept, and in the document of
    the position that predicts.

    >>> row, doc = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 0, 1, 1]])
    >>> targets, valid = future_targets(Batch(row, doc, torch.ones_like(row).bool()), 2)
    >>> targets[:, 0].tolist(), valid[:, 0].tolist()
    ([[6, 7, 8], [7, 8, 9]], [[True, True, False], [True, False, False]])
    """
    length = batch.row.shape[1] - n
    if length < 1:
        raise ValueError(
            f"a row of {batch.row.shape[1]} tokens is too short for n_future_tokens={n}: "
            f"it needs at least {n + 1}"
        )

    def ahead(x: Tensor) -> Tensor:
        return x[:, 1:].unfold(1, n, 1).permute(2, 0, 1)

    here = batch.doc[:, :length]
    return ahead(batch.row), ahead(batch.keep) & (ahead(batch.doc) == here) & (here >= 0)


def reference(
    fns: Sequence[Callable[[Tensor], Tensor]],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets_NBT: Tensor,
    scale_NBT: Tensor,
    params: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """The loss as one would write it on a board: n full logits, n cross-entropies, their weighted
    sum. The truth in tests.
    """
    nll = []
    for i, (fn, target) in enumerate(zip(fns, targets_NBT, strict=True)):
        logits = F.linear(fn(inputs[i % len(inputs)]), weights[i % len(weights)])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll.append(
            F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view_as(
                target
            )
        )
    nll_NBT = torch.stack(nll)
    return (scale_NBT * nll_NBT).sum(), nll_NBT.detach()


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is spread over processes (FSDP2's DTensor)."""
    return any(type(t.data).__name__ == "DTensor" for t in tensors)


def sequential(
    fns: Sequence[Callable[[Tensor], Tensor]],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets_NBT: Tensor,
    scale_NBT: Tensor,
    params: Sequence[Tensor] = (),
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """sum of scale x nll over heads and positions, and the nll of each (N, B, T), detached.

    Loss and gradients equal `reference`'s; the peak does not grow with n. `scale` is head weight x
    mask / denominator in one tensor. Two cuts share this code: *trunk*, one input z and `fns` the
    heads, whose parameters are `params`; *latents*, n inputs and identities. Gradients are made in
    forward and scaled in backward, so the result may be scaled, summed and accumulated like any
    loss. `chunk` positions are unembedded at a time; by default as many as keep a chunk of logits
    near 2^23 numbers, or 2^26 on an accelerator.
    """
    if len(fns) != len(targets_NBT):
        raise ValueError(f"the model has {len(fns)} heads, the loss {len(targets_NBT)} targets")
    if is_sharded((*weights, *params)):
        raise RuntimeError(
            "a sharded parameter was reached outside its own module: "
            "use cut='latents' with sharded models"
        )
    plan = _Plan(
        tuple(fns),
        targets_NBT,
        scale_NBT,
        chunk or chunk_size(weights[0]),
        len(inputs),
        len(weights),
    )
    tensors = (*inputs, *weights, *params)
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
    total, nll_NBT, grads = _score_heads(plan, tensors, wanted)
    for tensor, grad in zip(tensors, grads, strict=True):
        if grad is not None:
            total = StoredGradient.apply(total, tensor, grad)
    return total, nll_NBT


class _Plan(NamedTuple):
    fns: tuple[Callable[[Tensor], Tensor], ...]
    targets_NBT: Tensor
    scale_NBT: Tensor
    chunk: int
    n_inputs: int
    n_weights: int


def chunk_size(weight_VD: Tensor) -> int:
    """Positions unembedded at a time. Each chunk adds to the weight's whole gradient, which a GPU
    does in less time than the products only above some 2,000 positions; a CPU prefers logits that
    its caches nearly hold.
    """
    numbers = 2**23 if weight_VD.device.type == "cpu" else 2**26
    return max(128, numbers // len(weight_VD))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class StoredGradient(torch.autograd.Function):
    """The sum unchanged; in backward, `tensor` gets the gradient that is stored for it. A node for
    each tensor: a gradient is scaled, added and freed before the next one is touched.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, tensor: Tensor, grad: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dtype = tensor.dtype
        ctx.save_for_backward(grad)
        ctx.mark_dirty(total)  # the same tensor, not a view of it: callers may change it in place
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return g, (grad.to(wide(grad.dtype)) * g).to(ctx.dtype), None


@torch.no_grad()
def _score_heads(
    plan: _Plan, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """-> sum, nll (N, B, T), the gradient of each of `tensors` (inputs, weights, params) that wants
    one.
    """
    grads: list[Tensor | None] = [None] * len(tensors)
    first_param = plan.n_inputs + plan.n_weights
    total = torch.zeros((), dtype=wide(tensors[0].dtype), device=tensors[0].device)
    nll_NBT = torch.empty(plan.targets_NBT.shape, dtype=total.dtype, device=total.device)
    for i, fn in enumerate(plan.fns):
        at, weight_at = i % plan.n_inputs, plan.n_inputs + i % plan.n_weights
        # What this head's latent sends gradients to; empty when only the unembedding learns.
        sinks = [k for k in (at, *range(first_param, len(tensors))) if wanted[k]]
        with torch.set_grad_enabled(bool(sinks)):
            x = tensors[at].detach().requires_grad_(wanted[at])
            latent = fn(x)
        if not latent.requires_grad:  # all that this head reads is frozen
            sinks = []
        d_latent = (
            torch.empty_like(latent, memory_format=torch.contiguous_format) if sinks else None
        )
        if wanted[weight_at] and grads[weight_at] is None:
            grads[weight_at] = torch.zeros_like(
                tensors[weight_at], dtype=wide(tensors[weight_at].dtype)
            )
        nll_NBT[i] = _score_head(
            plan, i, latent.detach(), tensors[weight_at], d_latent, grads[weight_at]
        )
        total += (plan.scale_NBT[i] * nll_NBT[i]).sum()
        if d_latent is not None:
            ends = [x if k == at else tensors[k] for k in sinks]
            for k, g in zip(
                sinks,
                torch.autograd.grad(latent, ends, d_latent, allow_unused=True),
                strict=True,
            ):
                if g is not None:  # wide from the second on: most parameters belong to one head
                    grads[k] = g if grads[k] is None else grads[k].to(wide(g.dtype)) + g
        del x, latent, d_latent
    return total, nll_NBT, grads


def _score_head(
    plan: _Plan,
    i: int,
    latent_BTD: Tensor,
    weight_VD: Tensor,
    d_latent: Tensor | None,
    d_weight: Tensor | None,
) -> Tensor:
    """nll (B, T) of head i, chunk by chunk; fills d_latent and adds to d_weight where they are
    wanted.
    """
    dtype = compute_dtype(latent_BTD)
    latent_MD, weight = latent_BTD.flatten(0, -2).to(dtype), weight_VD.detach().to(dtype)
    nll = torch.empty(len(latent_MD), dtype=wide(dtype), device=latent_MD.device)
    target_M1 = plan.targets_NBT[i].flatten()[:, None]
    scale_M1 = plan.scale_NBT[i].flatten()[:, None].to(nll.dtype)
    d_flat = None if d_latent is None else d_latent.view(-1, d_latent.shape[-1])
    for start in range(0, len(nll), plan.chunk):
        at = slice(start, start + plan.chunk)
        logits = (latent_MD[at] @ weight.T).to(nll.dtype)
        logits -= logits.amax(-1, keepdim=True)
        chosen = logits.gather(-1, target_M1[at])
        # From here on in the logits' own memory: exponentials, then the gradient.
        sums = logits.exp_().sum(-1, keepdim=True)
        nll[at] = (sums.log() - chosen).squeeze(-1)
        if d_flat is not None or d_weight is not None:
            logits.mul_(scale_M1[at] / sums).scatter_add_(-1, target_M1[at], -scale_M1[at])
            g = logits.to(dtype)
            if d_flat is not None:
                d_flat[at] = g @ weight
            if d_weight is not None and d_weight.dtype == dtype:
                d_weight.addmm_(g.T, latent_MD[at])
            elif d_weight is not None:
                d_weight.add_(g.T @ latent_MD[at])
            del g
        del logits  # or two chunks of them would be alive
    return nll.view(plan.targets_NBT[i].shape)


@torch.no_grad()
def predictions(
    fns: Sequence[Callable[[Tensor], Tensor]],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets_NBT: Tensor,
    params: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """nll (N, B, T) and most likely token (N, B, T) of every head: what a validation needs, one row
    of logits at a time.
    """
    nll, best = (
        torch.empty(targets_NBT.shape, device=targets_NBT.device),
        torch.empty_like(targets_NBT),
    )
    for i, fn in enumerate(fns):
        latent, weight = fn(inputs[i % len(inputs)]), weights[i % len(weights)]
        for b, target in enumerate(targets_NBT[i]):
            logits = F.linear(latent[b], weight).float()
            nll[i, b], best[i, b] = (
                F.cross_entropy(logits, target, reduction="none"),
                logits.argmax(-1),
            )
    return nll, best


def agreements(best_NBT: Tensor, valid_NBT: Tensor) -> tuple[Tensor, Tensor]:
    """Where heads 2..n guess what head 1 itself will choose, under teacher forcing: (agree (N-1, B,
    T'), usable (B, T')).

    agree[j - 1] at position t compares head 1 + j at t with head 1 at t + j; T' = T - n + 1. Greedy
    verification accepts a chain of guesses up to the first disagreement: `1 +
    agree.cumprod(0).sum(0)` tokens per step, on held-out text.
    """
    n, _, length = best_NBT.shape
    span = length - n + 1
    if span < 1:
        raise ValueError(
            f"rows of {length} positions are too short to score {n} heads: "
            f"seq_len must be at least n_future_tokens"
        )
    agree = [best_NBT[j, :, :span] == best_NBT[0, :, j : j + span] for j in range(1, n)]
    nothing = torch.zeros_like(best_NBT[:0, :, :span], dtype=torch.bool)  # n = 1 has no drafts
    return torch.stack(agree) if agree else nothing, valid_NBT[n - 1, :, :span]


@dataclass
class MultiTokenLoss:
    """Sum over heads of weight x mean cross-entropy over that head's valid targets (the paper's
    weights are all 1).

    `cut` says where the sequential routine takes over: "trunk" frees each head's activations before
    the next head runs (parallel heads; one process or DDP), "latents" works for every head kind and
    for sharded models, "auto" picks. `schedule` multiplies the weights by what the share of the run
    that is done says; heads behind the last one that counts are not run at all, nor changed by an
    optimizer (DDP must be told: find_unused_parameters). `targets` and `score` are what is learned:
    the latter gets the former's first result as it is, the second is which terms of each head
    (N, B, T) count.
    """

    n_future_tokens: int
    head_weights: Sequence[float] | None = None
    cut: str = "auto"
    score: Score = sequential
    schedule: Schedule | None = None
    targets: Callable[[Batch, int], tuple[Tensor, Tensor]] = future_targets
    done: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.n_future_tokens < 1:
            raise ValueError(f"n_future_tokens={self.n_future_tokens} must be at least 1")
        if self.head_weights is not None and len(self.head_weights) != self.n_future_tokens:
            raise ValueError(
                f"head_weights has {len(self.head_weights)} numbers for "
                f"n_future_tokens={self.n_future_tokens}: give one per head"
            )
        if self.cut not in CUTS:
            raise ValueError(f"cut={self.cut!r} is unknown: allowed are {', '.join(CUTS)}")

    def count(self, batch: Batch) -> Tensor:
        """Valid targets per head (N,), without a model: summed over micro-batches and ranks it is
        the denominator.
        """
        return self.targets(batch, self.n_future_tokens)[1].sum((1, 2))

    def at(self, done: float) -> None:
        """How much of the run is done, 0..1: `mtp.train.train` says it before every step."""
        self.done = done

    def __call__(
        self, model: nn.Module, batch: Batch, denominator: Tensor
    ) -> tuple[Tensor, Metrics]:
        n = self.n_future_tokens
        targets, valid_NBT = self.targets(batch, n)
        dtype = wide(next(model.parameters()).dtype)
        weights = self.head_weights or [1.0] * n
        row, known = batch.row, dict[str, Any](batch.known)
        if self.schedule is not None:
            factors = self.schedule(self.done, n)
            weights = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
            upto = max(i for i, factor in enumerate(factors, 1) if factor)
            if upto < n:
                row, known["upto"] = row[:, : row.shape[1] - n + upto], upto
                n, targets, valid_NBT = upto, targets[:upto], valid_NBT[:upto]
        head_weights = torch.tensor(weights[:n], dtype=dtype, device=denominator.device)
        # A head without valid targets has a zero mask: its loss is zero, whatever it is divided by.
        scale_NBT = valid_NBT * (head_weights / denominator[:n].clamp(min=1e-30))[:, None, None]

        def score(fns, inputs, weights, params):
            return self.score(fns, inputs, weights, targets, scale_NBT, params)

        loss, nll_NBT = model(row, score=score, cut=self.cut, **known)
        sums, counts = (nll_NBT * valid_NBT).sum((1, 2)), valid_NBT.sum((1, 2))
        return loss, {f"loss_{i + 1}": (sums[i], counts[i]) for i in range(n)}


def mtp_loss(
    model: nn.Module, row: Tensor, *, n_future_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """The loss inside your own loop: rows (B, T + n) of plain text -> (loss to call backward on,
    mean loss of each head (N,)).

    `n_future_tokens` is the model's own, else its config's; give it when the model is wrapped. For
    packed documents, masks or weights use `MultiTokenLoss`.
    """
    # The config of attached heads is their trunk's, which says nothing of them.
    says = model if hasattr(model, "n_future_tokens") else model.config
    n: Any = n_future_tokens or says.n_future_tokens  # type: ignore[union-attr]
    objective, batch = MultiTokenLoss(n), plain_batch(row)
    count = objective.count(batch)
    loss, metrics = objective(model, batch, count)
    return loss, torch.stack([total / size.clamp(min=1) for total, size in metrics.values()])
