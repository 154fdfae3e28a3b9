"""Problems of text to SQL as files of prompts and completions, to train on and to validate with.

    python -m benchmarks.sql_data out=runs/sql_data
    python scripts/train_tokenizer.py out=runs/sql_data/sql.model vocab_size=1024 \
        data.source=jsonl data.path=runs/sql_data/train.jsonl data.val_path=runs/sql_data/held_out.jsonl
    python scripts/train.py experiment=sql
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.record import parse
from mtp.checkpoint import write_text
from mtp.evaluate import sql


@dataclass
class DataConfig:
    out: str = "runs/sql_data"
    train: int = 60_000
    held_out: int = 1_000
    seed: int = 0
    conditions: int = 2


def write(path: Path, problems: Iterable[sql.Problem]) -> None:
    pairs = ({"prompt": p.prompt, "completion": p.query} for p in problems)
    write_text(path, "".join(json.dumps(pair) + "\n" for pair in pairs))


def main() -> None:
    config = parse(DataConfig, sys.argv[1:])
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for held_out, count in ((False, config.train), (True, config.held_out)):
        found = sql.problems(config.seed, held_out, config.conditions)
        write(out / ("held_out.jsonl" if held_out else "train.jsonl"), islice(found, count))


if __name__ == "__main__":
    main()
