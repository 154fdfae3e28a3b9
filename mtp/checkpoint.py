"""A checkpoint is one directory, complete or absent:

    config.json            format version, model config, checksums, what the caller wants remembered
    model.safetensors      weights
    tokenizer.json, ...    the tokenizer, if there is one
    training.json          step, counters and data state        } only where training may continue
    optimizer.safetensors  the optimizer's, by parameter name   }

Where a model is spread over processes, each writes its part: `model.shards/` and
`optimizer.shards/` hold a safetensors file per process, in the layout of PyTorch's distributed
checkpoints. Any number of processes reads either form; `gather` makes one plain directory of it.

It is written to a hidden sibling and renamed, so a crash or a full disk leaves the previous
checkpoint and no broken one. Nothing here is pickled. A run directory holds
`checkpoints/step-00000100/` and so on; wherever a checkpoint is asked for, a run directory stands
for its newest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtp import tokenizer as tokenizers
from mtp.distributed import from_rank_zero, gather_objects, rank, world_size
from mtp.files import checksum, publish, refuse_to_overwrite, reserve, write_tensors
from mtp.loss import is_sharded
from mtp.model import ModelConfig, Transformer
from mtp.tokenizer import Tokenizer
from mtp.versions import check_version

log = logging.getLogger("mtp")
FORMAT_VERSION = 1
_CONFIG, _TRAINING = "config.json", "training.json"
_MODEL, _OPTIMIZER = "model", "optimizer"  # .safetensors, or .shards/
_NOT_THE_MODEL = ("optimizer", "training")  # files and folders that say nothing of what it writes


@dataclass
class TrainingState:
    """What training needs to go on: plain JSON values and the optimizer's tensors by name."""

    progress: dict[str, Any]
    optimizer: dict[str, Tensor]


def save(
    model: Any,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    training: TrainingState | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of a `Transformer`, or of what else is a module and has a dataclass as
    `config`; of a sharded model, all ranks together. FileExistsError if `folder` exists; OSError,
    naming it, if it cannot be written whole.
    """
    folder = Path(folder)
    parts = {_MODEL: {name: t.detach() for name, t in _stored_tensors(model).items()}}
    if training is not None:
        parts[_OPTIMIZER] = training.optimizer
    sharded = is_sharded(model.parameters())
    decide: Callable[..., Any] = from_rank_zero if sharded else lambda call: call()
    needed = sum(t.nbytes for part in parts.values() for t in part.values())
    decide(lambda: refuse_to_overwrite(folder))
    temporary: Path | None = None
    try:
        temporary = decide(lambda: reserve(folder, needed))
        for part, tensors in parts.items():
            _write_tensors(temporary, part, tensors, sharded)
        decide(lambda: _write_texts(temporary, tokenizer, training))
        config = {
            "format_version": FORMAT_VERSION,
            "model": asdict(model.config),
            "notes": {**(notes or {})},
            "checksums": _checksums(temporary, sharded),
        }
        decide(lambda: _finish(temporary, folder, config))
    except OSError as error:
        raise OSError(
            f"cannot write the checkpoint {folder}: {error}. Earlier checkpoints are untouched"
        ) from error
    finally:
        if temporary is not None and (rank() == 0 or not sharded):
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_tensors(folder: Path, part: str, tensors: Mapping[str, Tensor], sharded: bool) -> None:
    if sharded:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter
        from torch.distributed.checkpoint import save as save_shards
        from torch.distributed.checkpoint.api import CheckpointException

        writer = HuggingFaceStorageWriter(str(folder / f"{part}.shards"), save_distributed=True)
        try:
            save_shards(dict(tensors), storage_writer=writer)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))  # of one rank; the others are alike
            raise OSError(str(cause)) from error
        return
    write_tensors(tensors, folder / f"{part}.safetensors")


def _write_texts(folder: Path, tokenizer: Tokenizer | None, training: TrainingState | None) -> None:
    if training is not None:
        (folder / _TRAINING).write_text(json.dumps(training.progress, indent=1))
    if tokenizer is not None:
        tokenizer.save(folder)


def _finish(temporary: Path, folder: Path, config: dict[str, Any]) -> None:
    (temporary / _CONFIG).write_text(json.dumps(config, indent=1))
    publish(temporary, folder)


def _checksums(folder: Path, sharded: bool) -> dict[str, int]:
    """CRC-32 of every file. Ranks share the work on shards."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    mine = files[rank() :: world_size()] if sharded else files
    sums = {str(path.relative_to(folder)): checksum(path) for path in mine}
    if not sharded:
        return sums
    return {name: value for part in gather_objects(sums) for name, value in part.items()}


def find(where: str | Path) -> Path:
    """The checkpoint that `where` names: itself, or the newest of a run directory.
    FileNotFoundError names what was looked for.
    """
    where = Path(where)
    if (where / _CONFIG).is_file():
        return where
    found = of_run(where)
    if not found:
        raise FileNotFoundError(
            f"{where} is no checkpoint (no {_CONFIG} in it) and no run directory "
            f"(no checkpoints/step-* below it)"
        )
    return found[-1]


def of_run(run_dir: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    numbered = (path for path in folders if path.name[5:].isdecimal())
    return sorted(numbered, key=lambda path: int(path.name[5:]))


def fingerprint(folder: Path) -> str:
    """What tells a model from others by its folder, ours or Hugging Face's: a hash of its files,
    their names too, without those of training alone. Of our config.json all of it counts, notes
    and every file's checksum: the same weights saved with other progress are another model.
    """
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if not any(x.startswith(_NOT_THE_MODEL) for x in path.relative_to(folder).parts):
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


class Damaged(ValueError):
    """A checkpoint's file is not what was written."""


def newest_intact(run_dir: Path) -> Path:
    """The newest checkpoint of a run whose files are what was written. Newer ones are put aside
    under another name, with a warning. Damaged if none is whole: then all stay as they are.
    """
    damaged: list[tuple[Path, Damaged]] = []
    for folder in reversed(of_run(run_dir)):
        try:
            check(folder)
        except Damaged as error:
            damaged.append((folder, error))
            continue
        for broken, why in damaged:
            aside = tempfile.mkdtemp(prefix=f"{broken.name}.damaged.", dir=broken.parent)
            broken.rename(aside)
            log.warning("%s. Put aside as %s; going back to %s", why, aside, folder)
        return folder
    first = f": {damaged[0][1]}" if damaged else ""
    raise Damaged(f"{run_dir} holds no checkpoint that is whole{first}")


def check(folder: Path) -> None:
    """Damaged names a file of the checkpoint that is not what was written."""
    for name, value in _read_config(folder).get("checksums", {}).items():
        if not (folder / name).is_file() or checksum(folder / name) != value:
            raise Damaged(f"{folder / name} is damaged: it is not what was written")


def tidy(run_dir: Path, keep: int | None) -> None:
    """Remove what killed saves left behind and, where `keep` says so, all but the newest."""
    for path in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in of_run(run_dir)[:-keep] if keep else []:
        going = path.rename(path.with_name(f".{path.name}.going"))  # never half a checkpoint
        shutil.rmtree(going, ignore_errors=True)


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
    values = _read_config(folder)["model"]
    unknown = set(values) - {f.name for f in fields(ModelConfig)}
    if unknown:
        raise ValueError(f"{folder / _CONFIG} has unknown model keys: {', '.join(sorted(unknown))}")
    return ModelConfig(**values)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _CONFIG).read_text())
        later = config["format_version"] != FORMAT_VERSION
        model = {} if later else {**config["model"]}
    except KeyError as error:
        raise Damaged(
            f"{folder / _CONFIG} is no checkpoint config of this library: it has no {error}. Of a "
            f"Hugging Face folder, scripts/convert.py source_format=llama out_format=mtp makes a "
            f"checkpoint if it is a Llama's"
        ) from error
    except (ValueError, TypeError) as error:
        raise Damaged(f"{folder / _CONFIG} is no checkpoint config: {error!r}") from error
    check_version(config, FORMAT_VERSION, folder)
    return config | {"model": model}


def load_weights(model: nn.Module, folder: Path) -> None:
    """Into a model that is whole or sharded, from either form. ValueError names every tensor that
    is missing, surplus or misshapen.
    """
    wanted = _stored_tensors(model)
    stored = {name: shape for name, (shape, _) in _stored(folder, _MODEL).items()}
    problems = [
        f"missing: {name} {tuple(t.shape)}" for name, t in wanted.items() if name not in stored
    ]
    problems += [f"surplus: {name} {shape}" for name, shape in stored.items() if name not in wanted]
    problems += [
        f"misshapen: {name} is {stored[name]}, the config wants {tuple(t.shape)}"
        for name, t in wanted.items()
        if name in stored and stored[name] != tuple(t.shape)
    ]
    if problems:
        where = _place(folder, _MODEL)
        raise ValueError(f"{where} does not fit its config. " + "; ".join(problems))
    _fill(folder, _MODEL, wanted)


def load_training(where: str | Path, model: nn.Module | None = None) -> TrainingState:
    """Progress and optimizer state of a checkpoint that training can continue from, spread over
    processes as `model` is.
    """
    folder = find(where)
    if not (folder / _TRAINING).is_file():
        raise FileNotFoundError(
            f"{folder} holds no training state: it can be loaded, but training cannot go on from it"
        )
    params = dict(model.named_parameters()) if model is not None else {}

    def empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        p = params.get(name.rpartition(".")[0])
        if p is None or p.shape != shape:
            return torch.zeros(shape, dtype=dtype)
        return torch.zeros_like(p.detach(), dtype=dtype)

    tensors = {name: empty(name, *kind) for name, kind in _stored(folder, _OPTIMIZER).items()}
    _fill(folder, _OPTIMIZER, tensors)
    return TrainingState(_training_progress(folder), tensors)


def gather(source: str | Path, folder: str | Path) -> Path:
    """One plain directory from a checkpoint that several processes wrote, in one process."""
    source = find(source)
    check(source)  # or damage would get checksums of its own
    notes = _read_config(source)["notes"]
    training = load_training(source) if (source / _TRAINING).is_file() else None
    tokenizer = load_tokenizer(source) if (source / tokenizers.INDEX_FILE).is_file() else None
    _, dtype = next(iter(_stored(source, _MODEL).values()))
    return save(load(source, dtype=dtype), folder, tokenizer, training, notes)


def _training_progress(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _TRAINING).read_text())
    except ValueError as error:
        raise Damaged(f"{folder / _TRAINING} is damaged: {error}") from error


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without entries that repeat another: a tied unembedding."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    repeated = every - {name for name, _ in model.named_parameters()}
    return {name: t for name, t in model.state_dict().items() if name not in repeated}


def _place(folder: Path, part: str) -> Path:
    """The file or the folder of shards that holds a part of a checkpoint."""
    shards, file = folder / f"{part}.shards", folder / f"{part}.safetensors"
    for name in _read_config(folder).get("checksums", {}):
        if name.startswith(f"{shards.name}/") and not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing from the checkpoint")
    if not shards.is_dir() and not file.is_file():
        raise FileNotFoundError(f"{file} is missing from the checkpoint")
    return shards if shards.is_dir() else file


def _stored(folder: Path, part: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of all tensors in a part, by name."""
    from safetensors import SafetensorError, safe_open
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    place = _place(folder, part)
    try:
        if place.is_dir():
            metadata: Any = HuggingFaceStorageReader(str(place)).read_metadata()
            found = metadata.state_dict_metadata.items()
            return {name: (tuple(x.size), x.properties.dtype) for name, x in found}
        with safe_open(place, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return {
                name: (shape, (file.get_slice(name)[:0] if shape else file.get_tensor(name)).dtype)
                for name, shape in shapes.items()
            }
    except SafetensorError as error:
        raise Damaged(f"{place} is damaged: {error}") from error


@torch.no_grad()
def _fill(folder: Path, part: str, wanted: dict[str, Tensor]) -> None:
    """Read the tensors of these names into them."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as load_shards

    place = _place(folder, part)
    if place.is_dir():
        with warnings.catch_warnings():  # that one process reads what several wrote is no accident
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load_shards(
                wanted,
                storage_reader=HuggingFaceStorageReader(str(place)),
                no_dist=not is_sharded(wanted.values()),
            )
        return
    for name, t in load_file(place).items():
        _copy(wanted[name], t)


def _copy(to: Tensor, whole: Tensor) -> None:
    if is_sharded([to]):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = to  # every rank has read the file, and takes its own part
        spread = distribute_tensor(
            whole.to(to.device), sharded.device_mesh, sharded.placements, src_data_rank=None
        )
        to.copy_(spread)
    else:
        to.copy_(whole)


def load_tokenizer(where: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint or run directory, a SentencePiece file, or the word "bytes"."""
    is_run = (Path(where) / "checkpoints").is_dir()
    return tokenizers.load_tokenizer(find(where) if is_run else where)
