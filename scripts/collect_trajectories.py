"""Collect Jacobi trajectories for consistency training:

python scripts/collect_trajectories.py checkpoint=runs/demo out=runs/trajectories \\
    data.source=jsonl data.path=questions.jsonl

`checkpoint` is a run, a checkpoint, or a Hugging Face folder of a causal LM or its name on the hub;
training on them starts from the very same one, so convert a folder first. Prompts are records with
messages, a prompt and a completion (which is not looked at), or `data.text_key`; lines of a file
with data.source=lines; or the first `prompt_tokens` tokens of each document of a corpus. A command
that was stopped goes on where it was when it is given again. `--cfg job` prints every key.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import MISSING

import mtp
from benchmarks.timing import progress
from mtp.checkpoint import fingerprint
from mtp.consistency.files import Origin, collect_shards
from mtp.consistency.filters import FilterConfig
from mtp.documents import DataConfig, iter_documents
from mtp.encoding import prompt_of
from mtp.interop.folder import FoundModel, find_model
from mtp.run import find_device
from mtp.tokenizer import Tokenizer
from mtp.train import PRECISIONS
from scripts.cli import launch


@dataclass
class CollectConfig:
    """data.tokenizer is the model's own, and stays unsaid."""

    checkpoint: str = MISSING
    out: str = MISSING  # a folder
    data: DataConfig = field(default_factory=DataConfig)
    held_out: bool = False  # prompts of the part that is held out, to measure on
    limit: int | None = None  # how many prompts at most
    prompt_tokens: int | None = None  # of a document without answers; null: all of it
    window: int = 16
    max_new_tokens: int = 256
    seed: int = 0
    batch_size: int = 8
    shard_size: int = 256  # responses
    precision: str = "float32"
    device: str = "auto"
    sampling: mtp.Sampling = field(default_factory=mtp.Sampling)
    filters: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        counts = ("window", "max_new_tokens", "batch_size", "shard_size", "limit", "prompt_tokens")
        for key in counts:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        if self.precision not in PRECISIONS:
            allowed = ", ".join(PRECISIONS)
            raise ValueError(f"precision={self.precision!r}: allowed are {allowed}")
        if self.data.tokenizer != DataConfig.tokenizer:
            raise ValueError(f"data.tokenizer={self.data.tokenizer}: the model brings its own")


def _prompts(config: CollectConfig, tokenizer: Tokenizer) -> list[list[int]]:
    documents = islice(iter_documents(config.data, config.held_out), config.limit)
    return [prompt_of(d, tokenizer, config.prompt_tokens) for d in documents]


def _origin(config: CollectConfig, found: FoundModel, prompts: list[list[int]]) -> Origin:
    settings: dict[str, Any] = {
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        "ends": list(found.ends),
        **{key: getattr(config, key) for key in ("max_new_tokens", "seed", "shard_size")},
        "precision": config.precision,
        "sampling": asdict(config.sampling),
        "filters": asdict(config.filters),
    }
    model = fingerprint(found.folder)
    return Origin(found.tokenizer.fingerprint, model, config.window, settings)


def collect(config: CollectConfig) -> None:
    found = find_model(config.checkpoint, special=False)  # as documents are read
    prompts, stop = _prompts(config, found.tokenizer), mtp.stop_at(*found.ends)
    report = collect_shards(
        Path(config.out),
        found.load(find_device(config.device), PRECISIONS[config.precision]),
        [
            mtp.Request(ids, config.max_new_tokens, config.seed + i, stop)
            for i, ids in enumerate(prompts)
        ],
        _origin(config, found, prompts),
        found.tokenizer,
        config.filters,
        batch_size=config.batch_size,
        sampling=config.sampling,
        shard_size=config.shard_size,
        tell=progress("responses"),
    )
    print(
        f"written: {config.out}, {report.kept} of {report.responses} responses kept; dropped: "
        f"{report.dropped or 'none'}, prompts skipped: {report.skipped or 'none'}; "
        f"{report.tokens} tokens in {report.passes} passes, {report.seconds:.1f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    launch("collect_trajectories", CollectConfig, collect)
