"""Runs on a cluster: the shipped configuration gives SLURM a job that it can start again."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from mtp.hooks import read_jsonl
from mtp.train import Progress

hydra = pytest.importorskip("hydra")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
from omegaconf import OmegaConf  # noqa: E402

from mtp.run import RunConfig  # noqa: E402
from scripts.cli import CONFIGS, register  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def compose(*words):
    register("train", RunConfig)
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        return hydra.compose("train", overrides=list(words), return_hydra_config=True)


def test_a_job_on_the_cluster_goes_on_from_its_newest_checkpoint():
    assert compose("cluster=slurm").resume == "auto"


def test_nodes_and_gpus_are_keys_and_every_gpu_has_a_process():
    words = ["hydra.launcher.nodes=4", "hydra.launcher.gpus_per_node=8", "run_dir=there"]
    launcher = OmegaConf.to_container(compose("cluster=slurm", *words).hydra.launcher, resolve=True)
    assert (launcher["nodes"], launcher["tasks_per_node"]) == (4, 8)
    assert launcher["submitit_folder"] == "there/slurm/%j"


# A SLURM of three small commands: sbatch starts the job, and starts it again when it has asked for
# it; srun runs one task and announces, the first time, that it is over after the first checkpoint.
SBATCH = """#!/bin/bash
cp "$1" job.sh
export SLURM_JOB_ID=7 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_PROCID=0 SLURM_LOCALID=0
export SLURM_NODEID=0 SLURM_CPUS_PER_TASK=1 SLURM_STEP_NUM_TASKS=1
touch again
(while [ -e again ]; do rm again; bash "$1"; done) > log 2>&1 &
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] && shift || shift 2; done
"$@" &
if [ ! -e announced ]; then
    touch announced
    while ! ls run/checkpoints/step-* && kill -0 $!; do sleep 0.01; done > /dev/null 2>&1
    kill -USR2 $!
fi
wait $!
"""
SCONTROL = """#!/bin/bash
[ "$*" == "requeue 7" ] && touch again
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_a_job_that_is_told_of_its_end_saves_is_queued_again_and_goes_on(slurm):
    (slurm / "a.txt").write_text("to be, or not to be\n" * 100)
    words = [
        *("cluster=slurm", "hydra.launcher.partition=toy", "run_dir=run", "device=cpu"),
        *("model.dim=8", "model.n_layers=4", "model.n_heads=2", "model.multiple_of=8"),
        *("data.source=text", "data.path=a.txt", "data.val_fraction=0.2", "data.seq_len=16"),
        *("train.steps=400", "train.log_every=1", "train.save_every=40", "train.batch_size=1"),
        "sample_every=0",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train.py", "-m", *words],
        **{"cwd": slurm, "capture_output": True, "text": True},
    )
    said = (slurm / "log").read_text()
    assert done.returncode == 0, (done.stderr, said)
    job = (slurm / "job.sh").read_text()
    for flag in ("partition=toy", "nodes=1", "gpus-per-node=1", "ntasks-per-node=1", "requeue"):
        assert f"#SBATCH --{flag}\n" in job
    saved = re.findall(r"saved run/checkpoints/step-(\d+)", said.split("Requeued job 7")[0])
    assert re.findall(r"going on from run/checkpoints/step-(\d+)", said) == saved[-1:]
    steps = [line["step"] for line in read_jsonl(slurm / "run" / "metrics.jsonl")]
    assert steps == list(range(1, 401))


def test_a_job_that_is_pre_empted_does_not_end_by_itself(monkeypatch):
    """SLURM takes one that ended for done, and does not start it again."""
    from scripts import train

    waited = []
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(train, "run", lambda config: Progress(nn.Identity(), stopped=True))
    monkeypatch.setattr(train.time, "sleep", waited.append)
    with pytest.raises(SystemExit):
        train.main(RunConfig())
    assert waited and min(waited) >= 600
