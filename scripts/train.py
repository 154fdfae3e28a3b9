"""Train a model: `python scripts/train.py experiment=demo train.steps=100`.

Every key of `mtp.run.RunConfig` can be set as key=value; `--cfg job` prints them all,
`dry_run=true` says what the run will take, `resume=true` goes on from the newest checkpoint. Under
torchrun, the same command in every process: `torchrun --nproc-per-node 8 scripts/train.py ...`.
A sweep, one run after another: `-m train.optim.lr=1e-3,3e-3`; on a cluster: `-m cluster=slurm`.
"""

import os
import shlex
import sys
import time

from mtp.run import RunConfig, run
from scripts.cli import launch


def main(config: RunConfig) -> None:
    """A run that was asked to stop says how it goes on; that is no failure, and ends a sweep."""
    progress = run(config)
    if progress is None or not progress.stopped:
        return
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        # SLURM is about to end this job, and to start it again if it was pre-empted. A job that
        # ended by itself would count as done.
        time.sleep(3600)
    elif "RANK" not in os.environ:
        words = [word for word in sys.argv if not word.startswith("resume=")]
        command = shlex.join(["python", *words, "resume=auto"])  # a sweep's next runs are new
        print("go on with:", command, file=sys.stderr)
    sys.exit()


if __name__ == "__main__":
    launch("train", RunConfig, main)
