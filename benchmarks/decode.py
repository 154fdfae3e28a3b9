"""Every way to decode, side by side: same weights, same prompts, one process, in turns.

    python -m benchmarks.decode model=runs/bytes8
    python -m benchmarks.decode model=runs/bytes8 draft=runs/small precision=bfloat16
    python -m benchmarks.decode model=20m

`model` is a run or checkpoint, whose held-out text gives the prompts, or the name of a shape: then
weights and prompts are random, and times mean something, acceptance nothing. Texts are greedy, all
to their full length. Ours stand beside the plainest cached loop (`benchmarks.bare`) and, where it
is installed, transformers' `generate` with its own defaults (`benchmarks.peers`), which takes
drafts at batch 1 only. `draft` is a checkpoint of a smaller model with the same vocabulary.

Every contender decodes every group of prompts (one, or `queue` per row) in every round, in an
order that moves on each time and turns round in every other round. A contender's time is the sum
over groups of its median over rounds, prompts included; `speedup` is over our plain decoding, with
quartiles of the ratios of times within a turn. Acceptance length is new tokens per pass
(transformers' drafted passes include the prompt's); `acceptance` is of the passes that offered a
guess at that depth. What stands `on text` is teacher-forced over held-out rows: how many guesses
head 1 would choose itself. `verify_cost` is of bare forwards as wide as the contender's pass, and
`efficiency` = speedup x verify_cost / acceptance length: 1 where nothing is lost beside the passes.

A text that leaves the reference, our plain one at the first batch size, does so at a near-tie where
the two best logits at the first difference, read anew, are at most NEAR apart. `sampled_apart`
counts texts that batches of ours sample otherwise than plain decoding does one by one. The last
line is one JSON object; heads stand there at full depth and at the first batch size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mtp
from benchmarks.bare import verify_cost
from benchmarks.contenders import (
    BARE,
    NODES,
    THEIRS,
    Prompts,
    contenders,
    figures,
    heads,
    ours,
    peers,
)
from benchmarks.pictures import decode_panels, drawn
from benchmarks.record import launch, record
from benchmarks.shapes import shape
from benchmarks.texts import Judge, OnText, on_text, rows_of
from benchmarks.timing import copy_bandwidth, fastest_threads, take_turns
from benchmarks.ways import PLAIN
from mtp.decode.drafters import OwnHeads
from mtp.documents import iter_documents
from mtp.model import Transformer
from mtp.run import data_of, find_device
from mtp.train import PRECISIONS

NEAR = {"float32": 1e-3, "bfloat16": 0.25}  # logits that rounding may put in another order
QUIET = 0.5  # load at the start
STEADY = 0.1  # of its time, how far a contender's rounds may lie apart


@dataclass
class DecodeConfig:
    """batch: sizes, the reference first. prompts: decoded at each batch size, or one group.
    queue: texts per row of a batch; rows end at different steps, and ours take the next one then.
    texts: held-out rows of prompt_tokens + new_tokens for the teacher-forced figures. pairs: of
    bare forwards behind a `verify_cost`. name: of the files written.
    """

    model: str = "runs/bytes8"
    draft: str = ""
    batch: str = "1,8"
    precision: str = "float32"
    prompts: int = 16
    queue: int = 4
    prompt_tokens: int = 128
    new_tokens: int = 256
    rounds: int = 3
    texts: int = 64
    pairs: int = 30
    device: str = "auto"
    name: str = "decode"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: allowed are {', '.join(PRECISIONS)}")
        if not all(size.isdecimal() and int(size) for size in self.batch.split(",")):
            raise ValueError(f"batch={self.batch!r}: allowed are numbers from 1 on, as in 1,8")

    @property
    def sizes(self) -> list[int]:
        return [int(size) for size in self.batch.split(",")]

    @property
    def needed(self) -> int:
        """How many prompts."""
        return max(self.prompts, *(self.queue * rows for rows in self.sizes))

    def groups(self, prompts: Prompts, rows: int) -> list[Prompts]:
        size = self.queue * rows if rows > 1 else 1
        whole = max(self.prompts, size) // size * size
        return [prompts[i : i + size] for i in range(0, whole, size)]


# Figures.


def ideal_cost(model: Transformer, drafter: OwnHeads, config: DecodeConfig, rows: int) -> float:
    """Of the pass of own heads at a fixed depth, in plain steps and without a decoder."""
    cached = config.prompt_tokens + config.new_tokens // 2
    width, used = 1 + drafter.nodes, 1 + drafter.depth
    return verify_cost(model, cached, config.pairs, rows=rows, width=width, heads=used)


def on_held_out(drafter: OwnHeads, text: OnText) -> dict[str, Any]:
    shares = (text.tree if drafter.tree else text.chain)[: drafter.depth]
    return {"acceptance_length_text": 1 + sum(shares), "acceptance_text": shares}


# All of it.

Figures = dict[int, dict[str, dict[str, Any]]]  # batch size -> contender -> its figures


def compare(
    model: Transformer,
    prompts: Prompts,
    config: DecodeConfig,
    draft: Transformer | None,
    text: OnText | None,
) -> Figures:
    theirs = peers(model, draft)
    model, draft = model.packed(), draft and draft.packed()
    judge, found = Judge(model, prompts, NEAR[config.precision]), {}
    for rows in config.sizes:
        mine = ours(model, draft)  # anew: what adapts does so to this batch size
        groups, some = config.groups(prompts, rows), contenders(model, mine, theirs, rows)
        brief = partial(take_turns, some, groups[:1], min(32, config.new_tokens), 1)
        brief()  # warms up
        if model.embedding.weight.device.type == "cpu":
            torch.set_num_threads(fastest_threads(brief))
        turns = take_turns(some, groups, config.new_tokens, config.rounds)
        found[rows] = {name: figures(turns, name, rows) for name in some}
        for name, f in found[rows].items():
            f |= {"ours": name in mine, "threads": torch.get_num_threads()}
            f |= judge([t for d in turns.done[name] for t in d.texts])
        for name, texts in sampled_apart(model, mine, rows, groups[0], config.new_tokens).items():
            found[rows][name]["sampled_apart"] = texts
        for name, drafter in at_fixed_depth(mine).items():
            f, cost = found[rows][name], ideal_cost(model, drafter, config, rows)
            efficiency = f["speedup"] * cost / f["acceptance_length"]
            f |= {"verify_cost": cost, "efficiency": efficiency}
            f |= on_held_out(drafter, text) if text else {}
    return found


def at_fixed_depth(mine: Mapping[str, dict[str, Any]]) -> dict[str, OwnHeads]:
    """Those of our contenders of which one knows what a step reads."""
    drafters = {name: w["drafter"] for name, w in mine.items() if w.keys() == {"drafter"}}
    return {name: d for name, d in drafters.items() if isinstance(d, OwnHeads)}


def disturbances(load: float, found: Figures) -> list[str]:
    """What speaks against these times."""
    said = [f"the load was {load:.2f} at the start"] if load > QUIET else []
    return said + [
        f"{name} at batch {rows}: its rounds lie {f['rounds_apart']:.0%} apart"
        for rows, of_all in found.items()
        for name, f in of_all.items()
        if f["rounds_apart"] > STEADY
    ]


def sampled_apart(
    model: Transformer, mine: Mapping[str, dict[str, Any]], rows: int, prompts: Prompts, new: int
) -> dict[str, int]:
    """Of each of ours: how many texts, sampled at temperature 1 in batches, are not those that
    plain decoding gives one by one.
    """
    requests = [mtp.Request(prompt, new, seed) for seed, prompt in enumerate(prompts)]
    decode = partial(mtp.generate, model, requests, sampling=mtp.Sampling(1.0))
    alone = [c.tokens for c in decode(batch_size=1)]
    batched = {name: decode(batch_size=rows, **words) for name, words in mine.items()}
    return {
        name: sum(c.tokens != text for c, text in zip(done, alone, strict=True))
        for name, done in batched.items()
    }


def bandwidth_limit(model: Transformer, found: Figures) -> dict[str, Any]:
    """A plain step reads the weights of trunk, head 1 and unembedding, once for all rows: its time
    at the bandwidth of a copy, over what it took.
    """
    parts = [*model.trunk, model.heads.heads[0], model.norm]
    weights = [model.output.weights[0], *(w for part in parts for w in part.parameters())]
    read, rate = sum(w.nbytes for w in weights), copy_bandwidth(weights[0].device)
    of_limit = {rows: read / rate / f[PLAIN]["step_seconds"] for rows, f in found.items()}
    return {"bytes_read": read, "bytes_per_second": rate, "of_limit": of_limit}


def summary(found: Figures, deepest: int) -> dict[str, Any]:
    """Heads at full depth; only our own texts are called identical or not."""
    first, *_ = found.values()
    drafted = {rows: f[heads(deepest)] for rows, f in found.items()}
    own = [f for of_all in found.values() for f in of_all.values() if f["ours"]]
    at_first, theirs = first[heads(deepest)], first.get(THEIRS)
    return {
        "identical": not any(
            f[key] for f in own for key in ("near_ties", "other_texts", "sampled_apart")
        ),
        "near_ties": sum(f["near_ties"] for f in own),
        "other_texts": sum(f["other_texts"] for f in own),
        "sampled_apart": sum(f["sampled_apart"] for f in own),
        "acceptance_length_text": at_first.get("acceptance_length_text"),
        "acceptance_length": at_first["acceptance_length"],
        "heads_speedup": at_first["speedup"],
        "verify_cost": at_first["verify_cost"],
        "efficiency": at_first["efficiency"],
        "efficiency_b8": drafted[8]["efficiency"] if 8 in drafted else None,
        "ours_ar_over_transformers_ar": theirs and 1 / theirs["speedup"],
        "ours_ar_over_bare_loop": 1 / first[BARE]["speedup"],
        "speedup_by_batch": {rows: f["speedup"] for rows, f in drafted.items()},
    }


def table(of_all: Mapping[str, dict[str, Any]]) -> str:
    lines = [
        f"{'':>27} tokens/s speedup    (quartiles)  length  on text   cost  efficiency"
        f"  same text  near-ties  accepted at each depth"
    ]
    for name, f in of_all.items():
        low, high = f["speedup_iqr"]
        texts = f["same_texts"] + f["near_ties"] + f["other_texts"]
        on_text, cost, efficiency = (
            f"{f[key]:.2f}" if key in f else "-"
            for key in ("acceptance_length_text", "verify_cost", "efficiency")
        )
        lines.append(
            f"{name:>27} {f['tokens_per_second']:8,.0f} {f['speedup']:7.2f}"
            f" ({low:6.2f},{high:6.2f}) {f['acceptance_length']:7.2f} {on_text:>8} {cost:>6}"
            f" {efficiency:>11} {f['same_texts']:>7}/{texts:<3}{f['near_ties']:>8}   "
            + " ".join(f"{share:.2f}" for share in f["acceptance"])
        )
    return "\n".join(lines)


def prepare(
    config: DecodeConfig, device: torch.device
) -> tuple[Transformer, list[list[int]], OnText | None]:
    """The model, its prompts and, if it is trained, what its heads foresee of held-out text."""
    dtype = PRECISIONS[config.precision]
    if not Path(config.model).exists():
        generator = torch.Generator(device).manual_seed(0)
        with device:
            model = Transformer(shape(config.model), generator).to(dtype)
        vocabulary, size = model.config.vocab_size, (config.needed, config.prompt_tokens)
        return model, torch.randint(vocabulary, size, generator=torch.Generator()).tolist(), None
    model, tokenizer = mtp.load(config.model, device, dtype), mtp.load_tokenizer(config.model)
    data = data_of(config.model)
    count, length = max(config.texts, config.needed), config.prompt_tokens + config.new_tokens
    rows = rows_of(iter_documents(data, held_out=True), tokenizer, count, length)
    text = on_text(model, rows, NODES)
    chosen = [rows[i * count // config.needed] for i in range(config.needed)]
    return model, [row[: config.prompt_tokens] for row in chosen], text


def run(config: DecodeConfig) -> dict[str, Any]:
    load, device = os.getloadavg()[0], find_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    model, prompts, text = prepare(config, device)
    if model.config.head != "transformer" or not model.extra_heads:
        raise ValueError(f"model={config.model!r}: the bare loop reads two or more block heads")
    draft = mtp.load(config.draft, device, PRECISIONS[config.precision]) if config.draft else None
    if draft is not None and draft.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"draft={config.draft!r} has another vocabulary than the model")
    found = compare(model, prompts, config, draft, text)
    for rows, of_all in found.items():
        print(f"\n{config.model}, {config.precision}, batch {rows}\n{table(of_all)}")
    values = summary(found, model.extra_heads)
    values |= {"bandwidth": bandwidth_limit(model, found), "disturbed": disturbances(load, found)}
    path = record(config.name, values | {"load_before": round(load, 2), "batches": found}, config)
    panels = {f"batch {rows}": of_all for rows, of_all in found.items()}
    drawn(decode_panels, panels, path.with_suffix(".png"))
    return values


if __name__ == "__main__":
    launch(DecodeConfig, run)
