"""Train a model: `python scripts/train.py experiment=demo train.steps=100`.

Every key of `mtp.run.RunConfig` can be set as key=value; `--cfg job` prints them all,
`dry_run=true` says what the run will take, `resume=true` goes on from the newest checkpoint.
"""

from mtp.run import RunConfig, run
from scripts.cli import launch

if __name__ == "__main__":
    launch("train", RunConfig, run)
