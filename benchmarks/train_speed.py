"""Do extra heads cost more time than the operations they add?

    python -m benchmarks.train_speed
    python -m benchmarks.train_speed shape=1.3b batch_size=4 seq_len=2048 precision=bfloat16

Training steps with n = 1, 4 and 8 heads take turns in one process, eager and compiled, on the very
same parameters: heads are blocks of the trunk, so n only says from where on they read the trunk's
output. All that n adds is n - 1 unembeddings. `overhead` is the ratio of times over the ratio of
model operations (`mtp.run.estimate`; recomputation is not counted): 1 where heads are free beyond
their arithmetic, below 1 where unembeddings run at a better rate than blocks.

A step is forward, loss and backward, as in training but for the optimizer's, which takes the same
time for every n and would only draw all ratios towards 1. Ratios are taken within a round, in which
every step has one turn; medians are reported with quartiles. The last line is one JSON object: the
eager figures of n = 4 over n = 1, and the compiled ones within.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from benchmarks.record import launch, record
from benchmarks.shapes import shape
from benchmarks.timing import fastest_threads, seconds, spread
from mtp.blocks import compile_blocks
from mtp.estimate import estimate
from mtp.hooks import peak_flops
from mtp.loss import MultiTokenLoss, plain_batch, reference, sequential
from mtp.model import ModelConfig, Transformer
from mtp.run import find_device
from mtp.train import TrainConfig

HEADS = (1, 4, 8)
LARGE, SMALL = VOCABULARIES = (32768, 256)
PRECISIONS = ("float32", "bfloat16", "pure_bfloat16")


@dataclass
class SpeedConfig:
    """shape: a file of configs/model/. precision: bfloat16 is autocast over fp32 parameters, as in
    training; pure_bfloat16 has parameters and gradients in it too, for models that do not fit
    otherwise. pairs: how many rounds. name: of the record.
    """

    shape: str = "30m"
    batch_size: int = 2
    seq_len: int = 512
    precision: str = "float32"
    pairs: int = 9
    device: str = "auto"
    name: str = "train_speed"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r} is unknown: allowed are {', '.join(PRECISIONS)}"
            )

    def model(self, vocab: int, n: int) -> ModelConfig:
        return replace(shape(self.shape), vocab_size=vocab, n_future_tokens=n)


class Step(NamedTuple):
    """What takes turns."""

    n: int
    compiled: bool = False
    plain: bool = False  # mtp.loss.reference instead of the sequential routine

    def __str__(self) -> str:
        return f"n={self.n}{' compiled' * self.compiled}{' reference' * self.plain}"

    @property
    def baseline(self) -> Step:
        """Of the sequential routine n = 1; of the reference the routine with as many heads."""
        return Step(self.n if self.plain else 1, self.compiled)


Calls = dict[Step, Callable[[], None]]
Figures = dict[str, dict[str, Any]]


def regrouped(model: Transformer, config: ModelConfig) -> Transformer:
    """A model with another number of heads on the same parameters."""
    with torch.device("meta"):
        other = Transformer(config)
    tensors = model.state_dict().values()
    other.load_state_dict(dict(zip(other.state_dict(), tensors, strict=True)), assign=True)
    return other


def prepare(config: SpeedConfig, vocab: int, device: torch.device) -> Calls:
    """The steps at one vocabulary; none compiled where no compiler works."""
    gc.collect()  # compiled blocks refer to themselves: those of another vocabulary go now
    with device:
        parameters = Transformer(config.model(vocab, 1))
        if config.precision == "pure_bfloat16":
            parameters.to(torch.bfloat16)
        rows = torch.randint(vocab, (config.batch_size, config.seq_len + max(HEADS)))
    heads = [n for n in HEADS if n <= shape(config.shape).n_layers]
    calls: Calls = {}
    for compiled in (False, True):
        models = [regrouped(parameters, config.model(vocab, n)) for n in heads]
        if compiled and not all(compile_blocks(model.blocks, device) for model in models):
            break
        for n, model in zip(heads, models, strict=True):
            for step in (Step(n, compiled), Step(n, compiled, plain=True)):
                if not step.plain or (n == 4 and vocab == LARGE):
                    calls[step] = _call(config, model, step, rows)
    return calls


def _call(
    config: SpeedConfig, model: Transformer, step: Step, rows: torch.Tensor
) -> Callable[[], None]:
    loss_fn = MultiTokenLoss(step.n, score=reference if step.plain else sequential)
    batch = plain_batch(rows[:, : config.seq_len + step.n])
    device = rows.device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16")

    def call() -> None:
        with autocast:
            loss, _ = loss_fn(model, batch, loss_fn.count(batch))
        loss.backward()
        model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def take_turns(calls: Calls, rounds: int) -> list[dict[Step, float]]:
    """Seconds of every step in every round, after one round that warms up and compiles."""
    for call in calls.values():
        call()
    order = list(calls)
    return [
        {step: seconds(calls[step]) for step in (order[::-1] if i % 2 else order)}
        for i in range(rounds)
    ]


def figures(
    config: SpeedConfig, vocab: int, rounds: list[dict[Step, float]], peak: float | None
) -> Figures:
    """Of every step: its speed, and its ratios to its baseline. peak: operations per second."""
    found = {}
    for step in rounds[0]:
        taken = [times[step] for times in rounds]
        ratios = [times[step] / times[step.baseline] for times in rounds]
        per_token, baseline = (
            estimate(config.model(vocab, n), TrainConfig(), config.seq_len)["flops_per_token"]
            for n in (step.n, step.baseline.n)
        )
        rate = config.batch_size * config.seq_len / statistics.median(taken)
        found[str(step)] = {
            "seconds": statistics.median(taken),
            "seconds_iqr": spread(taken),
            "tokens_per_second": rate,
            "flops_per_token": per_token,
            "flops_utilisation": peak and rate * per_token / peak,
            "baseline": str(step.baseline),
            "time_ratio": statistics.median(ratios),
            "time_ratio_iqr": spread(ratios),
            "flop_ratio": per_token / baseline,
            "overhead": statistics.median(ratios) * baseline / per_token,
        }
    return found


def summary(found: dict[int, Figures], compiled: bool) -> dict[str, Any]:
    """n = 4 over n = 1."""
    step = Step(4, compiled)
    four, plain = (found[LARGE][str(s)] for s in (step, step._replace(plain=True)))
    return {
        "time_ratio": four["time_ratio"],
        "time_ratio_iqr": four["time_ratio_iqr"],
        "flop_ratio": four["flop_ratio"],
        "overhead": four["overhead"],
        "overhead_small_vocab": found[SMALL][str(step)]["overhead"],
        "sequential_over_reference_time": 1 / plain["time_ratio"],
        "tokens_per_second": four["tokens_per_second"],
        "flops_utilisation": four["flops_utilisation"],
    }


def table(found: Figures) -> str:
    """One line per step; ratios are those to its baseline."""
    lines = [f"{'':>22}  s/step  tokens/s    time     (quartiles)   flops  overhead  utilisation"]
    for name, f in found.items():
        low, high = f["time_ratio_iqr"]
        used = "-" if f["flops_utilisation"] is None else f"{f['flops_utilisation']:.1%}"
        lines.append(
            f"{name:>22} {f['seconds']:7.3f} {f['tokens_per_second']:9,.0f} {f['time_ratio']:7.3f}"
            f" ({low:6.3f}, {high:6.3f}) {f['flop_ratio']:7.3f} {f['overhead']:9.3f} {used:>12}"
        )
    return "\n".join(lines)


def run(config: SpeedConfig) -> dict[str, Any]:
    device, load = find_device(config.device), os.getloadavg()[0]
    if device.type == "cpu":
        torch.set_num_threads(fastest_threads(prepare(config, SMALL, device)[Step(1)]))
    peak = None if config.precision == "float32" else peak_flops(device)
    found: dict[int, Figures] = {}
    for vocab in VOCABULARIES:
        rounds = take_turns(prepare(config, vocab, device), config.pairs)
        found[vocab] = figures(config, vocab, rounds, peak)
        print(f"\n{config.shape}, vocabulary {vocab}\n{table(found[vocab])}", file=sys.stderr)
    compiled = summary(found, True) if Step(4, True) in rounds[0] else None
    values = summary(found, False) | {"compiled": compiled}
    record(config.name, values | {"load_before": round(load, 2), "steps": found}, config)
    return values


if __name__ == "__main__":
    launch(SpeedConfig, run)
