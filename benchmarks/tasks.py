"""Narrow tasks as files of prompts and completions, to train on and to validate with.

    python -m benchmarks.tasks task=sql out=runs/sql_data
    D="data.source=jsonl data.path=runs/sql_data/train.jsonl"
    D="$D data.val_path=runs/sql_data/held_out.jsonl"
    python scripts/train_tokenizer.py out=runs/sql_data/sql.model vocab_size=768 $D
    python scripts/train.py experiment=sql

sql: questions about small databases, see `mtp.evaluate.sql`; an answer scores 1 if it is right.
docstrings: the functions of this Python's standard library, each body from its first line and
docstring; files are held out whole; an answer scores its likeness to the body, ROUGE-L of words.
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
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from benchmarks.record import parse
from mtp.documents import DataConfig, iter_documents
from mtp.evaluate import sql
from mtp.evaluate.scores import rouge_l, words
from mtp.files import write_text

LONGEST = 1500  # characters of a function with its docstring
HELD_OUT = 0.1  # of the standard library's files


class Problem(NamedTuple):
    """score: of an answer, 0 to 1."""

    prompt: str
    completion: str
    score: Callable[[str], float]


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
        check_task(self.task)
        if Path(self.out).exists():
            raise SystemExit(f"error: out={self.out!r}: exists already and is not overwritten")


def questions(held_out: bool, seed: int = 0, conditions: int = 2) -> Iterator[Problem]:
    for problem in sql.problems(seed, held_out, conditions):
        yield Problem(problem.prompt, problem.query, partial(sql.is_right, problem))


def docstrings(held_out: bool, seed: int = 0, conditions: int = 2) -> Iterator[Problem]:
    """Every function once, however many files have it. There is one set of them: neither seed nor
    conditions matter.
    """
    seen = set()
    for document in iter_documents(DataConfig(val_fraction=0.0), held_out=False):
        digest = hashlib.sha256(document.name.encode()).digest()
        here = int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64
        for pair in functions(document.text):
            if pair not in seen and here == held_out:
                yield Problem(*pair, partial(likeness, pair[1]))
            seen.add(pair)


TASKS: dict[str, Callable[..., Iterator[Problem]]] = {"sql": questions, "docstrings": docstrings}


def check_task(task: str) -> None:
    if task not in TASKS:
        raise SystemExit(f"error: task={task!r}: allowed are {', '.join(TASKS)}")


def likeness(text: str, answer: str) -> float:
    return rouge_l(words(answer), words(text))


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Functions and methods with a docstring and more, cut after it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source's own escapes
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            prompt, completion = _cut(source, node)
            if completion and len(prompt) + len(completion) < LONGEST:
                yield prompt, completion


def _cut(source: str, node: ast.FunctionDef) -> tuple[str, str]:
    """Nothing to complete where the docstring's line holds code too."""
    first, end = node.lineno - 1, node.body[0].end_lineno or 0
    lines = textwrap.dedent("\n".join(source.split("\n")[first : node.end_lineno])).split("\n")
    shared = node.body[1].lineno == end
    prompt, rest = lines[: end - first], [] if shared else lines[end - first :]
    return "\n".join(prompt) + "\n", "\n".join(rest)


def write(path: Path, problems: Iterable[Problem]) -> int:
    pairs = ({"prompt": p.prompt, "completion": p.completion} for p in problems)
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    write_text(path, "".join(lines))
    return len(lines)


def main() -> None:
    config = parse(TaskConfig, sys.argv[1:])
    out, problems = Path(config.out), TASKS[config.task]
    out.mkdir(parents=True)
    for name, count in (("train", config.train), ("held_out", config.held_out)):
        found = problems(name == "held_out", config.seed, config.conditions)
        some = islice(found, count)
        print(f"{write(out / f'{name}.jsonl', some)} pairs in {out / name}.jsonl")


if __name__ == "__main__":
    main()
