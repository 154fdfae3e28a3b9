"""Which way to decode pays for a user's own model on the user's own prompts? The measurements of
`scripts/pilot.py`.

The first half of the prompts chooses: how many guesses each way makes, and the threshold of joint
decoding, by `mtp.decode.joint.calibrate`. The other half is measured: every way decodes every text
in turns, in one process, at batch 1, with the machinery of `benchmarks.ways`. Intervals are
over prompts (bootstrap, pairs kept) and hold for all ways together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

import mtp
from benchmarks.decoder_ways import LOSSY, beams, exact_ways, joint_way, left_out, memory_bytes
from benchmarks.energy import idle_watts
from benchmarks.figures import LEVEL, beside_plain, figures, measured, written
from benchmarks.timing import Turns, fastest_threads, seconds
from benchmarks.ways import PLAIN, PROBED, Setting, Spent, Way, contender, race, set_up
from mtp.data import read_vocabulary
from mtp.decode.joint import THRESHOLDS, Calibrated, calibrate
from mtp.decode.sampling import Sampling
from mtp.encoding import chat_template
from mtp.evaluate.scores import rouge_l, words
from mtp.interop.folder import FoundModel, find_model
from mtp.run import find_device
from mtp.train import PRECISIONS

FEWEST = 16  # prompts: fewer than eight that are measured cannot be this sure of anything
Say = Callable[[str], object]


# What it takes.


@dataclass
class PilotConfig:
    """What `scripts/pilot.py` takes. heads: a folder of some that were attached to the model.
    vocabulary: a file of scripts/draft_vocabulary.py, the only tokens that heads guess. chat:
    prompts are what a user says. budget: nats per token that a lossy way may lose, 0.05 are 5 % of
    perplexity. minutes: take as many of the prompts as fit in; null takes all.
    """

    model: str = ""  # a run or checkpoint, or a Hugging Face folder or its name on the hub
    prompts: str = ""  # a file of JSON lines (*.jsonl), or with a prompt on each line
    draft: str | None = None  # a smaller model of the same tokenizer
    heads: str | None = None
    vocabulary: str | None = None
    chat: bool = False
    new_tokens: int = 128
    rounds: int = 2
    budget: float = 0.05
    minutes: float | None = 15.0
    precision: str = "float32"
    device: str = "auto"
    out: str = "runs/pilot"  # a folder for pilot.html, pilot.md and pilot.json
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: give a run, a checkpoint or a Hugging Face folder, model=...")
        if not self.prompts:
            raise ValueError("prompts: give a file of JSON lines or plain lines, prompts=...")
        for key in ("new_tokens", "rounds"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.budget < 0:
            raise ValueError(f"budget={self.budget} must be at least 0 nats per token")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes={self.minutes} must be above 0 (null for no limit)")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: allowed are {', '.join(PRECISIONS)}")


class Case(NamedTuple):
    """A prompt, and what its text is scored by, if anything: an answer that is to stand in it, not
    within a longer word, or else a completion, by its likeness (ROUGE-L of words).
    """

    prompt: str
    answer: str | None = None
    completion: str | None = None

    def score(self, text: str) -> float | None:
        if self.answer is not None:
            return float(bool(re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", text)))
        if self.completion is not None:
            return rouge_l(words(text), words(self.completion))
        return None


class Ready(NamedTuple):
    """What decodes what. cases: one for each request."""

    setting: Setting
    cases: Sequence[Case]

    def some(self, count: int) -> Ready:
        """`count` of the prompts, from all of the file; the first half to choose by."""
        chosen = [i * len(self.cases) // count for i in range(count)]
        requests = [self.setting.requests[i] for i in chosen]
        return self._replace(
            setting=replace(self.setting, requests=requests, probed=count // 2),
            cases=[self.cases[i] for i in chosen],
        )


def prepare(config: PilotConfig, cases: Sequence[Case]) -> Ready:
    """Refuses what cannot work: before weights are read, what files and tokenizers say."""
    if len(cases) < FEWEST:
        raise ValueError(
            f"prompts={config.prompts} holds {len(cases)}: give at least {FEWEST}, half of them "
            f"choose settings and half are measured"
        )
    find = partial(find_model, special=not config.chat)  # templates begin a text themselves
    found, auxiliary = find(config.model), None if config.draft is None else find(config.draft)
    if auxiliary and auxiliary.tokenizer.fingerprint != found.tokenizer.fingerprint:
        raise ValueError(f"draft={config.draft} has another tokenizer than {config.model}")
    requests = requests_of(config, cases, found)
    ids = read_vocabulary(config.vocabulary)
    device, dtype = find_device(config.device), PRECISIONS[config.precision]
    target, draft = found.open(device, dtype), auxiliary and auxiliary.open(device, dtype)
    half = len(requests) // 2
    setting = set_up(target, draft, config.heads, requests, found.tokenizer, probed=half)
    return Ready(replace(setting, vocabulary=ids), list(cases))


def requests_of(config: PilotConfig, cases: Sequence[Case], found: FoundModel) -> list[mtp.Request]:
    texts, stop = [case.prompt for case in cases], mtp.stop_at(*found.ends)
    if config.chat:
        template = chat_template(found.tokenizer)
        texts = [template.render([{"role": "user", "content": text}], True) for text in texts]
    return [
        mtp.Request(found.tokenizer.encode(text), config.new_tokens, seed, stop)
        for seed, text in enumerate(texts)
    ]


# How long it takes.


class Cost(NamedTuple):
    """Seconds of a text: of each exact way, and of each joint one with its drafters."""

    exact: dict[str, float]
    joint: dict[str, float]
    settings: dict[str, int]  # how many each way chooses from

    def __call__(self, prompts: int, rounds: int) -> float:
        """Seconds that so many prompts take, half of them to choose by."""
        half = prompts // 2
        tried = min(PROBED, half)
        every = self.exact | self.joint
        choosing = sum(
            took * (self.settings[name] > 1) * self.settings[name] * tried
            for name, took in self.exact.items()
        )
        calibrating = sum(took * self.settings[name] * half for name, took in self.joint.items())
        return choosing + calibrating + sum(every.values()) * (prompts - half) * rounds


def cost(ready: Ready, config: PilotConfig) -> Cost:
    """By one text of each way; the number of threads is chosen first."""
    setting, new, sampling = ready.setting, config.new_tokens, config.sampling
    exact, joint = exact_ways(setting, sampling), beams(setting, sampling)
    some = exact | {
        name: joint_way(sampling, beam, beam.depths[-1], 0.5) for name, beam in joint.items()
    }
    decoders = {
        name: contender(setting, way, way.depths[0] if way.depths else None)
        for name, way in some.items()
    }
    first = setting.requests[0]
    if find_device(config.device).type == "cpu":
        torch.set_num_threads(fastest_threads(lambda: decoders[PLAIN](first, min(16, new))))
    took = {}
    for name, decode in decoders.items():
        decode(first, min(8, new))  # warms up
        took[name] = seconds(partial(decode, first, new))
    settings = {name: len(way.depths) for name, way in exact.items()}
    settings |= {name: len(beam.depths) * len(THRESHOLDS) for name, beam in joint.items()}
    of_exact, of_joint = ({name: took[name] for name in of} for of in (exact, joint))
    return Cost(of_exact, of_joint, settings)


def fitting(per_text: Cost, config: PilotConfig, prompts: int) -> int:
    """How many of the prompts fit in config.minutes."""
    if config.minutes is None:
        return prompts
    limit = 60 * config.minutes
    fit = [n for n in range(FEWEST, prompts + 1) if per_text(n, config.rounds) <= limit]
    if not fit:
        needed = per_text(FEWEST, config.rounds) / 60
        raise ValueError(
            f"minutes={config.minutes:g}: {FEWEST} prompts, the fewest, take about {needed:.2g}: "
            f"allow more, or lower new_tokens or rounds"
        )
    return fit[-1]


# What they say.


def calibrated(
    ready: Ready, config: PilotConfig
) -> tuple[dict[str, Way], dict[str, Calibrated], dict[str, str]]:
    """Joint ways that keep to the budget, how they were found, and why others are left out."""
    ways, found, refused = dict[str, Way](), dict[str, Calibrated](), dict[str, str]()
    setting, sampling = ready.setting, config.sampling
    halves = setting.requests[: setting.probed], setting.measured
    for name, beam in beams(setting, sampling).items():
        drafters = [beam.drafter(depth) for depth in beam.depths]
        try:
            best = calibrate(setting.target, *halves, drafters, sampling, config.budget)
        except ValueError as error:
            refused[name] = str(error)
            continue
        found[name] = best
        ways[name] = joint_way(sampling, beam, best.drafter.depth, best.threshold)
    return ways, found, refused


def verdict(found: Mapping[str, Any], budget: float) -> tuple[bool, str]:
    """Whether to use a way, and why in a sentence. found: of its kind, speedup and loss_rise."""
    low, high = found["speedup"]["low"], found["speedup"]["high"]
    if high < 1:
        return False, f"slower than plain decoding, at most {high:.2f} times as fast"
    if low <= 1:
        return False, f"not surely faster: {low:.2f} to {high:.2f} times as fast as plain decoding"
    if found["kind"] == LOSSY and (rise := found["loss_rise"]["high"]) > budget:
        return False, (
            f"faster, but its texts may lose {rise:.3f} nats per token, more than the budget of "
            f"{budget:g}"
        )
    return True, f"surely faster: at least {low:.2f} times as fast as plain decoding"


def decoders(
    ready: Ready,
    of_all: Mapping[str, Way],
    turns: Turns[Spent],
    depths: Mapping[str, int | None],
    budget: float,
    idle: float | None,
) -> dict[str, dict[str, Any]]:
    """Everything that is recorded of each way."""
    nats, texts = measured(ready.setting, turns)
    values = {}
    for name, way in of_all.items():
        found = beside_plain(name, way, nats["perplexity"], texts, len(of_all))
        found |= {
            "guesses": depths[name],
            "memory_bytes": memory_bytes(ready.setting, way, depths[name]),
            **figures(ready.setting, way, nats["perplexity"][name], turns, name, idle),
            **score(ready, texts[name]),
        }
        if name != PLAIN:
            found["go"], found["reason"] = verdict(found, budget)
        values[name] = found
    return values


def score(ready: Ready, texts: Sequence[list[int]]) -> dict[str, Any]:
    """Mean over the measured prompts that bring what scores them; nothing where none does."""
    cases = ready.cases[ready.setting.probed :]
    each = [
        case.score(ready.setting.tokenizer.decode(text))
        for case, text in zip(cases, texts, strict=True)
    ]
    some = [x for x in each if x is not None]
    return {"score": mean(some), "scored": len(some)} if some else {}


def answer(values: Mapping[str, Mapping[str, Any]]) -> str:
    """In a sentence."""
    go = {name: f["speedup"] for name, f in values.items() if f.get("go")}
    if not go:
        return "No go: no way to decode is surely faster than plain decoding on these prompts."
    best = max(go, key=lambda name: go[name]["mean"])
    others = [name for name in go if name != best]
    x = go[best]
    return (
        f"Go: {best}, {x['mean']:.2f} times as fast as plain decoding "
        f"({x['low']:.2f} to {x['high']:.2f})" + f"; also {', '.join(others)}" * bool(others) + "."
    )


def pilot(config: PilotConfig, cases: Sequence[Case], say: Say) -> dict[str, Any]:
    """Measure; -> plain JSON. say: hears what happens."""
    ready = prepare(config, cases)
    idle = ready.setting.counter and idle_watts(ready.setting.counter)
    per_text = cost(ready, config)
    count = fitting(per_text, config, len(cases))
    estimate = per_text(count, config.rounds)
    say(
        f"{len(per_text.exact | per_text.joint)} ways to decode, {count} of {len(cases)} prompts: "
        f"about {estimate / 60:.1f} minutes"
    )
    ready = ready.some(count)
    joint, found, refused = calibrated(ready, config)
    for name, best in found.items():
        say(f"{name}: threshold {best.threshold:g}, within the budget")
    of_all = exact_ways(ready.setting, config.sampling) | joint
    entries = {name: (ready.setting, way) for name, way in of_all.items()}
    turns, depths = race(entries, config.new_tokens, config.rounds)
    values = decoders(ready, of_all, turns, depths, config.budget, idle)
    return {
        "answer": answer(values),
        "model": config.model,
        "prompts": {"file": Path(config.prompts).name, "given": len(cases), "used": count}
        | {"measured": len(ready.setting.measured), "new_tokens": config.new_tokens},
        "sampling": vars(config.sampling),
        "precision": config.precision,
        "level": LEVEL,
        "budget": config.budget,
        "estimate_seconds": estimate,
        "idle_watts": idle,
        "decoders": values,
        "written": written(ready.setting, [spent.text for spent in turns.done[PLAIN]]),
        "calibrated": {
            name: {"threshold": best.threshold, "guesses": best.drafter.depth}
            | {part: getattr(best, part)._asdict() for part in ("found", "checked")}
            for name, best in found.items()
        },
        "left_out": left_out(ready.setting, config.sampling) | refused,
    }
