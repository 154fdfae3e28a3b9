"""What a training run will take, before anything is allocated."""

from __future__ import annotations

import torch

from mtp.distributed import world_size
from mtp.model import ModelConfig, Transformer
from mtp.train import TrainConfig


def estimate(model: ModelConfig, config: TrainConfig, seq_len: int) -> dict[str, float]:
    """Parameters, bytes of memory and disk, floating-point operations.

    Memory is weights, gradients, AdamW's two moments and a coarse count of the activations a block
    keeps; operations are 6 per multiplied parameter and token (each head its own unembedding) plus
    attention.
    """
    with torch.device("meta"):
        shapes = Transformer(model)
    parameters = sum(p.numel() for p in shapes.parameters())
    unembedding = model.vocab_size * model.dim
    multiplied = (
        sum(p.numel() for b in shapes.blocks for p in b.parameters())
        + model.n_future_tokens * unembedding
    )
    tokens = config.batch_size * seq_len
    width = 2 if config.precision == "bfloat16" else 4
    activations = tokens * len(shapes.blocks) * (12 * model.dim + 4 * model.ffn_dim) * width
    attention_layers = shapes.next_layers + shapes.rest_layers
    per_token = 6 * multiplied + 6 * attention_layers * model.dim * seq_len
    return {
        "parameters": parameters,
        "memory_bytes": 16 * parameters + activations,
        "flops_per_token": per_token,
        "flops": per_token * tokens * config.accumulation * config.steps * world_size(),
        "disk_bytes": disk_bytes(parameters, config),
    }


def disk_bytes(parameters: int, config: TrainConfig) -> int:
    """What a run's checkpoints take: weights and AdamW's two moments, of each that stays."""
    saves = -(-config.steps // config.save_every) if config.save_every else 1
    if config.keep_last:  # one more while the oldest is not gone yet
        saves = min(saves, config.keep_last + 1)
    return 12 * parameters * saves


def describe(expected: dict[str, float]) -> str:
    """One line for people."""
    return (
        f"{expected['parameters'] / 1e6:,.2f}M parameters, "
        f"about {expected['memory_bytes'] / 2**30:,.2f} GiB of memory, "
        f"{expected['flops_per_token'] / 1e6:,.1f} MFLOP per token, "
        f"{expected['flops'] / 1e12:,.1f} TFLOP in all, "
        f"{expected['disk_bytes'] / 2**20:,.0f} MiB of disk"
    )
