"""The consistency benchmark at toy size: its models, its figures, its page."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

import mtp
from benchmarks import consistency, consistency_models
from benchmarks.consistency import BenchmarkConfig
from benchmarks.consistency_models import consistency_run, texts_of, trained
from benchmarks.tasks import questions, write
from benchmarks.trajectory_page import trajectory_page
from benchmarks.ways import PLAIN
from mtp.consistency.filters import FilterConfig
from mtp.consistency.trajectories import Trajectory
from mtp.documents import DataConfig
from mtp.model import ModelConfig
from mtp.run import RunConfig, run
from mtp.tokenizer import ByteTokenizer
from mtp.train import TrainConfig

MODEL = ModelConfig(dim=16, n_layers=3, n_heads=2, n_future_tokens=2, multiple_of=8)
KEYS = {
    *("jacobi_control_tokens_per_forward", "jacobi_after_tokens_per_forward", "speedup"),
    *("quality_control", "quality_after", "quality_difference_interval"),
    *("problems", "window", "window_cost"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A base run, and what the benchmark is asked to make of it."""
    folder = tmp_path_factory.mktemp("toy")
    write(folder / "train.jsonl", islice(questions(held_out=False), 8))
    data = DataConfig("jsonl", str(folder / "train.jsonl"), seq_len=64, val_fraction=0.3)
    model = replace(MODEL, max_seq_len=1024)
    settings = TrainConfig(steps=1, batch_size=1, eval_batches=1)
    run(RunConfig(str(folder / "base"), model=model, data=data, train=settings, sample_every=0.0))
    return BenchmarkConfig(
        base=str(folder / "base"),
        out=str(folder / "out"),
        name=str(folder / "found"),
        **dict(prompts=3, steps=2, batch_size=2, draft_steps=1, problems=3, texts=2),
        **dict(rounds=1, pairs=1, window=4, new_tokens=6, device="cpu"),
    )


@pytest.fixture(autouse=True)
def every_response(monkeypatch):
    """Models that learned nothing repeat themselves."""
    none = FilterConfig(token_times=0, ngram_times=0, sentence_times=0)
    monkeypatch.setattr(consistency_models, "FilterConfig", lambda: none)
    monkeypatch.setattr(consistency, "WINDOWS", (3, 4))


def test_it_makes_its_models_and_writes_what_it_found(toy):
    line = consistency.run(toy)
    assert line.keys() == KEYS
    entry = json.loads(Path(f"{toy.name}.json").read_text(encoding="utf-8"))
    values = entry["values"]
    assert line.items() <= values.items()
    ways = {who: set(found) for who, found in values["decoding"].items()}
    assert ways["control"] == {PLAIN, "Jacobi 3", "Jacobi 4"}
    assert ways["after"] == ways["control"] | {"Jacobi 4, pool"}
    assert "own heads" in ways["base"] and "draft model" in ways["base"]
    for found in values["decoding"].values():
        assert found[PLAIN]["tokens_per_forward"] == found[PLAIN]["speedup"] == 1
        assert all(f["same_texts"] == f["texts"] == 2 for f in found.values())
    assert values["costs"].keys() == {"collection", "after", "control", "draft"}
    assert "consistency model" in Path(f"{toy.name}.html").read_text(encoding="utf-8")
    again = consistency.make_models(toy)  # finds all of it
    assert again.costs == values["costs"]


def test_the_control_reads_the_same_text_without_the_loss(toy):
    after, control = (consistency_run(toy, name) for name in ("after", "control"))
    weights = after.consistency.consistency_weight, control.consistency.consistency_weight
    assert weights == (1.0, 0.0)
    same = replace(control.consistency, consistency_weight=1.0, states=after.consistency.states)
    assert replace(control, run_dir=after.run_dir, consistency=same) == after


def test_the_draft_learns_the_answers_of_the_base_model(toy):
    consistency_models.collect(toy)
    tokenizer, model = mtp.load_tokenizer(toy.base), mtp.load(toy.base)
    for text in texts_of(toy, tokenizer):
        request = mtp.Request(tokenizer.encode(text["prompt"]), 6, stop=mtp.stop_at(256))
        (done,) = mtp.generate(model, [request], sampling=mtp.Sampling(temperature=0))
        assert text["completion"] == tokenizer.decode([t for t in done.tokens if t != 256])


def test_what_another_configuration_left_is_refused(toy, tmp_path):
    consistency_models.collect(toy)
    config = replace(consistency_run(toy, "after"), run_dir=str(tmp_path / "after"))
    assert trained(config) == trained(config)
    with pytest.raises(SystemExit, match="is of another configuration"):
        trained(replace(config, train=replace(config.train, steps=3)))


def test_quick_is_written_beside_the_whole():
    whole, quick = BenchmarkConfig(), BenchmarkConfig(quick=True)
    assert quick.steps < whole.steps
    assert quick.name != whole.name and quick.out != whole.out


def test_the_page_draws_right_tokens_blue_and_wrong_ones_red(tmp_path):
    one = Trajectory([65], [[[66, 60], [66, 67]]], length=2)
    trajectory_page([(one, one)], ("a", "b"), ByteTokenizer(), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    state = '<i class="right">B</i><i class="wrong">&lt;</i>'
    assert text.count(f"<li>{state}") == 2
    assert "b: 2 tokens in 1 steps" in text
