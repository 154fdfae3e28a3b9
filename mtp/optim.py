"""Optimizers and the learning rate's schedule.

AdamW, or Muon for the weights of linear maps with AdamW for all else: embeddings, unembeddings and
norms. At equal tokens Muon learns a small model clearly faster (Jordan et al. 2024).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "muon")


@dataclass
class OptimConfig:
    """Decoupled weight decay, linear warm-up and cosine decay to final_lr_ratio x lr (paper, table
    S13). clip: largest norm of the gradient. betas are AdamW's.
    """

    name: str = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    warmup_steps: int = 100
    final_lr_ratio: float = 0.03
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(
                f"optim.name={self.name!r} is unknown: allowed are {', '.join(OPTIMIZERS)}"
            )
        for key in ("lr", "clip"):
            if getattr(self, key) <= 0:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be above 0")
        for key in ("weight_decay", "warmup_steps", "final_lr_ratio"):
            if getattr(self, key) < 0:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be at least 0")


def schedule(step: int, done: float, config: OptimConfig) -> float:
    """Factor on the learning rate: warm-up by steps, cosine by the share of the run done."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return warm * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


class Optimizer:
    """All that learns in a model, under the optimizers that config.name asks for. Norms and other
    vectors are not decayed.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.known = [name for name, _ in model.named_parameters()]
        self.names: dict[Tensor, str] = {
            p: name for name, p in model.named_parameters() if p.requires_grad
        }
        maps = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
        by_muon = maps & self.names.keys() if config.name == "muon" else set()
        rest = [p for p in self.names if p not in by_muon]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        ]
        if by_muon:
            matrices = [p for p in self.names if p in by_muon]  # in the model's order
            self.parts.append(Muon(matrices, config.lr, config.weight_decay))

    def step(self, lr: float) -> None:
        """Apply all gradients and let them go."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that is kept between steps, by the name of its parameter."""
        return {
            f"{self.names[p]}.{key}": t
            for part in self.parts
            for p, state in part.state.items()
            for key, t in state.items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; ValueError names a parameter whose state does not fit. A
        parameter without any had no gradient yet.
        """
        of: dict[str, dict[str, Tensor]] = {name: {} for name in self.known}
        for full_name, t in tensors.items():
            name, _, key = full_name.rpartition(".")
            if name not in of:
                raise ValueError(
                    f"the checkpoint's optimizer state does not fit the model, "
                    f"which has no parameter {name!r}"
                )
            of[name][key] = t
        for part in self.parts:
            for p in (p for group in part.param_groups for p in group["params"]):
                name, like = self.names[p], tuple(p.shape)
                found = {key: tuple(t.shape) for key, t in of[name].items()}
                adam = {"step": (), "exp_avg": like, "exp_avg_sq": like}
                wanted = {"momentum": like} if isinstance(part, Muon) else adam
                if found and found != wanted:
                    raise ValueError(
                        f"the checkpoint's optimizer state does not fit the model: "
                        f"{name} {like} has {found}, not {wanted}"
                    )
                if found:
                    part.state[p] = {key: t.to(p.device) for key, t in of[name].items()}


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest orthogonal matrix, at the size of an AdamW update: one
    learning rate and weight decay fit both (Jordan et al. 2024; Liu et al. 2025, eq. 4).

    PyTorch's own rounds to bfloat16 everywhere, and takes matrices one by one; here those of one
    shape are one batch, in fp32 on processors that would only emulate bfloat16.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for p in self.param_groups[0]["params"]:
            if p.ndim != 2 or type(p.data).__name__ == "DTensor":
                raise ValueError(
                    f"optim.name='muon' needs whole matrices, not a parameter of shape "
                    f"{tuple(p.shape)} that is sharded or no matrix: use adamw"
                )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    of_shape[p.shape].append(p)
            for shape, params in of_shape.items():
                updates = self._updates(params, group["momentum"])
                size = 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-group["lr"] * size)

    def _updates(self, params: list[Tensor], momentum: float) -> list[Tensor]:
        grads = [p.grad for p in params if p.grad is not None]
        kept = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(kept, grads, 1 - momentum)
        return list(orthogonal(torch.stack(torch._foreach_lerp(grads, kept, momentum))).unbind())


def multiplies_bfloat16(x: Tensor) -> bool:
    """Whether the device has units for it: GPUs, and processors with AMX."""
    known: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # if new
    return x.is_cuda or bool(known().get("amx_bf16"))


def orthogonal(x: Tensor) -> Tensor:
    """Matrices (K, rows, columns) -> those of the same singular vectors and values near 1 (0.7 to
    1.2), by five steps of a quintic Newton-Schulz iteration.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at zero, Jordan et al. 2024
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    y = wide.bfloat16() if x.dtype == torch.float32 and multiplies_bfloat16(x) else wide
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y if wide is x else y.mT).to(x.dtype)
