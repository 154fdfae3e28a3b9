"""How many held-out questions a model answers with a right query, and how two models differ.

    python -m benchmarks.sql_score model=runs/sql problems=1500
    python -m benchmarks.sql_score model=runs/other baseline=runs/sql

Decoding is greedy; answers are executed (`mtp.evaluate.sql`). Training has up to two conditions on
a table's rows, questions here up to four: with two, a model that has learned to copy answers nearly
all. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

import mtp
from benchmarks.record import parse
from mtp.evaluate import sql
from mtp.evaluate.scores import compare, wilson
from mtp.tokenizer import Tokenizer


@dataclass
class ScoreConfig:
    model: str = "runs/sql"
    baseline: str | None = None
    problems: int = 1500
    seed: int = 0
    conditions: int = 4
    batch_size: int = 32


def answer(
    model: Any,
    tokenizer: Tokenizer,
    problems: Sequence[sql.Problem],
    drafter: Any = None,
    batch_size: int = 32,
    new_tokens: int = 192,
) -> list[mtp.Completion]:
    """Greedy completions up to the end token. More than new_tokens are no right answer."""
    stop = mtp.stop_at(tokenizer.end_id)
    requests = [mtp.Request(tokenizer.encode(p.prompt), new_tokens, stop=stop) for p in problems]
    greedy = mtp.Sampling(temperature=0)
    return mtp.generate(model, requests, drafter, greedy, batch_size=batch_size)


def verdicts(
    problems: Sequence[sql.Problem], tokenizer: Tokenizer, completions: Sequence[mtp.Completion]
) -> dict[str, float]:
    """By prompt, 1 where the answer is right, else 0: what `compare` takes."""
    pairs = zip(problems, completions, strict=True)
    return {p.prompt: float(sql.is_right(p, tokenizer.decode(c.tokens))) for p, c in pairs}


def score(where: str, config: ScoreConfig) -> tuple[dict[str, float], dict[str, Any]]:
    model, tokenizer = mtp.load(where).packed(), mtp.load_tokenizer(where)
    found = sql.problems(config.seed, held_out=True, conditions=config.conditions)
    problems = list(islice(found, config.problems))
    completions = answer(model, tokenizer, problems, batch_size=config.batch_size)
    right = verdicts(problems, tokenizer, completions)
    accuracy = wilson(int(sum(right.values())), len(right))
    tokens = sum(len(c.tokens) for c in completions) / len(completions)
    return right, {"accuracy": accuracy._asdict(), "mean_tokens": round(tokens, 2)}


def main() -> None:
    config = parse(ScoreConfig, sys.argv[1:])
    right, line = score(config.model, config)
    line = {"problems": len(right), **line}
    if config.baseline:
        before, line["baseline"] = score(config.baseline, config)
        line["difference"] = compare(before, right, level=0.95).difference._asdict()
    print(json.dumps(line))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
