"""Train a model: `python scripts/train.py experiment=demo train.steps=100`.

Every key of `mtp.run.RunConfig` can be set as key=value; `--cfg job` prints them all,
`dry_run=true` says what the run will take, `resume=true` goes on from the newest checkpoint. Under
torchrun, the same command in every process: `torchrun --nproc-per-node 8 scripts/train.py ...`.
"""

import os
import shlex
import sys

from mtp.run import RunConfig, run
from scripts.cli import launch


def main(config: RunConfig) -> None:
    """A run that was asked to stop says how it goes on; that is no failure."""
    progress = run(config)
    if progress is not None and progress.stopped and "RANK" not in os.environ:
        words = [word for word in sys.argv if not word.startswith("resume=")]
        print("go on with:", shlex.join(["python", *words, "resume=true"]), file=sys.stderr)


if __name__ == "__main__":
    launch("train", RunConfig, main)
