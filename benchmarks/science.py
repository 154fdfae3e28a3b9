"""Does a change of training help, at equal what? One engine for grids of training runs.

    python -m benchmarks.science study=star_graph
    python -m benchmarks.science study=star_graph quick=true

A study is a file of `configs/study/`, see `Study`: an experiment, the arms to compare (the first is
the baseline; values of one key, or names of several keys each), what every arm may choose its best
of (`tuned`), what tells the rows of the table apart (`axes`), and in which sense arms are equal
(`budgets`):

    parameters   model.n_layers counts trunk and heads together: extra heads take trunk layers, and
                 the record says what heads of other kinds add
    trunk        every arm keeps the baseline's trunk, extra heads come on top
    operations   as parameters; steps in inverse proportion to the operations of a token
    time         as parameters; each run ends after the study's `seconds` of training

Every cell of the grid is one run of `scripts/train.py`, with its command in its record. Cells take
turns seed by seed. A cell that is done is read back from its record, one that was stopped goes on
from its checkpoint: the same command goes on where it was. Of `tuned` each arm has what is best on
the mean over seeds, on the same held-out problems that it is scored on: a little flattering to all
arms alike. Intervals are Student's t over seeds, 90 %; `difference` pairs runs of one seed, and so
does `tokens_to_baseline`: those after which an arm was as good as the baseline in the end, between
two validations on the straight line, null where it never was. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import mtp
from benchmarks.cells import RECORD, STOPPED, Values, as_words, call, kept, pieces_word
from benchmarks.pictures import drawn, study_panels
from benchmarks.record import ROOT, launch, record
from mtp.checkpoint import find, load_config
from mtp.estimate import estimate
from mtp.evaluate.scores import Interval, over_seeds
from mtp.model import ModelConfig
from mtp.problems import problems, verdicts
from mtp.run import METRICS, data_of
from mtp.tokenizer import load_tokenizer
from mtp.train import TrainConfig

PIECES = "pieces"  # an axis
STUDIES = ROOT / "configs" / "study"
_train = partial(call, "train")


@dataclass
class ScienceConfig:
    """budgets: in place of the study's own. out: where cells are kept. words: for every run, as
    ["device=cuda"].
    """

    study: str = "star_graph"
    quick: bool = False
    budgets: list[str] = field(default_factory=list)
    out: str = "runs/science"
    words: list[str] = field(default_factory=list)
    name: str = ""  # of the record

    def __post_init__(self) -> None:
        self.name = self.name or f"science_{self.study}{'_quick' * self.quick}"


@dataclass
class Study:
    """arms: one key with its values, or names with the keys of each. axes: keys with their values;
    `pieces` is for how many of SentencePiece, made of what `words` say of data, or bytes.
    before: keys of the run that each arm's begins with, if any, `before_words` are of all; one with
    the same keys and seed is shared. measure: a key of metrics.jsonl. columns: more of its keys
    that the table has beside it. tests: task_args of other problems that every finished model is
    asked, by a name. quick: what is otherwise with quick=true, the same direction in minutes.
    """

    question: str
    experiment: str | None
    arms: dict[str, Any]
    tuned: dict[str, list] = field(default_factory=dict)
    axes: dict[str, list] = field(default_factory=dict)
    budgets: list[str] = field(default_factory=lambda: ["parameters"])
    seconds: float | None = None
    seeds: int = 3
    measure: str = "val_accuracy"
    higher: bool = True  # is better
    columns: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    before: dict[str, Values] = field(default_factory=dict)
    before_words: list[str] = field(default_factory=list)
    tests: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: int = 1000  # of each test
    quick: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = all(isinstance(keys, dict) for keys in self.arms.values())
        if len(self.arms) != 1 and not (self.arms and named):
            raise ValueError(
                f"arms={self.arms}: give one key with its values, or names with the keys of each"
            )
        for name in ("arms", "tuned", "axes") if not named else ("tuned", "axes"):
            setattr(self, name, {key: _choices(key, v) for key, v in getattr(self, name).items()})
        _choices("budgets", self.budgets)
        if unknown := set(self.budgets) - BUDGETS.keys():
            raise ValueError(f"budgets={sorted(unknown)}: allowed are {', '.join(BUDGETS)}")
        if self.seeds < 2:
            raise ValueError(f"seeds={self.seeds}: an interval needs at least 2")
        if ("time" in self.budgets) != (self.seconds is not None):
            raise ValueError("seconds: for budgets=[time], which needs them")
        if self.before and self.before.keys() != self.arms.keys():
            raise ValueError(f"before={sorted(self.before)}: give the keys of each arm")
        if self.problems < 1:
            raise ValueError(f"problems={self.problems}: must be at least 1")

    @property
    def keys_of(self) -> dict[Any, Values]:
        """What each arm adds to the command line, by its value or name."""
        ((key, values), *others) = self.arms.items()
        if others or isinstance(values, dict):
            return self.arms
        return {value: {key: value} for value in values}

    @property
    def asked(self) -> dict[str, Any]:
        """All that a finished model is."""
        return {"problems": self.problems, "of": self.tests} if self.tests else {}


def _choices(key: str, values: Any) -> list:
    """Lists among them, such as head_weights, as tuples: cells are told apart by them."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key}={values!r}: give a list of one value at least")
    found = [tuple(value) if isinstance(value, list) else value for value in values]
    if len({json.dumps(value) for value in found}) < len(found):
        raise ValueError(f"{key}={values!r}: a value stands there twice")
    return found


def read_study(name: str, quick: bool) -> Study:
    import yaml  # comes with Hydra

    file = STUDIES / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in STUDIES.glob("*.yaml")))
        raise SystemExit(f"error: study={name!r}: allowed are {known}")
    said, keys = yaml.safe_load(file.read_text(encoding="utf-8")), [f.name for f in fields(Study)]
    if unknown := sorted({*said, *said.get("quick", {})} - {*keys}):
        raise ValueError(f"{file} says {unknown[0]}: allowed are {', '.join(keys)}")
    study = Study(**said)
    return replace(study, **study.quick) if quick else study


# The grid.


class Cell(NamedTuple):
    """place: the row of the table that it belongs to. folder: named after what tells its run from
    the others, as in sweeps of Hydra; cells of different places may share a run. before: the
    folder and the words of the run that it begins with, if any.
    """

    arm: Any
    place: tuple[tuple[str, Any], ...]
    tuned: tuple[tuple[str, Any], ...]
    seed: int
    words: tuple[str, ...]
    folder: str
    before: tuple[str, tuple[str, ...]] | None = None


def cells_of(study: Study, words: Sequence[str] = (), out: str = "runs/science") -> list[Cell]:
    """out: where tokenizers are made."""
    keys_of, cells = study.keys_of, []
    first, *_ = keys_of.values()
    experiment = [f"experiment={study.experiment}"] if study.experiment else []
    grid = product(
        range(study.seeds), study.budgets, _each(study.axes), _each(study.tuned), keys_of
    )
    for seed, budget, setting, tuned, arm in grid:
        said_of_all = [*study.words, *words]
        common = [*experiment, *said_of_all, *_words_of(setting, said_of_all, Path(out))]
        baseline, own = ([*common, *as_words(keys)] for keys in (first, keys_of[arm]))
        chosen = [*as_words(tuned), *BUDGETS[budget](study, baseline, own)]
        seeds = [f"train.seed={seed}", f"data.seed={seed}"]
        said = {"arm": arm} if arm in study.arms else keys_of[arm]
        different = [*as_words(setting | said), *chosen, seeds[0]]
        folder = _last_keys(different)
        place = (("budget", budget), *setting.items())
        every = (*own, *chosen, *seeds)
        before = _before(study, arm, words, seeds)
        cells.append(Cell(arm, place, tuple(tuned.items()), seed, every, folder, before))
    return cells


def _before(
    study: Study, arm: Any, words: Sequence[str], seeds: Sequence[str]
) -> tuple[str, tuple[str, ...]] | None:
    if not study.before:
        return None
    keys = as_words(study.before[arm])
    folder = f"before,{_last_keys([*keys, seeds[0]])}"
    return folder, (*study.before_words, *words, *keys, *seeds)


def _words_of(setting: Values, words: Sequence[str], out: Path) -> list[str]:
    said = as_words({key: value for key, value in setting.items() if key != PIECES})
    pieces = setting.get(PIECES, "bytes")
    return said if pieces == "bytes" else [*said, pieces_word(pieces, words, out)]


def _each(values: Mapping[str, list]) -> list[Values]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def _last_keys(words: Sequence[str]) -> str:
    """ "train.optim.lr=0.001", "model=1m" -> "lr=0.001,model=1m"."""
    pairs = (word.split("=", 1) for word in words)
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in pairs)


def resolved(words: Iterable[str]) -> tuple[ModelConfig, TrainConfig, int]:
    """What the command line makes of a run: its model, training and the length of its rows."""
    found = composed(tuple(words))
    training = {key: value for key, value in found["train"].items() if key != "optim"}
    vocabulary = load_tokenizer(found["data"]["tokenizer"]).vocab_size
    model = replace(ModelConfig(**found["model"]), vocab_size=vocabulary)
    return model, TrainConfig(**training), found["data"]["seq_len"]


@cache
def composed(words: tuple[str, ...]) -> Values:
    """The whole configuration that a command line describes."""
    import yaml

    return yaml.safe_load(_train(*words, "--cfg", "job", capture=True))


def operations(words: Iterable[str]) -> float:
    """Of a token, on the mean over the run: a schedule runs 1, 2, ... and all heads for an n-th of
    it each, in one order or the other.
    """
    words = tuple(words)
    model, training, seq_len = resolved(words)
    n, own = model.n_future_tokens, model.n_layers - model.trunk_layers
    fewest = n if composed(words)["head_schedule"] is None else 1
    some = [
        replace(model, n_future_tokens=k, n_layers=model.trunk_layers + (k if own else 0))
        for k in range(fewest, n + 1)
    ]
    return sum(estimate(one, training, seq_len)["flops_per_token"] for one in some) / len(some)


def _same_trunk(study: Study, baseline: list[str], arm: list[str]) -> list[str]:
    if arm == baseline:
        return []
    (model, *_), (other, *_) = resolved(baseline), resolved(arm)
    return [f"model.n_layers={other.n_layers + model.trunk_layers - other.trunk_layers}"]


def _same_operations(study: Study, baseline: list[str], arm: list[str]) -> list[str]:
    if arm == baseline:
        return []
    one, other = operations(baseline), operations(arm)
    return [f"train.steps={round(resolved(arm)[1].steps * one / other)}"]


def _same_time(study: Study, baseline: list[str], arm: list[str]) -> list[str]:
    return [f"train.max_seconds={study.seconds}", "train.steps=1000000"]


BUDGETS: dict[str, Callable[[Study, list[str], list[str]], list[str]]] = {
    "parameters": lambda study, baseline, arm: [],
    "trunk": _same_trunk,
    "operations": _same_operations,
    "time": _same_time,
}


# Its cells.


def train_all(cells: Sequence[Cell], study: Study, out: Path) -> dict[Cell, Values]:
    """Every cell's record. SystemExit where an arm cannot be, before any is begun."""
    folders = {cell: out.resolve() / cell.folder for cell in cells}
    new = [cell for cell, folder in folders.items() if not (folder / RECORD).is_file()]
    for cell in {(cell.arm, cell.place): cell for cell in new}.values():
        _train(*(cell.before[1] if cell.before else cell.words), "dry_run=true")
    found = {}
    for number, (cell, folder) in enumerate(folders.items(), 1):
        print(f"run {number} of {len(cells)}: {cell.folder}", file=sys.stderr, flush=True)
        found[cell] = trained(cell, study, folder)
    return found


def trained(cell: Cell, study: Study, folder: Path) -> Values:
    """The cell's record, made by training where there is none. SystemExit if it was stopped."""
    identity = {"words": [*cell.words], "measure": study.measure, "asked": study.asked}
    if cell.before:
        identity["before"] = [*cell.before[1]]
    return kept(folder, identity, lambda: _made(cell, study, folder / "run"))


def _made(cell: Cell, study: Study, run_dir: Path) -> Values:
    words = list(cell.words)
    if cell.before:
        folder, before = cell.before
        begun = json.dumps(str(run_dir.parents[1] / folder))
        _train(*before, f"run_dir={begun}", "resume=auto")
        words.append(f"init_from={begun}")
    _train(*words, f"run_dir={json.dumps(str(run_dir))}", "resume=auto")
    rows = [json.loads(line) for line in (run_dir / METRICS).read_text("utf-8").splitlines()]
    last = rows[-1] if rows else {}
    for key in (study.measure, *study.columns):
        if key not in last:
            known = ", ".join(key for key in last if key.startswith("val_")) or "none: stopped"
            raise SystemExit(f"error: no {key} at the end of {run_dir}; there is {known}")
    return {
        "value": last[study.measure],
        "curve": [[r["step"], r[study.measure]] for r in rows if study.measure in r],
        **{key: last[key] for key in ("step", "tokens", "seconds")},
        "columns": {key: last[key] for key in study.columns},
        "parameters": parameters_of(run_dir),
        "tests": {name: asked(run_dir, args, study.problems) for name, args in study.tests.items()},
    }


def parameters_of(run_dir: Path) -> float:
    """All of the model that a run left."""
    return estimate(load_config(find(run_dir)), TrainConfig(), 1)["parameters"]


def asked(run_dir: Path, args: dict[str, int], count: int) -> float:
    """The share of other held-out problems that a finished model answers right."""
    data, tokenizer = data_of(run_dir), mtp.load_tokenizer(run_dir)
    data = replace(data, task_args=data.task_args | args)
    found = problems(data, True, 0, count)
    right = verdicts(mtp.load(run_dir).packed(), tokenizer, data, found, 32)
    return sum(right) / len(right)


# What they say.


def table(study: Study, cells: Sequence[Cell], found: Mapping[Cell, Values]) -> list[Values]:
    """A line for every place and arm, of the best that the arm chose from `tuned`."""
    lines = []
    for place in dict.fromkeys(cell.place for cell in cells):
        arms = dict.fromkeys(cell.arm for cell in cells)
        here = [cell for cell in cells if cell.place == place]
        best = {arm: _best(study, [c for c in here if c.arm == arm], found) for arm in arms}
        baseline = next(iter(best.values()))
        for arm, chosen in best.items():
            lines.append(
                {"place": dict(place), "arm": arm, "tuned": dict(chosen[0].tuned)}
                | _line(study, [found[c] for c in chosen], [found[c] for c in baseline])
            )
    return lines


def _best(study: Study, cells: list[Cell], found: Mapping[Cell, Values]) -> list[Cell]:
    """Its seeds, in order."""
    choices = [[c for c in cells if c.tuned == t] for t in dict.fromkeys(c.tuned for c in cells)]
    sign = 1 if study.higher else -1
    return max(choices, key=lambda seeds: sign * sum(found[c]["value"] for c in seeds))


def _line(study: Study, runs: list[Values], baseline: list[Values]) -> Values:
    values, before = ([run["value"] for run in of] for of in (runs, baseline))
    difference = over_seeds([b - a for a, b in zip(before, values, strict=True)])
    tests = {name: [run["tests"][name] for run in runs] for name in study.tests}
    columns = {key: [run["columns"][key] for run in runs] for key in study.columns}
    return {
        "values": values,
        **over_seeds(values)._asdict(),
        "difference": difference._asdict(),
        "verdict": verdict(difference, study.higher),
        "tokens_to_baseline": [
            tokens_to(run, base["value"], study.higher)
            for run, base in zip(runs, baseline, strict=True)
        ],
        "tests": {name: over_seeds(shares)._asdict() for name, shares in tests.items()},
        "columns": {key: over_seeds(values)._asdict() for key, values in columns.items()},
        **{key: runs[0][key] for key in ("parameters", "step", "tokens")},
        "seconds": [run["seconds"] for run in runs],
        "curves": [run["curve"] for run in runs],
    }


def tokens_to(run: Values, target: float, higher: bool) -> float | None:
    """After how many a run's measure first was as good as `target`."""
    sign, before = 1 if higher else -1, None
    for step, value in run["curve"]:
        if sign * (value - target) >= 0:
            if before is not None:
                step = before[0] + (step - before[0]) * (target - before[1]) / (value - before[1])
            return step * run["tokens"] / run["step"]
        before = step, value
    return None


def verdict(difference: Interval, higher: bool) -> str:
    """Whether the interval of a difference says so; the baseline's own is open."""
    if difference.low <= 0 <= difference.high:
        return "open"
    return "better" if (difference.low > 0) == higher else "worse"


def run(config: ScienceConfig) -> Values:
    """Train what is missing, write the record and the picture; -> the last line."""
    study = read_study(config.study, config.quick)
    study = replace(study, budgets=config.budgets or study.budgets)
    cells = cells_of(study, config.words, config.out)
    found = train_all(cells, study, Path(config.out, Path(config.name).name))
    lines = table(study, cells, found)
    every = [{"cell": cell.folder, **found[cell]} for cell in cells]
    values = {"study": asdict(study), "table": lines, "cells": every}
    written = record(config.name, values, config)
    drawn(study_panels, study.question, study.measure, lines, written.with_suffix(".png"))
    kept = (
        *("place", "arm", "tuned", "mean", "low", "high", "difference", "verdict", "tests"),
        *("columns", "parameters", "tokens_to_baseline"),
    )
    shown = [{key: line[key] for key in kept} for line in lines]
    return {"study": config.study, "measure": study.measure, "seeds": study.seeds, "table": shown}


if __name__ == "__main__":
    launch(ScienceConfig, run, STOPPED)
