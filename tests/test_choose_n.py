"""Rules that choose n: closed forms by hand, real runs at toy length, and what is refused."""

import json
from math import ceil, log2

import pytest
import yaml

hydra = pytest.importorskip("hydra")
from omegaconf import OmegaConf  # noqa: E402

from benchmarks import choose_n, science  # noqa: E402
from benchmarks.choose_n import (  # noqa: E402
    METRICS,
    OTHER_SEEDS,
    SETTINGS,
    Choice,
    ChooseConfig,
    Grid,
    Plan,
    Setting,
    grid_of,
    halving,
    judged,
    read_plan,
    speeds,
    verdict,
)
from benchmarks.readings import chooses_n, of_choices_of_n  # noqa: E402
from mtp.run import RunConfig, run  # noqa: E402
from scripts.cli import CONFIGS, register  # noqa: E402

TOY = [
    *("experiment=copying", "model.dim=16", "model.n_layers=4", "model.n_heads=2"),
    *("train.steps=4", "train.batch_size=2", "train.eval_batches=1", "train.eval_every=0"),
]
PLAN = Plan([1, 2], {"toy": Setting(["accuracy", "speed"], TOY)}, seeds=2)


@pytest.fixture(autouse=True)
def trainings(monkeypatch):
    """scripts/train.py without processes of its own; -> the words of every run."""
    said = []

    def train(*words, capture=False):
        register("train", RunConfig)
        words = words[:-2] if capture else words
        with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
            config = hydra.compose("train", overrides=[*words])
        if capture:
            return OmegaConf.to_yaml(config)
        said.append(words)
        run(OmegaConf.to_object(config))

    monkeypatch.setattr(science, "_train", train)
    return said


def written(folder, **changes):
    setting = {"metrics": ["accuracy", "speed"], "words": TOY}
    file = folder / "toy.yaml"
    said = {"ns": [1, 2], "seeds": 2, "tries": 1, "settings": {"toy": setting}} | changes
    file.write_text(yaml.safe_dump(said))
    return str(file)


# Rules.


def test_a_head_pays_where_its_acceptance_over_its_cost_exceeds_the_speed_so_far():
    """By hand: 1.8 / 1.2, 2.2 / 1.4, 2.3 / 1.6."""
    accepted, costs = [0.8, 0.4, 0.1], {1: 1.0, 2: 1.2, 3: 1.4, 4: 1.6}
    found = speeds(accepted, costs)
    assert found == pytest.approx({1: 1.0, 2: 1.5, 3: 2.2 / 1.4, 4: 2.3 / 1.6})
    for i in (2, 3, 4):
        pays = accepted[i - 2] / (costs[i] - costs[i - 1]) > found[i - 1]
        assert pays == (found[i] > found[i - 1]) == (i < 4)
    assert speeds(accepted, {1: 1.0, 4: 1.6})[4] == found[4]  # a grid may leave some out


@pytest.mark.parametrize("count", range(2, 10))
@pytest.mark.parametrize("higher", [True, False])
def test_halving_keeps_the_best_for_half_of_the_operations(count, higher):
    ns = [2**i for i in range(count)]
    best, seen = ns[count // 2], []

    def score(n, part):
        seen.append((n, part))
        return (1.0 if higher else -1.0) * (n == best)

    chosen, rounds = halving(ns, score, higher)
    assert chosen == best
    assert sum(part for _, part in seen) == pytest.approx(count / 2)
    assert len(rounds) == ceil(log2(count))
    assert [part for _, part in seen] == sorted(part for _, part in seen)  # longer for fewer
    assert [n for n, _ in rounds[0]["scores"]] == ns


def test_of_equals_the_smaller_stays():
    assert halving([1, 2, 4, 8], lambda n, part: 0.0, True)[0] == 1


# Runs.


def test_a_grid_is_equal_in_operations_and_parameters(tmp_path):
    grid = grid_of("toy", PLAN.settings["toy"], PLAN, ChooseConfig(words=["train.steps=400"]))
    assert grid.cost(1) == 1 < grid.cost(2)
    assert grid.steps(2, 1.0) < grid.steps(1, 1.0) == 400
    assert grid.flops(2, 1.0) == pytest.approx(grid.flops(1, 1.0), rel=0.01)
    assert grid.flops(1, 0.25) == grid.flops(1, 1.0) / 4


def test_choices_are_trained_and_judged_once(tmp_path, trainings):
    pytest.importorskip("matplotlib")
    config = ChooseConfig(written(tmp_path), out=f"{tmp_path}/out", name=f"{tmp_path}/found")
    line = choose_n.run(config)
    assert line == json.loads(json.dumps(line)) and line["choices"] == 2
    values = json.loads((tmp_path / "found.json").read_text())["values"]
    accuracy, speed = values["table"]
    # four of the grid, a try of half the steps for each n, one run of the largest n
    seeds = [next(w for w in words if w.startswith("train.seed")) for words in trainings]
    assert len(seeds) == 7 and seeds.count(f"train.seed={OTHER_SEEDS}") == 3
    assert accuracy["share"] == pytest.approx(1 / 4, abs=0.1)  # steps are few and whole
    assert speed["share"] == pytest.approx(1 / 4, abs=0.1)
    for choice in (accuracy, speed):
        assert {choice["chosen"], choice["best"]} <= {1, 2}
        assert [at["n"] for at in choice["grid"]] == [1, 2]
    (seen,) = speed["rounds"]
    (_, plain), (_, two) = seen["scores"]
    assert plain == 1 and two == (1 + seen["accepted"][0]) / speed["grid"][1]["cost"]
    for at in speed["grid"]:
        assert at["mean"] == pytest.approx(at["acceptance_length"] / at["cost"])
    assert (tmp_path / "found.png").stat().st_size
    assert f"toy, speed: {speed['chosen']}, best {speed['best']}" in of_choices_of_n(values)
    assert choose_n.run(config) == line and len(trainings) == 7  # all is read back


def test_a_choice_alone_trains_no_grid(tmp_path, trainings):
    file = written(tmp_path, settings={"toy": {"metrics": ["speed"], "words": TOY}})
    line = choose_n.run(ChooseConfig(file, False, out=f"{tmp_path}/o", name=f"{tmp_path}/found"))
    assert len(trainings) == 1 and line["table"][0]["chosen"] in (1, 2)
    assert "inside" not in line and not (tmp_path / "found.png").exists()


# The judgement.


class Judged(Grid):
    """Of made-up scores, by n and seed."""

    def trained(self, n, part, seed):
        values = {1: [0.4, 0.6, 0.5], 2: [0.88, 0.92, 0.9], 4: [0.85, 0.95, 0.93]}
        columns = {"val_accuracy": values[n][seed], "val_acceptance_length": 1.0}
        return {"value": 2.0, "columns": columns, "step": 1, "seconds": 1.0}

    def cost(self, n):
        return 1.0

    def flops(self, n, part):
        return 10.0 * part


@pytest.mark.parametrize(("n", "inside"), [(1, False), (2, True), (4, True)])
def test_a_choice_is_inside_where_its_mean_is_in_the_best_ones_interval(n, inside):
    """The best is 4, at 0.91 with 0.78 to 1.04."""
    plan = Plan([1, 2, 4], PLAN.settings, seeds=3)
    grid = Judged("toy", ["accuracy"], (), plan, None)
    found = judged(grid, "accuracy", Choice(n, 15.0, []))
    assert found["best"] == 4 and found["inside"] is inside
    assert [at["inside"] for at in found["grid"]] == [False, True, True]
    assert found["share"] == pytest.approx(15 / 90)


def test_a_rule_has_to_do_better_than_every_constant():
    def line(chosen, *inside):
        grid = [{"n": n, "inside": x} for n, x in zip([1, 2], inside, strict=True)]
        return {"inside": inside[chosen - 1], "share": 0.3, "grid": grid}

    split = verdict([line(1, True, False), line(2, False, True)], [1, 2])
    assert split["no_constant_as_good"] and split["inside"] == 2 and chooses_n(split)
    assert [c["inside"] for c in split["constants"]] == [1, 1]
    same = verdict([line(2, False, True), line(2, True, True)], [1, 2])
    assert not same["no_constant_as_good"] and not chooses_n(same)
    assert not chooses_n(split | {"most_share": 0.6})


# Files.


@pytest.mark.parametrize("name", [file.stem for file in SETTINGS.glob("*.yaml")])
def test_every_shipped_file_composes_into_runs(name, tmp_path, monkeypatch):
    """Pieces stand in for bytes: their tokenizer is not made here."""
    monkeypatch.setattr(choose_n, "pieces_word", lambda *_: "data.tokenizer=bytes")
    plan = read_plan(name)
    for key, setting in plan.settings.items():
        grid = grid_of(key, setting, plan, ChooseConfig(name))
        model, training, _ = science.resolved(grid.of(plan.ns[-1]))
        assert model.trunk_layers >= 1 and not training.eval_every
        assert all(
            grid.flops(n, 1.0) == pytest.approx(grid.flops(1, 1.0), rel=0.02) for n in plan.ns
        )
    settings = sum(len(setting.metrics) for setting in plan.settings.values())
    assert settings >= (4 if name == "whole" else 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ns": [2]}, r"ns=\[2\]: give at least 2 whole numbers from 1 on, in order"),
        ({"ns": [2, 1]}, "in order"),
        ({"ns": [0, 1]}, "from 1 on"),
        ({"ns": 3}, "ns=3: give at least 2 whole numbers"),
        ({"ns": [1, "x"]}, "give at least 2 whole numbers"),
        ({"seeds": 1}, "seeds=1: an interval needs at least 2"),
        ({"tries": 0}, "tries=0 must be at least 1"),
        ({"settings": {}}, "settings: give one at least"),
        ({"settings": ["a"]}, "settings: give one at least, by its name"),
        ({"settings": {"a": ["bits"]}}, "give keys and values; allowed are metrics, words"),
        ({"shares": 1}, "shares: allowed are ns, settings, seeds, tries"),
        ({"settings": {"a": {"metrics": ["loss"], "words": []}}}, "bits, accuracy, speed"),
        ({"settings": {"a": {"metrics": ["bits"]}}}, "words"),
        ({"settings": {"a": {"metrics": ["bits"], "words": ["train.seed=1"]}}}, "is set here"),
        (
            {"settings": {"a": {"metrics": ["bits"], "words": [*TOY, "train.max_seconds=9"]}}},
            "a: train.max_seconds: runs are equal in operations",
        ),
        (
            {"settings": {"a": {"metrics": ["accuracy"], "words": ["data=stdlib"]}}},
            "a: accuracy is of a task: its data.source=stdlib",
        ),
        ({"ns": [1, 9]}, "toy, n = 9: .*n_layers"),
    ],
)
def test_what_cannot_be_is_refused_before_any_run(changes, words, tmp_path, trainings):
    with pytest.raises(SystemExit, match=words):
        choose_n.run(ChooseConfig(written(tmp_path, **changes), out=str(tmp_path)))
    assert not trainings


@pytest.mark.parametrize("text", ["", "ns: [1, 2", "- a"])
def test_a_file_that_says_no_plan_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(SystemExit) as refused:
        read_plan(str(tmp_path / "plan.yaml"))
    said = str(refused.value)
    assert said.startswith(f"error: {tmp_path / 'plan.yaml'}: ") and "\n" not in said


def test_an_unknown_file_is_refused_with_those_there_are():
    with pytest.raises(SystemExit, match="settings=x: no such file; allowed are quick, whole"):
        read_plan("x")


def test_every_metric_knows_which_way_is_better():
    record = {"value": 2.0, "columns": {"val_accuracy": 0.5, "val_acceptance_length": 3.0}}
    values = {name: (m.higher, m.value(record, 1.5)) for name, m in METRICS.items()}
    assert values == {"bits": (False, 2.0), "accuracy": (True, 0.5), "speed": (True, 2.0)}
