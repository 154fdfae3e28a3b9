"""The one training loop. Every objective is a loss (see `mtp.loss`), every corpus or task a source
of batches.

    train(model, batches, loss_fn, config)

A step draws `accumulation` micro-batches, counts their valid targets over all ranks, and lets each
micro-batch's loss be divided by that global count, so that gradients do not depend on how a batch
was split. What happens beside it (log files, consoles, samples) is a hook that is called after
every step with a `Progress`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mtp import checkpoint
from mtp.blocks import compile_blocks, recompute_blocks
from mtp.distributed import SHARDINGS, shard, sum_on_host, sum_over_ranks, world_size
from mtp.loss import Batch, Metrics, agreements, future_targets, is_sharded, predictions
from mtp.meter import Meter
from mtp.optim import OptimConfig, Optimizer, schedule

log = logging.getLogger("mtp")
RECOMPUTE = ("none", "heads", "all")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class TrainConfig:
    """batch_size: rows per micro-batch and rank. max_seconds: finish early, the schedule shortened
    to fit; None for no limit. Only optimizer steps count, not evaluation, samples and saving.

    precision: of the forward pass (bfloat16 is autocast, weights stay fp32). What `prepare` reads:
    compile: torch.compile on every block; without a working compiler the run goes on uncompiled,
    with a warning. recompute: blocks whose activations are made again in backward instead of kept.
    Zero switches eval_every and save_every off; the end is always evaluated and saved. keep_last:
    how many of the newest checkpoints stay, None for all.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    max_seconds: float | None = None
    precision: str = "float32"
    compile: bool = False
    recompute: str = "none"
    sharding: str = "replicate"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 16
    save_every: int = 1000
    keep_last: int | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulation", "log_every", "eval_batches"):
            if getattr(self, key) < 1:
                raise ValueError(f"train.{key}={getattr(self, key)} must be at least 1")
        for key in ("eval_every", "save_every"):
            if getattr(self, key) < 0:
                raise ValueError(
                    f"train.{key}={getattr(self, key)} must be at least 0 (0 switches it off)"
                )
        choices = {"precision": PRECISIONS, "recompute": RECOMPUTE, "sharding": SHARDINGS}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"train.{key}={getattr(self, key)!r} is unknown: "
                    f"allowed are {', '.join(allowed)}"
                )
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"train.keep_last={self.keep_last} must be at least 1 (null for all)")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ValueError(
                f"train.max_seconds={self.max_seconds} must be above 0 (null for no limit)"
            )


def prepare(model: Any, config: TrainConfig) -> None:
    """Make a `Transformer` ready for `train`, in place: what is done to its blocks from outside."""
    chosen = {"none": [], "heads": model.heads.heads, "all": model.blocks}
    recompute_blocks(chosen[config.recompute])
    if config.compile:
        compile_blocks(model.blocks, next(model.parameters()).device)
    if world_size() > 1:
        shard(model, config.sharding)


class Loss(Protocol):
    """Of the kind of batches that its source makes: `mtp.loss.Batch` or other, with `row` and `to`
    as there.
    """

    def count(self, batch: Any) -> Tensor: ...

    def __call__(
        self, model: nn.Module, batch: Any, denominator: Tensor
    ) -> tuple[Tensor, Metrics]: ...


@runtime_checkable
class Scheduled(Protocol):
    """A loss that changes during a run: it hears before every step which share is done, 0..1."""

    def at(self, done: float) -> None: ...


class Batches(Protocol):
    """Endless or long enough; `state_dict` resumes exactly."""

    def __next__(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Progress:
    """Where a run stands. `metrics` holds what this step logged, and is empty on steps that log
    nothing.
    """

    model: nn.Module
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    done: float = 0.0  # share of the schedule, 0..1
    stopped: bool = False  # before its end, because it was asked to
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return self.seconds * (1 - self.done) / self.done if self.done else math.inf

    def counters(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}


Hook = Callable[[Progress], None]


def train(
    model: nn.Module,
    batches: Batches,
    loss_fn: Loss,
    config: TrainConfig,
    *,
    hooks: Sequence[Hook] = (),
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    save: Callable[[Progress, Optimizer], None] | None = None,
    resume: checkpoint.TrainingState | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Train until config.steps (or max_seconds). A run of 2k steps that was stopped after k and
    resumed equals the uninterrupted one bit for bit, unless the clock (max_seconds) had a say.

    evaluate(model) -> metrics to log; save(progress, optimizer) writes a checkpoint. When stop()
    says so on any rank, the step is finished and saved, and all ranks return. ValueError names the
    step at which batches ran out, or the step, rank and micro-batch of a loss that is not finite.
    """
    device = next(model.parameters()).device
    optimizer = Optimizer(model, config.optim)
    progress = Progress(model)
    if resume is not None:
        optimizer.load_state_dict(resume.optimizer)
        progress = Progress(model, **{k: resume.progress[k] for k in ("step", "tokens", "seconds")})
        batches.load_state_dict(resume.progress["data"])
    meter = Meter(device)
    while not (progress.stopped or finished(progress, config)):
        started = time.perf_counter()
        done = _done(progress, config)
        lr = config.optim.lr * schedule(progress.step, done, config.optim)
        if isinstance(loss_fn, Scheduled):
            loss_fn.at(done)
        tokens = train_step(model, batches, loss_fn, config, meter, progress.step)
        optimizer.step(lr)
        progress.step += 1
        progress.tokens += tokens * world_size()
        seconds = meter.end_step(tokens, started, _is_read(progress, config))
        # Ranks end, and decay, together.
        seconds, wishes = sum_on_host([seconds / world_size(), float(stop())], device)
        progress.seconds += seconds
        progress.done = _done(progress, config)
        progress.stopped = wishes > 0 and not finished(progress, config)
        _after_step(progress, config, meter, lr, hooks, evaluate)
        if save and _due(progress, config, config.save_every):
            save(progress, optimizer)
    return progress


def _after_step(
    progress: Progress,
    config: TrainConfig,
    meter: Meter,
    lr: float,
    hooks: Sequence[Hook],
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
) -> None:
    """Fill progress.metrics where something is due, and call the hooks."""
    progress.metrics = meter.read() | {"lr": lr} if _is_read(progress, config) else {}
    # Other shapes would compile again.
    eager = torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
    with eager:
        if evaluate and not progress.stopped and _due(progress, config, config.eval_every):
            progress.metrics |= evaluate(progress.model)
        for hook in hooks:
            hook(progress)


def _is_read(progress: Progress, config: TrainConfig) -> bool:
    """Whether the step's figures are read: where they are logged, and where a checkpoint follows,
    so that what it holds is finite and the log of a resumed run the same.
    """
    periods = (config.log_every, config.save_every, config.eval_every)
    return progress.step == 1 or any(_due(progress, config, period) for period in periods)


def _due(progress: Progress, config: TrainConfig, period: int) -> bool:
    """Each `period` steps (never, if zero) and at the end."""
    last = progress.stopped or finished(progress, config)
    return last or (period > 0 and progress.step % period == 0)


def train_step(
    model: nn.Module,
    batches: Batches,
    loss_fn: Loss,
    config: TrainConfig,
    meter: Meter,
    step: int,
) -> int:
    """The clipped gradient of one step; -> tokens it was learned from on this rank."""
    device = next(model.parameters()).device
    started = time.perf_counter()
    try:
        micro = [next(batches).to(device) for _ in range(config.accumulation)]
    except StopIteration:
        raise ValueError(
            f"the data ended after {step} steps of {config.steps}: "
            f"lower train.steps or allow more epochs"
        ) from None
    meter.waited += time.perf_counter() - started
    denominator = (
        sum_over_ranks(torch.stack([loss_fn.count(b) for b in micro]).sum(0)).clamp(min=1)
        / world_size()
    )
    autocast = torch.autocast(
        device.type, PRECISIONS[config.precision], enabled=config.precision != "float32"
    )
    losses = []
    for batch in micro:
        with autocast:
            loss, metrics = loss_fn(model, batch, denominator)
        loss.backward()
        meter.add(metrics)
        losses.append(loss)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
    whole: Any = norm
    meter.watch(step, losses, whole.full_tensor() if is_sharded([norm]) else whole)
    return sum(int(b.row.shape[0]) * (b.row.shape[1] - len(denominator)) for b in micro)


def _done(progress: Progress, config: TrainConfig) -> float:
    in_time = progress.seconds / config.max_seconds if config.max_seconds else 0.0
    return min(1.0, max(progress.step / config.steps, in_time))


def finished(progress: Progress, config: TrainConfig) -> bool:
    return progress.step >= config.steps or _done(progress, config) >= 1


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[Batch], n: int, bytes_per_token: float
) -> dict[str, float]:
    """Per head i: val_loss_i (nats per token), val_bits_per_byte_i; for i >= 2 val_agreement_i, the
    share of its guesses that are head 1's own later choice, and val_accepted_i, where those of
    heads 2..i - 1 are too; and val_acceptance_length, 1 + all val_accepted_i: what exact greedy
    verification would accept per step on this text (teacher-forced). Over the batches of all ranks.
    """
    device = next(model.parameters()).device
    sizes = (n, n, n - 1, n - 1, 1)
    sums = torch.zeros(sum(sizes), dtype=torch.double)
    for batch in batches:
        batch = batch.to(device)
        targets, valid = future_targets(batch, n)
        nll_NBT, best = model(batch.row, score=_predictor(targets), **batch.known)
        agree, usable = agreements(best, valid)
        found = (
            (nll_NBT * valid).sum((1, 2)),
            valid.sum((1, 2)),
            (agree & usable).sum((1, 2)),
            (agree.cumprod(0) * usable).sum((1, 2)),
            usable.sum()[None],
        )
        sums += torch.cat([x.cpu().double() for x in found])
    sums = torch.tensor(sum_on_host(sums.tolist(), device), dtype=torch.double)
    nll, valid_count, agreed, chained, usable_count = sums.split(sizes)
    loss = (nll / valid_count.clamp(min=1)).tolist()
    share = (agreed / usable_count.clamp(min=1)).tolist()
    metrics = {f"val_loss_{i}": x for i, x in enumerate(loss, 1)}
    metrics |= {
        f"val_bits_per_byte_{i}": x / math.log(2) / bytes_per_token for i, x in enumerate(loss, 1)
    }
    accepted = (chained / usable_count.clamp(min=1)).tolist()
    metrics |= {f"val_agreement_{i}": x for i, x in enumerate(share, 2)}
    metrics |= {f"val_accepted_{i}": x for i, x in enumerate(accepted, 2)}
    return metrics | {"val_acceptance_length": 1 + float(chained.sum() / usable_count.clamp(min=1))}


def _predictor(targets: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda fns, inputs, weights, params: predictions(fns, inputs, weights, targets, params)
