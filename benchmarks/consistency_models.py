"""The models that `benchmarks.consistency` compares, made from a base run of a narrow task: of its
trajectories the consistency model and the control, of its answers a small draft model.

What a stopped command left is gone on from; what another configuration left is refused.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import mtp
from benchmarks.record import quicken
from benchmarks.subjects import subject
from benchmarks.tasks import TASKS, Problem, check_task
from mtp.checkpoint import find, load_config
from mtp.consistency import ConsistencyConfig
from mtp.consistency.files import Origin, Report, collect_shards, read_trajectories
from mtp.consistency.filters import FilterConfig
from mtp.consistency.trajectories import Trajectory
from mtp.documents import DataConfig
from mtp.files import write_text
from mtp.model import ModelConfig
from mtp.optim import OptimConfig
from mtp.run import RunConfig, data_of, find_device, run
from mtp.tokenizer import Tokenizer
from mtp.train import PRECISIONS, TrainConfig

QUICK = {  # many small steps: these teach more in the same time
    "prompts": 1000,
    "states": 2,
    "batch_size": 4,
    "steps": 520,
    "lr": 3e-3,
    "draft_steps": 50,
    "problems": 200,
    "texts": 12,
    "rounds": 2,
}
TRAINED_WINDOW = 8  # 16 as published: what lies farther away a small model hardly learns
COLUMNS = 1024  # of a packed row, at most
DRAFT = ModelConfig(dim=64, n_layers=2, n_heads=2, n_future_tokens=1, multiple_of=32)


@dataclass
class BenchmarkConfig:
    """base: a run of `task`, a key of `benchmarks.tasks`. out: for what is collected and trained.
    prompts: to collect on. conditions: the most in a question in SQL. lr, ar_weight, steps,
    batch_size: of both longer trainings; states: of each window in a row. window: of Jacobi
    decoding where nothing else is said. problems: for quality. texts, rounds: decoded in turns.
    quick: the direction in minutes, in files of its own.
    """

    base: str = "runs/sql"
    task: str = "sql"
    conditions: int = 4
    out: str = "runs/consistency_benchmark"
    prompts: int = 6000
    steps: int = 1600
    batch_size: int = 8
    states: int = 4
    lr: float = 2e-3
    ar_weight: float = 10.0
    draft_steps: int = 300
    window: int = 8
    precision: str = "float32"
    new_tokens: int = 128
    problems: int = 2500
    texts: int = 48
    rounds: int = 3
    pairs: int = 30
    device: str = "auto"
    quick: bool = False
    name: str = "consistency"

    def __post_init__(self) -> None:
        check_task(self.task)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: allowed are {', '.join(PRECISIONS)}")
        quicken(self, QUICK)

    @property
    def trajectories(self) -> str:
        return f"{self.out}/trajectories"


@dataclass(frozen=True)
class Models:
    """Runs by name, and what each took: seconds, steps."""

    base: str
    after: str
    control: str
    draft: str
    costs: dict[str, Any]


def make_models(config: BenchmarkConfig) -> Models:
    report = collect(config)
    made = {
        "after": trained(consistency_run(config, "after")),
        "control": trained(consistency_run(config, "control")),
        "draft": trained(draft_run(config)),
    }
    costs = {"collection": asdict(report)} | {name: cost_of(where) for name, where in made.items()}
    return Models(config.base, **made, costs=costs)


def problems_of(config: BenchmarkConfig, held_out: bool) -> Iterator[Problem]:
    return TASKS[config.task](held_out, conditions=config.conditions)


def collect(config: BenchmarkConfig) -> Report:
    """Greedy trajectories on the task's training prompts."""
    base, device = subject(config.base), find_device(config.device)
    stop = mtp.stop_at(*base.ends)
    requests = [
        mtp.Request(base.tokenizer.encode(problem.prompt), config.new_tokens, seed, stop)
        for seed, problem in enumerate(islice(problems_of(config, False), config.prompts))
    ]
    prompts = json.dumps([request.prompt for request in requests])
    settings = {
        "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16],
        "max_new_tokens": config.new_tokens,
    }
    return collect_shards(
        Path(config.trajectories),
        base.load(device, torch.float32),
        requests,
        Origin(base.tokenizer.fingerprint, base.hash, TRAINED_WINDOW, settings),
        base.tokenizer,
        FilterConfig(),
        batch_size=32,
        sampling=mtp.Sampling(temperature=0),
        tell=every(500),
    )


def every(count: int) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        if done % count == 0:
            print(f"{done} of {total} trajectories", file=sys.stderr)

    return tell


def consistency_run(config: BenchmarkConfig, name: str) -> RunConfig:
    """after or control: the same rows, and for the control no consistency loss. What a row's text
    gives does not depend on the states in it, so that the control reads one of each window, only to
    measure.
    """
    control = name == "control"
    return RunConfig(
        run_dir=f"{config.out}/{name}",
        objective="consistency",
        init_from=config.base,
        resume="auto",
        device=config.device,
        sample_every=0.0,
        data=DataConfig(seq_len=COLUMNS),
        consistency=ConsistencyConfig(
            trajectories=config.trajectories,
            window=TRAINED_WINDOW,
            states=1 if control else config.states,
            ar_weight=config.ar_weight,
            consistency_weight=float(not control),
        ),
        train=TrainConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            precision="bfloat16",
            log_every=20,
            optim=OptimConfig("muon", config.lr, weight_decay=0.0, warmup_steps=60),
        ),
    )


def draft_run(config: BenchmarkConfig) -> RunConfig:
    """A small model learns the base model's answers: distillation by its text."""
    answers = Path(config.out) / "answers.jsonl"
    tokenizer = mtp.load_tokenizer(config.base)
    write_text(answers, "".join(f"{json.dumps(x)}\n" for x in texts_of(config, tokenizer)))
    base, rows = find(config.base), data_of(config.base).seq_len
    longest = load_config(base).max_seq_len
    return RunConfig(
        run_dir=f"{config.out}/draft",
        resume="auto",
        device=config.device,
        sample_every=0.0,
        model=ModelConfig(**(asdict(DRAFT) | {"max_seq_len": longest})),
        data=DataConfig(
            "jsonl",
            str(answers),
            val_path=str(answers),  # a run wants some; nobody looks
            tokenizer=str(base),
            seq_len=rows,
        ),
        train=TrainConfig(
            steps=config.draft_steps,
            batch_size=16,
            precision="bfloat16",
            log_every=20,
            eval_batches=1,
            optim=OptimConfig("muon", 5e-3, warmup_steps=20),
        ),
    )


def texts_of(config: BenchmarkConfig, tokenizer: Tokenizer) -> list[dict[str, str]]:
    found = read_trajectories(config.trajectories, tokenizer.fingerprint, TRAINED_WINDOW)
    return [
        {"prompt": tokenizer.decode(t.prompt), "completion": tokenizer.decode(answer(t, tokenizer))}
        for t in found
    ]


def answer(trajectory: Trajectory, tokenizer: Tokenizer) -> Sequence[int]:
    """Without the end token, which documents get anew."""
    return [token for token in trajectory.response if token != tokenizer.end_id]


def trained(config: RunConfig) -> str:
    """-> its run directory. SystemExit: another configuration was run there, or it was stopped."""
    written = Path(config.run_dir) / "run.json"
    wanted = json.loads(json.dumps(asdict(config)))
    if written.is_file() and json.loads(written.read_text(encoding="utf-8")) != wanted:
        raise SystemExit(f"error: {written} is of another configuration: choose another out=")
    print(f"training {config.run_dir}", file=sys.stderr)
    progress = run(config)
    if progress is not None and progress.stopped:
        raise SystemExit(f"stopped in {config.run_dir}: the same command goes on")
    return config.run_dir


def cost_of(run_dir: str) -> dict[str, Any]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    return {key: last[key] for key in ("step", "tokens", "seconds")}
