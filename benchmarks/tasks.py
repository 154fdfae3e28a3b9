"""Narrow tasks as files of prompts and completions, to train on and to validate with.

    python -m benchmarks.tasks task=sql out=runs/sql_data
    D="data.source=jsonl data.path=runs/sql_data/train.jsonl"
    D="$D data.val_path=runs/sql_data/held_out.jsonl"
    python scripts/train_tokenizer.py out=runs/sql_data/sql.model vocab_size=768 $D
    python scripts/train.py experiment=sql

sql: questions about small databases, see `mtp.evaluate.sql`. docstrings: the functions of this
Python's standard library, each body from its first line and docstring; files are held out whole.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from benchmarks.record import parse
from mtp.checkpoint import write_text
from mtp.documents import DataConfig, iter_documents
from mtp.evaluate import sql

LONGEST = 1500  # characters of a function with its docstring
HELD_OUT = 0.1  # of the standard library's files


class Pair(NamedTuple):
    prompt: str
    completion: str


@dataclass
class TaskConfig:
    """train, held_out: the most pairs of each part; the standard library has fewer."""

    task: str = "sql"
    out: str = "runs/sql_data"
    train: int = 60_000
    held_out: int = 1_000
    seed: int = 0
    conditions: int = 2  # of sql

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise SystemExit(f"error: task={self.task!r}: allowed are {', '.join(TASKS)}")
        if Path(self.out).exists():
            raise SystemExit(f"error: out={self.out!r}: exists already and is not overwritten")


def questions(config: TaskConfig, held_out: bool) -> Iterator[Pair]:
    for problem in sql.problems(config.seed, held_out, config.conditions):
        yield Pair(problem.prompt, problem.query)


def docstrings(config: TaskConfig, held_out: bool) -> Iterator[Pair]:
    """Every function once, however many files have it."""
    seen = set()
    for document in iter_documents(DataConfig(val_fraction=0.0), held_out=False):
        digest = hashlib.sha256(document.name.encode()).digest()
        here = int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64
        for pair in functions(document.text):
            if pair not in seen and here == held_out:
                yield pair
            seen.add(pair)


TASKS: dict[str, Callable[[TaskConfig, bool], Iterator[Pair]]] = {
    "sql": questions,
    "docstrings": docstrings,
}


def functions(source: str) -> Iterator[Pair]:
    """Functions and methods with a docstring and more, cut after it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source's own escapes
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            prompt, completion = _cut(source, node)
            if completion and len(prompt) + len(completion) < LONGEST:
                yield Pair(prompt, completion)


def _cut(source: str, node: ast.FunctionDef) -> Pair:
    """Nothing to complete where the docstring's line holds code too."""
    first, end = node.lineno - 1, node.body[0].end_lineno or 0
    lines = textwrap.dedent("\n".join(source.split("\n")[first : node.end_lineno])).split("\n")
    shared = node.body[1].lineno == end
    prompt, rest = lines[: end - first], [] if shared else lines[end - first :]
    return Pair("\n".join(prompt) + "\n", "\n".join(rest))


def write(path: Path, pairs: Iterable[Pair]) -> int:
    lines = [json.dumps(pair._asdict()) + "\n" for pair in pairs]
    write_text(path, "".join(lines))
    return len(lines)


def main() -> None:
    config = parse(TaskConfig, sys.argv[1:])
    out, pairs = Path(config.out), TASKS[config.task]
    out.mkdir(parents=True)
    for name, count in (("train", config.train), ("held_out", config.held_out)):
        some = islice(pairs(config, name == "held_out"), count)
        print(f"{write(out / f'{name}.jsonl', some)} pairs in {out / name}.jsonl")


if __name__ == "__main__":
    main()
