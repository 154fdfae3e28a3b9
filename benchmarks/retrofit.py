"""Heads trained from the start against heads attached afterwards: which foresee more, at what cost?

    python -m benchmarks.retrofit
    python -m benchmarks.retrofit quick=true

For every seed, models of one shape, on one corpus:

    next token   `blocks` blocks, trained for `steps` steps on the next token alone
    pretrained   n heads from the first step on, as many steps
    frozen       heads attached to the next-token model, which stays as it is
    joint        the same, and the model learns too, head 1's loss beside the others'
    own text     as frozen, on text that the model wrote itself

All heads are transformer blocks of one size, side by side. Pretrained ones read what head 1's block
reads, attached ones what the unembedding reads; tokens pass `blocks` blocks on their way to head 1
in all models. Trunks are pretrained on equal tokens. Attached heads then learn on `more_steps` of
further text, as many as give `joint` the operations of `pretrained` in all; the others take fewer
(`operations`, over those of `pretrained`: 6 per token and parameter that learns, 2 where it is only
read). Of `attach_lrs` each way to attach has what foresees most on the mean over seeds, on the text
that it is scored on: a little flattering to it.

`acceptance_text` is teacher-forced on held-out text: the guesses in a row that head 1 would choose
itself, and one. `acceptance_decoded`: tokens per step of decoding, at `temperature`, after
beginnings of that text. `bits_per_byte` are of the next token: whoever foresees more of a worse
model has won little. Intervals are Student's t over seeds, 90 %; `difference` is to `pretrained`,
of one seed each. Every training is a command of `scripts/`, kept in the record; the same command
goes on where it was. The last line is JSON.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mtp
from benchmarks.cells import STOPPED, Values, as_words, call, kept
from benchmarks.intervals import interval_panels
from benchmarks.pictures import drawn
from benchmarks.record import launch, quicken, record
from benchmarks.texts import rows_of
from mtp.data import load_corpus
from mtp.documents import iter_documents
from mtp.estimate import estimate
from mtp.evaluate.scores import over_seeds
from mtp.interop.attach import load_heads
from mtp.interop.folder import find_model
from mtp.model import ModelConfig
from mtp.optim import OptimConfig
from mtp.run import METRICS, data_of, evaluator, find_device
from mtp.train import PRECISIONS, TrainConfig

NEXT, PRETRAINED, FROZEN, JOINT, OWN = "next token", "pretrained", "frozen", "joint", "own text"
ATTACHED = (FROZEN, JOINT, OWN)
MEASURES = ("acceptance_text", "acceptance_decoded", "bits_per_byte")
OTHER_ORDER = 1000  # added to the seed of rows, so that attached heads do not read the same again
QUICK: dict[str, Any] = {
    "seeds": 2,
    "steps": 160,
    "attach_lrs": [2e-3],
    "own_texts": 160,
    "prompts": 16,
    "eval_batches": 32,
}


@dataclass
class RetrofitConfig:
    """data: words that say what to train on. blocks: that a token passes to head 1. lr: of both
    pretrainings. own_texts: that the next-token model writes, a row each. prompts: of decoding.
    out: where runs are kept. quick: the direction in minutes, in a file of its own.
    """

    data: list[str] = field(default_factory=lambda: ["data=stdlib"])
    n: int = 4
    dim: int = 128
    blocks: int = 4
    seq_len: int = 256
    batch_size: int = 8
    steps: int = 400
    lr: float = 2e-3
    attach_lrs: list[float] = field(default_factory=lambda: [5e-4, 2e-3])
    own_texts: int = 400
    prompt_tokens: int = 64
    temperature: float = 0.7
    prompts: int = 48
    eval_batches: int = 64
    seeds: int = 3
    precision: str = "bfloat16"
    device: str = "auto"
    out: str = "runs/retrofit"
    quick: bool = False
    name: str = "retrofit"

    def __post_init__(self) -> None:
        quicken(self, QUICK)
        least = {"n": 2, "seeds": 2, "own_texts": 1, "prompts": 1, "prompt_tokens": 1}
        for key, lowest in least.items():
            if (value := getattr(self, key)) < lowest:
                raise SystemExit(f"error: {key}={value} must be at least {lowest}")
        if self.prompt_tokens >= self.seq_len:
            raise SystemExit(
                f"error: prompt_tokens={self.prompt_tokens} must lie below seq_len={self.seq_len}"
            )
        if not self.attach_lrs:
            raise SystemExit("error: attach_lrs=[]: give one at least")
        if self.precision not in PRECISIONS:
            raise SystemExit(
                f"error: precision={self.precision!r}: allowed are {', '.join(PRECISIONS)}"
            )
        for rate in (self.lr, *self.attach_lrs):
            OptimConfig(lr=rate)  # these refuse what cannot be, before anything is trained
        self.judging, mtp.Sampling(self.temperature)
        if self.more_steps < 1:
            raise SystemExit(f"error: steps={self.steps}: too few to leave attached heads a step")

    def model(self, n: int) -> Values:
        """Keys of a model of n future tokens whose head 1 ends `blocks` blocks."""
        shape = {"dim": self.dim, "n_layers": self.blocks + n - 1, "n_future_tokens": n}
        return shape | {"n_heads": max(1, self.dim // 32)}  # the rest as attached blocks have it

    def flops(self, n: int) -> float:
        """Of training on a token."""
        model = ModelConfig(**self.model(n))
        return estimate(model, TrainConfig(), self.seq_len)["flops_per_token"]

    @property
    def judging(self) -> TrainConfig:
        return TrainConfig(batch_size=self.batch_size, eval_batches=self.eval_batches)

    @property
    def more_steps(self) -> int:
        """Of attached heads: what pretrained ones took from the budget."""
        return round(self.steps * (1 - self.flops(1) / self.flops(self.n)))


def operations(config: RetrofitConfig) -> dict[str, float]:
    """Of each way in all, over those of pretrained heads."""
    one, whole = config.flops(1), config.flops(config.n)
    begun, share = config.steps * one, config.more_steps
    frozen = begun + share * (whole - one + one / 3)
    writing = config.own_texts / config.batch_size * one / 3
    found = {
        PRETRAINED: config.steps * whole,
        FROZEN: frozen,
        JOINT: begun + share * whole,
        OWN: frozen + writing,
        NEXT: begun,
    }
    return {way: flops / found[PRETRAINED] for way, flops in found.items()}


# Cells.


class Cell(NamedTuple):
    way: str
    seed: int
    lr: float

    def folder(self, config: RetrofitConfig) -> Path:
        return Path(config.out, f"{self.way.replace(' ', '_')}-lr{self.lr:g}-seed{self.seed}")


def cells_of(config: RetrofitConfig) -> Iterator[Cell]:
    """Seed by seed, each after what it begins with."""
    for seed in range(config.seeds):
        yield from (Cell(way, seed, config.lr) for way in (NEXT, PRETRAINED))
        yield from (Cell(way, seed, lr) for way in ATTACHED for lr in config.attach_lrs)


def commands(cell: Cell, config: RetrofitConfig) -> list[tuple[str, list[str]]]:
    """Scripts and their words, one after another."""
    run_dir, trunk = cell.folder(config) / "run", _trunk(cell, config)
    training = {
        "run_dir": json.dumps(str(run_dir)),
        "resume": "auto",
        "device": config.device,
        "data.seq_len": config.seq_len,
        "train.seed": cell.seed,
        "train.batch_size": config.batch_size,
        "train.precision": config.precision,
        "train.eval_batches": 1,  # judged here, all in the same way
        "train.optim.lr": cell.lr,
    }
    if cell.way not in ATTACHED:
        model = config.model(1 if cell.way == NEXT else config.n)
        shape = {f"model.{key}": value for key, value in model.items()}
        run = {"data.seed": cell.seed, "train.steps": config.steps, "sample_every": 0}
        return [("train", [*config.data, *as_words(training | shape | run)])]
    attach = {
        "trunk": json.dumps(str(trunk)),
        "n": config.n,
        "kind": "transformer",
        "learning": "all" if cell.way == JOINT else "frozen",
        "data.seed": cell.seed + OTHER_ORDER,
        "train.steps": config.more_steps,
    }
    if cell.way != OWN:
        return [("attach", [*config.data, *as_words(training | attach)])]
    text = json.dumps(str(trunk.parent / "own.jsonl"))
    write = {
        "checkpoint": json.dumps(str(trunk)),
        "out": text,
        "device": config.device,
        "count": config.own_texts,
        "prompt_tokens": config.prompt_tokens,
        "max_new_tokens": config.seq_len - config.prompt_tokens,
        "seed": cell.seed,
        "sampling.temperature": config.temperature,
        "batch_size": 32,
    }
    own = {"data.source": "jsonl", "data.path": text, "data.val_path": text}
    return [
        ("self_distill", [*config.data, *as_words(write)]),
        ("attach", as_words(training | attach | own)),
    ]


def _said(cell: Cell, config: RetrofitConfig) -> list[str]:
    return [
        shlex.join(["python", f"scripts/{script}.py", *words])
        for script, words in commands(cell, config)
    ]


def _judged(config: RetrofitConfig) -> str:
    """What scores depend on beside the model."""
    keys = ("batch_size", "eval_batches", "seq_len", "prompts", "prompt_tokens", "temperature")
    return f"judged by {' '.join(as_words({key: getattr(config, key) for key in keys}))}"


def _trunk(cell: Cell, config: RetrofitConfig) -> Path:
    """The run of the next-token model that a cell's heads are attached to."""
    return Cell(NEXT, cell.seed, config.lr).folder(config) / "run"


def made(cell: Cell, config: RetrofitConfig) -> Values:
    for script, words in commands(cell, config):
        call(script, *words)
    run_dir = cell.folder(config) / "run"
    last = json.loads((run_dir / METRICS).read_text("utf-8").splitlines()[-1])
    steps = config.more_steps if cell.way in ATTACHED else config.steps
    if last["step"] < steps:
        raise SystemExit(f"error: {run_dir} was stopped: the same command goes on from there")
    costs = {key: last[key] for key in ("step", "tokens", "seconds")}
    return scored(opened(cell, config), _trunk(cell, config), config) | costs


def opened(cell: Cell, config: RetrofitConfig) -> Any:
    run_dir, device = cell.folder(config) / "run", find_device(config.device)
    if cell.way not in ATTACHED:
        return mtp.load(run_dir, device)
    trunk = run_dir / "trunk" if cell.way == JOINT else _trunk(cell, config)
    return load_heads(find_model(trunk).open(device), run_dir / "heads")


@torch.no_grad()
def scored(model: Any, trunk: Path, config: RetrofitConfig) -> Values:
    """A model's MEASURES, of those that it has, on what the next-token model's run held out."""
    data, tokenizer, n = data_of(trunk), mtp.load_tokenizer(trunk), model.extra_heads + 1
    text = evaluator(load_corpus(data, tokenizer, True), data, config.judging, n)(model)
    found = {"bits_per_byte": text["val_bits_per_byte_1"]}
    if n == 1:
        return found
    rows = rows_of(iter_documents(data, True), tokenizer, config.prompts, config.prompt_tokens)
    new = config.seq_len - config.prompt_tokens
    requests = [mtp.Request(row, new, seed) for seed, row in enumerate(rows)]
    sampling = mtp.Sampling(config.temperature)
    done = mtp.generate(model.packed(), requests, mtp.OwnHeads(), sampling)
    accepted, steps = sum(sum(c.accepted) for c in done), sum(c.steps for c in done)
    decoded = {"acceptance_text": text["val_acceptance_length"]}
    return found | decoded | {"acceptance_decoded": 1 + accepted / steps}


# What they say.


def table(config: RetrofitConfig, found: Mapping[Cell, Values]) -> dict[str, dict[str, Any]]:
    """A line for every way, of the learning rate that served it best."""
    best = {way: _best(way, found) for way in (PRETRAINED, *ATTACHED, NEXT)}
    costs = operations(config)
    return {
        way: {
            "lr": runs[0]["lr"],
            "operations": costs[way],
            **{key: [run[key] for run in runs] for key in ("step", "tokens", "seconds")},
            **{m: _line(m, runs, best[PRETRAINED]) for m in MEASURES if m in runs[0]},
        }
        for way, runs in best.items()
    }


def _best(way: str, found: Mapping[Cell, Values]) -> list[Values]:
    """Its runs, in the order of seeds."""
    rates = dict.fromkeys(cell.lr for cell in found if cell.way == way)
    choices = [
        [run | {"lr": lr} for cell, run in found.items() if (cell.way, cell.lr) == (way, lr)]
        for lr in rates
    ]
    return max(choices, key=lambda runs: sum(run.get("acceptance_text", 0.0) for run in runs))


def _line(measure: str, runs: Sequence[Values], pretrained: Sequence[Values]) -> dict[str, Any]:
    values, before = ([run[measure] for run in of] for of in (runs, pretrained))
    difference = over_seeds([b - a for a, b in zip(before, values, strict=True)])
    return {
        "values": values,
        **over_seeds(values)._asdict(),
        "difference": difference._asdict(),
    }


def summary(values: Values) -> Values:
    keys = ("mean", "low", "high", "difference")
    shown = {
        way: {
            "operations": round(line["operations"], 3),
            **{m: {k: line[m][k] for k in keys} for m in MEASURES if m in line},
        }
        for way, line in values["table"].items()
    }
    return {"seeds": values["seeds"], "more_steps": values["more_steps"], "table": shown}


def run(config: RetrofitConfig) -> Values:
    """Train what is missing, write the record and the picture; -> the last line."""
    cells, found = list(cells_of(config)), {}
    for number, cell in enumerate(cells, 1):
        print(f"cell {number} of {len(cells)}: {cell}", file=sys.stderr, flush=True)
        words = [*_said(cell, config), _judged(config)]
        found[cell] = kept(cell.folder(config), {"words": words}, partial(made, cell, config))
    lines = table(config, found)
    every = [cell._asdict() | values for cell, values in found.items()]
    sizes = {"seeds": config.seeds, "more_steps": config.more_steps}
    values = sizes | {"table": lines, "cells": every}
    path = record(config.name, values, config)
    panels = {
        measure.replace("_", " "): {
            way: line[measure] for way, line in lines.items() if measure in line
        }
        for measure in MEASURES
    }
    drawn(
        interval_panels,
        "Heads trained from the start and heads attached afterwards",
        panels,
        f"{config.seeds} seeds; lines are 90 % intervals",
        path.with_suffix(".png"),
    )
    return summary(values)


if __name__ == "__main__":
    launch(RetrofitConfig, run, STOPPED)
