"""Nothing is lost: whatever stops a run, it goes on to the same end, bit for bit."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import mtp
from mtp import checkpoint
from mtp.documents import DataConfig
from mtp.hooks import StopSignals, read_jsonl
from mtp.model import ModelConfig
from mtp.optim import OptimConfig
from mtp.run import RunConfig, run
from mtp.train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
TIMES = {"seconds", "tokens_per_second", "step_seconds", "data_wait", "memory_gib", "model_tflops"}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"text {i}: " + "abc " * (40 + 7 * i))
    model = ModelConfig(dim=8, n_layers=4, n_heads=2, n_future_tokens=3, multiple_of=8)
    data = DataConfig("text", str(folder), holdout=["3.txt"], seq_len=16)
    train = TrainConfig(
        steps=STEPS,
        batch_size=2,
        log_every=4,
        save_every=4,
        keep_last=2,
        optim=OptimConfig(lr=1e-2),
    )
    return RunConfig("", "auto", device="cpu", sample_every=0, model=model, data=data, train=train)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run that nothing interrupts."""
    config = replace(config, run_dir=str(tmp_path_factory.mktemp("whole") / "run"))
    run(config)
    return Path(config.run_dir)


def same_end(run_dir, whole):
    """The same log, clocks apart, and the same last checkpoint."""
    left, right = (
        [
            {k: v for k, v in line.items() if k not in TIMES}
            for line in read_jsonl(d / "metrics.jsonl")
        ]
        for d in (run_dir, whole)
    )
    assert left == right
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (checkpoint.find(d) / name for d in (run_dir, whole))
        assert one.read_bytes() == other.read_bytes(), name


CHILD = """
import importlib, json, os, sys
from mtp.run import RunConfig, run
from mtp.documents import DataConfig
from mtp.model import ModelConfig
from mtp.optim import OptimConfig
from mtp.train import TrainConfig

words = json.loads(sys.argv[1])
train = words["train"]
train["optim"] = OptimConfig(**train["optim"])
parts = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
config = RunConfig(**(words | {key: kind(**words[key]) for key, kind in parts.items()}))
place, after = sys.argv[2], int(sys.argv[3])
if place:
    module, _, name = place.rpartition(".")
    calls, inner = 0, getattr(importlib.import_module(module), name)

    def deadly(*args, **kwargs):
        global calls
        calls += 1
        if calls == after:
            os.kill(os.getpid(), 9)
        return inner(*args, **kwargs)

    setattr(importlib.import_module(module), name, deadly)
run(config)
"""


def start(config, dies_in="", after=0):
    words = [sys.executable, "-c", CHILD, json.dumps(asdict(config)), dies_in, str(after)]
    return subprocess.Popen(words, env=ENVIRONMENT, cwd=ROOT)


@pytest.mark.parametrize(
    ("dies_in", "after"),
    [("mtp.checkpoint._checksums", 3), ("mtp.files._sync", 40), ("mtp.checkpoint.tidy", 5)],
    ids=["between files", "before it has its name", "before old ones go"],
)
def test_a_run_killed_within_a_save_ends_like_an_uninterrupted_one(
    dies_in, after, config, whole, tmp_path
):
    config = replace(config, run_dir=str(tmp_path / "run"))
    child = start(config, dies_in, after)
    assert child.wait() == -signal.SIGKILL
    left = checkpoint.of_run(tmp_path / "run")
    assert 0 < len(left) < STEPS // 4
    for folder in left:
        checkpoint.check(folder)
    run(config)
    same_end(tmp_path / "run", whole)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2  # nothing half is left


def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(config, whole, tmp_path):
    config = replace(config, run_dir=str(tmp_path / "run"))
    rng = random.Random(time.time_ns())
    log, kills = tmp_path / "run" / "metrics.jsonl", 0
    for _ in range(3):
        child = start(config)
        lines = len(list(read_jsonl(log))) if log.exists() else 0
        until = lines + rng.randint(1, 4)
        while child.poll() is None and not (log.exists() and len(list(read_jsonl(log))) >= until):
            time.sleep(0.001 * rng.random())  # wherever in a step, or a save, that may be
        child.kill()
        kills += child.wait() == -signal.SIGKILL
    assert kills > 0
    run(config)
    same_end(tmp_path / "run", whole)


DAMAGED = {"config": "config.json", "progress": "training.json", "words": "tokenizer.json"}


@pytest.mark.parametrize("damage", ["cut", "a bit", "gone", *DAMAGED])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    damage, config, whole, tmp_path, caplog
):
    half = replace(config, run_dir=str(tmp_path / "run"), train=replace(config.train, steps=32))
    run(half)
    before, newest = checkpoint.of_run(tmp_path / "run")
    file = newest / DAMAGED.get(damage, "optimizer.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "a bit":
        data[-1] ^= 1
    file.write_bytes(data[: len(data) if damage == "a bit" else len(data) // 2])
    if damage == "gone":
        file.unlink()
    run(replace(half, train=config.train))
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert str(file) in warning and f"going back to {before}" in warning
    assert checkpoint.load_training(tmp_path / "run").progress["step"] == STEPS


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(config, tmp_path):
    config = replace(config, run_dir=str(tmp_path / "run"), train=replace(config.train, steps=4))
    run(config)
    (checkpoint.find(tmp_path / "run") / "model.safetensors").write_bytes(b"")
    for _ in range(2):  # nothing is renamed, so that the second time is no fresh start
        with pytest.raises(ValueError, match="run holds no checkpoint that is whole: .*damaged"):
            run(config)


@pytest.mark.parametrize("trouble", ["format", "disk"])
def test_what_is_no_damage_puts_no_checkpoint_aside(trouble, config, tmp_path, monkeypatch):
    config = replace(config, run_dir=str(tmp_path / "run"), train=replace(config.train, steps=8))
    run(config)
    before = sorted((tmp_path / "run" / "checkpoints").iterdir())
    if trouble == "format":
        file = checkpoint.find(tmp_path / "run") / "config.json"
        file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    else:

        def broken(path):
            raise OSError("input/output error")

        monkeypatch.setattr(checkpoint, "checksum", broken)
    with pytest.raises((ValueError, OSError), match="format version 2|input/output error"):
        run(config)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == before


@pytest.mark.parametrize("keep", [1, 3, None])
def test_the_newest_checkpoints_stay(keep, config, tmp_path):
    train = replace(config.train, steps=20, keep_last=keep)
    run(replace(config, run_dir=str(tmp_path / "run"), train=train))
    names = [path.name for path in checkpoint.of_run(tmp_path / "run")]
    assert names == [f"step-{step:08d}" for step in (4, 8, 12, 16, 20)][-(keep or 5) :]


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_asks_and_a_second_interrupt_insists(number):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before = [signal.getsignal(n) for n in numbers]  # a shell may have had SIGINT ignored
    with StopSignals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(n) for n in numbers] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_who_handled_a_signal_before_hears_of_it_when_the_run_is_saved(number, config, tmp_path):
    """A cluster's job manager, say, which then puts the job back into its queue."""
    saved = []

    def handler(*_):
        saved.append(checkpoint.find(tmp_path / "run").name)

    before = signal.signal(number, handler)
    try:
        config = replace(config, run_dir=str(tmp_path / "run"))
        run(config, hooks=[lambda p: p.step == 7 and os.kill(os.getpid(), number)])
        assert saved == ["step-00000008"] and signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_a_run_that_is_asked_to_stop_finishes_the_step_and_saves_it(config, tmp_path):
    config = replace(config, run_dir=str(tmp_path / "run"))

    def ask(progress):
        if progress.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    progress = run(config, hooks=[ask])
    assert progress.stopped and progress.step == 8
    assert checkpoint.find(tmp_path / "run").name == "step-00000008"
    assert "val_loss_1" not in progress.metrics  # a validation may take longer than there is


def test_a_stop_in_the_last_step_is_no_stop(config, tmp_path):
    """What comes at the end comes all the same."""
    config = replace(config, run_dir=str(tmp_path / "run"), train=replace(config.train, steps=4))
    progress = run(config, hooks=[lambda p: p.step == 3 and os.kill(os.getpid(), signal.SIGTERM)])
    assert not progress.stopped and progress.step == 4 and "val_loss_1" in progress.metrics


def words(config):
    """The command line that gives this configuration."""
    shown = {
        **{f"model.{k}": v for k, v in asdict(config.model).items() if v is not None},
        **{f"data.{k}": getattr(config.data, k) for k in ("source", "path", "holdout", "seq_len")},
        **{
            f"train.{k}": getattr(config.train, k)
            for k in ("steps", "batch_size", "log_every", "save_every", "keep_last")
        },
        **{"train.optim.lr": config.train.optim.lr, "run_dir": config.run_dir},
        **{"device": "cpu", "sample_every": 0},
    }
    return [f"{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in shown.items()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_well_on_a_signal_and_tells_how_to_go_on(number, config, whole, tmp_path):
    pytest.importorskip("hydra")
    endless = replace(config.train, steps=10**6)
    config = replace(config, run_dir=str(tmp_path / "run"))
    child = subprocess.Popen(
        [sys.executable, "scripts/train.py", *words(replace(config, train=endless))],
        **{"cwd": ROOT, "env": ENVIRONMENT, "stderr": subprocess.PIPE, "text": True},
    )
    while not checkpoint.of_run(tmp_path / "run") and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(number)
    _, said = child.communicate()
    assert child.returncode == 0, said
    command = shlex.split(said.split("go on with: ")[1])
    assert command[:2] == ["python", "scripts/train.py"] and command[-1] == "resume=auto"
    at = checkpoint.load_training(tmp_path / "run").progress["step"]
    done = subprocess.run(
        [sys.executable, *command[1:], f"train.steps={at + 4}"],
        **{"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint.load_training(tmp_path / "run").progress["step"] == at + 4


def test_a_signal_ends_a_sweep_and_the_command_goes_on_with_all_of_it(config, tmp_path):
    pytest.importorskip("hydra")
    long = replace(config, run_dir=str(tmp_path), train=replace(config.train, steps=3000))
    child = subprocess.Popen(
        [sys.executable, "scripts/train.py", "-m", *words(long), "train.seed=1,2"],
        **{"cwd": ROOT, "env": ENVIRONMENT, "stderr": subprocess.PIPE, "text": True},
    )
    while not checkpoint.of_run(tmp_path / "train.seed=1") and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate()
    assert child.returncode == 0, said
    assert not (tmp_path / "train.seed=2").exists()
    command = shlex.split(said.strip().splitlines()[-1].split("go on with: ")[1])
    assert command[2] == "-m" and command[-2:] == ["train.seed=1,2", "resume=auto"]


# Several processes, from the command line.


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_two_processes_start_a_run_and_one_goes_on(sharding, config, tmp_path):
    """The weights are those of one process with the same global batch, up to rounding."""
    pytest.importorskip("hydra")
    config = replace(config, run_dir=str(tmp_path / "run"), train=replace(config.train, steps=32))
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 scripts/train.py".split()
    given = words(replace(config, train=replace(config.train, batch_size=1)))
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *given, f"train.sharding={sharding}"],
        **{"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("saved ") == 8, "one process speaks for all"
    newest = checkpoint.find(tmp_path / "run")
    assert newest.name == "step-00000032" and (newest / "model.shards").is_dir()
    model = mtp.load(tmp_path / "run")
    run(replace(config, run_dir=str(tmp_path / "alone")))
    expected = mtp.load(tmp_path / "alone")
    for name, p in expected.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], p, rtol=1e-3, atol=1e-4)
    longer = replace(config, resume="true", train=replace(config.train, steps=40))
    assert run(longer).step == 40
    assert (checkpoint.find(tmp_path / "run") / "model.safetensors").is_file()


def test_muon_is_refused_for_several_processes_before_anything_is_made(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr("mtp.run.world_size", lambda: 2)
    optim = OptimConfig(name="muon")
    config = replace(
        config, run_dir=str(tmp_path / "run"), train=replace(config.train, optim=optim)
    )
    with pytest.raises(ValueError, match="train.optim.name='muon' needs whole matrices"):
        run(config)
    assert not (tmp_path / "run").exists()
