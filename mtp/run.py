"""A training run from a configuration: data, tokenizer, model, checkpoints and logs around
`mtp.train.train`.

    run_dir/checkpoints/step-00001000/   what `mtp.load(run_dir)` opens
    run_dir/metrics.jsonl                one object per logged step
    run_dir/run.json                     the configuration as it was run
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mtp import checkpoint
from mtp.data import Batches, Corpus, DataConfig, StreamingBatches, iter_documents, load_corpus
from mtp.distributed import rank, world_size
from mtp.hooks import JsonlLog, Samples, TensorBoard, console
from mtp.loss import MultiTokenLoss
from mtp.model import ModelConfig, Transformer
from mtp.optim import Optimizer
from mtp.tokenizer import Tokenizer, load_tokenizer
from mtp.train import Hook, Progress, TrainConfig, prepare, train, validate

log = logging.getLogger("mtp")


@dataclass
class RunConfig:
    """model.vocab_size comes from the tokenizer. resume: go on from run_dir's newest checkpoint.
    dry_run: only say what the run will take. head_weights: one per head, null for all 1.
    sample_every: seconds between samples of sample_prompt, 0 for none.
    """

    run_dir: str = "runs/train"
    resume: bool = False
    dry_run: bool = False
    tensorboard: bool = False
    device: str = "auto"
    head_weights: list[float] | None = None
    sample_prompt: str = "def "
    sample_every: float = 30.0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def run(config: RunConfig, hooks: Sequence[Hook] = ()) -> Progress | None:
    """Train as configured, or say what it will take (None). What cannot work is refused before
    anything is loaded.
    """
    device, run_dir = find_device(config.device), Path(config.run_dir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    model_config = replace(config.model, vocab_size=tokenizer.vocab_size)
    if config.data.seq_len > model_config.max_seq_len:
        raise ValueError(
            f"data.seq_len={config.data.seq_len} exceeds "
            f"model.max_seq_len={model_config.max_seq_len}"
        )
    if config.data.seq_len < model_config.n_future_tokens:
        raise ValueError(
            f"data.seq_len={config.data.seq_len} is shorter than "
            f"model.n_future_tokens={model_config.n_future_tokens}"
        )
    loss_fn = MultiTokenLoss(model_config.n_future_tokens, config.head_weights)
    expected = estimate(model_config, config.train, config.data.seq_len)
    log.info("%s", describe(expected))
    if config.dry_run:
        return None
    state = _open_run_dir(run_dir, config.resume, expected["disk_bytes"])
    held_out = load_corpus(config.data, tokenizer, True)
    batches, notes = _batches(config, tokenizer, model_config.n_future_tokens)
    if _step(state) >= config.train.steps:
        log.info("the run has done its %d steps already: nothing is left to do", _step(state))
    generator = torch.Generator().manual_seed(config.train.seed)
    model = Transformer(model_config, generator).to(device)
    if state is not None:
        _check_same(checkpoint.load_config(checkpoint.find(run_dir)), model_config)
        checkpoint.load_weights(model, checkpoint.find(run_dir))
    prepare(model, config.train)
    notes |= {"tokenizer": tokenizer.fingerprint}
    if rank() == 0:
        checkpoint.write_text(run_dir / "run.json", json.dumps(asdict(config), indent=1))

    def save(progress: Progress, optimizer: Optimizer) -> None:
        if rank() == 0:
            training = checkpoint.TrainingState(
                progress.counters() | {"data": batches.state_dict()}, optimizer.state_dict()
            )
            folder = run_dir / "checkpoints" / f"step-{progress.step:08d}"
            checkpoint.save(model, folder, tokenizer, training, notes)
            log.info("saved %s", folder)

    beside: list[Hook] = [JsonlLog(run_dir / "metrics.jsonl", _step(state)), console]
    if config.tensorboard:
        beside.append(TensorBoard(run_dir / "tensorboard"))
    if config.sample_every:
        beside.append(Samples(tokenizer, config.sample_prompt, config.sample_every))
    return train(
        model,
        batches,
        loss_fn,
        config.train,
        hooks=[*beside, *hooks],
        evaluate=evaluator(held_out, config, model_config.n_future_tokens),
        save=save,
        resume=state,
    )


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
    held_out: Corpus, config: RunConfig, n: int
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Validation on eval_batches batches, the same each time and spread over the held-out text."""

    batches = Batches(held_out, config.data.seq_len, n, config.train.batch_size, epochs=1)
    start = batches.state_dict()

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        batches.load_state_dict(start)
        chosen = islice(batches, config.train.eval_batches)
        return validate(model, chosen, n, held_out.bytes_per_token)

    return evaluate


def _batches(
    config: RunConfig, tokenizer: Tokenizer, n: int
) -> tuple[Batches | StreamingBatches, dict[str, Any]]:
    data, rows, ranks = config.data, config.train.batch_size, (rank(), world_size())
    if data.streaming:
        source = StreamingBatches(
            lambda: iter_documents(data, False), tokenizer, data.seq_len, n, rows, *ranks
        )
        return source, {}
    corpus = load_corpus(data, tokenizer, False)
    return Batches(corpus, data.seq_len, n, rows, data.seed, *ranks), {"data": corpus.fingerprint}


def _open_run_dir(
    run_dir: Path, resume: bool, disk_bytes: float
) -> checkpoint.TrainingState | None:
    """Make sure that the run can write there, and that nothing is mixed up with an earlier run."""
    started = (run_dir / "checkpoints").is_dir() and any((run_dir / "checkpoints").glob("step-*"))
    if started and not resume:
        raise ValueError(
            f"run_dir={run_dir} holds a run already: say resume=true or choose another"
        )
    if resume and not started:
        raise ValueError(f"resume=true, but run_dir={run_dir} holds no checkpoint")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run_dir).close()
    except OSError as error:
        raise OSError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error
    free = shutil.disk_usage(run_dir).free
    if free < disk_bytes:
        raise OSError(
            f"run_dir={run_dir} has {free / 2**20:,.0f} MiB free, the run's checkpoints need about "
            f"{disk_bytes / 2**20:,.0f}: save less often (train.save_every) or elsewhere"
        )
    return checkpoint.load_training(run_dir) if resume else None


def _check_same(saved: ModelConfig, wanted: ModelConfig) -> None:
    """Some keys, such as model.head, change what weights mean but not their shapes."""
    old, new = asdict(saved), asdict(wanted)
    changed = [f"model.{k}={new[k]!r} (saved: {old[k]!r})" for k in new if new[k] != old[k]]
    if changed:
        raise ValueError(
            f"resume=true, but the checkpoint's model is another: {', '.join(changed)}"
        )


def _step(state: checkpoint.TrainingState | None) -> int:
    return state.progress["step"] if state else 0


def estimate(model: ModelConfig, config: TrainConfig, seq_len: int) -> dict[str, float]:
    """What a run will take, before anything is allocated: parameters, bytes of memory and disk,
    floating-point operations.

    Memory is weights, gradients, AdamW's two moments and a coarse count of the activations a block
    keeps; operations are 6 per multiplied parameter and token (each head its own unembedding) plus
    attention.
    """
    with torch.device("meta"):
        shapes = Transformer(model)
    parameters = sum(p.numel() for p in shapes.parameters())
    unembedding = model.vocab_size * model.dim
    multiplied = (
        sum(p.numel() for b in shapes.blocks for p in b.parameters())
        + model.n_future_tokens * unembedding
    )
    tokens = config.batch_size * seq_len
    width = 2 if config.precision == "bfloat16" else 4
    activations = tokens * len(shapes.blocks) * (12 * model.dim + 4 * model.ffn_dim) * width
    per_token = 6 * multiplied + 6 * model.n_layers * model.dim * seq_len
    saves = -(-config.steps // config.save_every) if config.save_every else 1
    return {
        "parameters": parameters,
        "memory_bytes": 16 * parameters + activations,
        "flops_per_token": per_token,
        "flops": per_token * tokens * config.accumulation * config.steps,
        "disk_bytes": 12 * parameters * saves,
    }


def describe(expected: dict[str, float]) -> str:
    """One line for people."""
    return (
        f"{expected['parameters'] / 1e6:,.2f}M parameters, "
        f"about {expected['memory_bytes'] / 2**30:,.2f} GiB of memory, "
        f"{expected['flops_per_token'] / 1e6:,.1f} MFLOP per token, "
        f"{expected['flops'] / 1e12:,.1f} TFLOP in all, "
        f"{expected['disk_bytes'] / 2**20:,.0f} MiB of disk"
    )
