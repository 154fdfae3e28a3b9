"""The ways to decode that `benchmarks.joint` compares, and what they decode with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, product
from typing import Any

import torch

import mtp
from benchmarks.record import quicken
from benchmarks.tasks import TASKS, Problem
from benchmarks.texts import rows_of
from benchmarks.ways import PROBED, Setting, Way, grows_beams, opened, opened_beside, set_up
from mtp.decode.drafters import BeamHeads, BeamModel, DraftModel, OwnHeads
from mtp.decode.sampling import Joint, Sampling
from mtp.documents import DataConfig, iter_documents
from mtp.interop.folder import FoundModel
from mtp.run import data_of
from mtp.train import PRECISIONS

EXACT, BEAM_SEARCH, JOINT = "exact", "beam search", "joint"  # families
QUICK: dict[str, Any] = {
    "temperatures": [0.0, 0.6, 1.0],
    "widths": [1, 4],
    "thresholds": [0.1, 0.5],
    "depths": [4],
    "prompts": 8,
    "new_tokens": 64,
    "rounds": 2,
}


@dataclass
class JointConfig:
    """heads: a folder of some that were attached to the model. temperatures: of exact ways;
    temperature: of joint ways. prompt_tokens: of prompts cut from text. conditions: of sql, the
    most that a question sets. quick: the direction in minutes, in a file of its own.
    """

    model: str = "runs/sql"
    draft: str = ""
    heads: str = ""
    task: str = "text"
    text: str = ""
    conditions: int = 4
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    temperature: float = 1.0
    top_k: int = 10
    top_p: float = 0.9
    widths: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    thresholds: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.9])
    depths: list[int] = field(default_factory=lambda: [2, 4, 8])
    precision: str = "float32"
    prompts: int = 48
    prompt_tokens: int = 64
    new_tokens: int = 128
    rounds: int = 3
    device: str = "auto"
    quick: bool = False
    name: str = "joint"

    def __post_init__(self) -> None:
        quicken(self, QUICK)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: allowed are {', '.join(PRECISIONS)}")
        if self.task not in (allowed := ("text", *TASKS)):
            raise ValueError(f"task={self.task!r}: allowed are {', '.join(allowed)}")
        if self.text and self.task != "text":
            raise ValueError(f"text={self.text!r}: only task=text reads it, not task={self.task}")
        for key in ("prompts", "prompt_tokens", "new_tokens", "rounds"):
            if (given := getattr(self, key)) < 1:
                raise ValueError(f"{key}={given}: must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: joint ways want more, 0 is greedy")
        for key in ("temperatures", "widths", "thresholds", "depths"):
            if not (given := getattr(self, key)):
                raise ValueError(f"{key}={given}: give one at least")
            if key in ("widths", "depths") and min(given) < 1:
                raise ValueError(f"{key}={given}: all must be at least 1")
        for temperature, threshold in product(self.temperatures, self.thresholds):
            Joint(self.sampling(temperature), threshold)  # refuses what cannot be

    def sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature, self.top_k, self.top_p)


# What decodes what.


def prepare(config: JointConfig, device: torch.device) -> Setting:
    """For joint ways: without a draft model, heads that can grow beams are needed."""
    setting = open_setting(config, device)
    if setting.draft is None and not grows_beams(setting.target):
        beamless = "heads that read each other's guesses, which make no beams"
        heads = beamless if setting.target.extra_heads else "no heads that can draft"
        raise ValueError(f"model={config.model!r} has {heads}: give draft=")
    return setting


def open_setting(config: JointConfig, device: torch.device, probed: int = PROBED) -> Setting:
    at = device, PRECISIONS[config.precision]
    target, found = opened(config.model, *at)
    draft = opened_beside("draft", config.draft, target, found, *at) if config.draft else None
    if found is None and (config.text or config.task in TASKS):
        wanting = f"text={config.text!r}" if config.text else f"task={config.task}"
        raise ValueError(f"model={config.model!r} has random weights: {wanting} wants trained ones")
    count = probed + config.prompts
    problems = problems_of(config, count)
    prompts = list(prompts_of(config, found, problems, target.config.vocab_size, count))
    stop = mtp.stop_at(*found.ends) if found else None
    requests = [mtp.Request(p, config.new_tokens, i, stop) for i, p in enumerate(prompts)]
    tokenizer = found and found.tokenizer
    return set_up(target, draft, config.heads, requests, tokenizer, problems, probed)


def problems_of(config: JointConfig, count: int) -> list[Problem]:
    """Held out; none where the task is to go on with text."""
    if config.task not in TASKS:
        return []
    found = list(islice(TASKS[config.task](True, conditions=config.conditions), count))
    if len(found) < count:
        raise ValueError(
            f"prompts={config.prompts}: task={config.task} has {len(found)} held-out problems, "
            f"{count - config.prompts} of which warm up"
        )
    return found


def prompts_of(
    config: JointConfig,
    found: FoundModel | None,
    problems: Sequence[Problem],
    vocabulary: int,
    count: int,
) -> Iterator[list[int]]:
    size = count, config.prompt_tokens
    if found is None:
        return iter(torch.randint(vocabulary, size, generator=torch.Generator()).tolist())
    if problems:
        return (found.tokenizer.encode(problem.prompt) for problem in problems)
    if config.text:
        data = DataConfig("text", config.text, val_fraction=0.0)
        documents = iter_documents(data, held_out=False)
    elif found.theirs:
        raise ValueError(f"model={config.model!r} is no run, whose text gives prompts: give text=")
    else:
        documents = iter_documents(data_of(config.model), held_out=True)
    return iter(rows_of(documents, found.tokenizer, *size))


def ways(setting: Setting, config: JointConfig) -> dict[str, Way]:
    """Every point by its name."""
    return exact_ways(setting, config) | joint_ways(setting, config)


def guessers(setting: Setting, config: JointConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Words of `Way` for the draft model and for own heads."""
    shallow = tuple(sorted({min(depth, setting.target.extra_heads) for depth in config.depths}))
    return (
        {"depths": tuple(config.depths), "guesses": (setting.draft, "read")},
        {"depths": shallow, "guesses": (setting.target, "guess")},
    )


def exact_ways(setting: Setting, config: JointConfig) -> dict[str, Way]:
    target, draft, found = setting.target, setting.draft, dict[str, Way]()
    by_draft, by_heads = guessers(setting, config)
    for t in config.temperatures:
        law: dict[str, Any] = {"sampling": config.sampling(t)}
        found[f"plain, T {t:g}"] = Way(EXACT, law)
        for rule in ("match", "exact", "block"):
            words, at = law | {"rule": rule}, f"{rule}, T {t:g}"
            if draft is not None:
                drafter = partial(DraftModel, draft)
                found[f"draft model, {at}"] = Way(EXACT, words, drafter, **by_draft)
            if target.extra_heads:
                found[f"own heads, {at}"] = Way(EXACT, words, OwnHeads, **by_heads)
    return found


def joint_ways(setting: Setting, config: JointConfig) -> dict[str, Way]:
    """And beam search, which seeks the same. A tree of one beam would be the beam."""
    target, draft, found = setting.target, setting.draft, dict[str, Way]()
    by_draft, by_heads = guessers(setting, config)
    law: dict[str, Any] = {"sampling": config.sampling(config.temperature)}
    for width in config.widths:
        found[f"beam search, width {width}"] = Way(BEAM_SEARCH, law, width=width)
    for width, threshold in product(config.widths, config.thresholds):
        words, at = law | {"rule": "joint", "threshold": threshold}, f"width {width}, {threshold:g}"
        if draft is not None:
            beams = partial(BeamModel, draft, width=width)
            found[f"MTAD, {at}"] = Way(JOINT, words, beams, **by_draft)
            if width > 1:
                tree = partial(beams, whole=True)
                found[f"MMTAD, {at}"] = Way(JOINT, words, tree, **by_draft)
        if grows_beams(target):
            of_heads = partial(BeamHeads, width=width)
            found[f"MTAD of heads, {at}"] = Way(JOINT, words, of_heads, **by_heads)
    return found
