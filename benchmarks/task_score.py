"""How well a model answers a task's held-out problems (`benchmarks.tasks`), and how two differ.

    python -m benchmarks.task_score model=runs/sql problems=1500
    python -m benchmarks.task_score model=runs/other baseline=runs/sql

Decoding is greedy. Training has up to two conditions on a table's rows, questions here up to four:
with two, a model that has learned to copy answers nearly all. The last line is one JSON object,
intervals are of 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

import mtp
from benchmarks.record import launch
from benchmarks.tasks import TASKS, Problem, check_task
from mtp.evaluate.scores import compare, interval
from mtp.tokenizer import Tokenizer


@dataclass
class ScoreConfig:
    model: str = "runs/sql"
    baseline: str = ""
    task: str = "sql"
    problems: int = 1500
    seed: int = 0
    conditions: int = 4
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_task(self.task)


def answer(
    model: Any,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    drafter: Any = None,
    batch_size: int = 32,
    new_tokens: int = 192,
) -> list[mtp.Completion]:
    """Greedy completions up to the end token. More than new_tokens are no right answer."""
    stop = mtp.stop_at(tokenizer.end_id)
    requests = [mtp.Request(tokenizer.encode(p.prompt), new_tokens, stop=stop) for p in problems]
    greedy = mtp.Sampling(temperature=0)
    return mtp.generate(model, requests, drafter, greedy, batch_size=batch_size)


def scores(
    problems: Sequence[Problem], tokenizer: Tokenizer, completions: Sequence[mtp.Completion]
) -> dict[str, float]:
    """In order, what `compare` takes: by the problem's number, as several may share a prompt."""
    pairs = enumerate(zip(problems, completions, strict=True))
    return {str(i): float(p.score(tokenizer.decode(c.tokens))) for i, (p, c) in pairs}


def score(where: str, config: ScoreConfig) -> tuple[dict[str, float], dict[str, Any]]:
    model, tokenizer = mtp.load(where).packed(), mtp.load_tokenizer(where)
    found = TASKS[config.task](True, config.seed, config.conditions)
    problems = list(islice(found, config.problems))
    completions = answer(model, tokenizer, problems, batch_size=config.batch_size)
    each = scores(problems, tokenizer, completions)
    mean = interval(list(each.values()), level=0.95)
    tokens = sum(len(c.tokens) for c in completions) / len(completions)
    return each, {"score": mean._asdict(), "mean_tokens": round(tokens, 2)}


def run(config: ScoreConfig) -> dict[str, Any]:
    each, line = score(config.model, config)
    line = {"problems": len(each), **line}
    if config.baseline:
        before, line["baseline"] = score(config.baseline, config)
        line["difference"] = compare(before, each, level=0.95).difference._asdict()
    return line


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch(ScoreConfig, run)
