"""Runs that a benchmark compares: each is a cell with a folder of its own, made once by commands of
`scripts/` and read back from its record ever after, so that a benchmark that was stopped goes on
where it was.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, circumstances
from mtp.files import write_text

Values = dict[str, Any]
RECORD = "cell.json"
STOPPED = "stopped: the same command goes on from here"


def as_words(values: Values) -> list[str]:
    """Of the command line, by key."""
    return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items()]


def call(script: str, *words: str, capture: bool = False) -> str:
    """Run scripts/`script`.py; -> what it printed, if captured. SystemExit where it fails or is
    interrupted.
    """
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words]
    pipe = subprocess.PIPE if capture else None
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=pipe, text=True)
    except KeyboardInterrupt:
        raise SystemExit(STOPPED) from None
    if done.returncode:
        raise SystemExit(f"error: the run ended with status {done.returncode}: {' '.join(words)}")
    return done.stdout if capture else ""


def pieces_word(pieces: int, words: Sequence[str], folder: Path) -> str:
    """What trains on so many pieces of SentencePiece, made once of what those of `words` say that
    begin with data.
    """
    file = folder / f"pieces{pieces}.model"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        data = [word for word in words if word.startswith("data")]
        where = f"out={json.dumps(str(file.resolve()))}"
        call("train_tokenizer", where, f"vocab_size={pieces}", *data)
    return f"data.tokenizer={json.dumps(str(file))}"


def kept(folder: Path, identity: Values, make: Callable[[], Values]) -> Values:
    """The record of the cell that `identity` tells from others, by `make` where there is none yet.
    SystemExit where the folder holds the record of another.
    """
    file = folder / RECORD
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if differs := [key for key, value in identity.items() if found.get(key) != value]:
            said = f"of other {', '.join(differs)}"
            where = f"error: {folder} holds a cell of another study"
            raise SystemExit(f"{where}, {said}: move it away, or say another out=")
        return found
    found = {**identity, "commit": circumstances()["commit"], **make()}
    write_text(file, json.dumps(found, indent=1) + "\n")
    return found
