"""Heads from the start against heads attached afterwards: the real commands at toy length."""

import json
from functools import partial
from types import SimpleNamespace

import pytest

hydra = pytest.importorskip("hydra")
pytest.importorskip("matplotlib")
from omegaconf import OmegaConf  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import mtp  # noqa: E402
from benchmarks import retrofit  # noqa: E402
from benchmarks.readings import attached_foresee_less, of_retrofit  # noqa: E402
from benchmarks.record import parse  # noqa: E402
from benchmarks.retrofit import (  # noqa: E402
    ATTACHED,
    FROZEN,
    JOINT,
    NEXT,
    OWN,
    PRETRAINED,
    Cell,
    RetrofitConfig,
    cells_of,
    commands,
    operations,
    table,
)
from mtp.interop.attach import WEIGHTS  # noqa: E402
from mtp.run import RunConfig, run  # noqa: E402
from scripts.attach import AttachConfig, attach  # noqa: E402
from scripts.cli import CONFIGS, register  # noqa: E402
from scripts.self_distill import SelfDistillConfig, self_distill  # noqa: E402

SCRIPTS = {
    "train": (RunConfig, run),
    "attach": (AttachConfig, attach),
    "self_distill": (SelfDistillConfig, self_distill),
}


def call(said, script, *words):
    """The command without a process of its own."""
    schema, action = SCRIPTS[script]
    register(script, schema)
    said.append(script)
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        action(OmegaConf.to_object(hydra.compose(script, overrides=[*words])))


@pytest.fixture
def toy(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_text("abcdefgh" * 20 + str(i))
    data = ["data.source=folder", f"data.path={texts}", 'data.pattern="*.txt"']
    return RetrofitConfig(
        data=[*data, "data.holdout=[6.txt,7.txt]"],
        **{"n": 2, "dim": 16, "blocks": 2, "seq_len": 16, "batch_size": 2, "steps": 4},
        **{"attach_lrs": [1e-3], "own_texts": 3, "prompt_tokens": 4, "prompts": 2},
        # Heads learn in another type than that of their trunk.
        **{"eval_batches": 2, "seeds": 2, "precision": "bfloat16"},
        out=str(tmp_path / "out"),
        name=str(tmp_path / "retrofit"),
    )


def test_every_way_is_trained_once_and_judged_alike(toy, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(retrofit, "call", partial(call, said))
    line = retrofit.run(toy)
    assert said == 2 * ["train", "train", "attach", "attach", "self_distill", "attach"]
    assert line == json.loads(json.dumps(line)) and line["seeds"] == 2
    assert {*line["table"]} == {PRETRAINED, *ATTACHED, NEXT}
    for way, found in line["table"].items():
        assert ("acceptance_text" in found) == ("acceptance_decoded" in found) == (way != NEXT)
        if way != NEXT:
            for measure in ("acceptance_text", "acceptance_decoded"):
                assert 1 <= found[measure]["mean"] <= 2
    runs = tmp_path / "out"
    heads = load_file(runs / "frozen-lr0.001-seed0" / "run" / "heads" / WEIGHTS)
    (_, later) = mtp.load(runs / "pretrained-lr0.002-seed0" / "run").heads.heads
    sizes = sorted(p.numel() for p in later.parameters())
    assert sorted(p.numel() for p in heads.values()) == sizes  # one kind, of one size
    values = json.loads((tmp_path / "retrofit.json").read_text())["values"]
    bits = {way: found["bits_per_byte"]["values"] for way, found in values["table"].items()}
    assert bits[FROZEN] == pytest.approx(bits[NEXT], rel=1e-5)  # a frozen model is as it was
    assert bits[OWN] == pytest.approx(bits[NEXT], rel=1e-5)
    assert bits[JOINT] != pytest.approx(bits[NEXT], rel=1e-5)
    cells = {cell["way"]: cell for cell in values["cells"] if cell["seed"] == 1}
    steps = {way: cell["step"] for way, cell in cells.items()}
    more = toy.more_steps
    assert steps == {NEXT: 4, PRETRAINED: 4, FROZEN: more, JOINT: more, OWN: more}
    assert all(cell["words"][0].startswith("python scripts/") for cell in cells.values())
    assert (tmp_path / "retrofit.png").stat().st_size
    assert f"pretrained {line['table'][PRETRAINED]['acceptance_text']['mean']:.2f}" in of_retrofit(
        values
    )

    retrofit.run(toy)
    assert len(said) == 12  # all is read back
    with pytest.raises(SystemExit, match="holds a cell of another study"):
        retrofit.run(RetrofitConfig(**vars(toy) | {"prompts": 1}))


def test_models_are_of_one_shape_and_joint_training_takes_the_operations_of_pretraining():
    config = RetrofitConfig()
    found = {cell.way: commands(cell, config)[-1][1] for cell in cells_of(config)}
    assert {"model.n_layers=4", "model.n_future_tokens=1"} <= {*found[NEXT]}
    assert {"model.n_layers=7", "model.n_future_tokens=4"} <= {*found[PRETRAINED]}
    costs = operations(config)
    assert costs[PRETRAINED] == 1 == pytest.approx(costs[JOINT], abs=2e-3)
    assert costs[NEXT] < costs[FROZEN] < costs[OWN] < 1
    assert {"learning=frozen", "kind=transformer", "n=4"} <= {*found[FROZEN]}
    assert "learning=all" in found[JOINT] and "learning=frozen" in found[OWN]
    assert "data=stdlib" in found[FROZEN] and "data.source=jsonl" in found[OWN]
    quick = RetrofitConfig(quick=True)
    assert quick.name == "retrofit_quick" and quick.steps < config.steps
    assert quick.out != config.out


def test_each_way_has_its_best_rate_and_seeds_are_paired():
    config = RetrofitConfig(seeds=2, attach_lrs=[1e-3, 1e-2])
    level = {NEXT: 0.0, PRETRAINED: 2.0, FROZEN: 1.5, JOINT: 1.8, OWN: 1.6}

    def score(cell: Cell):
        value = level[cell.way] + cell.seed - (cell.lr == 1e-2) / 10
        costs = {"step": 1, "tokens": 2, "seconds": 3.0, "bits_per_byte": 4 - value}
        if cell.way == NEXT:
            return costs
        return costs | {"acceptance_text": value, "acceptance_decoded": value}

    lines = table(config, {cell: score(cell) for cell in cells_of(config)})
    assert [lines[way]["lr"] for way in ATTACHED] == [1e-3] * 3
    text = lines[FROZEN]["acceptance_text"]
    assert text["values"] == [1.5, 2.5] and text["low"] < 1.5
    difference = SimpleNamespace(**text["difference"])  # the seeds' own spread cancels
    assert difference.low == pytest.approx(-0.5) == pytest.approx(difference.high)
    assert attached_foresee_less({"table": lines})
    level[JOINT] = 2.0
    lines = table(config, {cell: score(cell) for cell in cells_of(config)})
    assert not attached_foresee_less({"table": lines})


def test_a_run_that_was_stopped_is_not_judged(toy, monkeypatch):
    def stopped(script, *words):
        call([], script, *words, "train.steps=2")

    monkeypatch.setattr(retrofit, "call", stopped)
    with pytest.raises(SystemExit, match="was stopped: the same command goes on"):
        retrofit.run(toy)


@pytest.mark.parametrize(
    "word, message",
    [
        ("n=1", "n=1 must be at least 2"),
        ("seeds=1", "seeds=1 must be at least 2"),
        ("prompt_tokens=256", "prompt_tokens=256 must lie below seq_len=256"),
        ("attach_lrs=[]", "give one at least"),
        ("precision=float8", "precision='float8': allowed are float32, bfloat16"),
        ("steps=1", "steps=1: too few"),
        ("attach_lrs=[1e-3,0]", "lr=0.0 must be above 0"),
        ("eval_batches=0", "eval_batches=0 must be at least 1"),
        ("temperature=-1", "temperature=-1.0"),
        ("depth=3", "keys are data, n, dim"),
    ],
)
def test_bad_words_are_refused_before_anything_is_trained(word, message):
    with pytest.raises((SystemExit, ValueError)) as refused:
        parse(RetrofitConfig, [word])
    assert message in str(refused.value)
