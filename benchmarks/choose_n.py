"""How many future tokens? Rules that say so from a few runs, judged against the whole grid.

    python -m benchmarks.choose_n
    python -m benchmarks.choose_n settings=quick
    python -m benchmarks.choose_n settings=FILE grid=false     # choose only

The paper leaves n open (section 7); eight are best for its bytes, four for its pieces of code
(table 1), one for its smallest models (table S7). Head i buys two things: it changes head 1,
through what the trunk learns from it and the layers that the trunk gives up for it; and its guess
is kept at a share a_i of places, for a share c_i of a step. Which of them counts is declared
beforehand, as a setting's `metrics`, and each has its rule:

speed      Tokens per time of decoding by own heads, over decoding token by token:

               S(n) = (1 + a_2 + ... + a_n) / (1 + c_2 + ... + c_n)

           Head i pays where a_i / c_i > S(i - 1). a_i is the share of held-out places where guesses
           2..i all are head 1's own later choice, the product of their rates of acceptance
           (teacher-forced: `val_accepted_i`). The sum of c is counted: the operations of a token
           with n heads over those with the first n of the grid, less 1. That is the time of a step
           that reads each weight once, of few rows and short guesses, where more columns cost
           nothing. All a_i come from one run of the largest n, whose head i guesses nearly as that
           of a run of i would; its shallower trunk makes them a little too small for the others.
bits       Bits per byte of head 1 on held-out text, and
accuracy   the share of a task's held-out problems that are answered right. What heads do to head 1
           is not in one run: the cosine of gradients (`benchmarks.alignment`) says whether a head
           pulls with it, not what the trunk's lost layers cost. So each n is tried, by sequential
           halving (Karnin, Koren & Somekh 2013): of K values, in R = log2 K rounds, rounded up,
           each of the K_r that are left gets a run of K / (2 R K_r) of the steps, whole with its
           warm-up and decay, and the better half stays; of equals the smaller. That is half of the
           operations of K runs, for each try. What only shows late is lost on it.

A file of `configs/choose_n` has the values of n, the settings, `seeds` of the grid and `tries` of
halving, whose seeds are others; one run is one try. All runs of a setting have equal parameters, so
that heads that are blocks take layers from the trunk, and equal operations: steps in inverse
proportion to those of a token. A choice is `inside` where its mean lies in the 95 % interval of the
best n's (Student's t over seeds), `share` is its operations over those of the grid, and `constants`
counts the choices where an n that never changes is inside. Each run is one of `scripts/train.py`;
the same command goes on where it was stopped. The last line is JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import ceil
from pathlib import Path
from typing import NamedTuple

from benchmarks.cells import STOPPED, Values, pieces_word
from benchmarks.intervals import choice_panels
from benchmarks.pictures import drawn
from benchmarks.record import ROOT, launch, record
from benchmarks.science import Cell, Study, composed, operations, resolved, trained
from mtp.documents import DataConfig
from mtp.evaluate.scores import over_seeds

SETTINGS = ROOT / "configs" / "choose_n"
N = "model.n_future_tokens"
BITS, ACCURACY, LENGTH = "val_bits_per_byte_1", "val_accuracy", "val_acceptance_length"
OTHER_SEEDS = 1000  # of tries, apart from the grid's
HALF = 0.5  # of the operations of all n, each try


@dataclass
class ChooseConfig:
    """settings: a name in configs/choose_n, or a file. grid: judge the choices too. words: for
    every run, such as ["device=cuda"]. out: where runs are kept.
    """

    settings: str = "whole"
    grid: bool = True
    words: list[str] = field(default_factory=list)
    out: str = "runs/choose_n"
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or f"choose_n_{Path(self.settings).stem}"


@dataclass(frozen=True)
class Setting:
    """words: of scripts/train.py. pieces: of a SentencePiece tokenizer that is made of what those
    that begin with data say; null for none.
    """

    metrics: list[str]
    words: list[str]
    pieces: int | None = None

    def __post_init__(self) -> None:
        if not self.metrics or not {*self.metrics} <= METRICS.keys():
            raise ValueError(f"metrics={self.metrics}: give some of {', '.join(METRICS)}")
        for word in self.words:
            if word.startswith((N, "run_dir", "resume", "train.seed", "data.seed")):
                raise ValueError(f"{word}: is set here")


@dataclass(frozen=True)
class Plan:
    ns: list[int]
    settings: dict[str, Setting]
    seeds: int = 3
    tries: int = 1

    def __post_init__(self) -> None:
        whole = isinstance(self.ns, list) and all(type(n) is int for n in self.ns)
        if not whole or len(self.ns) < 2 or self.ns[0] < 1 or sorted({*self.ns}) != self.ns:
            raise ValueError(f"ns={self.ns}: give at least 2 whole numbers from 1 on, in order")
        if self.seeds < 2:
            raise ValueError(f"seeds={self.seeds}: an interval needs at least 2")
        if self.tries < 1:
            raise ValueError(f"tries={self.tries} must be at least 1")
        if not self.settings or not isinstance(self.settings, dict):
            raise ValueError("settings: give one at least, by its name")


def read_plan(name: str) -> Plan:
    """SystemExit says what of the file cannot be."""
    import yaml  # comes with Hydra

    file = SETTINGS / f"{name}.yaml" if "." not in name else Path(name)
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in SETTINGS.glob("*.yaml")))
        raise SystemExit(f"error: settings={name}: no such file; allowed are {known}, or a file")
    try:
        said = _known(Plan, yaml.safe_load(file.read_text(encoding="utf-8")))
        Plan(**said)  # refuses what cannot be
        found = {key: Setting(**_known(Setting, x)) for key, x in said["settings"].items()}
        return Plan(**said | {"settings": found})
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise SystemExit(f"error: {file}: {' '.join(str(error).split())}") from None


def _known(kind: type, said: Values) -> Values:
    keys = [f.name for f in fields(kind)]
    if not isinstance(said, dict):
        raise ValueError(f"{said!r}: give keys and values; allowed are {', '.join(keys)}")
    if unknown := sorted({*said} - {*keys}):
        raise ValueError(f"{unknown[0]}: allowed are {', '.join(keys)}")
    return said


# Runs.


@dataclass(frozen=True)
class Grid:
    """What can be trained in a setting, at equal parameters and operations."""

    name: str
    metrics: Sequence[str]
    words: tuple[str, ...]
    plan: Plan
    folder: Path

    def of(self, n: int) -> tuple[str, ...]:
        return (*self.words, f"{N}={n}")

    def cost(self, n: int) -> float:
        """Operations of a token, over those of the first n."""
        return operations(self.of(n)) / operations(self.of(self.plan.ns[0]))

    def steps(self, n: int, part: float) -> int:
        _, training, _ = resolved(self.of(n))
        return max(1, round(part * training.steps / self.cost(n)))

    def flops(self, n: int, part: float) -> float:
        """Of a part of a run."""
        _, training, seq_len = resolved(self.of(n))
        tokens = training.batch_size * training.accumulation * seq_len
        return operations(self.of(n)) * tokens * self.steps(n, part)

    def trained(self, n: int, part: float, seed: int) -> Values:
        """A cell's record, as of a study."""
        steps = self.steps(n, part)
        columns = [LENGTH, *(f"val_accepted_{i}" for i in range(2, n + 1))]
        columns += [ACCURACY] * ("accuracy" in self.metrics)
        study = Study("", None, arms={N: [n]}, measure=BITS, columns=columns)
        seeds = (f"train.seed={seed}", f"data.seed={seed}")
        folder = f"n={n},steps={steps},seed={seed}"
        words = (*self.of(n), f"train.steps={steps}", *seeds)
        print(f"{self.name}: {folder}", file=sys.stderr, flush=True)
        return trained(Cell(n, (), (), seed, words, folder), study, self.folder / folder)


def grid_of(name: str, setting: Setting, plan: Plan, config: ChooseConfig) -> Grid:
    """SystemExit where one of its runs cannot be, before any is begun."""
    folder = Path(config.out, Path(config.settings).stem, name)
    words = [*setting.words, *config.words]
    if setting.pieces is not None:
        words.append(pieces_word(setting.pieces, setting.words, folder))
    grid = Grid(name, setting.metrics, tuple(words), plan, folder)
    for n in plan.ns:
        try:
            _, training, _ = resolved(grid.of(n))
            data = DataConfig(**composed(grid.of(n))["data"])
        except ValueError as error:
            raise SystemExit(f"error: {name}, n = {n}: {error}") from None
        if training.max_seconds is not None:
            raise SystemExit(f"error: {name}: train.max_seconds: runs are equal in operations")
        if data.source != "task" and "accuracy" in setting.metrics:
            raise SystemExit(f"error: {name}: accuracy is of a task: its data.source={data.source}")
    return grid


# Rules.


class Choice(NamedTuple):
    """flops: that it took. rounds: what it saw in each, as the part of a run and [n, score]."""

    n: int
    flops: float
    rounds: list[Values]


def by_one_run(grid: Grid, metric: Metric) -> Choice:
    last = grid.plan.ns[-1]
    columns = grid.trained(last, 1.0, OTHER_SEEDS)["columns"]
    accepted = [columns[f"val_accepted_{i}"] for i in range(2, last + 1)]
    scores = speeds(accepted, {n: grid.cost(n) for n in grid.plan.ns})
    seen = {"part": 1.0, "scores": _pairs(scores), "accepted": accepted}
    return Choice(ranked(scores, True)[0], grid.flops(last, 1.0), [seen])


def speeds(accepted: Sequence[float], costs: Mapping[int, float]) -> dict[int, float]:
    """a_2, a_3, ... and 1 + the sum of c for every n -> S(n)."""
    return {n: (1 + sum(accepted[: n - 1])) / cost for n, cost in costs.items()}


def by_halving(grid: Grid, metric: Metric) -> Choice:
    seeds = [OTHER_SEEDS + i for i in range(grid.plan.tries)]
    flops = 0.0

    def score(n: int, part: float) -> float:
        nonlocal flops
        flops += len(seeds) * grid.flops(n, part)
        runs = [grid.trained(n, part, seed) for seed in seeds]
        return sum(metric.value(run, grid.cost(n)) for run in runs) / len(runs)

    chosen, rounds = halving(grid.plan.ns, score, metric.higher)
    return Choice(chosen, flops, rounds)


def halving(
    ns: Sequence[int], score: Callable[[int, float], float], higher: bool
) -> tuple[int, list[Values]]:
    """`score` takes n and the part of a whole run -> the n that is left, and what was seen."""
    sizes = [len(ns)]
    while sizes[-1] > 2:
        sizes.append(ceil(sizes[-1] / 2))
    left, rounds = [*ns], []
    for size in sizes:
        part = HALF * len(ns) / (len(sizes) * size)
        scores = {n: score(n, part) for n in left}
        rounds.append({"part": part, "scores": _pairs(scores)})
        left = ranked(scores, higher)[: ceil(size / 2)]
    return left[0], rounds


def ranked(scores: Mapping[int, float], higher: bool) -> list[int]:
    """From the best on, of equals the smaller n first."""
    sign = -1 if higher else 1
    return sorted(scores, key=lambda n: (sign * scores[n], n))


def _pairs(scores: Mapping[int, float]) -> list[list[float]]:
    """As JSON keeps them."""
    return [[n, score] for n, score in scores.items()]


class Metric(NamedTuple):
    """value: of a run's record and its model's cost."""

    higher: bool  # is better
    value: Callable[[Values, float], float]
    rule: Callable[[Grid, Metric], Choice]


METRICS = {
    "bits": Metric(False, lambda run, cost: run["value"], by_halving),
    "accuracy": Metric(True, lambda run, cost: run["columns"][ACCURACY], by_halving),
    "speed": Metric(True, lambda run, cost: run["columns"][LENGTH] / cost, by_one_run),
}


# The judgement.


def judged(grid: Grid, name: str, choice: Choice) -> Values:
    """Against the grid, which is trained where it is not yet."""
    metric, plan = METRICS[name], grid.plan
    runs = {n: [grid.trained(n, 1.0, seed) for seed in range(plan.seeds)] for n in plan.ns}
    lines = [_line(n, metric, found, grid.cost(n)) for n, found in runs.items()]
    best = ranked({line["n"]: line["mean"] for line in lines}, metric.higher)[0]
    at = lines[plan.ns.index(best)]
    for line in lines:
        line["inside"] = at["low"] <= line["mean"] <= at["high"]
    whole = plan.seeds * sum(grid.flops(n, 1.0) for n in plan.ns)
    return {
        "best": best,
        "inside": lines[plan.ns.index(choice.n)]["inside"],
        "share": choice.flops / whole,
        "grid_flops": whole,
        "grid": lines,
    }


def _line(n: int, metric: Metric, runs: Sequence[Values], cost: float) -> Values:
    """The score of an n over seeds, and both things that its heads buy."""
    values = [metric.value(run, cost) for run in runs]
    return {
        "n": n,
        "values": values,
        **over_seeds(values, 0.95)._asdict(),
        "bits_per_byte": sum(run["value"] for run in runs) / len(runs),
        "acceptance_length": sum(run["columns"][LENGTH] for run in runs) / len(runs),
        "cost": cost,
        "steps": runs[0]["step"],
        "seconds": [run["seconds"] for run in runs],
    }


def verdict(table: Sequence[Values], ns: Sequence[int]) -> Values:
    """Of all settings: how often the rules and every constant n are inside."""
    constants = [
        {"n": n, "inside": sum(line["grid"][i]["inside"] for line in table)}
        for i, n in enumerate(ns)
    ]
    inside = sum(line["inside"] for line in table)
    return {
        "choices": len(table),
        "inside": inside,
        "most_share": max(line["share"] for line in table),
        "constants": constants,
        "no_constant_as_good": inside > max(c["inside"] for c in constants),
    }


def run(config: ChooseConfig) -> Values:
    """Choose, judge, write the record and the picture; -> the last line."""
    plan = read_plan(config.settings)
    grids = [grid_of(name, setting, plan, config) for name, setting in plan.settings.items()]
    table = []
    for grid in grids:
        for name in grid.metrics:
            choice = METRICS[name].rule(grid, METRICS[name])
            line = {"setting": grid.name, "metric": name, "chosen": choice.n}
            line |= {"flops": choice.flops, "rounds": choice.rounds}
            table.append(line | (judged(grid, name, choice) if config.grid else {}))
    values: Values = {"ns": plan.ns, "seeds": plan.seeds, "tries": plan.tries, "table": table}
    values |= verdict(table, plan.ns) if config.grid else {}
    written = record(config.name, values, config)
    if config.grid:
        drawn(choice_panels, table, written.with_suffix(".png"))
    return values | {"table": [{k: v for k, v in x.items() if k != "grid"} for x in table]}


if __name__ == "__main__":
    launch(ChooseConfig, run, STOPPED)
