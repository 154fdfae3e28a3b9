"""Train heads for a model that is there already, and stays as it is:

python scripts/attach.py trunk=FOLDER run_dir=runs/heads data=stdlib train.steps=500

`trunk` is a Hugging Face folder, its name on the hub, or a run or checkpoint of ours. Beside it
scripts/generate.py opens `run_dir/heads`; draft_vocabulary=8192 has heads guess frequent tokens
alone, which it reads from `run_dir/vocabulary.json`. Of a run that a signal ended, resume=true
makes the rest.
What a frozen trunk computes can be kept on disk, for all epochs and further runs: states=FOLDER.
learning=lora or all trains the trunk, too, and writes it to `run_dir/trunk`. heads=FOLDER starts
from saved heads, also where the trunk was trained further since. `--cfg job` prints every key.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from mtp.data import Batches, Corpus, frequent_tokens, load_corpora, write_vocabulary
from mtp.documents import DataConfig
from mtp.estimate import disk_bytes
from mtp.hooks import JsonlLog, console
from mtp.interop.attach import KINDS, AttachedHeads, attach_heads, load_heads, save_heads
from mtp.interop.draft_loss import DraftLoss
from mtp.interop.folder import FoundModel, find_model
from mtp.interop.states import StateBatches, write_states
from mtp.interop.tuning import LEARNING, save_trunk, tune
from mtp.run import METRICS, RECORD, evaluator, find_device, train_in
from mtp.run_dir import open_run_dir, resume_word
from mtp.train import PRECISIONS, TrainConfig
from scripts.cli import launch

log = logging.getLogger("mtp")
VOCABULARY = "vocabulary.json"
SHAPING = ("trunk", "n", "kind", "learning", "lora_rank", "trunk_precision")
UNUSED = ("compile", "recompute", "sharding")  # what is done to blocks of our own models


@dataclass
class AttachConfig:
    """data.tokenizer is the trunk's own, and stays unsaid. draft_vocabulary: score heads on so many
    of the corpus's most frequent tokens only. states: a folder for what a frozen trunk computes,
    of at most states_gib; one that is there is read.
    """

    trunk: str = MISSING  # a folder, or a name on the hub
    run_dir: str = "runs/attach"
    resume: str = "false"  # true, false or auto
    n: int = 4  # tokens predicted at once, the model's own included
    kind: str = "residual"  # transformer, causal
    heads: str | None = None  # go on from these, whatever n and kind say
    learning: str = "frozen"  # the trunk: frozen, lora, all
    lora_rank: int = 16
    draft_vocabulary: int | None = None
    states: str | None = None
    states_gib: float = 8.0
    trunk_precision: str = "float32"  # of its weights; heads learn in float32
    device: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        self.resume = resume_word(self.resume)
        choices: dict[str, Any] = {
            "kind": KINDS,
            "learning": LEARNING,
            "trunk_precision": PRECISIONS,
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} is unknown: allowed are {', '.join(allowed)}"
                )
        for key in UNUSED:
            if (value := getattr(self.train, key)) != getattr(TrainConfig, key):
                raise ValueError(f"train.{key}={value!r}: not for heads that are attached")
        if self.states and self.learning != "frozen":
            raise ValueError(f"states={self.states}: a trunk with learning={self.learning} changes")
        if self.data.tokenizer != DataConfig.tokenizer:
            raise ValueError(f"data.tokenizer={self.data.tokenizer}: the trunk brings its own")
        if self.data.streaming:
            raise ValueError("data.streaming=true: heads are trained on a corpus")


def open_model(config: AttachConfig, found: FoundModel) -> tuple[AttachedHeads, Callable[[], None]]:
    """Heads on their trunk, and what ends the trunk's own learning."""
    trunk = found.open(find_device(config.device), PRECISIONS[config.trunk_precision])
    if config.heads is not None:
        model = load_heads(trunk, config.heads, realign=True)
    else:
        generator = torch.Generator().manual_seed(config.train.seed)
        model = attach_heads(trunk, config.n, config.kind, generator)
    return model.float(), tune(model, config.learning, config.lora_rank, config.train.seed)


def attach(config: AttachConfig) -> None:
    found, run_dir = find_model(config.trunk, special=False), Path(config.run_dir)
    tokenizer = found.tokenizer
    model, settle = open_model(config, found)
    _check_sizes(config, model, tokenizer.vocab_size)
    parameters = sum(p.numel() for p in model.parameters())
    log.info("%.2fM parameters learn", parameters / 1e6)
    source = open_run_dir(run_dir, config.resume, disk_bytes(parameters, config.train))
    if source is not None:
        _check_same(config, run_dir / RECORD)
    corpus, held_out = load_corpora(config.data, tokenizer)
    count = config.draft_vocabulary
    ids = None if count is None else frequent_tokens(corpus, count)
    progress = train_in(
        run_dir,
        source,
        model,
        _batches(config, model, corpus),
        DraftLoss(model.n_future_tokens, ids, next_token=config.learning != "frozen"),
        config.train,
        hooks=lambda at_start: [JsonlLog(run_dir / METRICS, at_start), console],
        evaluate=evaluator(held_out, config.data, config.train, model.n_future_tokens),
        record=asdict(config),
        tokenizer=tokenizer,
        notes={"data": corpus.fingerprint, "tokenizer": tokenizer.fingerprint},
    )
    if progress.stopped:
        return
    settle()
    for part in ("heads", "trunk"):  # of a shorter run that went on
        shutil.rmtree(run_dir / part, ignore_errors=True)
    if config.learning != "frozen":
        like = found.folder if found.theirs else None
        print(f"written: {save_trunk(model, run_dir / 'trunk', tokenizer, like)}")
    if ids is not None:
        write_vocabulary(run_dir / VOCABULARY, ids)
        print(f"written: {run_dir / VOCABULARY}, all that the heads guess")
    print(f"written: {save_heads(model, run_dir / 'heads')}")


def _check_sizes(config: AttachConfig, model: AttachedHeads, tokens: int) -> None:
    n, limits, seq_len = model.n_future_tokens, model.config, config.data.seq_len
    if tokens > limits.vocab_size:
        raise ValueError(
            f"trunk={config.trunk}: its tokenizer has {tokens} tokens, the model's "
            f"vocab_size is {limits.vocab_size}"
        )
    if not n <= seq_len <= limits.max_seq_len:
        raise ValueError(f"data.seq_len={seq_len} must lie in {n}..{limits.max_seq_len}")


def _check_same(config: AttachConfig, record: Path) -> None:
    """Some keys, such as kind, change what weights mean but not their shapes."""
    saved = json.loads(record.read_text(encoding="utf-8"))
    new = asdict(config)
    changed = [f"{k}={new[k]!r} (saved: {saved[k]!r})" for k in SHAPING if new[k] != saved[k]]
    if changed:
        raise ValueError(f"resume=true, but the run's model is another: {', '.join(changed)}")


def _batches(config: AttachConfig, model: AttachedHeads, corpus: Corpus) -> Batches:
    data, rows = config.data, config.train.batch_size
    if config.states is None:
        return Batches(corpus, data.seq_len, model.n_future_tokens, rows, data.seed)
    if not Path(config.states).exists():
        budget = int(config.states_gib * 2**30)
        write_states(config.states, model, corpus, data.seq_len, budget, batch_size=rows)
    return StateBatches(config.states, model, corpus, data.seq_len, rows, data.seed)


if __name__ == "__main__":
    launch("attach", AttachConfig, attach)
