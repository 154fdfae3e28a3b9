"""What a frozen trunk makes of a corpus, on disk: computed once, read by every epoch and by heads
of every kind and number.

    write_states("states", model, corpus, seq_len=1024, budget=8 * 2**30)
    batches = StateBatches("states", model, corpus, seq_len=1024, batch_size=8)
    train(model, batches, DraftLoss(4), config)            the trunk does not run

    states/states.bin     row after row of T x D numbers
    states/states.json    whose they are: trunk, corpus, T; their type, and how many rows

Rows are those of `mtp.data.Batches`, and do not depend on the number of heads. Where a budget holds
but some, they lie evenly in the corpus.

Letters: B rows, T positions, D width.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mtp.data import Batches, Corpus
from mtp.files import publish, write_text
from mtp.loss import Batch

log = logging.getLogger("mtp")
INDEX, STATES = "states.json", "states.bin"
FORMAT_VERSION = 1
STORED: dict[str, Any] = {"bfloat16": np.int16, "float32": np.float32}  # numpy has no bfloat16
SAY_EVERY = 10.0  # seconds


class FrozenTrunk(Protocol):
    """What is asked of `mtp.interop.attach.AttachedHeads`."""

    n_future_tokens: int

    def states(self, tokens: Tensor) -> Tensor:
        """Ids (B, T) -> what heads read (B, T, D)."""

    def identity(self) -> dict[str, Any]:
        """Plain JSON values that tell the trunk from others; `dim` is D."""

    def parameters(self) -> Any: ...


def write_states(
    folder: str | Path,
    model: FrozenTrunk,
    corpus: Corpus,
    seq_len: int,
    budget: int,
    dtype: str = "bfloat16",
    batch_size: int = 8,
) -> Path:
    """Write the states of all rows, or of as many as `budget` bytes hold. The folder is complete or
    absent; the same call goes on where one was interrupted.

    dtype: bfloat16, to which a float32 trunk's states are rounded, or float32. ValueError where the
    budget holds no row, FileExistsError, OSError where the disk has no room for what it holds.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: states are never overwritten")
    if dtype not in STORED:
        raise ValueError(f"dtype={dtype!r} is unknown: allowed are {', '.join(STORED)}")
    rows = Batches(corpus, seq_len, 1, batch_size, shuffle=False)
    index = _identity(model, corpus, seq_len)
    row_bytes = seq_len * index["trunk"]["dim"] * np.dtype(STORED[dtype]).itemsize
    index |= {"dtype": dtype, "rows": _how_many(rows.n_rows, row_bytes, budget)}
    partial = folder.with_name(f".{folder.name}.partial")
    done = _begin(partial, index, row_bytes)
    _check_room(partial, (index["rows"] - done) * row_bytes)
    _append(partial / STATES, model, rows, done, index, batch_size)
    publish(partial, folder)
    return folder


def _identity(model: FrozenTrunk, corpus: Corpus, seq_len: int) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "trunk": model.identity(),
        "corpus": corpus.fingerprint,
        "seq_len": seq_len,
    }


def _how_many(n_rows: int, row_bytes: int, budget: int) -> int:
    count = min(n_rows, budget // row_bytes)
    if count < 1:
        raise ValueError(f"budget={budget}: the states of one row take {row_bytes} bytes")
    size = count * row_bytes / 2**30
    if count < n_rows:
        said = "%d of %d rows have states, %.2f GiB: the budget holds no more; the rest is left out"
        log.info(said, count, n_rows, size)
    else:
        log.info("all %d rows have states, %.2f GiB", count, size)
    return count


def _begin(partial: Path, index: dict[str, Any], row_bytes: int) -> int:
    """The folder to write to; -> how many rows it holds, from an earlier call of the same kind."""
    text, file = json.dumps(index, indent=1) + "\n", partial / STATES
    if not (partial / INDEX).is_file() or (partial / INDEX).read_text() != text:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_text(partial / INDEX, text)
    file.touch()
    done = file.stat().st_size // row_bytes
    os.truncate(file, done * row_bytes)  # half a row may be there
    return done


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder.parent}: the states need {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB "
            f"are free: give a smaller budget"
        )


def _append(
    file: Path,
    model: FrozenTrunk,
    rows: Batches,
    done: int,
    index: dict[str, Any],
    batch_size: int,
) -> None:
    device, said = next(model.parameters()).device, time.monotonic()
    began, first, count = said, done, index["rows"]
    with file.open("ab") as out:
        while done < count:
            number = np.arange(done, min(done + batch_size, count))
            batch = rows.take(_spread(number, count, rows.n_rows), number < count)
            states = model.states(batch.row[:, :-1].to(device))
            out.write(_numbers(states, index["dtype"]).tobytes())
            done = int(number[-1]) + 1
            if (now := time.monotonic()) - said > SAY_EVERY:
                said, left = now, (now - began) * (count - done) / (done - first)
                log.info("states of %d of %d rows, %d:%02d left", done, count, *divmod(left, 60))


def _spread(number: np.ndarray, count: int, n_rows: int) -> np.ndarray:
    """The rows of a corpus that `count` rows with states are, evenly apart."""
    return number * n_rows // count


def _numbers(states: Tensor, dtype: str) -> np.ndarray:
    stored = states.detach().to("cpu", getattr(torch, dtype)).contiguous()
    return (stored.view(torch.int16) if dtype == "bfloat16" else stored).numpy()


class StateBatch(Batch):
    """states: (B, T, D) what the trunk made of the first T tokens of each row."""

    states: Tensor

    def __new__(cls, batch: Batch, states: Tensor) -> StateBatch:
        self = super().__new__(cls, *batch)
        self.states = states
        return self

    def to(self, device: torch.device | str) -> StateBatch:
        return StateBatch(super().to(device), self.states.to(device, non_blocking=True))

    @property
    def known(self) -> dict[str, Tensor]:
        return {"states": self.states}


class StateBatches(Batches):
    """`Batches` of the rows that have states, which they carry. ValueError where a folder's states
    are of another trunk or corpus than those given, or are damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        model: FrozenTrunk,
        corpus: Corpus,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = None,
    ) -> None:
        index = _read_index(Path(folder), _identity(model, corpus, seq_len))
        count = index["rows"]
        super().__init__(corpus, seq_len, model.n_future_tokens, batch_size, seed, epochs=epochs)
        self._rows, self.n_rows = _spread(np.arange(count), count, self.n_rows), count
        self._identity["rows"] = count
        shape = (count, seq_len, index["trunk"]["dim"])
        self._states = np.memmap(Path(folder) / STATES, STORED[index["dtype"]], "r", shape=shape)

    def take(self, row: np.ndarray, real: np.ndarray) -> StateBatch:
        states = torch.from_numpy(self._states[row])
        if states.dtype == torch.int16:
            states = states.view(torch.bfloat16)
        return StateBatch(super().take(self._rows[row], real), states)


def _read_index(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the folder holds no states")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        width = np.dtype(STORED[index["dtype"]]).itemsize
        size = index["rows"] * index["seq_len"] * index["trunk"]["dim"] * width
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    for key, value in wanted.items():
        if index[key] != value:
            raise ValueError(f"{file}: {key}={index[key]}, here {value}: write other states")
    if (folder / STATES).stat().st_size != size:
        raise ValueError(f"{folder / STATES} is damaged: it does not have {size} bytes")
    return index
