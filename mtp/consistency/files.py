"""Trajectories on disk: a folder of shards, JSON lines, and a report.

    shard-0000000.jsonl     what the responses from number 0 on gave, those that filters dropped
                            left out. Line 1 is a header: format version, schema, what trajectories
                            are of, which responses the shard covers, what they cost. Each further
                            line is a trajectory: {"prompt": ids, "windows": ids of each state of
                            each window, "length": tokens}
    report.json             the sum over all shards

Shards are written whole, one after another, so that a collection that was stopped goes on where the
last one ends. Trajectories do not depend on what is decoded beside them: the files are those of a
run in one piece, except for passes and seconds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from mtp.checkpoint import fingerprint
from mtp.consistency.filters import FilterConfig, why_dropped
from mtp.consistency.trajectories import Collection, Trajectory, whole_windows
from mtp.decode.contract import Request
from mtp.decode.sampling import Sampling
from mtp.distributed import from_rank_zero
from mtp.files import write_text
from mtp.tokenizer import Tokenizer
from mtp.versions import check_version

FORMAT_VERSION = 1
SCHEMA = {"prompt": "[id]", "windows": "[window][state][id]", "length": "tokens of the response"}
REPORT = "report.json"


@dataclass(frozen=True)
class Origin:
    """What trajectories are of. tokenizer, model: fingerprints. settings: all else that decides
    what is collected, JSON values; a folder holds trajectories of one origin.
    """

    tokenizer: str
    model: str
    window: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def words(self) -> dict[str, Any]:
        written = json.dumps(self.settings, sort_keys=True)
        digest = hashlib.sha256(written.encode()).hexdigest()[:16]
        return {**asdict(self), "settings": json.loads(written), "settings_hash": digest}


@dataclass
class Report:
    """skipped: prompts not read, by reason; dropped: responses, by the filter that dropped them.
    All other counts are of all responses. unfinished: cut at their most new tokens. passes: of the
    model, over all rows of a batch and after the prompts'; read_tokens: what it read in them.
    seconds: of collecting.
    """

    skipped: dict[str, int] = field(default_factory=dict)
    responses: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    unfinished: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    windows: int = 0
    states: int = 0
    passes: int = 0
    read_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Report) -> Report:
        return Report(
            **{key: _sum(value, getattr(other, key)) for key, value in vars(self).items()}
        )


def _sum(one: Any, other: Any) -> Any:
    return dict(Counter(one) + Counter(other)) if isinstance(one, dict) else one + other


def collect_shards(
    folder: Path,
    model: Any,
    requests: Sequence[Request],
    origin: Origin,
    tokenizer: Tokenizer,
    filters: FilterConfig,
    *,
    batch_size: int = 8,
    sampling: Sampling | None = None,
    shard_size: int = 256,
    tell: Callable[[int, int], None] = lambda responses, total: None,
) -> Report:
    """Collect what `folder` lacks, `shard_size` responses to a shard. Prompts that are empty, or
    too long for the context, are skipped. tell(responses so far, responses in all).

    ValueError: the folder holds trajectories of another origin, what `Collection` refuses, no
    prompt that can be read, or filters that dropped every response.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size} must be at least 1")
    requests, skipped = _readable(requests, origin.window, model.config.max_seq_len)
    folder.mkdir(parents=True, exist_ok=True)
    total = _found(folder, origin)
    collection = Collection(model, requests[total.responses :], origin.window, batch_size, sampling)
    passes, read, since = 0, 0, time.monotonic()
    trajectories = _told(collection, len(requests), tell)
    while shard := list(islice(trajectories, shard_size)):
        now = time.monotonic()
        cost = collection.passes - passes, collection.columns - read, now - since
        passes, read, since = collection.passes, collection.columns, now
        part = requests[total.responses : total.responses + len(shard)]
        kept, report = _sift(shard, part, tokenizer, filters)
        report.passes, report.read_tokens, report.seconds = cost
        _write_shard(folder, total.responses, origin, kept, report)
        total += report
    total.skipped = skipped
    written = {"origin": origin.words(), **asdict(total)}
    write_text(folder / REPORT, json.dumps(written, indent=2) + "\n")
    _require_some(total)
    return total


def _readable(
    requests: Sequence[Request], window: int, context: int
) -> tuple[list[Request], dict[str, int]]:
    """Those that are collected, and by reason how many are not."""
    some = [request for request in requests if request.prompt]
    readable = [r for r in some if len(r.prompt) + whole_windows(r, window) <= context]
    counts = {"empty": len(requests) - len(some), "too_long": len(some) - len(readable)}
    skipped = {reason: count for reason, count in counts.items() if count}
    if not readable:
        raise ValueError(
            f"none of {len(requests)} prompts can be read ({skipped}): a prompt and "
            f"max_new_tokens, in whole windows of {window}, must fit max_seq_len={context}"
        )
    return readable, skipped


def _told(
    collection: Collection, total: int, tell: Callable[[int, int], None]
) -> Iterator[Trajectory]:
    before = total - len(collection.requests)
    for number, trajectory in enumerate(collection, before + 1):
        tell(number, total)
        yield trajectory


def _sift(
    shard: Sequence[Trajectory],
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    filters: FilterConfig,
) -> tuple[list[Trajectory], Report]:
    reasons = [why_dropped(t.response, tokenizer.decode(t.response), filters) for t in shard]
    kept = [t for t, reason in zip(shard, reasons, strict=True) if reason is None]
    cut = (
        t.length == r.max_new_tokens and not (r.stop and r.stop(t.response))
        for t, r in zip(shard, requests, strict=True)
    )
    return kept, Report(
        responses=len(shard),
        kept=len(kept),
        dropped=dict(Counter(reason for reason in reasons if reason is not None)),
        unfinished=sum(cut),
        prompt_tokens=sum(len(t.prompt) for t in shard),
        tokens=sum(t.length for t in shard),
        windows=sum(len(t.windows) for t in shard),
        states=sum(len(states) for t in shard for states in t.windows),
    )


def _require_some(total: Report) -> None:
    if total.responses and not total.kept:
        reasons = ", ".join(f"{count} for {word}" for word, count in total.dropped.items())
        raise ValueError(
            f"filters dropped all {total.responses} responses ({reasons}): loosen filters.*, or "
            f"look at what the model writes"
        )


def _write_shard(
    folder: Path, first: int, origin: Origin, kept: Sequence[Trajectory], report: Report
) -> None:
    header = {
        "format_version": FORMAT_VERSION,
        "schema": SCHEMA,
        **origin.words(),
        "first": first,
        "report": asdict(report),
    }
    lines = [header, *map(asdict, kept)]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    write_text(folder / f"shard-{first:07d}.jsonl", text)


# What is there already.


def read_trajectories(
    where: str | Path, tokenizer: str, window: int, model: Path | None = None
) -> Iterator[Trajectory]:
    """Of all shards of a folder, or of one shard, in the order of the prompts. tokenizer: its
    fingerprint. model: the folder of the one that made them; None: any did.

    ValueError, before the first trajectory: what was collected is of something else, or shards are
    missing. ValueError, at the trajectory: the file and line that is damaged.
    """
    wanted: dict[str, tuple[Any, str]] = {"tokenizer": (tokenizer, ""), "window": (window, "")}
    if model is not None:
        wanted["model"] = from_rank_zero(lambda: fingerprint(model)), f", {model}"
    headers = _some_headers(Path(where))
    for file, header in headers.items():
        for key, (value, name) in wanted.items():
            if header[key] != value:
                raise ValueError(
                    f"{file}: trajectories of {key}={header[key]!r}, wanted are those of "
                    f"{value!r}{name}: collect them anew"
                )
    return (t for file, header in headers.items() for t in _read_shard(file, header))


def origin_of(where: str | Path) -> Origin:
    """Of the trajectories there. ValueError: see `read_trajectories`."""
    header, *_ = _some_headers(Path(where)).values()
    return Origin(**{f.name: header[f.name] for f in fields(Origin)})


def _some_headers(where: Path) -> dict[Path, dict[str, Any]]:
    headers = _headers(where)
    if not headers:
        raise ValueError(f"{where}: no trajectories there; collect_trajectories.py writes some")
    return headers


def _found(folder: Path, origin: Origin) -> Report:
    """What the shards of a folder have in sum. ValueError: they are of another origin."""
    wanted, total = origin.words(), Report()
    for file, header in _headers(folder).items():
        keys = [key for key in wanted if header.get(key) != wanted[key]]
        if keys:
            key = keys[0]
            raise ValueError(
                f"{file}: {key} is {header.get(key)!r} there, {wanted[key]!r} here: choose another "
                f"folder, or the settings it was begun with"
            )
        total += Report(**header["report"])
    return total


def _headers(where: Path) -> dict[Path, dict[str, Any]]:
    """By shard, in order, each beginning where the one before it ends."""
    files = [where] if where.is_file() else sorted(where.glob("shard-*.jsonl"))
    headers = {file: _read_header(file) for file in files}
    at = headers[where]["first"] if where.is_file() else 0
    for file, header in headers.items():
        if header["first"] != at:
            raise ValueError(f"{file}: begins at response {header['first']}, {at} is missing")
        at += header["report"]["responses"]
    return headers


def _read_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as lines:
        line = lines.readline()
    try:
        header = json.loads(line)
        if header["format_version"] == FORMAT_VERSION:
            str(header["tokenizer"]), str(header["model"]), int(header["window"])
            int(header["first"]), Report(**header["report"]), {**header["settings"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}, line 1: is no header of trajectories ({error!r})") from error
    check_version(header, FORMAT_VERSION, file)
    return header


def _read_shard(file: Path, header: Mapping[str, Any]) -> Iterator[Trajectory]:
    kept, number = header["report"]["kept"], 1
    with file.open("rb") as lines:
        next(lines)
        for number, line in enumerate(lines, start=2):
            try:
                trajectory = Trajectory(**json.loads(line))
                _check(trajectory, header["window"])
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: is no trajectory ({error})") from error
            yield trajectory
    if number - 1 != kept:
        raise ValueError(f"{file}: ends at line {number}, should have {kept} trajectories")


def _check(trajectory: Trajectory, window: int) -> None:
    states = [state for states in trajectory.windows for state in states]
    if not all(isinstance(i, int) for ids in (trajectory.prompt, *states) for i in ids):
        raise ValueError("ids must be integers")
    if not trajectory.prompt or not all(trajectory.windows):
        raise ValueError("a prompt or a window is empty")
    if any(len(state) != window for state in states):
        raise ValueError(f"a state has not {window} tokens")
    covered = len(trajectory.windows) * window
    if not covered - window < trajectory.length <= covered:
        raise ValueError(f"length={trajectory.length} does not fit its windows")
