"""A run's directory: begun or gone on with, and never mixed up with another run's."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mtp import checkpoint

RESUME = ("false", "true", "auto")


def resume_word(resume: object) -> str:
    """One of RESUME: YAML reads the first two as booleans."""
    word = str(resume).lower()
    if word not in RESUME:
        raise ValueError(f"resume={word!r}: allowed are {', '.join(RESUME)}")
    return word


def open_run_dir(run_dir: Path, resume: str, disk_bytes: float) -> Path | None:
    """Make sure that the run can write there, and that nothing is mixed up with an earlier run; ->
    the checkpoint to go on from.
    """
    started = bool(checkpoint.of_run(run_dir))
    if started and resume == "false":
        raise ValueError(
            f"run_dir={run_dir} holds a run already: say resume=true or choose another"
        )
    if not started and resume == "true":
        raise ValueError(f"resume=true, but run_dir={run_dir} holds no checkpoint")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run_dir).close()
    except OSError as error:
        raise OSError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error
    checkpoint.tidy(run_dir, None)
    written = sum(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*.safetensors"))
    free, needed = shutil.disk_usage(run_dir).free, disk_bytes - written
    if free < needed:
        raise OSError(
            f"run_dir={run_dir} has {free / 2**20:,.1f} MiB free, the run's checkpoints need about "
            f"{needed / 2**20:,.1f}: save less often (train.save_every), keep fewer "
            f"(train.keep_last) or write elsewhere"
        )
    return checkpoint.newest_intact(run_dir) if started else None
