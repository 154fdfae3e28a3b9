"""Let a model write the text that its heads are trained on:

python scripts/self_distill.py checkpoint=FOLDER out=runs/own.jsonl data.source=stdlib
python scripts/attach.py trunk=FOLDER run_dir=runs/heads data.source=jsonl data.path=runs/own.jsonl

Prompts are the training documents of `data`: of a chat or of a prompt with its completion what
stands before the first answer, of other text the first `prompt_tokens` tokens. Each line of `out`
holds both texts and their ids, of which the completion's are targets. The same command goes on
where it was stopped. `--cfg job` prints every key.
"""

import hashlib
import json
import logging
import random
import time
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from omegaconf import MISSING

import mtp
from mtp.documents import DataConfig, iter_documents
from mtp.encoding import prompt_of
from mtp.evaluate.code import completion_text
from mtp.evaluate.samples import drop_torn_line
from mtp.hooks import read_jsonl
from mtp.interop.folder import FoundModel, find_model
from mtp.run import find_device
from mtp.tokenizer import Tokenizer
from mtp.train import PRECISIONS
from scripts.cli import launch

log = logging.getLogger("mtp")
EVERY = 10.0  # seconds between two lines of progress


@dataclass
class SelfDistillConfig:
    """data.tokenizer is the model's own, and stays unsaid."""

    checkpoint: str = MISSING  # a run, a checkpoint or a Hugging Face folder
    out: str = MISSING  # a file of JSON lines, new or of this same command
    count: int | None = None  # completions in all, prompts in turn; null: one of each prompt
    prompt_tokens: int = 64  # of a document without answers
    max_new_tokens: int = 192
    seed: int = 0  # of the prompts' order and of their completions
    batch_size: int = 16
    precision: str = "float32"  # or bfloat16
    device: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    sampling: mtp.Sampling = field(default_factory=lambda: mtp.Sampling(temperature=0.7))

    def __post_init__(self) -> None:
        for key in ("count", "prompt_tokens", "max_new_tokens"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: allowed are {', '.join(PRECISIONS)}")
        if self.data.tokenizer != DataConfig.tokenizer:
            raise ValueError(f"data.tokenizer={self.data.tokenizer}: the model brings its own")


class Prompt(NamedTuple):
    number: int  # among all: the same for the same settings, however many are asked for
    seed: int
    ids: list[int]


def make_prompts(config: SelfDistillConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """In an order of their own, so that the first ones are like all."""
    documents = list(iter_documents(config.data, held_out=False))
    random.Random(config.seed).shuffle(documents)
    count = len(documents) if config.count is None else config.count
    several = islice(cycle(documents), count)
    return [
        Prompt(i, config.seed + i, prompt_of(document, tokenizer, config.prompt_tokens))
        for i, document in enumerate(several)
    ]


class Written:
    """The file of completions: those found in it, and those appended."""

    def __init__(self, config: SelfDistillConfig, tokenizer: Tokenizer) -> None:
        """ValueError where it holds something else, or was written with other settings."""
        self.path, self.tokenizer = Path(config.out), tokenizer
        self.run = fingerprint(config, tokenizer)
        self.done: set[int] = set()
        if self.path.exists():
            drop_torn_line(self.path)
            records = list(read_jsonl(self.path))
            if any(record.get("run") != self.run for record in records):
                raise ValueError(
                    f"out={config.out} was written with another model, other prompts or settings: "
                    f"choose another file"
                )
            self.done = {record["number"] for record in records}
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, prompt: Prompt, ids: list[int]) -> None:
        record = {
            "prompt": self.tokenizer.decode(prompt.ids),
            "completion": completion_text(self.tokenizer, prompt.ids, ids),
            "prompt_ids": prompt.ids,
            "completion_ids": ids,
            "tokenizer": self.tokenizer.fingerprint,
            "number": prompt.number,
            "run": self.run,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.done.add(prompt.number)


def fingerprint(config: SelfDistillConfig, tokenizer: Tokenizer) -> str:
    """Of all that completions depend on, but for how many there are and where they are computed."""
    free = ("out", "count", "batch_size", "device")
    kept = {key: value for key, value in asdict(config).items() if key not in free}
    said = json.dumps([kept, tokenizer.fingerprint], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def write(
    config: SelfDistillConfig, found: FoundModel, prompts: list[Prompt], file: Written
) -> None:
    model = found.load(find_device(config.device), PRECISIONS[config.precision])
    room = model.config.max_seq_len - config.max_new_tokens
    fitting = [p for p in prompts if p.number not in file.done and 0 < len(p.ids) <= room]
    stop, started, told, new = mtp.stop_at(*found.ends), time.monotonic(), 0.0, 0
    requests = [mtp.Request(p.ids, config.max_new_tokens, p.seed, stop) for p in fitting]
    decoding = mtp.Decoding(model, requests, None, config.sampling, batch_size=config.batch_size)
    for i, tokens in decoding:
        new += len(tokens)
        if i not in decoding.owner:
            file.append(fitting[i], decoding.completions[i].tokens)
        if (seconds := time.monotonic() - started) - told > EVERY:
            told = seconds
            log.info("%d of %d, %.0f tokens/s", len(file.done), len(prompts), new / seconds)


def self_distill(config: SelfDistillConfig) -> None:
    found = find_model(config.checkpoint, special=False)  # as documents are read
    prompts, file = make_prompts(config, found.tokenizer), Written(config, found.tokenizer)
    before = len(file.done)
    write(config, found, prompts, file)
    wanted = {prompt.number for prompt in prompts}
    print(
        f"written: {config.out}, {len(file.done) - before} completions now, {len(file.done)} in "
        f"all; {len(wanted - file.done)} prompts were empty or too long for the model"
    )


if __name__ == "__main__":
    launch("self_distill", SelfDistillConfig, self_distill)
