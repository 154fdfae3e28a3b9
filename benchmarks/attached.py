"""What do heads bring that are attached to a finished model and trained for minutes?

    python -m benchmarks.attached trunk=FOLDER other=FILE

`trunk` is a Llama in a Hugging Face folder. For `own_minutes` it goes on with beginnings from the
standard library's source, greedily; that text is what heads learn from. Its hidden states are
computed once, and heads of each kind then learn from them for `minutes` each, to guess the
`vocabulary` most frequent tokens. Nothing of the trunk changes.

Plain decoding and each kind of heads, as many guesses per step as pay, take turns on prompts from
held-out packages and from `other`, a text of another kind: batch 1, greedy, in `precision`.
`speedup` is over plain decoding, with quartiles over groups of prompts and rounds; what adapts
starts anew with each group. A text may leave the plain one only where the trunk's two best logits,
read anew, are at most `movement` apart: as far as the number of tokens in a pass, without heads or
drafts, moves them against each other somewhere in the plain texts. In float32 every text has to be
the plain one (`same_in_float32`). `acceptance_text` is teacher-forced: the guesses in a line that
the trunk would choose itself, and one, on held-out rows as they were written and on the trunk's own
greedy texts. Sequential heads read the row's tokens there, not their own guesses.

The last line is one JSON object, of the kind that foresees most of the trunk's own text.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mtp
from benchmarks.contenders import Decoded, Prompts, decode_ours, figures
from benchmarks.pictures import decode_panels, drawn
from benchmarks.record import launch, record
from benchmarks.texts import Judge, coverage, movement, on_text, rows_of
from benchmarks.timing import take_turns
from benchmarks.ways import PLAIN
from mtp.data import Corpus, frequent_tokens, load_corpus, write_vocabulary
from mtp.decode.depth import AdaptiveDepth
from mtp.documents import DataConfig, iter_documents
from mtp.hooks import console
from mtp.interop.attach import AttachedHeads, attach_heads, save_heads
from mtp.interop.draft_loss import DraftLoss
from mtp.interop.llama import load_llama
from mtp.interop.states import StateBatches, write_states
from mtp.optim import OptimConfig
from mtp.records import Document, Ids
from mtp.tokenizer import HuggingFaceTokenizer, Tokenizer
from mtp.train import PRECISIONS, TrainConfig, train

TRAINED_ON, OTHER = "the kind trained on", "another kind"
ALL = 2**40  # bytes: of states, no limit


@dataclass
class AttachedConfig:
    """minutes: of training, for each kind. out: a new folder for states, heads and the ids that
    they guess. own_tokens: that the trunk writes after each beginning of prompt_tokens. groups: of
    prompts. texts: held-out rows for the teacher-forced figures.
    """

    trunk: str
    other: str
    out: str = "runs/attached"
    kinds: str = "residual,transformer,causal,sequential"
    n: int = 3
    own_minutes: float = 12.0
    own_tokens: int = 192
    minutes: float = 8.0
    vocabulary: int = 4096
    precision: str = "bfloat16"
    optimizer: str = "adamw"
    lr: float = 2e-3
    holdout: list[str] = field(
        default_factory=lambda: ["email", "json", "sqlite3", "tomllib", "wsgiref"]
    )
    prompts: int = 12
    groups: int = 3
    prompt_tokens: int = 64
    new_tokens: int = 128
    rounds: int = 3
    texts: int = 48
    name: str = "attached"

    @property
    def width(self) -> int:
        """Of a row: one of the trunk's texts with its end token."""
        return self.prompt_tokens + self.own_tokens + 1


# The trunk's own text.


def own_text(trunk: Any, prompts: Prompts, config: AttachedConfig) -> Iterator[list[int]]:
    """Beginnings and how the trunk goes on, until the clock ends it."""
    model, until = trunk.packed(), time.monotonic() + 60 * config.own_minutes
    for i in range(0, len(prompts), 64):
        requests = [mtp.Request(prompt, config.own_tokens) for prompt in prompts[i : i + 64]]
        completions = mtp.generate(model, requests, batch_size=32)
        for request, done in zip(requests, completions, strict=True):
            yield [*request.prompt, *done.tokens]
        left = max(0.0, until - time.monotonic())
        print(f"own text of {i + len(requests)} beginnings, {left:.0f} s left", file=sys.stderr)
        if not left:
            return


def beginnings(corpus: Corpus, length: int) -> list[list[int]]:
    """Evenly from all of it, none overlapping another, in an order that has all kinds first."""
    count = len(corpus.tokens) // (8 * length)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [corpus.tokens[8 * length * i + np.arange(length)].tolist() for i in order]


def as_corpus(rows: Prompts, begin: int, tokenizer: Tokenizer) -> Corpus:
    """The first `begin` tokens of each are no targets."""

    def document(row: Sequence[int]) -> Document:
        parts = (list(row[:begin]), list(row[begin:]))
        said = tuple((tokenizer.decode(part), i > 0) for i, part in enumerate(parts))
        return Document(said, ids=Ids(parts, tokenizer.fingerprint))

    return Corpus.from_documents(map(document, rows), tokenizer)


# Training.


def learn(
    kind: str, trunk: Any, corpus: Corpus, ids: Tensor, config: AttachedConfig
) -> tuple[AttachedHeads, dict[str, Any]]:
    model = attach_heads(trunk, config.n, kind).float()
    optim = OptimConfig(config.optimizer, config.lr, weight_decay=0.0, warmup_steps=20)
    settings = TrainConfig(
        steps=10**6,  # the clock ends it
        max_seconds=60 * config.minutes,
        precision=config.precision,
        log_every=50,
        optim=optim,
    )
    states = Path(config.out) / "states"
    batches = StateBatches(states, model, corpus, config.width, settings.batch_size)
    progress = train(model, batches, DraftLoss(config.n, ids), settings, hooks=[console])
    model.to(trunk.embedding.weight.dtype)
    save_heads(model, Path(config.out) / kind)
    return model, {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": progress.seconds,
        "tokens": progress.tokens,
        "epochs": progress.step * settings.batch_size / batches.n_rows,
    }


# Decoding.


def adaptive(model: AttachedHeads, ids: Tensor, prompts: Prompts, new: int) -> Decoded:
    words = {"drafter": mtp.OwnHeads(vocabulary=ids), "depth": AdaptiveDepth()}
    return decode_ours(model, words, 1, prompts, new)  # type: ignore[arg-type]


def prompts_of(rows: Prompts, config: AttachedConfig) -> Prompts:
    some = (rows[i * len(rows) // config.prompts] for i in range(config.prompts))
    return [row[: config.prompt_tokens] for row in some]


def compare(
    trunk: Any, heads: dict[str, AttachedHeads], ids: Tensor, rows: Prompts, config: AttachedConfig
) -> dict[str, dict[str, Any]]:
    """Each contender's figures, and of heads what they foresee of these rows and of the texts that
    the trunk makes of their beginnings.
    """
    size, prompts = config.prompts // config.groups, prompts_of(rows, config)
    groups = [prompts[i * size : (i + 1) * size] for i in range(config.groups)]
    contenders = {
        PLAIN: partial(decode_ours, trunk.packed(), {}, 1),
        **{kind: partial(adaptive, model.packed(), ids) for kind, model in heads.items()},
    }
    take_turns(contenders, [prompts[:1]], 16, 1)  # warms up
    turns = take_turns(contenders, groups, config.new_tokens, config.rounds)
    texts = {name: [t for d in turns.done[name] for t in d.texts] for name in contenders}
    near = movement(trunk, prompts, texts[PLAIN][: len(prompts)], config.n)
    judge = Judge(trunk, prompts, near)
    found = {
        name: figures(turns, name, 1) | judge(texts[name]) | {"ours": name != PLAIN}
        for name in contenders
    }
    found[PLAIN]["movement"] = near
    own = [[*a, *b] for a, b in zip(prompts, texts[PLAIN], strict=False)]
    for kind, model in heads.items():
        begins = repeat(config.prompt_tokens)
        both = on_text(model, rows, 1, ids), on_text(model, own, 1, ids, begins)
        found[kind]["acceptance_text"], found[kind]["acceptance_own_text"] = (
            1 + sum(text.chain) for text in both
        )
    return found


def same_in_float32(
    trunk: Any, heads: dict[str, AttachedHeads], ids: Tensor, prompts: Prompts, new: int
) -> dict[str, int]:
    """How many texts of each kind are the plain ones, token for token. Leaves all in float32."""
    plain = decode_ours(trunk.float().packed(), {}, 1, prompts, new).texts
    found = {}
    for kind, model in heads.items():
        texts = adaptive(model.float().packed(), ids, prompts, new).texts  # type: ignore[arg-type]
        found[kind] = sum(one == other for one, other in zip(plain, texts, strict=True))
    return found


# All of it.


def held_out_rows(config: AttachedConfig, data: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    other = DataConfig(source="text", path=config.other, val_fraction=0.0)
    length = config.prompt_tokens + config.new_tokens
    return {
        TRAINED_ON: rows_of(iter_documents(data, True), tokenizer, config.texts, length),
        OTHER: rows_of(iter_documents(other, False), tokenizer, config.texts, length),
    }


def prepare(
    trunk: Any, tokenizer: Tokenizer, data: DataConfig, config: AttachedConfig
) -> tuple[Corpus, dict[str, Any]]:
    """The trunk's own text, with its states on disk; what both took."""
    started, length = time.perf_counter(), config.prompt_tokens
    prompts = beginnings(load_corpus(data, tokenizer, False), length)
    corpus = as_corpus(list(own_text(trunk, prompts, config)), length, tokenizer)
    written = time.perf_counter()
    heads = attach_heads(trunk, config.n)
    write_states(Path(config.out) / "states", heads, corpus, config.width, ALL)
    return corpus, {
        "own_text_tokens": len(corpus.tokens),
        "own_text_seconds": written - started,
        "states_seconds": time.perf_counter() - written,
    }


def summary(values: dict[str, Any]) -> dict[str, Any]:
    on, other = (values["decoded"][text] for text in (TRAINED_ON, OTHER))
    kind = max(values["kinds"], key=lambda kind: on[kind]["acceptance_own_text"])
    texts = [found[kind] for found in (on, other)]
    return {
        "kind": kind,
        "speedup": on[kind]["speedup"],
        "speedup_another": other[kind]["speedup"],
        "identical_or_near_ties": not any(found["other_texts"] for found in texts),
        "near_ties": sum(found["near_ties"] for found in texts),
        "movement": max(found[PLAIN]["movement"] for found in (on, other)),
        "same_in_float32": values["same_in_float32"][kind],
        "prompts": values["prompts"],
        "training_minutes": values["training_seconds"] / 60,
    }


def run(config: AttachedConfig) -> dict[str, Any]:
    if Path(config.out).exists():
        raise ValueError(f"out={config.out} exists already: choose another folder")
    load, began = os.getloadavg()[0], time.perf_counter()
    torch.set_num_threads(1)
    trunk = load_llama(config.trunk).to(PRECISIONS[config.precision])
    tokenizer = HuggingFaceTokenizer(config.trunk)
    data = DataConfig(source="stdlib", holdout=config.holdout)
    rows = held_out_rows(config, data, tokenizer)
    corpus, values = prepare(trunk, tokenizer, data, config)
    ids = frequent_tokens(corpus, config.vocabulary).sort().values
    write_vocabulary(Path(config.out) / "vocabulary.json", ids)
    heads: dict[str, AttachedHeads] = {}
    values["kinds"] = {}
    for kind in config.kinds.split(","):
        heads[kind], values["kinds"][kind] = learn(kind, trunk, corpus, ids, config)
    values["training_seconds"] = time.perf_counter() - began
    values["coverage"] = {text: coverage(some, ids, 1)[0] for text, some in rows.items()}
    values["decoded"] = {t: compare(trunk, heads, ids, some, config) for t, some in rows.items()}
    prompts = [prompt for some in rows.values() for prompt in prompts_of(some, config)]
    values["same_in_float32"] = same_in_float32(trunk, heads, ids, prompts, config.new_tokens)
    values["prompts"] = len(prompts)
    values = summary(values) | values | {"load_before": round(load, 2)}
    path = record(config.name, values, config)
    panels = {f"text of {t}": found for t, found in values["decoded"].items()}
    drawn(decode_panels, panels, path.with_suffix(".png"))
    return summary(values)


if __name__ == "__main__":
    launch(AttachedConfig, run)
