"""What `make demo` measures: how much faster does a model decode when its own heads draft?

Plain and self-speculative decoding take turns on every prompt, in one process, batch 1, fp32, with
the same noise, so that their texts must be equal; our plain greedy decoding and the plainest loop
take turns at every step. The speedup is of all prompts' seconds, as the acceptance is of all
prompts' steps; medians stand beside with quartiles, of speedups over prompts, of steps over all
pairs. Greedy text of a small model runs into loops, which flatter its drafts or ruin them, so texts
are sampled and the greedy figures stand beside. `benchmarks.decode` compares more decoders.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import mtp
from benchmarks.bare import plain_steps_against_bare, verify_cost
from benchmarks.timing import fastest_threads, spread
from mtp.decode.contract import Completion, Drafter
from mtp.model import Transformer
from mtp.records import Document
from mtp.tokenizer import Tokenizer


@dataclass
class DecodeConfig:
    prompts: int = 16
    prompt_tokens: int = 128
    new_tokens: int = 256
    bare_tokens: int = 64  # of the greedy comparison with the plainest loop
    temperature: float = 0.5
    rounds: int = 3  # of plain and drafted decoding


@dataclass
class Decoded:
    """One prompt under both decoders; bare_over_plain: of each pair of greedy steps."""

    prompt: list[int]
    plain: Completion
    drafted: Completion
    same: bool
    plain_seconds: float
    drafted_seconds: float
    bare_over_plain: list[float]


def held_out_prompts(
    documents: Sequence[Document], tokenizer: Tokenizer, count: int, length: int
) -> list[list[int]]:
    """`count` prompts of `length` tokens, each from a line's start in the middle of a document."""
    long = [d.text for d in documents if len(d.text) > 20 * length]
    if len(long) < count:
        raise ValueError(f"{count} prompts were asked for, but only {len(long)} documents are long")
    texts = [long[i * len(long) // count] for i in range(count)]
    starts = [text.rfind("\n", 0, len(text) // 2) + 1 for text in texts]
    return [
        tokenizer.encode(t[at : at + 8 * length])[:length]
        for t, at in zip(texts, starts, strict=True)
    ]


def decode(model: Transformer, prompt: list[int], config: DecodeConfig) -> Decoded:
    def timed(drafter: Drafter | None) -> tuple[float, Completion]:
        request, sampling = mtp.Request(prompt, config.new_tokens), mtp.Sampling(config.temperature)
        started = time.perf_counter()
        completion = mtp.generate(model, [request], drafter, sampling)[0]
        return time.perf_counter() - started, completion

    # In turns, each one's faster: what ran just before leaves the caches to the next of its kind.
    turns = [(timed(None), timed(mtp.OwnHeads())) for _ in range(config.rounds)]
    (plain_seconds, plain), (drafted_seconds, drafted) = (
        min(of_one, key=lambda turn: turn[0]) for of_one in zip(*turns, strict=True)
    )
    pairs, same = plain_steps_against_bare(model, prompt, config.bare_tokens)
    same = same and plain.tokens == drafted.tokens
    return Decoded(prompt, plain, drafted, same, plain_seconds, drafted_seconds, pairs)


def measure(
    model: Transformer,
    prompts: list[list[int]],
    config: DecodeConfig,
    report: Callable[[Decoded], None] = lambda done: None,
) -> tuple[dict[str, Any], list[Decoded]]:
    """Figures of all prompts, and the completions themselves."""
    brief = replace(config, new_tokens=min(64, config.new_tokens), bare_tokens=2, rounds=1)
    # Of all that is compared, together: a plain step may not care, where wider ones lose by two.
    torch.set_num_threads(fastest_threads(lambda: decode(model, prompts[0], brief)))
    done = []
    for prompt in prompts:
        done.append(decode(model, prompt, config))
        report(done[-1])
    steps = sum(d.drafted.steps for d in done)
    accepted = [sum(x) for x in zip(*(d.drafted.accepted for d in done), strict=True)]
    drafted = [sum(x) for x in zip(*(d.drafted.drafted for d in done), strict=True)]
    speedup = [d.plain_seconds / d.drafted_seconds for d in done]
    against_bare = [pair for d in done for pair in d.bare_over_plain]
    figures = {
        "prompts": len(done),
        "new_tokens": config.new_tokens,
        "identical": all(d.same for d in done),
        "mean_acceptance_length": 1 + sum(accepted) / steps,
        "acceptance": [a / d for a, d in zip(accepted, drafted, strict=True)],
        "repetition": statistics.mean(repetition(d.plain.tokens) for d in done),
        "temperature": config.temperature,
        "greedy": greedy(model, prompts, config),
        "verify_cost": verify_cost(model, config.prompt_tokens + config.new_tokens // 2),
        "speedup": sum(d.plain_seconds for d in done) / sum(d.drafted_seconds for d in done),
        "speedup_of_prompts": statistics.median(speedup),
        "speedup_of_prompts_iqr": spread(speedup),
        "ar_over_bare_loop": statistics.median(against_bare),
        "ar_over_bare_loop_iqr": spread(against_bare),
        "decode_threads": torch.get_num_threads(),
    }
    return figures, done


def greedy(model: Transformer, prompts: list[list[int]], config: DecodeConfig) -> dict[str, float]:
    """Acceptance and repetition of greedy text, decoded in one batch and not timed."""
    requests = [mtp.Request(prompt, config.new_tokens) for prompt in prompts]
    done = mtp.generate(model, requests, mtp.OwnHeads(), batch_size=len(prompts))
    accepted, steps = sum(sum(c.accepted) for c in done), sum(c.steps for c in done)
    return {
        "mean_acceptance_length": 1 + accepted / steps,
        "repetition": statistics.mean(repetition(c.tokens) for c in done),
    }


def repetition(tokens: list[int], n: int = 16) -> float:
    """Share of n-grams that occurred before in the same text: near 1, a greedy loop flatters its
    drafts.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
