"""A way to decode, what it decodes with, what it takes, and the turns of several."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mtp
from benchmarks.beam_search import beam_search
from benchmarks.energy import (
    Counter,
    counted,
    energy_counter,
    parameters_of_head,
    parameters_of_pass,
    weight_bytes,
)
from benchmarks.shapes import shape
from benchmarks.tasks import Problem
from benchmarks.timing import Turns, progress, take_turns
from mtp.decode.contract import Drafter
from mtp.decode.loop import check_request
from mtp.interop.attach import load_heads
from mtp.interop.folder import FoundModel, find_model
from mtp.model import Transformer

PLAIN = "plain"
PROBED = 3  # texts that warm up, and find the depth of each way


# What decodes what.


@dataclass(frozen=True)
class Setting:
    """parameters: by which a position of target, of draft and of one extra head is multiplied.
    requests: `probed` ones, and those that are measured. problems: that those answer. weights:
    bytes of target and of draft. heads: what to call the target's. vocabulary: all that they guess.
    """

    target: Any
    draft: Any
    parameters: dict[str, int]
    requests: list[mtp.Request]
    tokenizer: Any = None
    problems: Sequence[Problem] = ()
    counter: Counter | None = None
    probed: int = PROBED
    weights: dict[str, int] = field(default_factory=dict)
    heads: str = "own heads"
    vocabulary: Sequence[int] | None = None

    @property
    def measured(self) -> list[mtp.Request]:
        return self.requests[self.probed :]


def opened(where: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, FoundModel | None]:
    """A model that is not packed; of a shape by its name there is nothing more."""
    if Path(where).exists():
        found = find_model(where)
        return found.open(device, dtype), found
    try:
        config = shape(where)
    except ValueError as error:
        raise ValueError(f"{where!r} is no folder, and {error}") from None
    generator = torch.Generator(device).manual_seed(0)
    with device:
        return Transformer(config, generator).to(dtype), None


def set_up(
    target: Any,
    draft: Any,
    heads: str | None,
    requests: list[mtp.Request],
    tokenizer: Any = None,
    problems: Sequence[Problem] = (),
    probed: int = PROBED,
) -> Setting:
    """Models that are not packed yet are counted, and packed. heads: a folder of some that were
    attached to the target. problems: of all requests. Requests that do not fit into one of the
    contexts are refused.
    """
    parameters, weights = {"target": parameters_of_pass(target)}, {"target": weight_bytes(target)}
    if heads:
        target = load_heads(target, heads)
        weights["target"] += weight_bytes(target)  # the trunk's are none of its own
    if target.extra_heads:
        parameters["head"] = parameters_of_head(target)
    if draft is not None:
        parameters["draft"], weights["draft"] = parameters_of_pass(draft), weight_bytes(draft)
    for model in filter(None, (target, draft)):
        for i, request in enumerate(requests):
            check_request(model, i, request)
    return Setting(
        *(target.packed(), draft and draft.packed(), parameters, requests, tokenizer),
        *(problems[probed:], energy_counter(target.embedding.weight.device), probed, weights),
        "attached heads" if heads else "own heads",
    )


def opened_beside(key: str, where: str, target: Any, found: FoundModel | None, *at: Any) -> Any:
    """A model of the target's own tokenizer; ValueError names the key of another one. at: device
    and type.
    """
    model, other = opened(where, *at)
    prints = [x.tokenizer.fingerprint for x in (found, other) if x is not None]
    if len({*prints}) > 1 or model.config.vocab_size != target.config.vocab_size:
        raise ValueError(f"{key}={where!r} has another tokenizer than the model")
    return model


def grows_beams(target: Any) -> bool:
    """Whether its own heads can, see `BeamHeads`."""
    return bool(target.extra_heads and not target.reads_ahead)


# Decoding.


@dataclass(frozen=True)
class Way:
    """words: of `generate`, but for the drafter, which `drafter` makes for a depth; `guesses` says
    what it calls in order to guess. width: of a beam search, which has no more.
    """

    family: str
    words: dict[str, Any]
    drafter: Callable[[int], Drafter] | None = None
    depths: tuple[int, ...] = ()
    guesses: tuple[Any, str] | None = None
    width: int | None = None

    def at(self, depth: int | None) -> dict[str, Any]:
        """All words of `generate`; no depth: nothing drafts."""
        return self.words | {"drafter": self.drafter(depth) if self.drafter and depth else None}


class Spent(NamedTuple):
    """On one text. passes, positions: of the target, with the prompt's; guess_...: of what drafts.
    joules: None where nothing counts them. steps, accepted: as in `Completion`, of all depths.
    """

    text: list[int]
    passes: int
    positions: int
    guess_passes: int
    guess_positions: int
    joules: float | None
    steps: int = 0
    accepted: int = 0

    @property
    def tokens(self) -> int:
        return len(self.text)


Contender = Callable[[mtp.Request, int], Spent]


def contender(setting: Setting, way: Way, depth: int | None = None) -> Contender:
    words, target = way.at(depth), setting.target

    def complete(request: mtp.Request) -> mtp.Completion:
        if way.width is not None:
            return mtp.Completion(beam_search(target, request, way.width, words["sampling"]))
        return mtp.generate(target, [request], batch_size=1, **words)[0]

    return partial(decode, setting, way, complete)


def decode(
    setting: Setting,
    way: Way,
    complete: Callable[[mtp.Request], mtp.Completion],
    request: mtp.Request,
    new: int,
) -> Spent:
    guesses = counted(*way.guesses) if way.guesses else nullcontext()
    before = setting.counter and setting.counter()
    with counted(setting.target) as reads, guesses as guessed:
        found = complete(replace(request, max_new_tokens=new))
    joules = None if before is None or not setting.counter else setting.counter() - before
    guess_work = (guessed.passes, guessed.positions) if guessed else (0, 0)
    work = reads.passes, reads.positions, *guess_work
    return Spent(found.tokens, *work, joules, found.steps, sum(found.accepted))


def fastest_depth(setting: Setting, way: Way, new: int) -> int | None:
    """On texts that are not measured; None where nothing drafts."""
    some = setting.requests[: min(PROBED, setting.probed)]
    return fastest(way.depths, partial(contender, setting, way), some, new)


def fastest(
    depths: Sequence[int], decoder_of: Callable[[int], Any], groups: Sequence[Any], new: int
) -> int | None:
    """decoder_of: a depth -> what takes a group of `groups` and says its `tokens`."""

    def pace(depth: int) -> float:
        decoder = decoder_of(depth)
        decoder(groups[0], min(8, new))  # warms up
        started = time.perf_counter()
        tokens = sum(decoder(group, new).tokens for group in groups)
        return tokens / (time.perf_counter() - started)

    if len(depths) < 2:
        return depths[0] if depths else None
    return max(depths, key=pace)


def race(
    of_all: Mapping[str, tuple[Setting, Way]],
    new: int,
    rounds: int,
) -> tuple[Turns[Spent], dict[str, int | None]]:
    """Turns, and the depth of each way. All settings have the same requests."""
    depths, tell = {}, progress("ways that have their depth")
    tell(0, len(of_all))
    for name, (setting, way) in of_all.items():
        depths[name] = fastest_depth(setting, way, new)
        tell(len(depths), len(of_all))
    contenders = {name: contender(*entry, depths[name]) for name, entry in of_all.items()}
    setting, _ = next(iter(of_all.values()))
    take_turns(contenders, setting.requests[:1], min(32, new), 1)  # warms up
    return take_turns(contenders, setting.measured, new, rounds, progress("turns")), depths
