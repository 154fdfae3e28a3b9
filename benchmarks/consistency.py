"""Does a model that is trained to jump along its own Jacobi trajectories decode in fewer passes and
in less time, and answers as well?

    python -m benchmarks.consistency base=runs/sql
    python -m benchmarks.consistency base=runs/sql quick=true

`base` is a run of `experiment=sql` (`benchmarks.tasks` makes its data and scores answers). All else
is made from it (`benchmarks.consistency_models`): trajectories on prompts of the task, of questions
with up to `conditions` conditions, where the run learned from questions with two; from these the
consistency model (after) and the control, which is trained on the same rows for as many steps at
the same learning rate, by the autoregressive term alone; and a small draft model.

Problems are held out, those of SQL by whole templates. All ways to decode take turns in one
process, at batch 1, one thread on a CPU, texts to their end; `tokens_per_forward` counts passes
after the prompt's, times hold the prompt, `speedup` is over the same model's autoregressive
decoding with quartiles of
ratios within a turn. `same_texts` counts texts equal to that model's autoregressive ones. Windows
are swept for both models; `window_cost` is a bare forward over a window, over one token's
(`benchmarks.bare`). Quality is the mean score, in SQL the share of answers that are right when
executed, greedy, with bootstrap intervals of 95 %; the difference is paired.

Beside the figures it writes a picture and a page of trajectories. The last line is JSON.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import mtp
from benchmarks.bare import verify_cost
from benchmarks.consistency_models import (
    TRAINED_WINDOW,
    BenchmarkConfig,
    Models,
    make_models,
    problems_of,
)
from benchmarks.contenders import Contender, Decoded, decode_ours, figures
from benchmarks.pictures import consistency_panels, drawn
from benchmarks.record import launch, record
from benchmarks.task_score import answer, scores
from benchmarks.tasks import Problem
from benchmarks.timing import Turns, take_turns
from benchmarks.trajectory_page import trajectory_page
from benchmarks.ways import PLAIN
from mtp.consistency.measures import collocations, measure
from mtp.consistency.trajectories import Collection, Trajectory
from mtp.decode.drafters import DraftModel, OwnHeads, PromptLookup
from mtp.decode.jacobi import Jacobi
from mtp.evaluate.scores import compare, interval
from mtp.model import Transformer
from mtp.run import find_device
from mtp.tokenizer import Tokenizer
from mtp.train import PRECISIONS

WINDOWS = (4, 8, 16, 32, 64)
MEASURED = 64  # responses whose trajectories are measured
SHOWN = 4  # of them, on the page
LISTED = 10  # collocations
POOL = 4  # branches beside a window
Words = dict[str, dict[str, Any]]  # way to decode -> words of `generate`


def jacobi(window: int) -> str:
    return f"Jacobi {window}"


def ways(config: BenchmarkConfig, base: Transformer, draft: Transformer) -> dict[str, Words]:
    """By model."""
    n = config.window
    sweep: Words = {jacobi(w): {"drafter": Jacobi(w)} for w in sorted({*WINDOWS, n})}
    own: Words = {
        "own heads": {"drafter": OwnHeads()},
        f"{jacobi(n)}, heads first": {"drafter": Jacobi(n, first=OwnHeads())},
    }
    others: Words = {
        "prompt lookup": {"drafter": PromptLookup()},
        "draft model": {"drafter": DraftModel(draft)},
    }
    pool: Words = {f"{jacobi(n)}, pool": {"drafter": Jacobi(n, pool=POOL)}}
    return {
        "base": {
            PLAIN: {},
            jacobi(n): sweep[jacobi(n)],
            **others,
            **(own if base.extra_heads else {}),
        },
        "control": {PLAIN: {}, **sweep},
        "after": {PLAIN: {}, **sweep, **pool},
    }


def race(
    models: Mapping[str, Transformer],
    ways_of: Mapping[str, Words],
    prompts: Sequence[Sequence[int]],
    config: BenchmarkConfig,
    end: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> way -> figures."""
    stop = mtp.stop_at(end)
    contenders: dict[str, Contender] = {
        f"{who}, {way}": partial(decode_ours, models[who], words, 1, stop=stop)
        for who, some in ways_of.items()
        for way, words in some.items()
    }
    groups = [[prompt] for prompt in prompts]
    take_turns(contenders, groups[:2], config.new_tokens, 1)  # warms up
    turns = take_turns(contenders, groups, config.new_tokens, config.rounds)
    return {who: {way: of_way(turns, who, way) for way in some} for who, some in ways_of.items()}


def of_way(turns: Turns[Decoded], who: str, way: str) -> dict[str, Any]:
    name, plain = f"{who}, {way}", f"{who}, {PLAIN}"
    done = turns.done[name]
    tokens = sum(len(text) - 1 for d in done for text in d.texts)  # the prompt's pass says one
    pairs = zip(done, turns.done[plain], strict=True)
    return figures(turns, name, 1, plain) | {
        "tokens_per_forward": tokens / sum(d.steps for d in done),
        "same_texts": sum(one.texts == other.texts for one, other in pairs),
        "texts": len(done),
    }


def window_costs(where: str, config: BenchmarkConfig, cached: int) -> dict[str, dict[int, float]]:
    """Precision -> window -> what its pass costs, in passes over one token."""
    device = find_device(config.device)
    found = {}
    for precision in ("float32", "bfloat16"):
        model = mtp.load(where, device, PRECISIONS[precision]).packed()
        found[precision] = {
            n: verify_cost(model, cached, config.pairs, width=n, heads=1)
            for n in sorted({*WINDOWS, config.window})
        }
    return found


# Trajectories.


def trajectories(
    model: Transformer, prompts: Sequence[Sequence[int]], new: int, end: int
) -> list[Trajectory]:
    stop, greedy = mtp.stop_at(end), mtp.Sampling(temperature=0)
    requests = [mtp.Request(list(p), new, seed, stop) for seed, p in enumerate(prompts)]
    return list(Collection(model, requests, TRAINED_WINDOW, len(requests), greedy))


def of_trajectories(found: Sequence[Trajectory], tokenizer: Tokenizer) -> dict[str, Any]:
    """Their measures, and the collocations fast-forwarded most often beside their frequency."""
    listed = [
        {
            "text": tokenizer.decode(list(row.tokens)),
            "count": row.count,
            "fast_forwarded": row.fast_forwarded,
            "share": row.share,
        }
        for row in collocations(found)[:LISTED]
    ]
    return asdict(measure(found)) | {"collocations": listed}


# Quality.


def quality(
    models: Mapping[str, Transformer],
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    new: int,
) -> dict[str, Any]:
    """Of every model, and what the consistency model differs by from the control."""
    each = {
        who: scores(problems, tokenizer, answer(model, tokenizer, problems, new_tokens=new))
        for who, model in models.items()
    }
    means = {who: interval(list(x.values()), level=0.95)._asdict() for who, x in each.items()}
    found = compare(each["control"], each["after"], level=0.95)
    return means | {"difference": found._asdict() | {"difference": found.difference._asdict()}}


# All of it.


def summary(config: BenchmarkConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    way, found, score = jacobi(config.window), values["decoding"], values["quality"]
    difference = score["difference"]["difference"]
    return {
        "jacobi_control_tokens_per_forward": found["control"][way]["tokens_per_forward"],
        "jacobi_after_tokens_per_forward": found["after"][way]["tokens_per_forward"],
        "speedup": found["after"][way]["speedup"],
        "quality_control": score["control"]["mean"],
        "quality_after": score["after"]["mean"],
        "quality_difference_interval": [difference["low"], difference["high"]],
        "problems": values["problems"],
        "window": config.window,
        "window_cost": values["window_costs"][config.precision][config.window],
    }


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = [f"{'':>30} tokens/s speedup    (quartiles)  tokens/forward  same texts"]
    for who, some in found.items():
        for way, f in some.items():
            low, high = f["speedup_iqr"]
            lines.append(
                f"{f'{who}, {way}':>30} {f['tokens_per_second']:8,.0f} {f['speedup']:7.2f}"
                f" ({low:6.2f},{high:6.2f}) {f['tokens_per_forward']:15.2f}"
                f"  {f['same_texts']:>6}/{f['texts']}"
            )
    return "\n".join(lines)


def of_collocations(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    lines = ["fast-forwarded most often       before: at once/all      after: at once/all"]
    for one, other in zip(before["collocations"], after["collocations"], strict=False):
        cells = (f"{x['text']!r} {x['fast_forwarded']}/{x['count']}" for x in (one, other))
        lines.append("".join(f"{cell:>40}" for cell in cells))
    return "\n".join(lines)


def measured(
    made: Models, config: BenchmarkConfig
) -> tuple[dict[str, Any], dict[str, list[Trajectory]]]:
    """All values, and the trajectories behind some."""
    device, dtype = find_device(config.device), PRECISIONS[config.precision]
    runs = {"base": made.base, "control": made.control, "after": made.after}
    models = {who: mtp.load(where, device, dtype).packed() for who, where in runs.items()}
    draft, tokenizer = mtp.load(made.draft, device, dtype).packed(), mtp.load_tokenizer(made.base)
    problems = list(islice(problems_of(config, held_out=True), config.problems))
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    few, end = prompts[: config.texts], tokenizer.end_id
    cached = int(statistics.mean(map(len, few)))
    paths = {
        who: trajectories(models[who], prompts[:MEASURED], config.new_tokens, end)
        for who in ("base", "control", "after")
    }
    values = {
        "decoding": race(models, ways(config, models["base"], draft), few, config, end),
        "window_costs": window_costs(made.after, config, cached),
        "trajectories": {who: of_trajectories(found, tokenizer) for who, found in paths.items()},
        "quality": quality(models, problems, tokenizer, config.new_tokens),
        "problems": len(problems),  # a task may have fewer than were asked for
    }
    return values, paths


def run(config: BenchmarkConfig) -> dict[str, Any]:
    if find_device(config.device).type == "cpu":
        torch.set_num_threads(1)
    made = make_models(config)
    load = os.getloadavg()[0]
    values, paths = measured(made, config)
    line = summary(config, values)
    print(table(values["decoding"]))
    print(of_collocations(values["trajectories"]["base"], values["trajectories"]["after"]))
    whole = line | {"load_before": round(load, 2), "costs": made.costs, **values}
    path = record(config.name, whole, config)
    write_page(made, paths, path.with_suffix(".html"))
    drawn(consistency_panels, values["decoding"], path.with_suffix(".png"))
    return line


def write_page(made: Models, paths: Mapping[str, Sequence[Trajectory]], path: Path) -> None:
    tokenizer = mtp.load_tokenizer(made.base)
    pairs = list(zip(paths["base"], paths["after"], strict=True))[:SHOWN]
    trajectory_page(pairs, ("target", "consistency model"), tokenizer, path)


if __name__ == "__main__":
    launch(BenchmarkConfig, run)
