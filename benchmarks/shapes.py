"""Model shapes by name: the paper's, read without a YAML library, since a machine may have only
torch, and two small ones.
"""

from __future__ import annotations

from typing import Any

from benchmarks.record import ROOT
from mtp.model import ModelConfig

SMALL = ModelConfig(dim=512, n_layers=8, n_heads=8, vocab_size=32768, max_seq_len=2048)
OWN = {
    "small": SMALL,
    "20m": ModelConfig(dim=384, n_layers=12, n_heads=6, n_future_tokens=4, max_seq_len=2048),
    # Trunk and head 1 are SmolLM2-135M's 30 layers; decoding wants a second head.
    "smollm2-135m": ModelConfig(
        dim=576,
        n_layers=31,
        n_heads=9,
        n_kv_heads=3,
        n_future_tokens=2,
        hidden_dim=1536,
        vocab_size=49152,
        tie_embeddings=True,
        rope_theta=1e5,
        max_seq_len=2048,
    ),
}


def shape(name: str) -> ModelConfig:
    """One of `OWN`, or a file of configs/model/, whose lines are `key: integer` and comments."""
    files = {file.stem: file for file in (ROOT / "configs" / "model").glob("*.yaml")}
    if name in OWN:
        return OWN[name]
    if name not in files:
        allowed = ", ".join([*OWN, *sorted(files)])
        raise ValueError(f"shape {name!r} is unknown: allowed are {allowed}")
    lines = (line.partition("#")[0] for line in files[name].read_text().splitlines())
    pairs = (line.split(":") for line in lines if line.strip())
    values: dict[str, Any] = {key.strip(): int(value) for key, value in pairs}
    return ModelConfig(**values)
