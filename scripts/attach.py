"""Train heads for a causal LM of transformers, which stays as it is:

python scripts/attach.py trunk=FOLDER out=runs/heads data=stdlib train.steps=500

`trunk` is a Hugging Face folder with weights and tokenizer; `mtp.interop.attach.load_heads` opens
`out` beside it. A signal that ends a run saves it too. heads=FOLDER starts from saved heads, also
where the trunk was trained further since. `--cfg job` prints every key.
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from mtp.data import Batches, load_corpora
from mtp.documents import DataConfig
from mtp.hooks import StopSignals, console
from mtp.interop.attach import KINDS, AttachedHeads, attach_heads, load_heads, save_heads
from mtp.interop.huggingface import CausalLM
from mtp.loss import MultiTokenLoss
from mtp.run import RunConfig, evaluator, find_device
from mtp.tokenizer import HuggingFaceTokenizer
from mtp.train import PRECISIONS, TrainConfig, train
from scripts.cli import launch

log = logging.getLogger("mtp")


@dataclass
class AttachConfig:
    """data.tokenizer is the trunk's own, and stays unsaid."""

    trunk: str = MISSING  # a folder
    out: str = MISSING  # a new folder
    n: int = 4  # tokens predicted at once, the model's own included
    kind: str = "residual"  # transformer, causal
    heads: str | None = None  # go on from these, whatever n and kind say
    trunk_precision: str = "float32"  # of its weights; heads learn in float32
    device: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        choices: dict[str, Any] = {"kind": KINDS, "trunk_precision": PRECISIONS}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} is unknown: allowed are {', '.join(allowed)}"
                )
        if self.data.tokenizer != DataConfig.tokenizer:
            raise ValueError(f"data.tokenizer={self.data.tokenizer}: the trunk brings its own")
        if self.data.streaming:
            raise ValueError("data.streaming=true: heads are trained on a corpus")


def open_model(config: AttachConfig) -> AttachedHeads:
    from transformers import AutoModelForCausalLM

    dtype = PRECISIONS[config.trunk_precision]
    theirs = AutoModelForCausalLM.from_pretrained(config.trunk, dtype=dtype)
    trunk = CausalLM(theirs.to(find_device(config.device)))
    if config.heads is not None:
        return load_heads(trunk, config.heads, realign=True)
    generator = torch.Generator().manual_seed(config.train.seed)
    return attach_heads(trunk, config.n, config.kind, generator)


def attach(config: AttachConfig) -> None:
    if not Path(config.trunk).is_dir():
        raise ValueError(f"trunk={config.trunk} is no folder")
    if os.path.exists(config.out):
        raise ValueError(f"out={config.out} exists already: choose another folder")
    tokenizer, data = HuggingFaceTokenizer(config.trunk), config.data
    model = open_model(config).float()
    n, limits = model.n_future_tokens, model.config
    if tokenizer.vocab_size > limits.vocab_size:
        raise ValueError(
            f"trunk={config.trunk}: its tokenizer has {tokenizer.vocab_size} tokens, the model's "
            f"vocab_size is {limits.vocab_size}"
        )
    if not n <= data.seq_len <= limits.max_seq_len:
        raise ValueError(f"data.seq_len={data.seq_len} must lie in {n}..{limits.max_seq_len}")
    corpus, held_out = load_corpora(data, tokenizer)
    batches = Batches(corpus, data.seq_len, n, config.train.batch_size, data.seed)
    log.info("%.2fM parameters learn", sum(p.numel() for p in model.parameters()) / 1e6)
    with StopSignals() as stop:
        train(
            model,
            batches,
            MultiTokenLoss(n),
            config.train,
            hooks=[console],
            evaluate=evaluator(held_out, RunConfig(data=data, train=config.train), n),
            stop=stop,
        )
        print(f"written: {save_heads(model, config.out)}")


if __name__ == "__main__":
    launch("attach", AttachConfig, attach)
