"""Comparisons of n on a user's own text: toy runs are trained, read back and joined."""

import doctest
import json
import shutil

import pytest

hydra = pytest.importorskip("hydra")
from omegaconf import OmegaConf  # noqa: E402

from benchmarks import page, science  # noqa: E402
from mtp.run import RunConfig, run  # noqa: E402
from scripts import compare  # noqa: E402
from scripts.cli import CONFIGS, REPORTS, register  # noqa: E402
from scripts.compare import (  # noqa: E402
    CompareConfig,
    check_alike,
    found_in,
    gathered,
    main,
    markdown,
    panels,
    study_of,
    table,
)

TINY = [
    *("model.dim=16", "model.n_layers=4", "model.n_heads=2", "model.multiple_of=8"),
    *("model.max_seq_len=32", "data.seq_len=16", "train.steps=2", "train.batch_size=2"),
    *("train.eval_batches=1", "train.eval_every=1", "device=cpu"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "my.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"line {i} of some " * 9}) + "\n" for i in range(60))
    )
    return file


def train_here(*words):
    """As scripts/train.py does, without a process of its own."""
    register("train", RunConfig)
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        run(OmegaConf.to_object(hydra.compose("train", overrides=[*words])))


@pytest.fixture(scope="module")
def compared(text, tmp_path_factory):
    """Of real runs."""
    out = tmp_path_factory.mktemp("out") / "compare"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(science, "_train", train_here)
        main(CompareConfig(str(text), n=[1, 2], seeds=2, words=TINY, out=str(out)))
    return out


def made(n, seed, bits=1.0, **more):
    heads = {f"val_bits_per_byte_{i}": bits + i - 1 for i in range(1, n + 1)}
    curves = {i: [[1, 3.0], [2, bits]] for i in range(1, n + 1)}
    numbers = {"acceptance_length": n / 2 + 0.5, "memory_gib": 0.1, "parameters": 7}
    rest = {"run": f"{n}/{seed}", "same": {"data.path": None}, "curves": curves}
    return (
        {"n": n, "seed": seed, "seconds": 2.0, "tokens": 9, "step": 2}
        | heads
        | numbers
        | rest
        | more
    )


def test_runs_are_trained_and_leave_a_table_a_plot_and_a_record(compared):
    pytest.importorskip("matplotlib")
    entry = json.loads((compared / "compare.json").read_text())
    one, two = entry["values"]["table"]
    assert [one["n"], two["n"]] == [1, 2] and one["parameters"] == two["parameters"]
    assert one["acceptance_length"]["mean"] == 1 <= two["acceptance_length"]["mean"] <= 2
    for line in (one, two):
        for i in range(1, line["n"] + 1):
            x = line[f"val_bits_per_byte_{i}"]
            assert 0 < x["low"] < x["mean"] < x["high"]
        assert line["memory_gib"]["mean"] > 0 and line["seconds"]["mean"] > 0
    assert "verdict" in two and "verdict" not in one
    assert (compared / "compare.png").stat().st_size
    assert "bits per byte, head 2" in (compared / "compare.md").read_text()


def test_runs_that_were_scored_on_more_of_the_text_are_refused(compared, tmp_path):
    runs = [compare.read_run(folder) for folder in found_in([str(compared)])]
    check_alike(runs)
    for key in ("batch_size", "eval_batches"):
        folder = tmp_path / key
        shutil.copytree(next(found_in([str(compared)])), folder)
        said = json.loads((folder / "run.json").read_text())
        said["train"][key] *= 2
        (folder / "run.json").write_text(json.dumps(said))
        with pytest.raises(ValueError, match="batch_size x eval_batches=.* same held-out text"):
            check_alike([runs[0], compare.read_run(folder)])


def test_an_n_that_cannot_be_is_refused_before_any_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr(science, "_train", train_here)
    with pytest.raises(ValueError, match="n_layers=.* must be at least n_future_tokens=99"):
        main(CompareConfig(str(text), n=[1, 99], seeds=2, words=TINY, out=str(tmp_path)))
    assert not [*tmp_path.rglob("run.json")]


def test_runs_are_joined_from_their_records(compared, tmp_path, monkeypatch):
    """Those of a folder, or one by one, without training; the table is the same."""
    monkeypatch.setattr(compare, "train_all", None)
    single = [str(folder) for folder in found_in([str(compared)])]
    assert len(single) == 4
    for runs in ([str(compared)], single):
        main(CompareConfig(runs=runs, out=str(tmp_path / "joined")))
        joined, first = (
            json.loads((folder / "compare.json").read_text())["values"]["table"]
            for folder in (tmp_path / "joined", compared)
        )
        assert joined == first


def test_words_that_are_no_keys_here_are_for_training():
    given = ["data=a", "model=3m", 'data.holdout=["b"]', "n=[1,2]", "--cfg", "job"]
    *own, words = gathered(given)
    assert own == ["data=a", "n=[1,2]", "--cfg", "job"] == gathered(own)
    assert doctest.testmod(compare).failed == 0 == doctest.testmod(page).failed
    register("compare", CompareConfig)
    with hydra.initialize_config_dir(str(REPORTS), version_base=None):
        config = hydra.compose("compare", overrides=["data=/", words])
    assert config.words == ["model=3m", 'data.holdout=["b"]']


def test_the_users_words_reach_every_run_and_replace_the_small_ones(text):
    words = study_of(CompareConfig(str(text), words=["model=3m", "train.lr_x=1"])).words
    assert words.count("model=3m") == 1 and "model=1m" not in words and "train.steps=1000" in words
    study = study_of(CompareConfig(str(text), words=["experiment=demo", "train.steps=5"]))
    assert study.experiment == "demo" and "experiment=demo" not in study.words
    assert "model=1m" not in study.words and "train.steps=5" in study.words
    assert f'data.path="{text.resolve()}"' in study.words and "data.source=jsonl" in study.words


def test_intervals_are_over_seeds_and_differences_pair_them():
    runs = [made(1, 0, 1.0), made(1, 1, 2.0), made(2, 0, 0.9), made(2, 1, 1.9), made(4, 0, 0.5)]
    one, two, four = table(runs, [1, 2, 4])
    assert one["val_bits_per_byte_1"]["mean"] == 1.5 and "less_first" not in one
    assert two["less_first"]["mean"] == pytest.approx(-0.1) and two["verdict"] == "better"
    assert two["less_first"]["high"] == pytest.approx(-0.1)  # the seeds' own spread cancels
    assert four["val_bits_per_byte_1"] == {"mean": 0.5} and "less_first" not in four
    shown = markdown([one, two, four]).splitlines()
    assert shown[2].startswith("| 1 | 2 | 1.500 (") and shown[2].count(" - ") == 5
    assert {(p["place"]["head"], int(p["arm"][-1])) for p in panels(runs, [1, 2, 4])} == {
        *((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (3, 4), (4, 4)),
    }


def test_runs_on_other_text_or_twice_the_same_are_refused():
    other = made(2, 0, same={"data.path": "b"})
    with pytest.raises(ValueError, match="2/0 has data.path='b', 1/0 has None: .* held-out text"):
        check_alike([made(1, 0), other])
    with pytest.raises(ValueError, match=r"n and seed \[\(1, 0\)\]: are of several runs"):
        check_alike([made(1, 0), made(1, 0), made(1, 1)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "give either data=FILE"),
        ({"data": "x", "runs": ["y"]}, "give either data=FILE"),
        ({"data": "/nowhere/x.jsonl"}, "data=/nowhere/x.jsonl: no such file or folder"),
        ({"runs": ["y"], "n": []}, r"n=\[\]: give numbers of future tokens"),
        ({"runs": ["y"], "n": [2, 2]}, r"n=\[2, 2\]: give numbers of future tokens"),
        ({"runs": ["y"], "words": ["run_dir=x"]}, r"words=\['run_dir=x'\]: are set here"),
    ],
)
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**words)


def test_a_folder_without_runs_and_a_run_that_was_stopped_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no run, which has run.json, and no folder of runs"):
        [*found_in([str(tmp_path)])]
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="its run.json says no model: is it none of"):
        compare.read_run(tmp_path)
    said = {"model": {"n_future_tokens": 2}}
    (tmp_path / "run.json").write_text(json.dumps(said))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="has no val_bits_per_byte_2: not finished"):
        compare.read_run(tmp_path)
