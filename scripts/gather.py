"""Make one plain checkpoint of what several processes wrote, in one process.

python scripts/gather.py checkpoint=runs/large out=runs/large-plain
"""

from dataclasses import dataclass

from omegaconf import MISSING

from mtp import checkpoint
from scripts.cli import launch


@dataclass
class GatherConfig:
    checkpoint: str = MISSING  # or a run directory, for its newest
    out: str = MISSING  # a new folder


def gather(config: GatherConfig) -> None:
    print(f"written: {checkpoint.gather(config.checkpoint, config.out)}")


if __name__ == "__main__":
    launch("gather", GatherConfig, gather)
