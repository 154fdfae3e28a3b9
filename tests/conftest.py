"""What all tests share: one thread (two are slower on small tensors), tiny models, the device."""

from __future__ import annotations

import json
import logging
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

import mtp
from mtp.heads import HEADS
from mtp.model import ModelConfig, Transformer
from mtp.tokenizer import ByteTokenizer, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
KINDS = tuple(HEADS)
BLOCK_KINDS = tuple(kind for kind in KINDS if HEADS[kind].takes_blocks)
# Shared evaluation data; tests that want it skip without.
DATA = Path(os.environ.get("MTP_TEST_DATA", "/nonexistent"))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Benchmarks and scripts choose another number; each test begins with one again."""
    torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    """MTP_TEST_DEVICE=cuda runs the same suite on a GPU."""
    return torch.device(os.environ.get("MTP_TEST_DEVICE", "cpu"))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script as `python scripts/NAME.py WORDS` does, in this process; -> stdout, stderr."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *words])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr()

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # scripts set it; this takes it back
    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


def tiny(
    kind: str = "transformer", *, seed: int = 0, gain: float = 1.0, **overrides
) -> Transformer:
    """A model of a few thousand fp64 parameters; `gain` sharpens its predictions: no near-ties."""
    shape = {"dim": 16, "n_layers": 5, "n_heads": 2, "n_kv_heads": 1, "n_future_tokens": 4}
    sizes = {"vocab_size": 13, "multiple_of": 8, "max_seq_len": 96, "head": kind}
    config = ModelConfig(**(shape | sizes | overrides))
    model = Transformer(config, torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed + 1)
        for parameter in model.parameters():
            parameter.mul_(gain)
            # Norms of ones and maps of zeros would hide mistakes.
            if parameter.ndim == 1 or not parameter.any():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise * 0.2)
    return model


def a_run(
    folder: Path, text: Path | None = None, tokenizer: Tokenizer | None = None, **shape
) -> Path:
    """A run directory, as training on `text` leaves it, of a model of bytes that was not trained;
    held out is the text itself.
    """
    model = tiny(**{"vocab_size": 257, "max_seq_len": 64, **shape}).float()
    mtp.save(model, folder / "checkpoints" / "step-00000001", tokenizer or ByteTokenizer())
    if text is not None:
        data = {"source": "text", "path": str(text), "val_path": str(text)}
        (folder / "run.json").write_text(json.dumps({"data": data}))
    return folder
