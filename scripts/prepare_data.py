"""Tokenise a data set once, into a folder of memory-mapped shards that training opens.

python scripts/prepare_data.py out=/data/code data.source=folder data.path=src 'data.pattern="*.py"'
python scripts/train.py data=shards data.path=/data/code data.tokenizer=/data/code/tokenizer
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from omegaconf import MISSING

from mtp.data import DataConfig, prepare_shards
from scripts.cli import launch


@dataclass
class PrepareConfig:
    out: str = MISSING  # a new folder
    data: DataConfig = field(default_factory=DataConfig)
    workers: int = 2
    shard_tokens: int = 2**26


def progress() -> Callable[[int], None]:
    """Counts documents and tokens; says so on stderr once a second."""
    start = shown = time.monotonic()
    documents = tokens = 0

    def report(n_tokens: int) -> None:
        nonlocal shown, documents, tokens
        documents, tokens, now = documents + 1, tokens + n_tokens, time.monotonic()
        if now - shown >= 1:
            shown, rate = now, tokens / (now - start)
            line = f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s"
            print(line, file=sys.stderr)

    return report


def prepare(config: PrepareConfig) -> None:
    prepare_shards(config.data, config.out, config.workers, config.shard_tokens, progress())
    print(f"written: {config.out}", file=sys.stderr)


if __name__ == "__main__":
    launch("prepare_data", PrepareConfig, prepare)
