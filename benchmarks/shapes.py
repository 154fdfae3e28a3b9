"""The paper's model shapes by name, read without a YAML library: a machine may have only torch."""

from __future__ import annotations

from typing import Any

from benchmarks.record import ROOT
from mtp.model import ModelConfig

SHAPES = ROOT / "configs" / "model"


def paper_shape(name: str) -> ModelConfig:
    """`name` is that of a file in configs/model/; its lines are `key: integer` and comments."""
    path = SHAPES / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in SHAPES.glob("*.yaml")))
        raise ValueError(f"shape={name!r} is unknown: allowed are {names}")
    lines = (line.partition("#")[0] for line in path.read_text().splitlines())
    pairs = (line.split(":") for line in lines if line.strip())
    values: dict[str, Any] = {key.strip(): int(value) for key, value in pairs}
    return ModelConfig(**values)
