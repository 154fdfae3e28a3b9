"""Tokenises a data set once, into a folder of memory-mapped shards that training opens.

python scripts/prepare_data.py out=/data/code data.source=folder data.path=src data.pattern=*.py
python scripts/train.py data.source=shards data.path=/data/code
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from mtp.data import DataConfig, prepare_shards


@dataclass
class PrepareConfig:
    out: str = MISSING  # a new folder
    data: DataConfig = field(default_factory=DataConfig)
    workers: int = 2
    shard_tokens: int = 2**26


ConfigStore.instance().store(name="prepare_schema", node=PrepareConfig)


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


@hydra.main(version_base=None, config_path="../configs", config_name="prepare_data")
def main(config: DictConfig) -> None:
    prepare = OmegaConf.to_object(config)
    assert isinstance(prepare, PrepareConfig)
    prepare_shards(
        prepare.data, prepare.out, prepare.workers, prepare.shard_tokens, report=progress()
    )
    print(f"written: {prepare.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
