"""How a result is kept: one JSON file per answer, with what is needed to judge and repeat it.

Also the small parser by which benchmarks take `key=value` words over a dataclass, so that they run
where only torch and the checkout are.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch

from mtp.files import write_text
from mtp.versions import check_version

ROOT = Path(__file__).resolve().parent.parent
FORMAT_VERSION = 1
T = TypeVar("T")


def record(
    name: str, values: Mapping[str, Any], config: Any = None, folder: Path | None = None
) -> Path:
    """Write `name`.json (default: benchmarks/results/) with values, command, commit, machine, date.

    `values` holds plain JSON; a measured figure stands beside its spread and its baseline.
    """
    folder = folder or ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    entry = {
        "format_version": FORMAT_VERSION,
        "name": name,
        **circumstances(),
        "values": dict(values),
    }
    if config is not None:
        entry["config"] = asdict(config)
    write_text(path, json.dumps(entry, indent=1) + "\n")
    return path


def read(path: Path) -> dict[str, Any]:
    """What `record` wrote. ValueError where a later version did."""
    entry = json.loads(path.read_text(encoding="utf-8"))
    check_version(entry, FORMAT_VERSION, path)
    return entry


def circumstances() -> dict[str, Any]:
    """Command, commit, hardware, software and date of this process."""
    script = Path(sys.argv[0]).resolve()
    shown = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return {
        "command": shlex.join(["python", shown, *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "-s") else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def hardware() -> str:
    """The processor with its cores, and the accelerator if there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    accelerator = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {os.cpu_count()} cores{accelerator}"


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # a machine without git has results too
        return ""
    return done.stdout.strip()


def parse(kind: type[T], words: Sequence[str]) -> T:
    """`key=value` words -> the dataclass; values are JSON where they parse as such, else text."""
    hints, given = get_type_hints(kind), {}
    allowed = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in allowed:
            raise SystemExit(f"error: {word!r}: give key=value, keys are {', '.join(allowed)}")
        given[key] = _value(text, hints[key], key)
    return kind(**given)


def _value(text: str, hint: Any, key: str) -> Any:
    if hint is str:
        return text
    try:
        return _as(hint, json.loads(text.lower() if text in ("True", "False") else text))
    except ValueError:
        wanted = f"{hint}, as JSON" if get_args(hint) else hint.__name__
        raise SystemExit(f"error: {key}={text!r} is no value of type {wanted}") from None


def _as(hint: Any, value: Any) -> Any:
    """A JSON value as the type that it has to be of; ValueError where it is of another."""
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not (get_origin(hint) or hint):
        raise ValueError
    *_, inner = get_args(hint) or [None]
    if inner is None:
        return value
    if isinstance(value, dict):  # whose keys are text in JSON
        return {key: _as(inner, each) for key, each in value.items()}
    return [_as(inner, each) for each in value]


def launch(kind: type[T], run: Callable[[T], Any], stopped: str = "stopped") -> None:
    """What `python -m benchmarks.NAME` does: the last line is what `run` makes of the words, as
    JSON. What the library tells of its progress goes to stderr; what goes wrong ends in one line.
    stopped: what Ctrl-C ends in.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(json.dumps(run(parse(kind, sys.argv[1:]))))
    except (ValueError, OSError, ImportError) as error:
        said = str(error).replace("\n", " ")
        raise SystemExit(f"error: {said}") from error
    except KeyboardInterrupt:
        raise SystemExit(stopped) from None


def quicken(config: Any, smaller: Mapping[str, Any]) -> None:
    """Where `quick` is set: `smaller` values, and files beside those of the whole, not in their
    place.
    """
    if config.quick:
        files = {k: f"{getattr(config, k)}_quick" for k in ("name", "out") if hasattr(config, k)}
        vars(config).update(smaller, **files)
