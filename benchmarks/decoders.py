"""Every decoder of the library on one model: how fast, how exact, at what cost.

    python -m benchmarks.decoders model=runs/sql task=sql
    python -m benchmarks.decoders model=runs/sql draft=SMALLER consistency=RUN task=sql quick=true
    python -m benchmarks.decoders model=FOLDER heads=runs/heads_a,runs/heads_b text=FILE

`draft` is a smaller model, `consistency` a consistency model of the same base, `heads` folders of
`scripts/attach.py`: each brings its rows. Prompts are the run's held-out text, or `text`, or
held-out problems of a task (`benchmarks.tasks`), whose answers are scored. All decoders draw from
one law (`temperature`, then `top_k`, then `top_p`) and take turns in one process, at batch 1 and
then at `batch`. Each that drafts makes as many guesses as were fastest, at that batch size, on
texts before.

Exactness: `same text`, as plain decoding's under the same noise; `same law`, by block verification;
`lossy`, by joint decoding at `threshold` (MTAD, the best beam; MMTAD, all of them as a tree); of
the consistency model, `same text as its own plain`. `identical` counts texts that are. Speed is
over plain decoding of the model: at batch 1 with intervals over prompts that hold for all decoders
together, at `batch` with quartiles of ratios within a turn. Acceptance length is 1 + accepted /
steps; `on text` it is teacher-forced, the guesses in a line that the model would choose itself.
Quality is the task's score, else perplexity under the model. Memory is counted: weights, and caches
of the longest texts. Energy is the GPU's own counter, at batch 1; where there is none, operations
stand for it. Beside the record it writes a picture and a table (.png, .md). The last line is JSON.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

import mtp
from benchmarks.contenders import Decoded, decode_requests
from benchmarks.contenders import figures as batch_figures
from benchmarks.decoder_ways import (
    LOSSY,
    SAME_TEXT,
    beams,
    exact_ways,
    joint_way,
    left_out,
    memory_bytes,
)
from benchmarks.decoders_report import decoder_bars, decoders_markdown
from benchmarks.energy import idle_watts
from benchmarks.figures import LEVEL, beside_plain, figures, measured, written
from benchmarks.joint_ways import JointConfig, open_setting, prompts_of
from benchmarks.pictures import drawn
from benchmarks.record import launch, quicken, read, record
from benchmarks.texts import draft_on_text, on_text
from benchmarks.timing import Turns, progress, take_turns
from benchmarks.ways import (
    PLAIN,
    Setting,
    Spent,
    Way,
    fastest,
    opened,
    opened_beside,
    race,
    set_up,
)
from mtp.data import read_vocabulary
from mtp.decode.drafters import DraftModel, OwnHeads
from mtp.evaluate.scores import interval
from mtp.files import write_text
from mtp.interop.folder import find_model
from mtp.run import find_device
from mtp.train import PRECISIONS

OWN_TEXT = "same text as its own plain"
QUEUE = 2  # texts per row of a batch
QUICK: dict[str, Any] = {"prompts": 8, "new_tokens": 48, "rounds": 2}


@dataclass
class DecodersConfig:
    """heads: folders, with commas between. vocabulary: a file of `scripts/draft_vocabulary.py`, the
    only tokens that heads guess. batch: the size beside 1. threshold: of joint ways. The
    other words are those of `JointConfig`. quick: the direction in minutes, in a file of its own.
    """

    model: str = "runs/sql"
    draft: str = ""
    consistency: str = ""
    heads: str = ""
    vocabulary: str = ""
    task: str = "text"
    text: str = ""
    conditions: int = 4
    temperature: float = 1.0
    top_k: int = 10
    top_p: float = 0.9
    threshold: float = 0.5
    precision: str = "float32"
    prompts: int = 48
    prompt_tokens: int = 64
    new_tokens: int = 128
    rounds: int = 3
    batch: int = 8
    device: str = "auto"
    quick: bool = False
    name: str = "decoders"

    def __post_init__(self) -> None:
        quicken(self, QUICK)
        if self.batch < 2:
            raise ValueError(f"batch={self.batch}: must be at least 2, batch 1 is measured anyway")
        self.folders, self.asked(), self.sampling  # refuse what cannot be

    @property
    def sampling(self) -> mtp.Sampling:
        return mtp.Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def folders(self) -> dict[str, str]:
        """By what to call them: attach.py writes a folder `heads` into that of its run."""
        paths = [Path(part) for part in self.heads.split(",") if part]
        named = {(p.parent if p.name == "heads" else p).name: str(p) for p in paths}
        if len(named) < len(paths):
            raise ValueError(f"heads={self.heads!r}: folders of one name cannot be told apart")
        return named

    def asked(self) -> JointConfig:
        """What `benchmarks.joint` would be asked for prompts and models."""
        kept = {"temperature", "heads", "quick", "name"}
        shared = set(vars(self)) & set(vars(JointConfig())) - kept
        return JointConfig(**{k: getattr(self, k) for k in shared}, thresholds=[self.threshold])


# What decodes.


class Entry(NamedTuple):
    """plain: the name of the decoding whose text this one is to write, if it keeps any."""

    setting: Setting
    way: Way
    plain: str = PLAIN


def prepare(config: DecodersConfig) -> tuple[dict[str, Entry], dict[str, str]]:
    """Every row, plain decoding first, and those that there are not, each with the reason."""
    asked, at = config.asked(), (find_device(config.device), PRECISIONS[config.precision])
    ids = read_vocabulary(config.vocabulary)
    setting = replace(open_setting(asked, at[0], probed=config.batch), vocabulary=ids)
    found = entries(setting, config.sampling, config.threshold)
    missing = left_out(setting, config.sampling)
    for run_name, folder in config.folders.items():
        target, _ = opened(config.model, *at)
        more = set_up(target, None, folder, setting.requests, probed=config.batch)
        attached = replace(more, heads=f"heads of {run_name}", vocabulary=ids)
        of_heads = entries(attached, config.sampling, config.threshold)
        found |= {name: e for name, e in of_heads.items() if attached.heads in name}
    if config.consistency:
        files = find_model(config.model) if Path(config.model).exists() else None
        other = opened_beside("consistency", config.consistency, setting.target, files, *at)
        more = set_up(other, None, None, setting.requests, probed=config.batch)
        found |= own(more, config.sampling)
    else:
        missing["consistency model"] = "none was given: consistency=RUN"
    if not config.folders:
        missing["attached heads"] = "none were given: heads=FOLDER of scripts/attach.py"
    if any(entry.way.family == LOSSY for entry in found.values()):
        missing.pop("joint", None)  # the model's heads cannot, attached ones can
    return found, missing


def entries(setting: Setting, sampling: mtp.Sampling, threshold: float) -> dict[str, Entry]:
    """All that fits one model."""
    found = exact_ways(setting, sampling)
    for name, beam in beams(setting, sampling, whole=True).items():
        way = joint_way(sampling, beam, beam.depths[0], threshold)
        found[name] = replace(way, depths=beam.depths)
    return {name: Entry(setting, way) for name, way in found.items()}


def own(setting: Setting, sampling: mtp.Sampling) -> dict[str, Entry]:
    """Of a consistency model."""
    ways, plain = exact_ways(setting, sampling), f"consistency model, {PLAIN}"
    return {
        f"consistency model, {name}": Entry(setting, replace(ways[name], family=OWN_TEXT), plain)
        for name in (PLAIN, "Jacobi")
    }


# Batches.


def race_in_batches(
    found: Mapping[str, Entry], config: DecodersConfig
) -> tuple[Turns[Decoded], dict[str, int | None]]:
    """As `race` does one by one."""
    rows, new = config.batch, config.new_tokens
    setting = next(iter(found.values())).setting
    before, size = [setting.requests[: setting.probed]], QUEUE * rows
    groups = [setting.measured[i : i + size] for i in range(0, len(setting.measured), size)]

    def decoder(entry: Entry, depth: int | None) -> Callable[[Sequence[mtp.Request], int], Decoded]:
        words, target = entry.way.at(depth), entry.setting.target
        return lambda requests, most: decode_requests(
            target, words, rows, [replace(r, max_new_tokens=most) for r in requests]
        )

    depths = {
        name: fastest(entry.way.depths, partial(decoder, entry), before, new)
        for name, entry in found.items()
    }
    contenders = {name: decoder(entry, depths[name]) for name, entry in found.items()}
    take_turns(contenders, before, min(32, new), 1)  # warms up
    return take_turns(contenders, groups, new, config.rounds, progress("turns")), depths


# Teacher-forced.


def held_out(config: DecodersConfig, setting: Setting) -> tuple[list[list[int]], list[int]]:
    """Rows, and the first position of each that counts; none of random weights."""
    most = config.new_tokens
    if setting.tokenizer is None:
        return [], []
    if setting.problems:
        pairs = zip(setting.measured, setting.problems, strict=True)
        texts = [(r.prompt, setting.tokenizer.encode(p.completion)[:most]) for r, p in pairs]
        return [[*prompt, *text] for prompt, text in texts], [len(prompt) for prompt, _ in texts]
    longer = replace(config.asked(), prompt_tokens=config.prompt_tokens + most)
    found = find_model(config.model)
    rows = prompts_of(longer, found, [], setting.target.config.vocab_size, config.prompts)
    return list(rows), [0] * config.prompts


def acceptance_on_text(
    entry: Entry, depth: int | None, rows: list[list[int]], begins: list[int]
) -> float | None:
    """1 + guesses that stand, of a decoder whose guesses are heads' or a draft's own choices."""
    way, target = entry.way, entry.setting.target
    drafter = way.drafter(depth) if way.drafter and depth and way.family != LOSSY else None
    if not rows or depth is None:
        return None
    if isinstance(drafter, OwnHeads):
        text = on_text(target, rows, drafter.tree or 1, drafter.vocabulary, begins)
        return 1 + sum(text.tree if drafter.tree else text.chain[:depth])
    if isinstance(drafter, DraftModel):
        return 1 + sum(draft_on_text(target, drafter.model, rows, depth, begins))
    return None


# Figures.


def alone(
    found: Mapping[str, Entry],
    turns: Turns[Spent],
    depths: Mapping[str, int | None],
    idle: float | None,
) -> dict[str, dict[str, Any]]:
    """Of each decoder at batch 1."""
    values = {}
    by, texts = measured(found[PLAIN].setting, turns)
    for name, (setting, way, plain) in found.items():
        done = turns.done[name]
        accepted, steps = sum(s.accepted for s in done), sum(s.steps for s in done)
        values[name] = {
            **beside_plain(name, way, by["perplexity"], texts, len(found), plain),
            **figures(setting, way, by["perplexity"][name], turns, name, idle),
            "acceptance_length": 1 + accepted / max(1, steps),
            "guesses": depths[name],
            "memory_bytes": memory_bytes(setting, way, depths[name]),
        }
        if "score" in by:
            right = (1 - by["score"][name].loss).tolist()
            values[name]["score"] = interval(right, LEVEL)._asdict()
    return values


def in_batches(
    found: Mapping[str, Entry],
    turns: Turns[Decoded],
    depths: Mapping[str, int | None],
    plain_texts: Mapping[str, Sequence[list[int]]],
    rows: int,
) -> dict[str, dict[str, Any]]:
    """Of each decoder. plain_texts: that each is to write, as batch 1 wrote them."""
    keys = ("speedup", "speedup_iqr", "tokens_per_second", "acceptance_length")
    values = {}
    for name, (setting, way, plain) in found.items():
        texts = [text for done in turns.done[name] for text in done.texts]
        f = batch_figures(turns, name, rows)
        values[name] = {
            **{key: f[key] for key in keys},
            "guesses": depths[name],
            "identical": mean(a == b for a, b in zip(texts, plain_texts[plain], strict=True)),
            "memory_bytes": memory_bytes(setting, way, depths[name], rows),
        }
    return values


def compare(
    found: Mapping[str, Entry], config: DecodersConfig
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Everything that is recorded of each decoder, and what plain decoding wrote."""
    base = found[PLAIN].setting
    rows, begins = held_out(config, base)
    counter = base.counter
    idle = counter and idle_watts(counter)
    pairs = {name: (entry.setting, entry.way) for name, entry in found.items()}
    turns, depths = race(pairs, config.new_tokens, config.rounds)
    values = alone(found, turns, depths, idle)
    batched, deep = race_in_batches(found, config)
    plain_texts = {name: [spent.text for spent in done] for name, done in turns.done.items()}
    in_batch = in_batches(found, batched, deep, plain_texts, config.batch)
    for name, entry in found.items():
        on = acceptance_on_text(entry, depths[name], rows, begins)
        values[name] |= {"acceptance_length_text": on, "batched": in_batch[name]}
    return values, written(base, plain_texts[PLAIN])


# All of it.


def summary(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The fastest of each exactness class, and whether texts that are to be the same are."""
    kinds = dict.fromkeys(f["kind"] for f in values.values())
    fastest_of = {
        kind: max(
            (name for name, f in values.items() if f["kind"] == kind),
            key=lambda name: values[name]["speedup"]["mean"],
        )
        for kind in kinds
    }
    exact = [f for f in values.values() if f["kind"] in (SAME_TEXT, OWN_TEXT)]
    return {
        "fastest": {
            kind: {"name": name, "speedup": values[name]["speedup"]}
            | {"speedup_batched": values[name]["batched"]["speedup"]}
            for kind, name in fastest_of.items()
        },
        "identical": all(f["identical"] == f["batched"]["identical"] == 1 for f in exact),
        "decoders": len(values),
    }


def run(config: DecodersConfig) -> dict[str, Any]:
    load = os.getloadavg()[0]
    if find_device(config.device).type == "cpu":
        torch.set_num_threads(1)
    found, missing = prepare(config)
    values, texts = compare(found, config)
    line = summary(values)
    more = {"load_before": round(load, 2), "level": LEVEL, "left_out": missing, "written": texts}
    path = record(config.name, line | more | {"rows": values}, config)
    kept = read(path)
    text = decoders_markdown(kept)
    print(text)
    write_text(path.with_suffix(".md"), text)
    drawn(decoder_bars, kept, path.with_suffix(".png"))
    return line


if __name__ == "__main__":
    launch(DecodersConfig, run)
