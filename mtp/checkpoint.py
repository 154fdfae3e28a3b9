"""A checkpoint is one directory, complete or absent:

    config.json            format version, model config, what the caller wants remembered
    model.safetensors      weights
    tokenizer.json, ...    the tokenizer, if there is one
    training.json          step, counters and data state       } only where training may continue
    optimizer.safetensors  AdamW's moments by parameter name   }

It is written to a hidden sibling and renamed, so a crash or a full disk leaves the previous
checkpoint and no broken one. Nothing here is pickled. A run directory holds
`checkpoints/step-00000100/` and so on; wherever a checkpoint is asked for, a run directory stands
for its newest.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtp import tokenizer as tokenizers
from mtp.model import ModelConfig, Transformer
from mtp.tokenizer import Tokenizer

FORMAT_VERSION = 1
_CONFIG, _WEIGHTS, _TRAINING, _OPTIMIZER = (
    "config.json",
    "model.safetensors",
    "training.json",
    "optimizer.safetensors",
)


@dataclass
class TrainingState:
    """What training needs to go on: plain JSON values and the optimizer's tensors by name."""

    progress: dict[str, Any]
    optimizer: dict[str, Tensor]


def save(
    model: Transformer,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    training: TrainingState | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint. FileExistsError if `folder` exists; OSError, naming it, if it cannot be
    written whole.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(
            f"{folder} exists already: a checkpoint is never overwritten, choose another folder"
        )
    weights = {
        name: t.detach().contiguous()
        for name, t in model.state_dict().items()
        if name not in _derived(model)
    }
    needed = sum(
        t.nbytes for t in [*weights.values(), *(training.optimizer.values() if training else ())]
    )
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise OSError(f"{needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free")
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        _write(temporary, model, weights, tokenizer, training, notes or {})
        os.rename(temporary, folder)
        _sync(folder.parent)
    except OSError as error:
        raise OSError(
            f"cannot write the checkpoint {folder}: {error}. Earlier checkpoints are untouched"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(
    folder: Path,
    model: Transformer,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer | None,
    training: TrainingState | None,
    notes: Mapping[str, Any],
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.chmod(0o755)  # mkdtemp's is private
    config = {"format_version": FORMAT_VERSION, "model": asdict(model.config), "notes": {**notes}}
    try:
        save_file(weights, folder / _WEIGHTS)
        if training is not None:
            save_file(
                {k: t.contiguous() for k, t in training.optimizer.items()}, folder / _OPTIMIZER
            )
    except SafetensorError as error:  # its way of saying that the disk is full
        raise OSError(str(error)) from error
    if training is not None:
        (folder / _TRAINING).write_text(json.dumps(training.progress, indent=1))
    if tokenizer is not None:
        tokenizer.save(folder)
    (folder / _CONFIG).write_text(json.dumps(config, indent=1))
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: a reader or a crash sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def find(where: str | Path) -> Path:
    """The checkpoint that `where` names: itself, or the newest of a run directory.
    FileNotFoundError names what was looked for.
    """
    where = Path(where)
    if (where / _CONFIG).is_file():
        return where
    folders = (where / "checkpoints").glob("step-*")
    found = sorted(
        (path for path in folders if path.name[5:].isdecimal()), key=lambda path: int(path.name[5:])
    )
    if not found:
        raise FileNotFoundError(
            f"{where} is no checkpoint (no {_CONFIG} in it) and no run directory "
            f"(no checkpoints/step-* below it)"
        )
    return found[-1]


def load(
    where: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """The model of a checkpoint or run directory. ValueError names missing, surplus and misshapen
    tensors.
    """
    folder = find(where)
    model = Transformer(load_config(folder), torch.Generator()).to(device=device, dtype=dtype)
    load_weights(model, folder)
    return model


def load_config(folder: Path) -> ModelConfig:
    try:
        config = json.loads((folder / _CONFIG).read_text())
        version, values = config["format_version"], dict(config["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _CONFIG} is no checkpoint config: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version}; this release reads {FORMAT_VERSION}"
        )
    unknown = set(values) - {f.name for f in fields(ModelConfig)}
    if unknown:
        raise ValueError(f"{folder / _CONFIG} has unknown model keys: {', '.join(sorted(unknown))}")
    return ModelConfig(**values)


def load_weights(model: nn.Module, folder: Path) -> None:
    tensors = _read(folder / _WEIGHTS)
    wanted = {name: t for name, t in model.state_dict().items() if name not in _derived(model)}
    problems = [
        f"missing: {name} {tuple(t.shape)}" for name, t in wanted.items() if name not in tensors
    ]
    problems += [
        f"surplus: {name} {tuple(t.shape)}" for name, t in tensors.items() if name not in wanted
    ]
    problems += [
        f"misshapen: {name} is {tuple(tensors[name].shape)}, the config wants {tuple(t.shape)}"
        for name, t in wanted.items()
        if name in tensors and tensors[name].shape != t.shape
    ]
    if problems:
        raise ValueError(f"{folder / _WEIGHTS} does not fit its config. " + "; ".join(problems))
    with torch.no_grad():
        for name, t in wanted.items():
            t.copy_(tensors[name])


def _derived(model: nn.Module) -> set[str]:
    """Entries of the state dict that repeat another: a tied unembedding."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the checkpoint")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def load_training(where: str | Path) -> TrainingState:
    """Progress and optimizer state of a checkpoint that training can continue from."""
    folder = find(where)
    if not (folder / _TRAINING).is_file():
        raise FileNotFoundError(
            f"{folder} holds no training state: it can be loaded, but training cannot go on from it"
        )
    try:
        progress = json.loads((folder / _TRAINING).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / _TRAINING} is damaged: {error}") from error
    return TrainingState(progress, _read(folder / _OPTIMIZER))


def load_tokenizer(where: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint or run directory, a SentencePiece file, or the word "bytes"."""
    is_run = (Path(where) / "checkpoints").is_dir()
    return tokenizers.load_tokenizer(find(where) if is_run else where)
