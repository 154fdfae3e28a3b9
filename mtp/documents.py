"""Where documents come from, and which are held out."""

import gzip
import hashlib
import json
import logging
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any

from mtp.evaluate import micro
from mtp.overlap import Overlap
from mtp.packages import package_files
from mtp.records import WRITTEN, Document, Keys, document_of, parsed
from mtp.tasks.table import Task, make_task

log = logging.getLogger("mtp")


@dataclass
class DataConfig:
    """Where documents come from, which are held out, and how they are cut into rows.

    Held out are the documents of `val_path` or `val_split` where given, else the top-level packages
    or files that `holdout` lists, else a share `val_fraction` chosen by a hash of the text. Of the
    others a `share` is for training, chosen by another hash.
    """

    source: str = "stdlib"  # a key of SOURCES
    path: str | None = None  # file or folder; for `datasets` a folder or a name on the hub
    pattern: str | None = None  # which files of a folder, such as "*.py"
    packages: list[str] = field(default_factory=list)  # `code`: installed, permissively licensed
    micro_share: float = 0.2  # `code`: of the bytes, what is micro-programs
    task: str | None = None  # `task`: a key of `mtp.tasks.table.TASKS`
    task_args: dict[str, int] = field(default_factory=dict)  # its parameters
    # JSON files of problems that models are tested on: documents that share 13 words in a row with
    # one are left out. `code` needs them, or [].
    benchmarks: list[str] | None = None
    text_key: str | None = "text"
    prompt_key: str | None = "prompt"
    completion_key: str | None = "completion"
    messages_key: str | None = "messages"
    name: str | None = None  # `datasets`: the configuration
    split: str = "train"
    streaming: bool = False
    val_path: str | None = None
    val_split: str | None = None
    val_fraction: float = 0.01
    holdout: list[str] = field(default_factory=list)
    share: float = 1.0
    seq_len: int = 256
    tokenizer: str = "bytes"  # what `load_tokenizer` takes
    seed: int = 0  # of the order of rows, and of a task's problems

    def __post_init__(self) -> None:
        of_files = self.source in ("stdlib", "code", "text", "folder")
        finds = self.source in ("stdlib", "code", "task")
        by_task = self.source == "task"
        separate = bool(self.val_path or self.val_split)
        for wrong, message in (
            (self.source not in SOURCES, f"source={self.source!r}: allowed: {', '.join(SOURCES)}"),
            (not finds and not self.path, f"path: source={self.source!r} needs one"),
            (finds and self.path, f"path: source={self.source!r} finds its own"),
            (self.source != "code" and self.packages, "packages: for source='code' only"),
            (not 0 <= self.micro_share < 1, f"micro_share={self.micro_share}: allowed: [0, 1)"),
            (
                self.source == "code" and self.benchmarks is None,
                "benchmarks: source='code' needs the files of HumanEval and MBPP, to leave out "
                "what overlaps with them; [] leaves nothing out",
            ),
            (self.source == "shards" and self.benchmarks, "benchmarks: not for source='shards'"),
            (self.source == "folder" and not self.pattern, "pattern: source='folder' needs one"),
            (
                self.val_path and (finds or self.source == "shards"),
                "val_path: not for this source",
            ),
            (self.source != "datasets" and self.val_split, "val_split: for source='datasets' only"),
            (self.source != "datasets" and self.streaming, "streaming: for source='datasets' only"),
            (self.streaming and not separate, "streaming: needs val_split or val_path"),
            (
                self.holdout and not of_files,
                "holdout: for source text, folder, stdlib or code only",
            ),
            (self.holdout and separate, "holdout: not together with val_path"),
            (not 0 <= self.val_fraction < 1, f"val_fraction={self.val_fraction}: allowed: [0, 1)"),
            (not 0 < self.share <= 1, f"share={self.share}: allowed: (0, 1]"),
            (self.source in ("shards", "task") and self.share < 1, "share: not for this source"),
            (self.seq_len < 1, f"seq_len={self.seq_len}: must be at least 1"),
            (self.seed < 0, f"seed={self.seed}: must be at least 0"),
            (not by_task and (self.task or self.task_args), "task: for source='task' only"),
            (by_task and self.tokenizer != "bytes", "tokenizer: source='task' is in bytes"),
            (by_task and not self.val_fraction, "val_fraction: source='task' needs some"),
        ):
            if wrong:
                raise ValueError(f"data.{message}")
        if by_task:
            self._check_task()

    def _check_task(self) -> None:
        try:
            make_task(self.task, self.task_args)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None


# Sources: one word, one function from a config to documents in a fixed order.


def _text(config: DataConfig) -> Iterator[Document]:
    root = Path(str(config.path))
    for file in _files(config, "*.txt"):
        name = str(file.relative_to(root)) if file != root else file.name
        yield Document(((_decode(file.read_bytes(), file), True),), name)


def _stdlib(config: DataConfig) -> Iterator[Document]:
    """The Python standard library's own source, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in _find(root, config.pattern or "*.py"):
        name = file.relative_to(root)
        # What the build generated differs between machines of the same Python.
        generated = name.parts[0].startswith(("_sysconfigdata", "config-"))
        if generated or {"test", "tests", "idle_test"}.intersection(name.parts):
            continue
        try:
            yield Document(((file.read_bytes().decode("utf-8"), True),), str(name))
        except UnicodeDecodeError:
            continue


def _code(config: DataConfig) -> Iterator[Document]:
    """The standard library, packages and micro-programs, each text once."""
    seen: set[str] = set()
    n_bytes = 0
    for document in chain(_stdlib(config), _packages(config)):
        if document.text not in seen:
            seen.add(document.text)
            n_bytes += len(document.text.encode("utf-8"))
            yield document
    wanted = n_bytes * config.micro_share / (1 - config.micro_share)
    for number, text in enumerate(micro.training_text()):
        if wanted <= 0:
            return
        wanted -= len(text)  # ASCII
        yield Document(((text, True),), f"micro/{number:06d}.py")


def _packages(config: DataConfig) -> Iterator[Document]:
    for package in config.packages:
        for name, file in package_files(package):
            yield Document(((_decode(file.read_bytes(), file), True),), name)


def _lines(config: DataConfig) -> Iterator[Document]:
    for file in _files(config, "*.txt"):
        for line in _decode(file.read_bytes(), file).split("\n"):
            if line.strip():
                yield Document(((line, True),), file.name)


def _jsonl(config: DataConfig) -> Iterator[Document]:
    for file in _files(config, "*.jsonl"):
        offset = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{file}, line {number}"
                text = _decode(line, file, offset)
                offset += len(line)
                if text.strip():
                    yield document_of(parsed(text, where), _keys(config), where)


def _parquet(config: DataConfig) -> Iterator[Document]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise _missing("parquet") from error
    for file in _files(config, "*.parquet"):
        table = parquet.ParquetFile(file)
        wanted = (*_keys(config), *WRITTEN)
        columns = [key for key in table.schema_arrow.names if key in wanted]
        for group in table.iter_batches(columns=columns):
            for record in group.to_pylist():
                yield document_of(record, _keys(config), str(file))


def _datasets(config: DataConfig) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise _missing("datasets") from error
    records = load_dataset(config.path, config.name, split=config.split, streaming=config.streaming)
    for record in records:
        yield document_of(record, _keys(config), f"{config.path}, split {config.split}")


def _task(config: DataConfig) -> Iterator[Document]:
    """Some problems, for who wants documents; training draws new ones (`mtp.problems`)."""
    task = make_task(config.task, config.task_args)
    for number in range(TASK_DOCUMENTS):
        yield problem(task, random.Random(f"document {config.seed} {number}"))


def problem(task: Task, rng: random.Random) -> Document:
    prompt, answer = task.draw(rng)
    return Document(((prompt, task.learns_prompt), (answer, True)))


def _shards(config: DataConfig) -> Iterator[Document]:
    raise ValueError(f"data.source='shards': {config.path} holds token ids, no documents")


SOURCES: dict[str, Callable[[DataConfig], Iterator[Document]]] = {
    "text": _text,
    "folder": _text,
    "stdlib": _stdlib,
    "code": _code,
    "lines": _lines,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "datasets": _datasets,
    "shards": _shards,
    "task": _task,
}
TASK_DOCUMENTS = 20_000


def _missing(source: str) -> ImportError:
    return ImportError(f"data.source={source!r} needs, in a checkout: pip install '.[data]'")


def _files(config: DataConfig, pattern: str) -> list[Path]:
    path = Path(str(config.path))
    if not path.exists():
        raise ValueError(f"data.path: no file or folder {path}")
    if path.is_file():
        return [path]
    wanted = config.pattern or pattern
    found = _find(path, wanted)
    if not found:
        raise ValueError(f"data.path: no file in {path} is called {wanted} (data.pattern)")
    return found


def _find(root: Path, pattern: str) -> list[Path]:
    """Files by pattern in a fixed order, none from hidden folders or installed packages."""
    installed = {"site-packages", "dist-packages", "__pycache__"}
    names = (file.relative_to(root) for file in root.rglob(pattern) if file.is_file())
    return sorted(
        root / name
        for name in names
        if not any(part in installed or part.startswith(".") for part in name.parts)
    )


def _decode(data: bytes, file: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no UTF-8 at byte {offset + error.start}") from error


def _keys(config: DataConfig) -> Keys:
    return config.messages_key, config.prompt_key, config.completion_key, config.text_key


# Documents of the two parts.


def iter_documents(config: DataConfig, held_out: bool) -> Iterator[Document]:
    """The non-empty documents of one part, never none, without what overlaps with benchmarks."""
    documents = _one_part(config, held_out)
    return _without_overlap(documents, config.benchmarks) if config.benchmarks else documents


def _one_part(config: DataConfig, held_out: bool) -> Iterator[Document]:
    separate = bool(config.val_path or config.val_split)
    if separate and held_out:
        path, split = config.val_path or config.path, config.val_split or config.split
        config = replace(config, path=path, split=split)
    groups: set[str] = set()
    seen = kept = 0
    documents = SOURCES[config.source](config)
    first = list(islice(documents, 2))
    if len(first) == 1 and config.share < 1 and not held_out:
        raise ValueError(
            f"data.share={config.share}: data.source={config.source!r}, path {config.path} is one "
            f"document, which trains whole: a share is one of documents"
        )
    if len(first) == 1 and len(first[0].segments) == 1 and config.val_fraction:
        if not separate and not config.holdout:  # one book: its end is held out
            first, separate = [_part(first[0], config.val_fraction, held_out)], True
    for document in chain(first, documents):
        groups, seen = groups | _groups(document), seen + 1
        if not document.text or not (separate or is_held_out(document, config) == held_out):
            continue
        if held_out or _drawn(document, 1) < config.share:
            kept += 1
            yield document
    if unknown := sorted(set(config.holdout) - groups):
        raise ValueError(
            f"data.holdout: no top-level package or file is called {unknown}; for text of your own "
            f"say data.holdout=[], and data.val_fraction for a share to hold out"
        )
    if not kept:
        part = "validation" if held_out else "training"
        raise ValueError(
            f"data.source={config.source!r}, path {config.path}: no {part} documents among {seen}; "
            "held out are those of data.val_path, data.val_split, data.holdout or "
            f"data.val_fraction; data.share={config.share} of the others are for training"
        )


def load_documents(config: DataConfig) -> tuple[list[Document], list[Document]]:
    """The training and the held-out documents."""
    return list(iter_documents(config, False)), list(iter_documents(config, True))


def _part(document: Document, share: float, held_out: bool) -> Document:
    """The beginning of a lone text, or its last `share`, cut at the start of a line; within one
    that is more than a tenth of the text, which would hold out far more than was asked for.
    """
    ((text, is_target),) = document.segments
    wanted = int(len(text) * (1 - share))
    line = text.rfind("\n", 0, wanted) + 1
    at = wanted if wanted - line > len(text) / 10 else line
    return Document(((text[at:] if held_out else text[:at], is_target),), document.name)


def _groups(document: Document) -> set[str]:
    """The names of a file's top-level package or file: {"ast.py", "ast"}."""
    top = PurePath(document.name).parts[:1]
    return {*top, *(PurePath(part).stem for part in top)}


def is_held_out(document: Document, config: DataConfig) -> bool:
    if config.holdout:
        return not _groups(document).isdisjoint(config.holdout)
    return _drawn(document, 0) < config.val_fraction


def _drawn(document: Document, number: int) -> float:
    """In [0, 1], one of several numbers that a text's hash gives it."""
    digest = hashlib.sha256(document.text.encode("utf-8")).digest()
    return int.from_bytes(digest[8 * number : 8 * number + 8], "big") / 2**64


def _without_overlap(documents: Iterator[Document], files: list[str]) -> Iterator[Document]:
    overlap = Overlap(chain.from_iterable(_problems(Path(file)) for file in files))
    n_kept = n_left_out = 0
    for document in documents:
        if document.text in overlap:
            n_left_out += 1
        else:
            n_kept += 1
            yield document
    names = ", ".join(Path(file).name for file in files)
    said = "%d of %d documents left out, which share %d words in a row with %s"
    log.info(said, n_left_out, n_kept + n_left_out, overlap.n, names)


def _problems(file: Path) -> Iterator[str]:
    """All strings of each record of a JSON list or of lines of JSON, perhaps gzipped."""
    if not file.is_file():
        raise ValueError(f"data.benchmarks: no file {file}; [] leaves nothing out")
    data = file.read_bytes()
    text = _decode(gzip.decompress(data) if file.suffix == ".gz" else data, file)
    lines = filter(str.strip, text.split("\n"))
    try:
        records = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, lines)
        yield from ("\n".join(_strings(record)) for record in records)
    except ValueError as error:
        raise ValueError(f"data.benchmarks: {file}: no JSON ({error})") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        yield from chain.from_iterable(map(_strings, parts))
