"""Continue prompts: `python scripts/generate.py checkpoint=runs/demo prompt='"def main"'`.

With drafter=heads the model drafts for itself, with drafter=model another one (`draft`), with
drafter=lookup the text itself; the text is the same, in fewer steps. Prompts come from `prompt` or,
one per line, from the file `prompts`. `--cfg job` prints every key.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import MISSING

import mtp
from mtp.decode.drafters import make_drafter
from mtp.run import find_device
from mtp.tokenizer import Tokenizer
from mtp.train import PRECISIONS
from scripts.cli import launch


@dataclass
class GenerateConfig:
    checkpoint: str = MISSING  # or a run directory, for its newest
    prompt: str | None = None
    prompts: str | None = None  # a file with one prompt per line
    max_new_tokens: int = 256
    samples: int = 1  # per prompt, with seeds seed, seed + 1, ...
    seed: int = 0
    drafter: str = "none"  # or heads, model, lookup
    draft: str | None = None  # run or checkpoint of a model that drafts, for drafter=model
    depth: int | None = None  # most guesses per step; null: all extra heads
    rule: str = "match"
    batch_size: int = 8
    precision: str = "float32"
    device: str = "auto"
    sampling: mtp.Sampling = field(default_factory=mtp.Sampling)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1")
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give either prompt=TEXT or prompts=FILE")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: allowed are {', '.join(PRECISIONS)}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 at byte {error.start}") from error


def _draft(config: GenerateConfig, tokenizer: Tokenizer) -> mtp.Transformer | None:
    """The model that drafts, if there is one."""
    if config.draft is None:
        return None
    model = mtp.load(config.draft, find_device(config.device), PRECISIONS[config.precision])
    if mtp.load_tokenizer(config.draft).fingerprint != tokenizer.fingerprint:
        raise ValueError(f"draft={config.draft} has another tokenizer than {config.checkpoint}")
    return model


def complete(config: GenerateConfig) -> None:
    torch.set_num_threads(1)  # rows of one step are too small to share
    model = mtp.load(config.checkpoint, find_device(config.device), PRECISIONS[config.precision])
    tokenizer = mtp.load_tokenizer(config.checkpoint)
    texts = _lines(Path(config.prompts)) if config.prompts else [config.prompt]
    drafter = make_drafter(config.drafter, config.depth, _draft(config, tokenizer))
    seeds = range(config.seed, config.seed + config.samples)
    requests = [
        mtp.Request(ids, config.max_new_tokens, seed, mtp.stop_at(tokenizer.end_id))
        for ids in (tokenizer.encode(str(text)) for text in texts)
        for seed in seeds
    ]
    started = time.perf_counter()
    completions = mtp.generate(
        model, requests, drafter, config.sampling, batch_size=config.batch_size, rule=config.rule
    )
    seconds = time.perf_counter() - started
    for request, completion in zip(requests, completions, strict=True):
        print(tokenizer.decode([*request.prompt, *completion.tokens]))
    new, steps = sum(len(c.tokens) for c in completions), sum(c.steps for c in completions)
    accepted = sum(sum(c.accepted) for c in completions)
    length = 1 + accepted / max(1, steps)
    print(
        f"{new} new tokens in {seconds:.2f} s, {new / seconds:,.0f} tokens/s, "
        f"mean acceptance length {length:.2f}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    launch("generate", GenerateConfig, complete)
