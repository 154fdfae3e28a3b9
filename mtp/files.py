"""Files and folders that are whole or absent: what is written gets its name when all of it is
there, so a crash or a full disk leaves what was before, and nothing broken.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

PYTORCH = {"format": "pt"}  # metadata that transformers looks for in weights


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: a reader or a crash sees the old text or the new one. A missing
    folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """One safetensors file. OSError where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: t.contiguous() for k, t in tensors.items()}, file, metadata)
    except SafetensorError as error:  # its way of saying that the disk is full
        raise OSError(str(error)) from error


@contextmanager
def whole(folder: Path, needed: int) -> Iterator[Path]:
    """A hidden folder to write `needed` bytes to. It becomes `folder` when the block ends well, and
    vanishes when it does not. FileExistsError if `folder` exists; OSError, naming it, if it cannot
    be written whole.
    """
    refuse_to_overwrite(folder)
    temporary: Path | None = None
    try:
        temporary = reserve(folder, needed)
        yield temporary
        publish(temporary, folder)
    except OSError as error:
        raise OSError(f"cannot write {folder}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_to_overwrite(folder: Path) -> None:
    if folder.exists():
        raise FileExistsError(
            f"{folder} exists already: a checkpoint is never overwritten, choose another folder"
        )


def reserve(folder: Path, needed: int) -> Path:
    """A hidden folder beside the one wanted."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(f"{needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free")
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))


def publish(temporary: Path, folder: Path) -> None:
    """Make all durable, readable as other new files are, and give the folder its name."""
    for path in (*temporary.rglob("*"), temporary):
        _unlock(path)
        _sync(path)
    os.rename(temporary, folder)
    _sync(folder.parent)


def _unlock(path: Path) -> None:
    """What mkdtemp and safetensors make is their owner's alone."""
    mask = os.umask(0)  # there is no way to ask without setting it
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            value = zlib.crc32(chunk, value)
    return value
