"""Which way to decode pays for a user's own model on the user's own prompts? The measurements of
`scripts/pilot.py`.

The first half of the prompts chooses: how many guesses each way makes, and the threshold of joint
decoding, by `mtp.decode.joint.calibrate`. The other half is measured: every way decodes every text
in turns, in one process, at batch 1, with the machinery of `benchmarks.ways`. Intervals are
over prompts (bootstrap, pairs kept) and hold for all ways together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from benchmarks.energy import idle_watts
from benchmarks.joint import figures, measured
from benchmarks.joint_measures import Measured, against
from benchmarks.pilot_ways import (
    FEWEST,
    LOSSY,
    PLAIN,
    Case,
    PilotConfig,
    Ready,
    beams,
    exact_ways,
    joint_way,
    left_out,
    memory_bytes,
    prepare,
)
from benchmarks.timing import Turns, fastest_threads, seconds
from benchmarks.ways import PROBED, Spent, Way, contender, race
from mtp.decode.joint import THRESHOLDS, Calibrated, calibrate
from mtp.run import find_device

LEVEL = 0.95  # of all intervals together
Tell = Callable[[int, int], object]
Say = Callable[[str], object]


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
    exact = exact_ways(ready, sampling)
    joint = beams(ready, sampling)
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
    for name, beam in beams(ready, sampling).items():
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
            "memory_bytes": memory_bytes(ready, way, depths[name]),
            **figures(ready.setting, way, nats["perplexity"][name], turns, name, idle),
            **score(ready, texts[name]),
        }
        if name != PLAIN:
            found["go"], found["reason"] = verdict(found, budget)
        values[name] = found
    return values


def beside_plain(
    name: str,
    way: Way,
    by: Mapping[str, Measured],
    texts: Mapping[str, Sequence[list[int]]],
    ways: int,
    plain: str = PLAIN,
) -> dict[str, Any]:
    """What a way is, and how it does against plain decoding, in intervals that hold for all `ways`
    together (Bonferroni). by: in nats. plain: whose texts it is to write.
    """
    pair = against(by[name], by[PLAIN], 1 - (1 - LEVEL) / max(1, ways - 1))
    return {
        "kind": way.family,
        "rule": way.words.get("rule", "match"),
        "threshold": way.words.get("threshold"),
        "speedup": pair.speed._asdict(),
        "loss_rise": pair.loss._asdict(),
        "identical": mean(a == b for a, b in zip(texts[name], texts[plain], strict=True)),
    }


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


def pilot(config: PilotConfig, cases: Sequence[Case], say: Say, tell: Tell) -> dict[str, Any]:
    """Measure; -> plain JSON. say: hears what happens; tell: how many turns of all are taken."""
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
    of_all = exact_ways(ready, config.sampling) | joint
    entries = {name: (ready.setting, way) for name, way in of_all.items()}
    turns, depths = race(entries, config.new_tokens, config.rounds, tell)
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
        "calibrated": {
            name: {"threshold": best.threshold, "guesses": best.drafter.depth}
            | {part: getattr(best, part)._asdict() for part in ("found", "checked")}
            for name, best in found.items()
        },
        "left_out": left_out(ready, config.sampling) | refused,
    }
