"""Matrices laid out for decoding on a CPU.

A step multiplies few rows by every matrix of the model. As they lie in memory, BLAS reads them at a
third of its speed or less and takes rows nearly one by one; repacked by oneDNN they are read almost
as fast as they can be, and some more rows cost little.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class PackedLinear(nn.Module):
    """x (..., I) -> x W^T (..., O), from weight (O, I). For inference: it has no gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = bias if bias is None else bias.detach()
        self.multiply = torch.ops.mkldnn._linear_pointwise.default  # the packet would look it up

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, self.bias, "none", [], "")


Matrix = Tensor | PackedLinear


def project(x: Tensor, matrix: Matrix) -> Tensor:
    """x W^T, however the matrix lies."""
    return matrix(x) if isinstance(matrix, PackedLinear) else F.linear(x, matrix)


@cache
def can_pack(dtype: torch.dtype, device_type: str) -> bool:
    """Whether there is a kernel for it here: torch's own are tried, as a compiled model uses
    them.
    """
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        PackedLinear(torch.ones(16, 16, dtype=dtype))(torch.ones(1, 16, dtype=dtype))
    except (AttributeError, RuntimeError):  # built without oneDNN, or a processor without the type
        return False
    return True


def with_packed_linears(model: Model) -> Model:
    """A copy for inference whose linear maps are packed; all other parameters are shared."""
    shared: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    for module in model.modules():
        if type(module) is nn.Linear:  # others may do more than multiply
            shared[id(module)] = PackedLinear(module.weight, module.bias)
    return copy.deepcopy(model, shared)


def refuse_packed(model: Any) -> None:
    """ValueError if it is such a copy, where it is to be saved."""
    if model.output.packed:
        raise ValueError("a packed copy only decodes: save the model that it was made from")
