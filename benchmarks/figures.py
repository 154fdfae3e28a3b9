"""What the texts of several ways to decode are worth and what they took, from their turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import numpy as np

import mtp
from benchmarks.joint_measures import Measured, against, perplexity, text_nll
from benchmarks.task_score import scores
from benchmarks.timing import Turns
from benchmarks.ways import PLAIN, Setting, Spent, Way

LEVEL = 0.95  # of all intervals together


def losses(
    setting: Setting, texts: Mapping[str, Sequence[list[int]]]
) -> dict[str, dict[str, np.ndarray]]:
    """Of every way's texts, by measure, over prompts: nats, and what answers lack of a full
    score where they have one. Many ways write the same text, which is read once.
    """
    known: dict[tuple[int, tuple[int, ...]], float] = {}

    def nll(i: int, text: list[int]) -> float:
        key = i, tuple(text)
        if key not in known:
            known[key] = text_nll(setting.target, setting.measured[i].prompt, text)
        return known[key]

    def lacking(some: Sequence[list[int]]) -> list[float]:
        right = scores(setting.problems, setting.tokenizer, [mtp.Completion(t) for t in some])
        return [1 - score for score in right.values()]

    found = {
        "perplexity": {
            name: np.array([nll(i, text) for i, text in enumerate(some)])
            for name, some in texts.items()
        }
    }
    if setting.problems:
        found["score"] = {name: np.array(lacking(some)) for name, some in texts.items()}
    return found


def measured(
    setting: Setting, turns: Turns[Spent]
) -> tuple[dict[str, dict[str, Measured]], dict[str, list[list[int]]]]:
    """Measure -> way -> what was measured, and all texts."""
    texts = {name: [spent.text for spent in done] for name, done in turns.done.items()}
    tokens = {name: np.array([len(text) for text in some]) for name, some in texts.items()}
    took = {name: np.array([median(x) for x in rounds]) for name, rounds in turns.took.items()}
    return {
        measure: {
            name: Measured(
                loss,
                tokens[name] if measure == "perplexity" else np.ones_like(loss),
                tokens[name],
                took[name],
            )
            for name, loss in of_all.items()
        }
        for measure, of_all in losses(setting, texts).items()
    }, texts


def costs(setting: Setting, way: Way, done: Sequence[Spent]) -> dict[str, float]:
    """What a way's texts took per new token, clocks aside."""
    passes, positions, guess_passes, guess_positions = (
        sum(column) for column in list(zip(*done, strict=True))[1:5]
    )
    tokens, parameters = sum(len(spent.text) for spent in done), setting.parameters
    operations = 2 * parameters["target"] * positions
    if way.guesses:
        guesser = "head" if way.guesses[1] == "guess" else "draft"
        operations += 2 * parameters[guesser] * guess_positions
    return {
        "tokens_per_target_forward": (tokens - len(done)) / max(1, passes - len(done)),
        "target_forwards_per_token": passes / tokens,
        "guesses_per_token": guess_passes / tokens,
        "operations_per_token": operations / tokens,
    }


def energy(
    done: Sequence[Spent], took: Sequence[Sequence[float]], idle: float | None
) -> dict[str, float]:
    """Joules per token of the last round, all of them and above idle; nothing without a counter."""
    tokens, last = sum(len(spent.text) for spent in done), sum(rounds[-1] for rounds in took)
    if idle is None:
        return {}
    joules = sum(spent.joules or 0.0 for spent in done)
    return {
        "joules_per_token": joules / tokens,
        "joules_per_token_above_idle": (joules - idle * last) / tokens,
    }


def figures(
    setting: Setting, way: Way, of_way: Measured, turns: Turns[Spent], name: str, idle: float | None
) -> dict[str, Any]:
    """Of the way with this name: its texts' perplexity, and what they took. idle: watts, where
    energy is counted.
    """
    p50, p95 = np.quantile(of_way.seconds, [0.5, 0.95]).tolist()
    return {
        "perplexity": perplexity(of_way),
        "tokens_per_second": 1 / of_way.point[1],
        "seconds_p50": p50,
        "seconds_p95": p95,
        "tokens": int(of_way.tokens.sum()),
        **costs(setting, way, turns.done[name]),
        **energy(turns.done[name], turns.took[name], idle),
    }


def written(setting: Setting, texts: Sequence[list[int]], count: int = 2) -> dict[str, Any]:
    """The first texts and how their prompts end, to be looked at: speed is worth what they are."""
    if setting.tokenizer is None:
        return {}
    said = setting.tokenizer.decode
    pairs = zip(setting.measured[:count], texts, strict=False)
    return {
        str(i): {"prompt": said(list(request.prompt))[-80:], "text": said(text)[:240]}
        for i, (request, text) in enumerate(pairs, 1)
    }


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
