"""HumanEval and MBPP: problems, prompts and stop rules as published.

One name stands for many benchmarks: "MBPP" may be 974, 500, 427 or 257 problems under one of
several prompts, and scores of two of them do not compare. `Benchmark.says` belongs into every
report. Sources: HumanEval, Chen et al. 2021 (2107.03374); MBPP, Austin et al. 2021 (2108.07732).

    form         of         the model reads                               its answer ends at
    completion   HumanEval  the function's head and docstring             the next statement
    instruct     HumanEval  a question; its answer begins with the head   that, or a closing fence
    chat         HumanEval  the same question; its answer opens a fence   a closing fence
    3shot        MBPP       tasks 2, 3 and 4 solved, then the task        [DONE]
    docstring    MBPP       a docstring: the task and its first test      the next statement

"instruct" is `humaneval_instruct` of lm-evaluation-harness 0.4.13. In "chat" the model writes the
head too: small chat models close at once a fence that holds it. "docstring" is BigCode's form,
after InCoder.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os.path
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp.decode.contract import cut_at
from mtp.evaluate.sandbox import Sandbox
from mtp.records import PLAIN_CHAT
from mtp.tokenizer import Tokenizer

Row = Mapping[str, Any]

# What ends a function's body; what ends a program after a docstring.
STATEMENTS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
AFTER_DOCSTRING = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
FENCE, DONE = "```", "[DONE]"
SPLITS = {  # of MBPP, by task number
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
    "prompt": range(1, 11),
    "all": range(1, 975),
}
SHOTS = (2, 3, 4)


@dataclass(frozen=True)
class Problem:
    """What a model reads, where its answer ends, and what makes a program of the answer."""

    task_id: str  # as established sample files write it: HumanEval/0, Mbpp/11
    prompt: str
    stops: tuple[str, ...]
    reference: str  # a completion that passes
    prefix: str  # the program's text before the completion
    tests: str  # and after it

    def program(self, completion: str) -> str:
        return self.prefix + completion + self.tests


@dataclass(frozen=True)
class Benchmark:
    name: str
    says: str  # one line: which data set, split, count, form, line ends, and where it is from
    problems: tuple[Problem, ...]


class Source(NamedTuple):
    """Where a data set is found, and how it is known again."""

    title: str
    file: str  # below a folder, with its own folder or without
    sha256: str
    rows: int
    hub: str
    config: str | None
    revision: str
    splits: tuple[str, ...]
    forms: tuple[str, ...]  # the first is the default


_MBPP = Source(
    title="MBPP (full)",
    file="mbpp/mbpp.jsonl",
    sha256="ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
    rows=974,
    hub="google-research-datasets/mbpp",
    config="full",
    revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
    splits=tuple(SPLITS),
    forms=("3shot", "docstring"),
)
SOURCES = {
    "humaneval": Source(
        title="HumanEval",
        file="human_eval/HumanEval.jsonl.gz",
        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        rows=164,
        hub="openai/openai_humaneval",
        config=None,
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        splits=("test",),
        forms=("completion", "chat", "instruct"),
    ),
    "mbpp": _MBPP,
    "mbpp_sanitized": _MBPP._replace(
        title="MBPP (sanitized)",
        file="mbpp/sanitized-mbpp.json",
        sha256="ca95deaa9a01ef0a6f439f88bcf0dd3db3563d22f22aad6cae04ebb9a8d8c8e9",
        rows=427,
        config="sanitized",
    ),
}


def plain_chat(question: str) -> str:
    """A question in the chat format of `mtp.records`, up to where its answer begins."""
    return PLAIN_CHAT.render([{"role": "user", "content": question}], True)


def load_benchmark(
    name: str,
    split: str | None = None,
    form: str | None = None,
    path: str | Path | None = None,
    template: Callable[[str], str] = plain_chat,
) -> Benchmark:
    """Read a benchmark, from the hub (needs `datasets`) or from `path`, a file or a folder of them.

    split: default "test". form: by default the data set's first in SOURCES. template: makes of a
    question the text up to where the model's answer begins; forms "chat" and "instruct" ask one.
    ValueError for an unknown word, for a file that is missing or not the published one, and where
    the hub does not answer.
    """
    source = SOURCES[_known("benchmark", name, SOURCES)]
    split = _known("split", split or "test", source.splits)
    form = _known("form", form or source.forms[0], source.forms)
    rows, origin = _from_hub(source) if path is None else _from_file(source, Path(path))
    rows, line_ends = _with_plain_line_ends(rows)
    if name == "humaneval":
        problems = [_humaneval_problem(row, form, template) for row in rows]
    else:
        number = {row["task_id"]: _mbpp_row(row) for row in rows}
        chosen = [number[i] for i in SPLITS[split] if i in number]
        problems = mbpp_problems(chosen, form, [number[i] for i in SHOTS])
    says = f"{source.title}, split {split}, {len(problems)} problems, {form} form"
    return Benchmark(name, f"{says}, {line_ends}, {origin}", tuple(problems))


def _known(key: str, word: str, allowed: Iterable[str]) -> str:
    if word not in allowed:
        raise ValueError(f"{key}={word!r}: allowed: {', '.join(allowed)}")
    return word


# Reading.


def _from_file(source: Source, path: Path) -> tuple[list[Row], str]:
    file = _find(source, path)
    data = file.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != source.sha256:
        raise ValueError(
            f"{file}: is not the published {source.title}: its sha256 is {found}, "
            f"expected {source.sha256}"
        )
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    if file.suffix == ".json":
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.split("\n") if line]
    return rows, f"sha256 {found[:16]}"


def _find(source: Source, path: Path) -> Path:
    if path.is_file():
        return path
    places = [path / source.file, path / Path(source.file).name]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"path: {source.title} is neither a file {path} nor {places[0]} nor {places[1]}"
    )


def _from_hub(source: Source) -> tuple[list[Row], str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{source.title} from the hub needs, in a checkout: pip install '.[data]'; "
            f"or give path, a folder with {source.file}"
        ) from error
    try:
        parts = load_dataset(source.hub, source.config, revision=source.revision)
    except Exception as error:  # the errors of three network libraries, with no class in common
        raise ValueError(
            f"the hub does not give {source.hub} ({type(error).__name__}: {error}); "
            f"without a network give path, a folder with {source.file}"
        ) from error
    rows = [row for part in parts.values() for row in part]
    if len(rows) != source.rows:
        raise ValueError(f"{source.hub}: has {len(rows)} rows, {source.title} has {source.rows}")
    return rows, f"{source.hub} at {source.revision[:12]}"


def _with_plain_line_ends(rows: Iterable[Row]) -> tuple[list[Row], str]:
    """CR LF, which JSON escapes carry through any reader, made LF; and a word on how many rows."""
    plain: list[Row] = []
    changed = 0
    for row in rows:
        plain.append(
            {k: v.replace("\r\n", "\n") if isinstance(v, str) else v for k, v in row.items()}
        )
        changed += plain[-1] != row
    return plain, f"CRLF made LF in {changed} rows" if changed else "line ends as published"


# Prompts.


def _humaneval_problem(row: Row, form: str, template: Callable[[str], str]) -> Problem:
    head, solution = row["prompt"], row["canonical_solution"]
    asked = template(
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{head}\n```\n"
    )
    opened = f"{asked}Here is the completed function:\n```python\n"
    prompt, stops, reference = {
        "completion": (head, STATEMENTS, solution),
        "instruct": (f"{opened}{head}\n", (*STATEMENTS, FENCE), solution),
        "chat": (opened, (FENCE,), head + solution),
    }[form]
    tests = f"\n{row['test']}\ncheck({row['entry_point']})\n"
    # In a chat the head comes twice: its imports may be missing from the answer.
    return Problem(row["task_id"], prompt, stops, reference, prefix=head, tests=tests)


def _mbpp_row(row: Row) -> Row:
    """The sanitized file in the full one's words."""
    return {
        "task_id": f"Mbpp/{row['task_id']}",
        "text": row["text"] if "text" in row else row["prompt"],
        "code": row["code"],
        "test_setup_code": row.get("test_setup_code") or "\n".join(row.get("test_imports", ())),
        "test_list": row["test_list"],
    }


def mbpp_problems(rows: Iterable[Row], form: str, shots: Iterable[Row]) -> list[Problem]:
    """Problems of rows in MBPP's schema (task_id, text, code, test_list, perhaps test_setup_code).

    shots: what form "3shot" shows solved before each task.
    """
    _known("form", form, _MBPP.forms)
    solved = "".join(f"{_task(row)}{row['code']}\n{DONE}\n\n" for row in shots)
    return [_mbpp_problem(row, form, solved) for row in rows]


def _mbpp_problem(row: Row, form: str, solved: str) -> Problem:
    docstring = f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""\n'
    prompt, stops, prefix = {
        "3shot": (solved + _task(row), (DONE,), ""),
        "docstring": (docstring, AFTER_DOCSTRING, docstring),
    }[form]
    tests = "\n".join(["", row.get("test_setup_code", ""), *row["test_list"], ""])
    return Problem(str(row["task_id"]), prompt, stops, row["code"], prefix, tests)


def _task(row: Row) -> str:
    """The wording of MBPP's authors."""
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


# Completions.


def cut(completion: str, stops: Sequence[str]) -> str:
    """The text before the first stop string, wherever tokens begin and end."""
    return cut_at(completion, *stops)


def completion_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ids add to a prompt's.

    Many tokenizers drop the space that a text begins with, so ids decoded alone lose one column of
    indentation, and with it every program.
    """
    return tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]


# References.


def check_references(benchmark: Benchmark, sandbox: Sandbox) -> dict[str, str]:
    """The verdicts of the references that do not pass, by task: the ceiling of any score.

    They are cut as samples are. All pass on CPython 3.11, but for Mbpp/342 in form "docstring",
    whose class a stop string cuts away.
    """
    programs = [p.program(cut(p.reference, p.stops)) for p in benchmark.problems]
    verdicts = [outcome.verdict for outcome in sandbox.run_all(programs)]
    pairs = zip(benchmark.problems, verdicts, strict=True)
    return {problem.task_id: verdict for problem, verdict in pairs if verdict != "passed"}


Score = Callable[[list[int], list[int]], float]


class Coded(NamedTuple):
    """How long a text is under a model, and as it stands."""

    bits: float
    bytes: int


def reference_bits(benchmark: Benchmark, tokenizer: Tokenizer, score: Score) -> dict[str, Coded]:
    """The references' code lengths given their prompts, by task: the sum of bits over the sum of
    bytes is bits per byte, which compares models that solve nothing yet, of any tokenizers.

    score(context, ids) -> -log p(ids | context) in nats. Prompt and reference are encoded as one
    text; where a token spans the seam, the model is charged for the prompt's part of it too.
    """
    coded = {}
    for problem in benchmark.problems:
        alone = tokenizer.encode(problem.prompt)
        whole = tokenizer.encode(problem.prompt + problem.reference)
        seam = len(os.path.commonprefix([alone, whole]))
        nats = score(whole[:seam], whole[seam:])
        coded[problem.task_id] = Coded(nats / math.log(2), len(problem.reference.encode()))
    return coded


def score_by(model: Callable[[Tensor], Tensor], device: Any = "cpu") -> Score:
    """A `Score` from a model that maps ids (1, T) to next-token logits (1, T, V)."""

    @torch.inference_mode()
    def score(context: list[int], ids: list[int]) -> float:
        row = torch.tensor([context + ids], device=device)
        logits_TV = model(row[:, :-1])[0, len(context) - 1 :].float()
        return F.cross_entropy(logits_TV, row[0, len(context) :], reduction="sum").item()

    return score
