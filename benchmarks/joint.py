"""Does joint decoding (MTAD, Qin et al. 2025) lie above what exact decoding reaches, and where?

    python -m benchmarks.joint model=runs/sql draft=runs/sql_draft task=sql
    python -m benchmarks.joint model=runs/bytes8 draft=runs/demo quick=true
    python -m benchmarks.joint model=FOLDER draft=SMALLER text=FILE prompts=16
    python -m benchmarks.joint model=1.3b draft=30m

`model` is a run or checkpoint, a Hugging Face folder, or the name of a shape: then weights and
prompts are random, and costs mean something, acceptance and quality nothing. `draft` is the
auxiliary model, of the same tokenizer. Prompts are the run's held-out text, or `text`, or held-out
problems of a task (`benchmarks.tasks`), whose answers get a score: of sql, 1 where they are right.

Every way samples from the same law: temperature, then top_k, then top_p, for target and auxiliary
model. That cut (by default 10 and 0.9, the method's own) lowers perplexity a lot by itself, and so
does a lower temperature, greedy decoding most of all. Joint decoding therefore stands, at
`temperature`, beside the curve of all exact ways under the same cut at all `temperatures`: plain,
and drafted by the auxiliary model or the target's own heads under the rules match, exact and block.
"Above" means faster at no higher perplexity: `over_curve` is how many times as fast a joint way is
as the curve at its own perplexity (`benchmarks.joint_measures`), with intervals over prompts that
hold for all joint ways together, and `above` names those surely above 1. `best_joint` is the
fastest that loses nothing against the fastest exact way, `best_exact`.

MTAD judges the auxiliary model's best beam, MMTAD all of them as a tree; beam search is the
target's own, for the most probable text. Each way that drafts has the depth of `depths` that was
fastest on texts before. Then all take turns in one process, at batch 1; a text's time is its median
over rounds, its prompt included. Perplexity is the target's, before temperature and cuts, on the
new tokens alone. Tokens per target forward leave out the prompt's pass and its token. Energy per
token is the GPU's own counter over the last round, all of it and above idle; where there is none,
passes and operations (2 x parameters x positions) stand for it. An extra head is taken to unembed
every position that it reads, the most it can. The last line is JSON.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.energy import idle_watts
from benchmarks.figures import LEVEL, figures, measured
from benchmarks.joint_measures import Measured, compared, distinct, front
from benchmarks.joint_pictures import joint_panels
from benchmarks.joint_ways import EXACT, JOINT, JointConfig, prepare, ways
from benchmarks.pictures import drawn
from benchmarks.record import launch, record
from benchmarks.ways import Setting, Way, race
from mtp.run import find_device

PUBLISHED = (  # V: read in the paper's abstract, S: quoted by others; not on this machine or task
    "MTAD, Llama-2 and OPT 13B to 70B: perplexity 21.2 % below token-by-token sampling's, 1.42 "
    "times as fast and 1.54 times less energy than standard speculative decoding [V]",
    "MMTAD: 1.26 times as fast, 23.6 % less energy than vanilla speculative decoding [S]",
)


# Figures.


def points(setting: Setting, config: JointConfig, idle: float | None) -> dict[str, Any]:
    """Everything that is recorded."""
    of_all = ways(setting, config)
    entries = {name: (setting, way) for name, way in of_all.items()}
    turns, depths = race(entries, config.new_tokens, config.rounds)
    found, texts = measured(setting, turns)
    values: dict[str, Any] = {}
    for name, way in of_all.items():
        values[name] = {
            "family": way.family,
            "temperature": way.words["sampling"].temperature,
            "depth": depths[name],
            "distinct": [distinct(texts[name], n) for n in (1, 2, 3, 4)],
            **figures(setting, way, found["perplexity"][name], turns, name, idle),
        }
        if "score" in found:
            values[name]["score"] = 1 - found["score"][name].point[0]
    return {"points": values} | {measure: judged(of_all, some) for measure, some in found.items()}


def judged(of_all: Mapping[str, Way], found: Mapping[str, Measured]) -> dict[str, Any]:
    """By one measure: the front of all points, joint ways against exact ones."""
    exact, joint = (
        {name: found[name] for name, way in of_all.items() if way.family == family}
        for family in (EXACT, JOINT)
    )
    return {"front": front({name: way.point for name, way in found.items()})} | compared(
        exact, joint, LEVEL
    )


# All of it.


def summary(values: Mapping[str, Any], energy_measured: bool) -> dict[str, Any]:
    """By perplexity."""
    by, of_all = values["perplexity"], values["points"]
    keys = ("perplexity", "score", "tokens_per_second", "tokens_per_target_forward")

    def shown(name: str) -> dict[str, Any]:
        return {"name": name} | {key: of_all[name][key] for key in keys if key in of_all[name]}

    def ratio(key: str) -> float | None:
        joint = by["best_joint"]
        return None if joint is None else of_all[joint][key] / of_all[by["best_exact"]][key]

    return {
        "front": [shown(name) for name in by["front"]],
        "best_exact": shown(by["best_exact"]),
        "best_mtad_at_no_worse_quality": by["best_joint"] and shown(by["best_joint"]),
        "tokens_per_target_forward_ratio": ratio("tokens_per_target_forward"),
        "tokens_per_second_ratio": ratio("tokens_per_second"),
        "above_exact_curve": by["above"],
        "energy_measured": energy_measured,
    }


def answer(by: Mapping[str, Any], measure: str) -> str:
    """To the question, in a sentence."""
    over = by["over_curve"]
    highest = max(over, key=lambda name: over[name]["mean"])
    mean, low, high = (over[highest][key] for key in ("mean", "low", "high"))
    where = ", ".join(by["above"]) or "nowhere"
    return (
        f"By {measure}, above the exact curve: {where} ({LEVEL:.0%} for all {len(over)} joint ways "
        f"together). Highest: {highest}, {mean:.2f} times as fast as the curve there "
        f"({low:.2f} to {high:.2f})" + ", beyond its end" * (highest in by["beyond"]) + "."
    )


def table(of_all: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        f"{'':>29} depth perplexity score tokens/s  p50 s  p95 s  tokens/forward  GFLOP/token"
        f"  J/token  distinct 1 to 4"
    ]
    for name, f in of_all.items():
        score = f"{f['score']:.3f}" if "score" in f else "-"
        joules = f"{f['joules_per_token']:.3f}" if "joules_per_token" in f else "-"
        lines.append(
            f"{name:>29} {f['depth'] or '-':>5} {f['perplexity']:10.3f} {score:>8}"
            f" {f['tokens_per_second']:8,.1f} {f['seconds_p50']:6.2f} {f['seconds_p95']:6.2f}"
            f" {f['tokens_per_target_forward']:15.2f} {f['operations_per_token'] / 1e9:12.3f}"
            f" {joules:>8}  " + " ".join(f"{share:.2f}" for share in f["distinct"])
        )
    return "\n".join(lines)


def run(config: JointConfig) -> dict[str, Any]:
    device, load = find_device(config.device), os.getloadavg()[0]
    if device.type == "cpu":
        torch.set_num_threads(1)
    setting = prepare(config, device)
    idle = setting.counter and idle_watts(setting.counter)
    values = points(setting, config, idle)
    line = summary(values, idle is not None)
    print(table(values["points"]))
    measures = [key for key in ("perplexity", "score") if key in values]
    answers = [answer(values[measure], measure) for measure in measures]
    print("\n".join([*answers, *(f"Published: {claim}" for claim in PUBLISHED)]))
    more = {
        "answers": answers,
        "published": PUBLISHED,
        "load_before": round(load, 2),
        "parameters": setting.parameters,
        "random_weights": not Path(config.model).exists(),
        "idle_watts": idle,
    }
    path = record(config.name, line | more | values, config)
    drawn(joint_panels, values["points"], measures, path.with_suffix(".png"))
    return line


if __name__ == "__main__":
    launch(JointConfig, run)
