"""Rotary positions, half-rotated, as in Hugging Face's Llama.

Letters: B rows, T positions, d head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]


class Rotary:
    """cos and signed sin of every position, one table (positions, 2, 1, d). A plain object, so that
    `model.to(bfloat16)` leaves it in fp32. scaling: the other words of `slowed`.
    """

    def __init__(
        self, head_dim: int, theta: float, positions: int, scaling: dict[str, float] | None = None
    ) -> None:
        half = torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float64)
        self.frequency = theta ** -(half / head_dim)
        if scaling is not None:
            self.frequency = slowed(self.frequency, **scaling)
        self.reserve(positions)

    @torch.inference_mode(False)  # training may follow decoding
    def reserve(self, positions: int) -> None:
        angles = torch.outer(torch.arange(positions, device="cpu"), self.frequency)[:, None]
        cos, sin = angles.cos(), angles.sin()
        self.table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1).float()

    def __call__(self, positions: Tensor) -> Rotation:
        """positions (..., T) -> cos and sin (..., T, 1, d)."""
        if self.table.device != positions.device:
            self.table = self.table.to(positions.device)
        cos, sin = self.table[positions].unbind(-3)
        return cos, sin


def slowed(
    frequency: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Tensor:
    """Rotary frequencies for a longer context (Llama 3.1): what turns more than `high_freq_factor`
    times in the original one is kept, what turns less than `low_freq_factor` times is divided by
    `factor`, and what lies between goes evenly from one to the other.
    """
    turns = frequency * original_max_position_embeddings / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (x_j, x_{j + d/2}) by their position's angle; x (B, T, heads, d)."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
