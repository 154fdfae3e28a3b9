"""A training run from a configuration: an objective's loss and data, tokenizer, model, checkpoints
and logs around `mtp.train.train`.

    run_dir/checkpoints/step-00001000/   what `mtp.load(run_dir)` opens
    run_dir/metrics.jsonl                one object per logged step
    run_dir/run.json                     the configuration as it was run
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mtp import checkpoint
from mtp.consistency.files import origin_of, read_trajectories
from mtp.consistency.loss import ConsistencyConfig, ConsistencyLoss
from mtp.consistency.on_policy import as_collected
from mtp.consistency.packing import TrajectoryBatches
from mtp.data import Batches, Corpus, DataConfig, StreamingBatches, iter_documents, load_corpus
from mtp.distill import (
    DistillConfig,
    DistillLoss,
    TaughtBatches,
    check_draft,
    load_target,
    make_texts,
)
from mtp.distill import evaluator as draft_evaluator
from mtp.distributed import from_rank_zero, processes, rank, world_size
from mtp.estimate import describe, estimate
from mtp.files import write_text
from mtp.hooks import (
    JsonlLog,
    Samples,
    StopSignals,
    TensorBoard,
    Utilisation,
    WeightsAndBiases,
    console,
)
from mtp.loss import MultiTokenLoss
from mtp.model import ModelConfig, Transformer
from mtp.objectives import SCHEDULES, SUMMARIES, summary_loss
from mtp.optim import Optimizer
from mtp.problems import ProblemBatches, check_rows
from mtp.problems import evaluator as task_evaluator
from mtp.run_dir import open_run_dir, resume_word
from mtp.tokenizer import Tokenizer, load_tokenizer
from mtp.train import Batches as Source
from mtp.train import Hook, Loss, Progress, TrainConfig, prepare, train, validate

log = logging.getLogger("mtp")
RECORD, METRICS = "run.json", "metrics.jsonl"


@dataclass
class RunConfig:
    """model.vocab_size comes from the tokenizer. objective: tokens of a corpus; order or bag, where
    the last head learns a summary of the next `window` tokens (`mtp.objectives`); consistency; or
    distill, whose tokenizer and vocabulary are the target's.
    init_from: a checkpoint or run directory to start from, which brings model and tokenizer.
    resume: go on from run_dir's newest checkpoint; auto: if there is one. dry_run: only say what
    the run will take. wandb: a project's name. head_weights: one per head, null for all 1.
    head_schedule: how they change during the run, a key of `mtp.objectives.SCHEDULES`.
    sample_every: seconds between samples of sample_prompt, 0 for none.
    """

    run_dir: str = "runs/train"
    resume: str = "false"  # true, false or auto
    dry_run: bool = False
    objective: str = "tokens"  # a key of OBJECTIVES
    init_from: str | None = None
    tensorboard: bool = False
    wandb: str | None = None
    device: str = "auto"
    head_weights: list[float] | None = None
    head_schedule: str | None = None
    window: int = 32
    sample_prompt: str = "def "
    sample_every: float = 30.0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        self.resume = resume_word(self.resume)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r}: allowed are {', '.join(OBJECTIVES)}")
        if self.head_schedule is not None and self.head_schedule not in SCHEDULES:
            raise ValueError(
                f"head_schedule={self.head_schedule!r}: allowed are {', '.join(SCHEDULES)}, or null"
            )
        if self.head_schedule is not None and self.objective != "tokens":
            raise ValueError(f"head_schedule: not together with objective={self.objective}")
        if self.head_weights is not None and self.objective in ("consistency", "distill"):
            raise ValueError(
                f"head_weights: not together with objective={self.objective}, where head 1 alone "
                f"learns"
            )
        if self.objective == "consistency" and self.consistency.trajectories is None:
            raise ValueError("consistency.trajectories: give the folder of a collection")
        if self.objective == "consistency" and self.init_from is None:
            raise ValueError("init_from: give the model that consistency.trajectories are of")
        if self.objective == "distill" and self.distill.target is None:
            raise ValueError(
                "distill.target: give the run or checkpoint of the model to stand in for"
            )
        brought: list[tuple[str, str, object]] = []
        if self.objective == "distill":
            brought += [("distill.target", "data.tokenizer", DataConfig.tokenizer)]
        if self.init_from is not None:
            brought += [("init_from", "model", ModelConfig())]
            brought += [("init_from", "data.tokenizer", DataConfig.tokenizer)]
        for source, key, value in brought:
            if attrgetter(key)(self) != value:
                raise ValueError(f"{key}: not together with {source}, which brings its own")


def run(config: RunConfig, hooks: Sequence[Hook] = ()) -> Progress | None:
    """Train as configured, or say what it will take (None). What cannot work is refused before
    anything is loaded. The same call in every process where torchrun or srun started several.

    SIGTERM, SIGINT and SIGUSR2 end the run after the step at hand, saved: progress.stopped says so.
    """
    with processes(find_device(config.device)) as device:
        return _run(config, device, hooks)


def _run(config: RunConfig, device: torch.device, hooks: Sequence[Hook]) -> Progress | None:
    run_dir, objective = Path(config.run_dir), OBJECTIVES[config.objective]
    tokenizer, model_config = _starting_point(config)
    loss_fn = objective.loss(config, tokenizer, model_config)
    expected = estimate(model_config, config.train, config.data.seq_len)
    _info("%s", describe(expected))
    if config.train.steps <= (warmup := config.train.optim.warmup_steps):
        said = "train.steps=%d end within train.optim.warmup_steps=%d: little is learned"
        _info(said, config.train.steps, warmup)
    if config.dry_run:
        return None
    source = from_rank_zero(lambda: open_run_dir(run_dir, config.resume, expected["disk_bytes"]))
    if source is not None:
        _check_same(checkpoint.load_config(source), model_config)
    start = None if source or config.init_from is None else checkpoint.find(config.init_from)
    model = Transformer(model_config, torch.Generator().manual_seed(config.train.seed)).to(device)
    prepare(model, config.train)
    batches, evaluate, notes = objective.data(config, tokenizer, model, start)
    notes |= {"tokenizer": tokenizer.fingerprint}
    if start is not None:
        checkpoint.load_weights(model, start)
    return train_in(
        run_dir,
        source,
        model,
        batches,
        loss_fn,
        config.train,
        hooks=lambda at_start: [
            *_beside(config, tokenizer, expected["flops_per_token"], at_start),
            *hooks,
        ],
        evaluate=evaluate,
        record=asdict(config),
        tokenizer=tokenizer,
        notes=notes,
    )


def train_in(
    run_dir: Path,
    source: Path | None,
    model: Any,
    batches: Source,
    loss_fn: Loss,
    config: TrainConfig,
    *,
    hooks: Callable[[int], Sequence[Hook]],
    evaluate: Callable[[torch.nn.Module], dict[str, float]] | None,
    record: dict[str, Any],
    tokenizer: Tokenizer,
    notes: dict[str, Any],
) -> Progress:
    """Train with checkpoints in a run directory, from the one that `open_run_dir` found, if any.

    hooks: by the step at which training begins. record: the run as configured, for run.json. notes:
    what checkpoints are to remember.
    """
    state = None if source is None else _resumed(model, source)
    at_start = state.progress["step"] if state else 0
    if at_start >= config.steps:
        _info("the run has done its %d steps already: nothing is left to do", at_start)

    def recorded(progress: Progress) -> None:
        """After a step: what is refused before leaves the record of the run that is there."""
        if progress.step == at_start + 1 and rank() == 0:
            write_text(run_dir / RECORD, json.dumps(record, indent=1))

    with StopSignals() as stop:
        progress = train(
            model,
            batches,
            loss_fn,
            config,
            hooks=[recorded, *hooks(at_start)],
            evaluate=evaluate,
            save=_saver(run_dir, batches, tokenizer, notes, config.keep_last),
            resume=state,
            stop=stop,
        )
    if progress.stopped:
        said = "stopped after step %d, saved; the same command goes on with resume=auto"
        _info(said, progress.step)
    return progress


def _resumed(model: Any, source: Path) -> checkpoint.TrainingState:
    checkpoint.load_weights(model, source)
    state = checkpoint.load_training(source, model)
    _info("going on from %s", source)
    return state


def _info(text: str, *values: object) -> None:
    log.log(logging.INFO if rank() == 0 else logging.DEBUG, text, *values)


def _saver(
    run_dir: Path, batches: Source, tokenizer: Tokenizer, notes: dict[str, Any], keep: int | None
) -> Callable[[Progress, Optimizer], None]:
    def save(progress: Progress, optimizer: Optimizer) -> None:
        counters = progress.counters() | {"data": batches.state_dict()}
        training = checkpoint.TrainingState(counters, optimizer.state_dict())
        folder = run_dir / "checkpoints" / f"step-{progress.step:08d}"
        checkpoint.save(progress.model, folder, tokenizer, training, notes)
        _info("saved %s", folder)
        if rank() == 0:
            checkpoint.tidy(run_dir, keep)

    return save


def _starting_point(config: RunConfig) -> tuple[Tokenizer, ModelConfig]:
    if config.train.optim.name == "muon" and world_size() > 1:
        raise ValueError(
            "train.optim.name='muon' needs whole matrices, which several processes share: use adamw"
        )
    if config.init_from is not None:
        folder = checkpoint.find(config.init_from)
        return checkpoint.load_tokenizer(folder), checkpoint.load_config(folder)
    if config.objective == "distill":
        folder = checkpoint.find(str(config.distill.target))
        vocab_size = checkpoint.load_config(folder).vocab_size
        return checkpoint.load_tokenizer(folder), replace(config.model, vocab_size=vocab_size)
    tokenizer = load_tokenizer(config.data.tokenizer)
    return tokenizer, replace(config.model, vocab_size=tokenizer.vocab_size)


def _beside(config: RunConfig, tokenizer: Tokenizer, flops: float, at_start: int) -> list[Hook]:
    """What is logged, in an order: figures are added before they are written."""
    run_dir = Path(config.run_dir)
    hooks: list[Hook] = [
        Utilisation(flops, config.train.precision),
        JsonlLog(run_dir / METRICS, at_start),
        console,
    ]
    if config.tensorboard:
        hooks.append(TensorBoard(run_dir / "tensorboard"))
    if config.wandb:
        hooks.append(WeightsAndBiases(config.wandb, run_dir, asdict(config)))
    if config.sample_every and world_size() == 1:  # a sharded model does not decode
        hooks.append(Samples(tokenizer, config.sample_prompt, config.sample_every))
    return hooks


def data_of(where: str | Path) -> DataConfig:
    """The data of the run that left a checkpoint, `where` as for `mtp.load`. ValueError if a run
    did not leave it.
    """
    written = checkpoint.find(where).parent.parent / RECORD
    if not written.is_file():
        raise ValueError(f"no {written} tells the data that {where} was trained on")
    return DataConfig(**json.loads(written.read_text(encoding="utf-8"))["data"])


def find_device(name: str) -> torch.device:
    """ "auto" prefers CUDA, then MPS, then the CPU."""
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown, or not of this machine
        raise ValueError(
            f"device={name!r} does not work here ({str(error).splitlines()[0]}): "
            f"allowed are auto, cpu, cuda, mps"
        ) from None


def evaluator(
    held_out: Corpus, data: DataConfig, config: TrainConfig, n: int
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Validation on eval_batches batches, the same each time, shared among ranks."""
    ranks = (rank(), world_size())
    rows = config.batch_size
    found, needed = len(held_out.tokens), data.seq_len + n
    if found < needed:
        raise ValueError(
            f"{found} tokens are held out, one row needs {needed} (data.seq_len + "
            f"n_future_tokens): hold out more (data.val_fraction, data.val_path, data.holdout)"
        )
    batches = Batches(held_out, data.seq_len, n, rows, 0, *ranks, epochs=1)
    start = batches.state_dict()

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        batches.load_state_dict(start)
        chosen = islice(batches, -(-config.eval_batches // world_size()))
        return validate(model, chosen, n, held_out.bytes_per_token)

    return evaluate


class Data(NamedTuple):
    """evaluate: see `train`. notes: what a checkpoint's config says of the data."""

    batches: Source
    evaluate: Callable[[torch.nn.Module], dict[str, float]] | None
    notes: dict[str, Any]


class Objective(NamedTuple):
    """loss: made before anything is loaded, it refuses what cannot work. data: loads it, for a
    model that gets its weights later, where a run begins from a checkpoint from the folder given.
    """

    loss: Callable[[RunConfig, Tokenizer, ModelConfig], Loss]
    data: Callable[[RunConfig, Tokenizer, Transformer, Path | None], Data]


def _token_loss(config: RunConfig, tokenizer: Tokenizer, model: ModelConfig) -> Loss:
    seq_len, n = config.data.seq_len, model.n_future_tokens
    if seq_len > model.max_seq_len:
        raise ValueError(f"data.seq_len={seq_len} exceeds model.max_seq_len={model.max_seq_len}")
    if seq_len < n:
        raise ValueError(f"data.seq_len={seq_len} is shorter than model.n_future_tokens={n}")
    if config.data.source == "task":
        check_rows(config.data, model.max_seq_len)
    if config.objective in SUMMARIES:
        if config.window >= seq_len:
            raise ValueError(f"window={config.window} must be below data.seq_len={seq_len}")
        return summary_loss(config.objective, n, config.window, config.head_weights)
    schedule = None if config.head_schedule is None else SCHEDULES[config.head_schedule]
    return MultiTokenLoss(n, config.head_weights, schedule=schedule)


def _tokens(
    config: RunConfig, tokenizer: Tokenizer, model: Transformer, start: Path | None
) -> Data:
    data, n, rows = config.data, model.config.n_future_tokens, config.train.batch_size
    ranks = (rank(), world_size())
    if data.source == "task":
        new = ProblemBatches(data, tokenizer, n, rows, *ranks)
        return Data(new, task_evaluator(data, tokenizer, config.train, n), {"data": data.task})
    evaluate = evaluator(load_corpus(data, tokenizer, True), data, config.train, n)
    if data.streaming:
        stream = StreamingBatches(
            lambda: iter_documents(data, False), tokenizer, data.seq_len, n, rows, *ranks
        )
        return Data(stream, evaluate, {})
    corpus = load_corpus(data, tokenizer, False)
    batches = Batches(corpus, data.seq_len, n, rows, data.seed, *ranks)
    return Data(batches, evaluate, {"data": corpus.fingerprint})


def _consistency_loss(config: RunConfig, tokenizer: Tokenizer, model: ModelConfig) -> Loss:
    if config.consistency.refresh_every and world_size() > 1:
        raise ValueError(
            f"consistency.refresh_every={config.consistency.refresh_every}: the model in training "
            f"decodes in one process only, there are {world_size()}"
        )
    weights = config.consistency.ar_weight, config.consistency.consistency_weight
    return ConsistencyLoss(config.consistency.divergence, *weights)


def _trajectories(
    config: RunConfig, tokenizer: Tokenizer, model: Transformer, start: Path | None
) -> Data:
    settings, seed, refresh = config.consistency, config.data.seed, None
    where = str(settings.trajectories)
    found = list(read_trajectories(where, tokenizer.fingerprint, settings.window, start))
    if settings.refresh_every:
        prompts = [trajectory.prompt for trajectory in found]
        refresh = as_collected(origin_of(where), model, tokenizer, prompts, seed)
    batches = TrajectoryBatches(
        found,
        config.train.batch_size,
        config.data.seq_len,
        model.config.max_seq_len,
        settings.kind,
        seed,
        rank(),
        world_size(),
        settings.states,
        augment=settings.augment,
        refresh=refresh,
        refresh_every=settings.refresh_every,
    )
    skipped = ", ".join(f"{count} {what}" for what, count in batches.skipped.items() if count)
    log.info("trajectories: %d responses; skipped: %s", len(batches), skipped or "nothing")
    return Data(batches, None, {"data": batches.fingerprint})


def _distill_loss(config: RunConfig, tokenizer: Tokenizer, model: ModelConfig) -> Loss:
    check_draft(config.distill, config.data, tokenizer, model)
    return DistillLoss()


def _taught(
    config: RunConfig, tokenizer: Tokenizer, model: Transformer, start: Path | None
) -> Data:
    target = load_target(config.distill, find_device(config.device))
    name = checkpoint.fingerprint(checkpoint.find(str(config.distill.target)))
    given = config.distill, config.data, tokenizer, target, config.train.batch_size
    identity = {"target": name, "text": config.distill.text}
    batches, held_out = (
        TaughtBatches(target, identity, make_texts(*given, part)) for part in (False, True)
    )
    evaluate = draft_evaluator(held_out, config.train.eval_batches)
    return Data(batches, evaluate, {"target": name})


OBJECTIVES = {
    **{word: Objective(_token_loss, _tokens) for word in ("tokens", *SUMMARIES)},
    "consistency": Objective(_consistency_loss, _trajectories),
    "distill": Objective(_distill_loss, _taught),
}


def _check_same(saved: ModelConfig, wanted: ModelConfig) -> None:
    """Some keys, such as model.head, change what weights mean but not their shapes."""
    old, new = asdict(saved), asdict(wanted)
    changed = [f"model.{k}={new[k]!r} (saved: {old[k]!r})" for k in new if new[k] != old[k]]
    if changed:
        raise ValueError(
            f"resume=true, but the checkpoint's model is another: {', '.join(changed)}"
        )
