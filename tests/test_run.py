"""A whole run: from a configuration and a folder of text to checkpoints, logs and samples."""

import json
import logging
import math
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import mtp
from mtp import checkpoint
from mtp.data import Batches, load_corpus
from mtp.documents import DataConfig
from mtp.estimate import describe, estimate
from mtp.hooks import read_jsonl
from mtp.model import ModelConfig, Transformer
from mtp.optim import OptimConfig
from mtp.run import RunConfig, find_device, run
from mtp.tokenizer import ByteTokenizer
from mtp.train import TrainConfig, validate

N = 3
TIMES = (
    *("seconds", "tokens_per_second", "step_seconds", "data_wait"),
    *("memory_gib", "model_tflops"),
)
MODEL = ModelConfig(dim=8, n_layers=4, n_heads=2, n_future_tokens=N, multiple_of=8, max_seq_len=64)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of training texts and one of held-out ones."""
    folder = tmp_path_factory.mktemp("texts")
    for part, count in (("train", 5), ("held_out", 2)):
        (folder / part).mkdir()
        for i in range(count):
            (folder / part / f"{i}.txt").write_text(f"{part} {i}: " + "abc " * (10 + 7 * i))
    return folder


@pytest.fixture
def config(texts, tmp_path):
    data = DataConfig("text", str(texts / "train"), val_path=str(texts / "held_out"), seq_len=16)
    train = TrainConfig(
        steps=4, batch_size=2, log_every=1, optim=OptimConfig(lr=1e-2, warmup_steps=2)
    )
    return RunConfig(str(tmp_path / "run"), device="cpu", model=MODEL, data=data, train=train)


def metrics(config):
    """The lines of metrics.jsonl without what differs from run to run."""
    lines = read_jsonl(home(config) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def home(config):
    return Path(config.run_dir)


def same_checkpoints(left, right):
    """Both runs' newest checkpoints hold the same bits, clocks apart."""
    for name in ("model.safetensors", "optimizer.safetensors", "tokenizer.json"):
        one, other = (checkpoint.find(config.run_dir) / name for config in (left, right))
        assert one.read_bytes() == other.read_bytes(), name
    files = [checkpoint.find(c.run_dir) / "config.json" for c in (left, right)]
    configs = [json.loads(file.read_text()) for file in files]
    for entry in configs:
        del entry["checksums"]["training.json"]  # it holds a clock
    assert configs[0] == configs[1]
    states = [checkpoint.load_training(c.run_dir).progress | {"seconds": 0} for c in (left, right)]
    assert states[0] == states[1]


# One run, end to end.


def test_a_run_leaves_a_model_that_loads_and_completes(config):
    progress = run(config)
    model, tokenizer = mtp.load(config.run_dir), mtp.load_tokenizer(config.run_dir)
    assert progress.step == 4
    for name, t in progress.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], t), name
    assert model.config == replace(MODEL, vocab_size=tokenizer.vocab_size)
    request = mtp.Request(tokenizer.encode("abc"), 10)
    plain, drafted = (mtp.generate(model, [request], d)[0] for d in (None, mtp.OwnHeads()))
    assert plain.tokens == drafted.tokens and len(plain.tokens) == 10


def test_a_run_leaves_the_documented_files(config):
    config.train.save_every = 3
    run(config)
    assert {path.name for path in home(config).iterdir()} == {
        "checkpoints",
        "metrics.jsonl",
        "run.json",
    }
    saved = sorted(path.name for path in (home(config) / "checkpoints").iterdir())
    assert saved == ["step-00000003", "step-00000004"]


def test_run_json_is_the_configuration(config):
    run(config)
    stored = json.loads((home(config) / "run.json").read_text())
    assert stored == json.loads(json.dumps(asdict(config)))


def test_a_run_that_is_refused_leaves_the_record_of_the_one_there(config):
    run(config)
    before = (home(config) / "run.json").read_text()
    longer = replace(config.train, steps=6)
    other = replace(config, resume="true", train=longer, data=replace(config.data, seed=7))
    with pytest.raises(ValueError, match="its seed is 0, not 7"):
        run(other)
    assert (home(config) / "run.json").read_text() == before


def test_the_log_has_a_line_per_step_and_ends_with_the_validation(config, texts):
    progress = run(config)
    lines = list(read_jsonl(home(config) / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    corpus = load_corpus(config.data, ByteTokenizer(), True)
    given = Batches(corpus, 16, N, 2, epochs=1)
    held_out = validate(progress.model, given, N, corpus.bytes_per_token)
    assert {k: lines[-1][k] for k in held_out} == held_out


def test_too_little_held_out_text_says_which_part_it_is(config, tmp_path):
    (tmp_path / "text.txt").write_text("a line\n" * 100)
    config.data = DataConfig("text", str(tmp_path / "text.txt"), val_fraction=0.01, seq_len=16)
    with pytest.raises(ValueError, match="^8 tokens are held out, one row needs 19 .*val_fraction"):
        run(config)


def test_every_validation_reads_the_same_batches(config):
    config.train = replace(config.train, eval_every=1, optim=OptimConfig(lr=1e-12), eval_batches=2)
    run(config)
    losses = [line["val_loss_1"] for line in metrics(config)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_samples_are_logged(config, caplog):
    caplog.set_level(logging.INFO)
    config.sample_prompt, config.sample_every = "abc", 1e-9
    seen = []

    def aged(progress):
        progress.seconds += 10  # the first sample comes after ten seconds
        seen.append(progress.step)

    run(config, hooks=[aged])
    samples = [message for message in caplog.messages if "sample: abc⟶" in message]
    assert seen == [1, 2, 3, 4] and len(samples) == 3


def test_samples_can_be_switched_off(config, caplog):
    caplog.set_level(logging.INFO)
    config.sample_every = 0
    run(config, hooks=[lambda progress: setattr(progress, "seconds", 1e3)])
    assert not [message for message in caplog.messages if "sample:" in message]


def test_tensorboard_writes_into_the_run_directory(config):
    pytest.importorskip("tensorboard")
    config.tensorboard, config.train.steps = True, 1
    run(config)
    assert list((home(config) / "tensorboard").glob("events.*"))


def test_the_seed_decides_the_weights_and_runs_repeat(config):
    runs = [
        replace(config, run_dir=f"{config.run_dir}{i}", train=replace(config.train, seed=seed))
        for i, seed in enumerate((0, 0, 1))
    ]
    for one in runs:
        run(one)
    same_checkpoints(*runs[:2])
    assert metrics(runs[0]) == metrics(runs[1]) != metrics(runs[2])


def test_head_weights_reach_the_loss(config):
    plain, weighted = replace(config), replace(config, run_dir=f"{config.run_dir}2")
    weighted.head_weights = [1.0, 0.0, 0.0]
    run(plain), run(weighted)
    first, second = metrics(plain), metrics(weighted)
    assert first[0]["loss_3"] == second[0]["loss_3"]
    assert first[0]["grad_norm"] > second[0]["grad_norm"]


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ({"head_schedule": "x"}, "head_schedule='x': allowed are forward, reverse, annealed, or"),
        ({"head_schedule": "reverse", "objective": "bag"}, "not together with objective=bag"),
        ({"head_weights": [1.0], "objective": "distill"}, "not together with objective=distill"),
    ],
)
def test_schedules_that_cannot_be_are_refused(config, words, refusal):
    with pytest.raises(ValueError, match=refusal):
        replace(config, **words)


def test_a_summary_that_cannot_be_is_refused(config):
    config.objective = "order"
    with pytest.raises(ValueError, match="window=32 must be below data.seq_len=16"):
        run(config)
    config.window = 0
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        run(config)
    config.model = replace(config.model, n_future_tokens=1)
    with pytest.raises(ValueError, match="n_future_tokens=1 must be at least 2: objective=order"):
        run(config)


@pytest.mark.parametrize("objective", ["order", "bag"])
def test_a_last_head_that_learns_a_summary_trains_and_validates(config, objective):
    config.objective, config.window = objective, 8
    run(config)
    last = metrics(config)[-1]
    assert math.isfinite(last["loss_3"]) and "val_bits_per_byte_1" in last


def test_a_schedule_is_gone_through_and_resumed_as_it_was(config):
    config.head_schedule = "reverse"
    config.train = replace(config.train, steps=6)
    run(config)
    heads = [sum(key.startswith("loss_") for key in line) for line in metrics(config)]
    assert heads == [3, 3, 2, 2, 1, 1]
    halves = replace(config, run_dir=f"{config.run_dir}2")
    run(halves, hooks=[lambda p: p.step == 3 and os.kill(os.getpid(), signal.SIGTERM)])
    run(replace(halves, resume="true"))
    same_checkpoints(config, halves)


# Estimates.


def test_a_dry_run_logs_the_estimate_and_writes_nothing(config, caplog):
    caplog.set_level(logging.INFO)
    config.dry_run = True
    assert run(config) is None
    expected = estimate(replace(MODEL, vocab_size=257), config.train, 16)
    assert caplog.messages == [describe(expected)]
    assert not home(config).exists()


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True}, {"unembedding": "replicated"}, {"head": "linear"}]
    + [{"head": "causal", "n_kv_heads": 1}, {"head": "sequential"}],
    ids=str,
)
def test_the_estimate_counts_the_models_parameters(changes, config):
    model = replace(MODEL, **changes)
    counted = sum(p.numel() for p in Transformer(model).parameters())
    expected = estimate(model, config.train, 16)
    assert expected["parameters"] == counted
    assert f"{counted / 1e6:,.2f}M parameters" in describe(expected)


@pytest.mark.parametrize(("head", "layers"), [("causal", 4), ("linear", 4), ("sequential", 6)])
def test_the_estimate_counts_attention_in_every_layer_that_has_it(head, layers, config):
    per_token = [
        estimate(replace(MODEL, head=head), config.train, seq_len)["flops_per_token"]
        for seq_len in (16, 17)
    ]
    assert per_token[1] - per_token[0] == 6 * layers * MODEL.dim


def test_the_estimate_of_disk_is_what_checkpoints_take(config):
    config.train.save_every = 2
    config.model = replace(MODEL, dim=64)
    expected = estimate(replace(config.model, vocab_size=257), config.train, 16)["disk_bytes"]
    run(config)
    files = (home(config) / "checkpoints").rglob("*.safetensors")
    assert sum(file.stat().st_size for file in files) == pytest.approx(expected, rel=0.1)


def test_a_large_model_is_estimated_without_memory():
    huge = ModelConfig(dim=8192, n_layers=80, n_heads=64, vocab_size=32000)
    expected = estimate(huge, TrainConfig(), 4096)
    assert expected["parameters"] > 5e10
    assert expected["flops"] == expected["flops_per_token"] * 8 * 4096 * 1000


# Resuming.


def interrupted(config, step):
    """Run until the checkpoint of `step` is written, then die in the next step."""

    def die(progress):
        if progress.step > step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, hooks=[die])


def streaming(config, texts, monkeypatch):
    """The same texts as a local data set that `datasets` streams."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    folder = Path(config.run_dir).parent / "jsonl"
    folder.mkdir()
    for part, name in (("train", "train"), ("held_out", "validation")):
        records = [{"text": file.read_text()} for file in sorted((texts / part).iterdir())]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    return DataConfig("datasets", str(folder), streaming=True, val_split="validation", seq_len=16)


@pytest.mark.parametrize("source", ["text", "streaming"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(source, config, texts, monkeypatch):
    if source == "streaming":
        config.data = streaming(config, texts, monkeypatch)
    config.train = replace(config.train, save_every=2, eval_every=2, log_every=3, steps=6)
    whole = replace(config, run_dir=f"{config.run_dir}-whole")
    run(whole)
    interrupted(config, 2)
    progress = run(replace(config, resume="true"))
    assert progress.step == 6
    same_checkpoints(config, whole)
    assert metrics(config) == metrics(whole)


def test_resuming_goes_on_from_the_newest_checkpoint_by_number(config):
    config.train = replace(config.train, save_every=2, steps=12, log_every=12)
    interrupted(config, 10)
    steps = []
    run(replace(config, resume="true"), hooks=[lambda progress: steps.append(progress.step)])
    assert steps == [11, 12]


def test_a_finished_run_can_be_prolonged(config):
    run(config)
    longer = replace(config, resume="true", train=replace(config.train, steps=6))
    assert run(longer).step == 6
    assert [line["step"] for line in metrics(config)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("key", "value"), [("head", "causal"), ("rope_theta", 5.0), ("n_heads", 1)]
)
def test_resuming_with_another_model_of_the_same_shapes_is_refused(key, value, config):
    config.train.steps = 1
    run(config)
    other = replace(config, resume="true", model=replace(MODEL, **{key: value}))
    with pytest.raises(ValueError, match=f"model.{key}={value!r}"):
        run(other)


def test_resuming_on_other_data_is_refused(config, texts):
    config.train.steps = 1
    run(config)
    other = replace(config.data, path=str(texts / "held_out"))
    with pytest.raises(ValueError, match="state of other data: its corpus"):
        run(replace(config, resume="true", data=other))


# What is refused, before anything is loaded.


def test_a_used_run_directory_is_refused_and_left_as_it_was(config):
    run(config)
    before = {path: path.stat().st_mtime_ns for path in home(config).rglob("*")}
    with pytest.raises(ValueError, match=f"run_dir={config.run_dir} holds a run already"):
        run(config)
    assert before == {path: path.stat().st_mtime_ns for path in home(config).rglob("*")}


def test_resuming_nothing_is_refused(config):
    config.resume = "true"
    with pytest.raises(ValueError, match=f"run_dir={config.run_dir} holds no checkpoint"):
        run(config)
    assert not home(config).exists()


def test_a_run_directory_that_cannot_be_made_is_named(config):
    home(config).write_text("a file")
    with pytest.raises(OSError, match=f"run_dir={config.run_dir} cannot be written"):
        run(config)


@pytest.mark.parametrize(
    ("seq_len", "words"),
    [
        (65, "data.seq_len=65 exceeds model.max_seq_len=64"),
        (2, "data.seq_len=2 is shorter than model.n_future_tokens=3"),
    ],
)
def test_row_lengths_that_cannot_work_are_refused(seq_len, words, config):
    config.data.seq_len = seq_len
    with pytest.raises(ValueError, match=words):
        run(config)
    assert not home(config).exists()


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "cuda:99"])
def test_an_unknown_or_absent_device_is_refused(device, config):
    config.device = device
    with pytest.raises(ValueError, match=f"device='{device}' does not work here") as caught:
        run(config)
    assert "auto, cpu, cuda, mps" in str(caught.value)


def test_auto_finds_a_device_that_works():
    assert torch.zeros(1, device=find_device("auto")) == 0
    assert find_device("cpu") == torch.device("cpu")


def test_a_wrong_number_of_head_weights_is_refused(config):
    config.head_weights = [1.0]
    with pytest.raises(ValueError, match="head_weights has 1 numbers for n_future_tokens=3"):
        run(config)
    assert not home(config).exists()


def test_held_out_text_too_short_for_a_row_is_refused_before_training(config, texts, tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    config.data = replace(config.data, val_path=str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="4 tokens are held out, one row needs 19"):
        run(config, hooks=[lambda progress: pytest.fail("training began")])


def test_a_disk_without_room_for_the_run_is_refused_at_its_start(config, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="0 MiB free, the run's checkpoints need about .*keep_last"):
        run(config)
    assert not (home(config) / "run.json").exists()


@pytest.mark.parametrize(("keep", "stay"), [(None, 4), (1, 2), (9, 4)])
def test_the_estimate_of_disk_knows_how_many_checkpoints_stay(keep, stay):
    training = TrainConfig(steps=8, save_every=2, keep_last=keep)
    expected = estimate(MODEL, training, 16)
    assert expected["disk_bytes"] == 12 * expected["parameters"] * stay


def test_a_resumed_run_needs_no_room_for_what_is_written_already(config, monkeypatch):
    config.train = replace(config.train, save_every=1)
    run(config)
    config.resume, config.train.steps = "true", 5
    missing = estimate(replace(MODEL, vocab_size=257), config.train, 16)["disk_bytes"] / 5
    usage = shutil.disk_usage("/")._replace(free=1.5 * missing)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run(config).step == 5


def test_steps_that_only_validate_are_logged_whole(config):
    """Each line of the log has losses, and the console finds all it shows."""
    config.train = replace(config.train, log_every=4, eval_every=3, save_every=0)
    run(config)
    lines = metrics(config)
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert all("loss_1" in line for line in lines)
    assert ["val_loss_1" in line for line in lines] == [False, True, True]
