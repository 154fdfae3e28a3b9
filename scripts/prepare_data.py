"""Tokenise a data set once, into a folder of memory-mapped shards that training opens.

python scripts/prepare_data.py out=/data/code data.source=folder data.path=src 'data.pattern="*.py"'
python scripts/train.py data=shards data.path=/data/code data.tokenizer=/data/code/tokenizer
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from omegaconf import MISSING

from mtp.documents import DataConfig
from mtp.shards import prepare_shards
from scripts.cli import launch


@dataclass
class PrepareConfig:
    out: str = MISSING  # a new folder
    data: DataConfig = field(default_factory=DataConfig)
    workers: int = 2
    shard_tokens: int = 2**26


def progress() -> tuple[Callable[[int], None], Callable[[], None]]:
    """What counts documents and tokens and says so on stderr once a second, and what says it."""
    start = shown = time.monotonic()
    documents = tokens = 0

    def report(n_tokens: int) -> None:
        nonlocal shown, documents, tokens
        documents, tokens, now = documents + 1, tokens + n_tokens, time.monotonic()
        if now - shown >= 1:
            shown = now
            say()

    def say() -> None:
        rate = tokens / max(1e-3, time.monotonic() - start)
        line = f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s"
        print(line, file=sys.stderr)

    return report, say


def prepare(config: PrepareConfig) -> None:
    report, say_all = progress()
    prepare_shards(config.data, config.out, config.workers, config.shard_tokens, report)
    say_all()
    print(f"written: {config.out}", file=sys.stderr)


if __name__ == "__main__":
    launch("prepare_data", PrepareConfig, prepare)
