"""The engine of studies: its grid, what arms are equal in, what it reads back, what it says."""

import json
import math
from dataclasses import asdict, replace
from statistics import NormalDist

import pytest

from benchmarks import cells, science
from benchmarks.claims import CLAIMS
from benchmarks.readings import right_answers
from benchmarks.science import STUDIES, ScienceConfig, Study, cells_of, read_study, resolved, table
from mtp.estimate import estimate
from mtp.evaluate.scores import over_seeds
from mtp.objectives import SCHEDULES
from mtp.run import OBJECTIVES, RunConfig, run
from mtp.tokenizer import load_tokenizer

hydra = pytest.importorskip("hydra")
from omegaconf import OmegaConf  # noqa: E402

from scripts.cli import CONFIGS, register  # noqa: E402

HEADS = "model.n_future_tokens"
CORPUS = ("sizes", "bytes", "weights", "objectives", "vocabulary", "epochs")
SMALL = ["model.dim=16", "model.n_layers=5", "train.steps=100"]
STUDY = Study(
    "Does it?",
    "copying",
    arms={HEADS: [1, 2]},
    tuned={"train.optim.lr": [0.001, 0.01]},
    axes={"data.task_args.length": [2, 3]},
    words=SMALL,
)


def made(value, **more):
    curve = [[1, 0.0], [2, value]]
    numbers = {"parameters": 7, "step": 2, "tokens": 9, "seconds": 1.0}
    return {"value": value, "curve": curve, "tests": {}, "columns": {}, **numbers, **more}


def composition(words):
    register("train", RunConfig)
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        return hydra.compose("train", overrides=[*words])


def composed(*words, capture):
    """What `--cfg job` prints, without a process of its own."""
    return OmegaConf.to_yaml(composition(words[:-2]))


def whole_config(*words):
    return OmegaConf.to_object(composition(words))


def token_loss(config):
    """What a run refuses before anything is loaded."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    return OBJECTIVES[config.objective].loss(config, tokenizer, config.model)


# The grid.


def test_every_shipped_study_has_a_grid_and_a_quick_one_in_its_direction():
    names = [file.stem for file in STUDIES.glob("*.yaml")]
    assert {"star_graph", "induction", "polynomial", *CORPUS} <= {*names}
    for name in names:
        whole, quick = (read_study(name, quick) for quick in (False, True))
        assert whole.seeds >= 3 <= quick.seeds
        assert (quick.words, quick.before_words) != (whole.words, whole.before_words)
        arms, fewer = whole.keys_of, quick.keys_of
        assert fewer.items() <= arms.items() and len(fewer) > 1
        assert next(iter(arms)) == next(iter(fewer))


def test_pieces_are_made_once(tmp_path, monkeypatch):
    said = []

    def call(script, out, *words):
        said.append([script, *words])
        (tmp_path / "pieces300.model").write_text("")

    monkeypatch.setattr(cells, "call", call)
    study = replace(STUDY, axes={"pieces": ["bytes", 300]}, words=[*SMALL, "data=stdlib"])
    found = cells_of(study, out=str(tmp_path))
    assert said == [["train_tokenizer", "vocab_size=300", "data=stdlib"]]
    trained_on = {dict(c.place)["pieces"]: [w for w in c.words if "tokenizer" in w] for c in found}
    assert trained_on == {"bytes": [], 300: [f'data.tokenizer="{tmp_path}/pieces300.model"']}
    assert len({c.folder for c in found}) == len(found)


@pytest.mark.parametrize("name", CORPUS)
def test_studies_of_a_corpus_begin_with_the_next_token_and_are_equal_in_parameters(
    name, monkeypatch
):
    """A composed run for every arm at every width, quick and whole; what is no block adds a tenth
    at most, which the record says. Pieces stand in for bytes: their tokenizer is not made here.
    """
    monkeypatch.setattr(science, "pieces_word", lambda *_: "data.tokenizer=bytes")
    for study in (read_study(name, quick) for quick in (False, True)):
        sizes = {}
        cells = cells_of(replace(study, budgets=["parameters"]))
        for cell in (c for c in cells if c.seed == 0):
            config = whole_config(*cell.words)
            token_loss(config)
            found = estimate(config.model, config.train, config.data.seq_len)["parameters"]
            sizes.setdefault(cell.place, []).append((config.model.n_future_tokens, found))
        assert not study.higher and len(sizes) == math.prod(map(len, study.axes.values()))
        for (n, baseline), *others in sizes.values():
            assert n == 1 and all(0.99 < found / baseline < 1.11 for _, found in others)


@pytest.mark.parametrize("name", CORPUS)
def test_every_arm_of_a_corpus_trains_at_toy_length(name, tmp_path):
    for part in ("train", "held_out"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.txt").write_text(f"{part}: " + "abc " * 90)
    toy = [
        *("model.dim=16", "data.source=text", f"data.path={tmp_path}/train", "data.holdout=[]"),
        *(f"data.val_path={tmp_path}/held_out", "data.seq_len=40", "train.steps=4"),
        *("train.batch_size=2", "train.eval_batches=1", "device=cpu"),
    ]
    study = read_study(name, False)
    cells = cells_of(replace(study, axes={}, budgets=["parameters"]))
    for cell in (c for c in cells if c.seed == 0):
        config = whole_config(*cell.words, *toy, f"run_dir={tmp_path}/run_{cell.arm}")
        last = run(config).metrics
        assert all(math.isfinite(last[key]) for key in (study.measure, *study.columns)), cell.arm


def test_arms_may_begin_with_runs_of_their_own_and_share_those_that_are_alike(
    tmp_path, monkeypatch
):
    """The shipped study at toy length, by the real runs."""
    said = []

    def train_here(*words):
        said.append(words)
        run(whole_config(*words))

    monkeypatch.setattr(science, "_train", train_here)
    for part in ("before", "after"):
        (tmp_path / f"{part}.txt").write_text(f"{part}: " + "abc\n" * 900)
    toy = [*("data.source=text", "data.seq_len=40", "train.steps=2", "train.batch_size=2")]
    toy += ["train.eval_batches=1", "train.eval_every=1", "device=cpu", "data.holdout=[]"]
    toy += ["data.val_fraction=0.2"]
    study = read_study("finetune", False)
    study = replace(
        study,
        tuned={},
        seeds=2,
        before_words=[
            *study.before_words,
            "model.dim=16",
            *toy,
            f"data.path={tmp_path}/before.txt",
        ],
        words=[w for w in study.words if "pattern" not in w]
        + [*toy, f"data.path={tmp_path}/after.txt"],
    )
    found = science.train_all(cells_of(study), study, tmp_path / "out")
    begun = {word for words in said for word in words if word.startswith("init_from=")}
    assert len(begun) == 6 and len(found) == 8  # four arms of two seeds, two begin alike
    assert len({run["parameters"] for run in found.values()}) == 1
    of_arm = {(cell.arm, cell.seed): run["value"] for cell, run in found.items()}
    assert len({*of_arm.values()}) == 8
    with pytest.raises(ValueError, match="before=.*: give the keys of each arm"):
        replace(study, before={"one_then_one": {}})


def test_an_unknown_study_is_refused_with_those_there_are():
    with pytest.raises(
        SystemExit, match="study='x': allowed are bytes, epochs, finetune, induction, "
    ):
        read_study("x", False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"arms": {}}, "give one key with its values, or names with the keys of each"),
        ({"arms": {"a": [1], "b": [2]}}, "give one key with its values, or names with"),
        ({"arms": {"a": [1], "b": {}}}, "give one key with its values, or names with"),
        ({"budgets": ["money"]}, r"budgets=\['money'\]: allowed are parameters, trunk, operations"),
        ({"seeds": 1}, "seeds=1: an interval needs at least 2"),
        ({"budgets": ["time"]}, "seconds: for budgets"),
        ({"seconds": 3.0}, "seconds: for budgets"),
        ({"arms": {"a": []}}, r"a=\[\]: give a list of one value at least"),
        ({"arms": {"a": 3}}, "a=3: give a list of one value at least"),
        ({"axes": {"a": [[1, 2], [1, 2]]}}, "a=.*: a value stands there twice"),
        ({"tuned": {"a": []}}, "a=.*: give a list"),
        ({"budgets": []}, "budgets=.*: give a list"),
        ({"problems": 0}, "problems=0: must be at least 1"),
    ],
)
def test_a_study_that_cannot_be_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        replace(STUDY, **given)


def test_a_study_of_unknown_keys_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(science, "STUDIES", tmp_path)
    (tmp_path / "x.yaml").write_text("question: Does it?\nquick: {wordz: []}\n")
    with pytest.raises(ValueError, match="x.yaml says wordz: allowed are question, experiment"):
        read_study("x", False)


def test_arms_may_be_lists():
    study = replace(STUDY, axes={}, tuned={}, arms={"head_weights": [[1, 0], [1, 1]]})
    cells = cells_of(study)
    assert cells[0].words[-3] == "head_weights=[1, 0]"
    lines = table(study, cells, {cell: made(cell.arm[1] + cell.seed / 9) for cell in cells})
    assert [line["verdict"] for line in lines] == ["open", "better"]


def test_cells_are_the_product_and_seeds_take_turns():
    cells = cells_of(STUDY, ["device=cpu"])
    assert len(cells) == 3 * 2 * 2 * 2 == len({cell.folder for cell in cells})
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    first = cells[0]
    assert first.words == (
        *("experiment=copying", *SMALL, "device=cpu", "data.task_args.length=2", f"{HEADS}=1"),
        *("train.optim.lr=0.001", "train.seed=0", "data.seed=0"),
    )
    assert first.folder == "length=2,n_future_tokens=1,lr=0.001,seed=0"
    assert dict(first.place) == {"budget": "parameters", "data.task_args.length": 2}


def test_named_arms_have_several_keys_each():
    arms = {"one": {HEADS: 1}, "wide": {HEADS: 2, "head_weights": [1, 0.5]}}
    one, wide = cells_of(replace(STUDY, arms=arms, axes={}, tuned={}))[:2]
    assert [one.arm, wide.arm] == ["one", "wide"]
    assert wide.words[-4:-2] == (f"{HEADS}=2", "head_weights=[1, 0.5]")
    assert wide.folder == "arm=wide,seed=0"


def test_operations_of_a_schedule_are_its_mean_over_the_run(monkeypatch):
    monkeypatch.setattr(science, "_train", composed)
    words = ["experiment=copying", *SMALL, f"{HEADS}=2"]
    one, both = (
        science.operations([*words[:-1], f"model.n_layers={5 - 2 + n}", f"{HEADS}={n}"])
        for n in (1, 2)
    )
    for schedule in SCHEDULES:
        mean = science.operations([*words, f"head_schedule={schedule}"])
        assert mean == pytest.approx((one + both) / 2) and one < mean < both


def test_budgets_are_equal_in_what_they_say(monkeypatch):
    """A baseline of two budgets is one run."""
    monkeypatch.setattr(science, "_train", composed)
    budgets = ["parameters", "trunk", "operations", "time"]
    study = replace(STUDY, axes={}, tuned={}, budgets=budgets, seconds=5.0)
    found = {(dict(c.place)["budget"], c.arm): c for c in cells_of(study) if c.seed == 0}
    assert len({found[budget, 1].words for budget in budgets[:3]}) == 1
    shapes = {key: resolved(cell.words) for key, cell in found.items()}
    sizes = {key: estimate(*shape) for key, shape in shapes.items()}
    assert sizes["parameters", 1]["parameters"] == sizes["parameters", 2]["parameters"]
    assert shapes["trunk", 1][0].trunk_layers == shapes["trunk", 2][0].trunk_layers
    one, other = sizes["operations", 1]["flops"], sizes["operations", 2]["flops"]
    assert shapes["operations", 2][1].steps < 100 and other == pytest.approx(one, rel=0.01)
    for arm in (1, 2):
        assert shapes["time", arm][1].max_seconds == 5
        assert shapes["time", arm][1].steps > 10**5


# Cells.


def test_a_cell_is_trained_once_and_read_back(tmp_path):
    """The real command, on a word of one letter."""
    words = "model.dim=16 train.steps=2 train.eval_every=1 train.eval_batches=1 train.batch_size=2"
    study = replace(STUDY, axes={}, tuned={}, words=words.split(), tests={"two": {"length": 2}})
    study = replace(study, columns=["step_seconds"])
    cell = cells_of(study)[0]
    found = science.trained(cell, study, tmp_path / "a=1,b")
    assert [step for step, _ in found["curve"]] == [1, 2] and found["step"] == 2
    assert found["value"] == found["curve"][-1][1] and found["words"] == [*cell.words]
    assert found["tests"].keys() == {"two"} and found["columns"]["step_seconds"] > 0
    assert found["parameters"] > 10_000
    file = tmp_path / "a=1,b" / "cell.json"
    file.write_text(json.dumps(found | {"value": 0.123}))
    assert science.trained(cell, study, tmp_path / "a=1,b")["value"] == 0.123
    with pytest.raises(SystemExit, match="holds a cell of another study, of other words"):
        science.trained(cell._replace(words=(*cell.words, "device=cpu")), study, tmp_path / "a=1,b")
    for key, other in (("measure", {"measure": "val_loss"}), ("asked", {"problems": 7})):
        with pytest.raises(SystemExit, match=f"of another study, of other {key}: move it away"):
            science.trained(cell, replace(study, **other), tmp_path / "a=1,b")


def test_each_arm_that_is_new_is_tried_before_any_is_trained(tmp_path, monkeypatch):
    study, said = replace(STUDY, axes={}, tuned={}), []
    monkeypatch.setattr(science, "_train", lambda *words: said.append(words[-1]))
    monkeypatch.setattr(science, "trained", lambda cell, *_: said.append(cell.folder))
    cells = cells_of(study)
    science.train_all(cells, study, tmp_path)
    assert said == ["dry_run=true"] * 2 + [cell.folder for cell in cells]
    for cell in cells:
        if cell.arm == 1:
            (tmp_path / cell.folder).mkdir()
            (tmp_path / cell.folder / "cell.json").touch()
    said.clear()
    science.train_all(cells, study, tmp_path)
    assert said.count("dry_run=true") == 1


@pytest.mark.parametrize(
    ("measure", "rows", "words"),
    [
        ("val_x", [{"step": 1, "val_y": 0.5}], "there is val_y"),
        ("val_y", [{"step": 1, "val_y": 0.5}, {"step": 2}], "there is none: stopped"),
        ("val_y", [], "there is none: stopped"),
    ],
)
def test_a_cell_that_was_stopped_or_has_no_such_measure_leaves_no_record(
    measure, rows, words, tmp_path, monkeypatch
):
    def train(*said):
        assert said[-1] == "resume=auto"
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    monkeypatch.setattr(science, "_train", train)
    study = replace(STUDY, measure=measure)
    with pytest.raises(SystemExit, match=words):
        science.trained(cells_of(study)[0], study, tmp_path)
    assert not (tmp_path / "cell.json").exists()


# What they say.


def test_each_arm_has_its_best_and_is_compared_with_the_baseline_seed_by_seed():
    study = replace(STUDY, axes={})
    cells = cells_of(study)
    values = {(1, 0.001): 0.3, (1, 0.01): 0.2, (2, 0.001): 0.1, (2, 0.01): 0.9}
    found = {c: made(values[c.arm, dict(c.tuned)["train.optim.lr"]] + c.seed / 100) for c in cells}
    baseline, other = table(study, cells, found)
    assert baseline["tuned"] == {"train.optim.lr": 0.001} and baseline["mean"] == pytest.approx(
        0.31
    )
    assert other["tuned"] == {"train.optim.lr": 0.01} and len(other["values"]) == 3
    assert other["difference"]["low"] == pytest.approx(0.6)  # the seeds' own spread cancels
    assert other["low"] < other["mean"] - 0.01
    assert [baseline["verdict"], other["verdict"]] == ["open", "better"]
    lower = replace(study, higher=False)
    baseline, other = table(lower, cells, found)
    assert baseline["tuned"] == {"train.optim.lr": 0.01} and other["verdict"] == "better"


@pytest.mark.parametrize(
    ("curve", "target", "higher", "tokens"),
    [
        ([[1, 0.2], [2, 0.4], [4, 0.8]], 0.6, True, 30.0),  # a straight line between two
        ([[1, 0.2], [2, 0.4], [4, 0.8]], 0.1, True, 10.0),  # from the first one on
        ([[1, 0.2], [2, 0.9], [4, 0.1]], 0.5, True, 10.0 * (1 + 3 / 7)),  # that it got worse again
        ([[1, 3.0], [3, 2.0]], 2.0, False, 30.0),
        ([[1, 3.0], [3, 2.0]], 1.9, False, None),
        ([], 1.0, True, None),
    ],
)
def test_tokens_are_counted_until_the_baseline_is_reached(curve, target, higher, tokens):
    run = made(0.0, curve=curve, step=4, tokens=40)
    assert science.tokens_to(run, target, higher) == (tokens and pytest.approx(tokens))


def test_a_difference_within_its_interval_stays_open():
    study = replace(STUDY, axes={}, tuned={})
    cells = cells_of(study)
    noisy = {(1, s): 0.5 for s in range(3)} | {(2, 0): 0.9, (2, 1): 0.2, (2, 2): 0.8}
    lines = table(study, cells, {c: made(noisy[c.arm, c.seed]) for c in cells})
    assert lines[1]["mean"] > lines[0]["mean"] and lines[1]["verdict"] == "open"
    worse = table(study, cells, {c: made(0.5 - 0.4 * (c.arm == 2) + c.seed / 99) for c in cells})
    assert worse[1]["verdict"] == "worse"


def test_a_study_writes_its_record_and_its_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(science, "read_study", lambda name, quick: STUDY)

    def trained(cell, study, folder):
        """Of unequal lengths, as where the clock ends runs."""
        return made(cell.arm / 4, curve=[[1, 0.0], [2, 0.1], [3, 0.2]][: 1 + cell.seed])

    monkeypatch.setattr(science, "trained", trained)
    monkeypatch.setattr(science, "_train", lambda *words: None)
    assert ScienceConfig("x", quick=True).name == "science_x_quick"
    line = science.run(ScienceConfig("x", out=str(tmp_path), name=str(tmp_path / "science_x")))
    entry = json.loads((tmp_path / "science_x.json").read_text())
    assert len(entry["values"]["cells"]) == 24 and (tmp_path / "science_x.png").stat().st_size
    assert len(line["table"]) == 4 and line["seeds"] == 3
    assert json.loads(json.dumps(line)) == line


def test_budgets_of_the_command_line_stand_in_place_of_the_studys(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(science, "read_study", lambda name, quick: STUDY)

    def found(cells, study, out):
        return {cell: made(cell.arm / 4) for cell in cells}

    monkeypatch.setattr(science, "train_all", found)
    line = science.run(ScienceConfig("x", budgets=["operations"], name=str(tmp_path / "science_x")))
    assert {row["place"]["budget"] for row in line["table"]} == {"operations"}
    with pytest.raises(ValueError, match="budgets=\\['luck'\\]: allowed are parameters"):
        science.run(ScienceConfig("x", budgets=["luck"]))


def test_columns_are_means_over_seeds_with_intervals():
    study = replace(STUDY, axes={}, tuned={}, columns=["memory_gib"])
    cells = cells_of(study)
    found = {c: made(0.5, columns={"memory_gib": c.arm + c.seed}) for c in cells}
    first, second = (line["columns"]["memory_gib"] for line in table(study, cells, found))
    assert (first["mean"], second["mean"]) == (2, 3) and first["low"] < 1.5


OF_STUDIES = [c for c in CLAIMS if c.record.startswith("science_")]
OF_ANSWERS = [c for c in OF_STUDIES if c.ours is right_answers]


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("claim", OF_ANSWERS, ids=lambda c: c.text)
def test_the_book_reads_how_many_answers_are_right(claim, holds):
    """Two and four tokens find all that one does not, the larger the model, the less that is; or
    as many as one.
    """
    study = read_study(claim.record.removeprefix("science_"), False)
    cells = cells_of(study)

    def share(cell):
        one = 0.3 + 0.1 * ["1m", "3m", "10m"].index(dict(cell.place).get("model", "1m"))
        return 0.95 if holds and cell.arm != 1 else one + cell.seed / 100

    found = {c: made(share(c), tests=dict.fromkeys(study.tests, share(c))) for c in cells}
    values = {"study": asdict(study), "table": table(study, cells, found)}
    values = json.loads(json.dumps(values))
    assert claim.holds(values) is holds
    first = claim.ours(values).split(": ", 1)[1]
    assert "n = 1 31 % (29 to 33), n = 2 " in first


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize(
    "claim", [c for c in OF_STUDIES if c not in OF_ANSWERS], ids=lambda c: c.text
)
def test_the_book_reads_what_a_study_writes(claim, holds, monkeypatch):
    """Arms gain with the width, the reverse curriculum most; or none differs from the baseline."""
    monkeypatch.setattr(science, "BUDGETS", dict.fromkeys(science.BUDGETS, lambda *_: []))
    study = read_study(claim.record.removeprefix("science_"), False)
    cells = cells_of(study)
    baseline = cells[0].arm

    def value(cell):
        best = cell.arm in ("reverse", "four_then_one")
        gain = dict(cell.place).get("model.dim", 128) * 1e-3 + 0.05 * best
        return 2 - gain * (holds and cell.arm != baseline) + cell.seed / 100

    found = {c: made(value(c), columns=dict.fromkeys(study.columns, 1.0)) for c in cells}
    values = json.loads(json.dumps({"table": table(study, cells, found)}))
    assert claim.holds(values) is holds
    assert f"bits per byte over {baseline}" in claim.ours(values)


def test_intervals_over_seeds_are_students():
    """Quantiles of t as tables have them."""
    for runs, t in ((2, 6.3138), (3, 2.9200), (5, 2.1318), (30, 1.6991)):
        values = [0.0] * (runs - 1) + [1.0]
        mean, low, high = over_seeds(values)
        spread = math.sqrt((mean * (1 - mean)) * runs / (runs - 1))
        assert (high - mean) == pytest.approx(t * spread / math.sqrt(runs), rel=1e-3)
        assert mean - low == pytest.approx(high - mean)
    many = over_seeds([0.0, 1.0] * 500)
    assert many.high - 0.5 == pytest.approx(
        NormalDist().inv_cdf(0.95) * 0.5 / math.sqrt(1000), rel=0.01
    )
    with pytest.raises(ValueError, match="1 runs: an interval over seeds needs at least 2"):
        over_seeds([0.5])
