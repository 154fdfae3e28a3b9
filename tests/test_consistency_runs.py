"""Consistency training as a run: from a checkpoint and its trajectories, or on-policy."""

import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import tiny
from test_consistency import WINDOW, batches, gradients
from test_run import interrupted, metrics, same_checkpoints

from mtp import checkpoint
from mtp.consistency.files import Origin, collect_shards, read_trajectories
from mtp.consistency.filters import FilterConfig
from mtp.consistency.loss import ConsistencyConfig, ConsistencyLoss
from mtp.consistency.trajectories import Collection
from mtp.decode.contract import Request, stop_at
from mtp.decode.sampling import Sampling
from mtp.optim import OptimConfig
from mtp.run import RunConfig, run
from mtp.tokenizer import ByteTokenizer
from mtp.train import TrainConfig

PROMPTS = [[i, 2 * i, 3 * i] for i in range(1, 6)]
FILTERS = FilterConfig(token_times=0, ngram_times=0)
SETTINGS = {
    "max_new_tokens": 10,
    "ends": [256],
    "sampling": asdict(Sampling()),
    "filters": asdict(FILTERS),
}


@pytest.fixture
def config(tmp_path):
    """A run on collected trajectories, from a checkpoint."""
    model, tokenizer = tiny(vocab_size=257, gain=2.0).float(), ByteTokenizer()
    checkpoint.save(model, tmp_path / "trained", tokenizer)
    made = checkpoint.fingerprint(tmp_path / "trained")
    collect_shards(
        tmp_path / "collected",
        model,
        [Request(prompt, 10) for prompt in PROMPTS],
        Origin(tokenizer.fingerprint, made, WINDOW, SETTINGS),
        tokenizer,
        FILTERS,
    )
    training = TrainConfig(
        steps=4, batch_size=2, log_every=1, optim=OptimConfig(lr=1e-3, warmup_steps=1)
    )
    return RunConfig(
        str(tmp_path / "run"),
        objective="consistency",
        init_from=str(tmp_path / "trained"),
        device="cpu",
        train=training,
        consistency=ConsistencyConfig(str(tmp_path / "collected"), WINDOW),
    )


def collected(config):
    where = config.consistency.trajectories
    return list(read_trajectories(where, ByteTokenizer().fingerprint, WINDOW))


def rewrite(config, old, new):
    """In the collection's header."""
    (shard,) = Path(config.consistency.trajectories).glob("shard-*")
    assert old in shard.read_text()
    shard.write_text(shard.read_text().replace(old, new))


def test_a_run_starts_from_a_checkpoint_learns_and_tells_both_losses(config, caplog):
    caplog.set_level(logging.INFO)
    start = checkpoint.load(config.init_from)
    config.train.steps, config.consistency.ar_weight = 60, 0.0
    run(config)
    values = [line["loss_consistency"] for line in metrics(config)]
    after = checkpoint.load(config.run_dir)
    loss_fn, batch = ConsistencyLoss(), next(batches(collected(config)))
    total, count = loss_fn(start, batch, loss_fn.count(batch))[1]["loss_consistency"]
    assert values[0] == pytest.approx((total / count).item(), rel=1e-5)
    assert sum(values[-10:]) < 0.8 * sum(values[:10])
    assert after.config == start.config
    shown = f"  loss consistency {values[0]:.3f}, autoregressive "
    assert [message for message in caplog.messages if "step      1" in message and shown in message]


@pytest.mark.parametrize("changes", [{}, {"augment": True, "refresh_every": 2}], ids=str)
def test_a_resumed_run_ends_like_an_uninterrupted_one(changes, config):
    config.consistency = replace(config.consistency, **changes)
    config.train = replace(config.train, save_every=2, steps=6)
    whole = replace(config, run_dir=f"{config.run_dir}-whole")
    run(whole)
    interrupted(config, 2)
    run(replace(config, resume="true"))
    same_checkpoints(config, whole)
    assert metrics(config) == metrics(whole)
    state = checkpoint.load_training(config.run_dir).progress["data"]
    assert state["refreshed"] == 6 * bool(changes) and bool(state["augment"]) == bool(changes)


def test_on_policy_training_reads_what_the_model_in_training_says(config):
    config.consistency = replace(config.consistency, refresh_every=1)
    config.train = replace(config.train, steps=2, save_every=1, optim=OptimConfig(lr=0.1))
    run(config)
    pool = checkpoint.load_training(config.run_dir).progress["data"]["pool"]
    made = {}
    for where in (config.init_from, f"{config.run_dir}/checkpoints/step-00000001"):
        requests = [Request(prompt, 10, i, stop_at(256)) for i, prompt in enumerate(PROMPTS)]
        made[where] = list(map(asdict, Collection(checkpoint.load(where), requests, WINDOW)))
    before, after = made.values()
    assert before != after
    assert pool[:4] == before[:2] + after[2:4]
    assert pool[4:] == list(map(asdict, collected(config)[4:]))


def test_new_trajectories_have_to_pass_the_collections_filters(config):
    config.consistency = replace(config.consistency, refresh_every=1)
    rewrite(config, '"min_tokens":0', '"min_tokens":11')  # of 10 at most
    run(config)
    state = checkpoint.load_training(config.run_dir).progress["data"]
    assert state["drawn"] == 8 and state["refreshed"] == 0
    assert state["pool"] == list(map(asdict, collected(config)))


def test_a_base_run_that_went_on_does_not_keep_a_run_from_resuming(config):
    config.train.save_every = 2
    interrupted(config, 2)
    shutil.rmtree(config.init_from)
    checkpoint.save(tiny(vocab_size=257, seed=9).float(), config.init_from, ByteTokenizer())
    assert run(replace(config, resume="true")).step == 4
    with pytest.raises(ValueError, match=r"trajectories of model=.*, wanted are .*/trained: coll"):
        run(replace(config, run_dir=f"{config.run_dir}-new"), hooks=[too_late])


def test_without_its_weight_the_divergence_is_measured_and_not_learned(config):
    config.consistency = replace(config.consistency, consistency_weight=0.0, ar_weight=1.0)
    config.train.steps = 1
    run(config)
    model, batch = checkpoint.load(config.init_from), next(batches(collected(config)))
    once, twice = (ConsistencyLoss(ar_weight=weight) for weight in (1.0, 2.0))
    text = twice(model, batch, twice.count(batch))[0] - once(model, batch, once.count(batch))[0]
    (line,) = metrics(config)
    assert line["loss_autoregressive"] == pytest.approx(text.item(), rel=1e-5)
    assert line["loss_consistency"] > 0
    text.backward()
    norm = torch.stack(
        [grad.norm() for grad in gradients(model).values() if grad is not None]
    ).norm()
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"consistency": ConsistencyConfig()}, "consistency.trajectories: give the folder of"),
        ({"init_from": None}, "init_from: give the model that consistency.trajectories are of"),
        ({"objective": "x"}, "objective='x': allowed are tokens, .*consistency"),
        ({"model": tiny().config}, "model: not together with init_from"),
    ],
)
def test_what_cannot_work_is_refused(changes, words, config):
    with pytest.raises(ValueError, match=words):
        replace(config, **changes)


def too_late(progress):
    pytest.fail("training began")


def test_trajectories_of_another_window_are_refused_before_training(config):
    config.consistency = replace(config.consistency, window=8)
    with pytest.raises(ValueError, match="trajectories of window=4, wanted are those of 8"):
        run(config, hooks=[too_late])


def test_on_policy_training_that_cannot_work_is_refused_before_training(config, monkeypatch):
    config.consistency = replace(config.consistency, refresh_every=1)
    rewrite(config, '"ends":[256],', "")
    with pytest.raises(ValueError, match=r"do not say .*'ends'.*collect_trajectories.py writes"):
        run(config, hooks=[too_late])
    monkeypatch.setattr("mtp.run.world_size", lambda: 2)
    with pytest.raises(ValueError, match="refresh_every=1: .* in one process only, there are 2"):
        run(config, hooks=[too_late])
