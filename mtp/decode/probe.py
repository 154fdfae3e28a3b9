"""How many threads, and which floating type, decode fastest here: a few real steps tell.

Neither can be known beforehand. A second thread nearly halves a step of wide matrices, and makes
one many times longer where something else wants the core. bfloat16 halves what a step reads, and
makes the rows of a verifying step nearly free, on processors that multiply it in hardware;
elsewhere it is emulated, many times slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mtp.decode.contract import Request
from mtp.decode.loop import Decoding

ROUNDS, SECONDS = 2, 0.5  # at least so many; small models get more of them, in so much time
STEPS = 4  # per round and setting: what disturbs a thread seldom spares them all
PROMPT, NEW = 16, 64  # most tokens of the texts, which leave room for the steps
CLEARLY = 0.05  # less is noise, and a text should not hang on noise


class Setting(NamedTuple):
    threads: int
    precision: str

    def __str__(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads > 1)} in {self.precision}"


@dataclass
class Probe:
    """What was chosen, and the seconds of a step in each setting, none where there is only one."""

    chosen: Setting
    seconds: dict[Setting, float]

    def __str__(self) -> str:
        steps = ", ".join(f"{x} {1000 * took:.2f}" for x, took in self.seconds.items())
        return f"{self.chosen} (ms per step: {steps})" if steps else str(self.chosen)


def fastest(
    decoders: Mapping[str, Callable[[Sequence[Request]], Decoding]],
    requests: Sequence[Request],
    threads: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
) -> Probe:
    """Decode the beginnings of these requests in every setting, in turns, for a second or two where
    steps are short. The number of threads is given back as it was.

    decoders: for each precision what will decode later, such as `partial(Decoding, model,
    drafter=OwnHeads())`: with heads, it is verifying several rows that counts. Give bfloat16 beside
    float32 only where other text is welcome, since it changes near-ties. decoders and threads begin
    with the plainest, which a later one must clearly beat.
    """
    settings = [Setting(n, precision) for precision in decoders for n in threads]
    if len(settings) == 1 or not requests:
        return Probe(settings[0], {})
    brief = [
        replace(r, prompt=r.prompt[:PROMPT], max_new_tokens=min(r.max_new_tokens, NEW), stop=None)
        for r in requests
    ]
    seconds = dict.fromkeys(settings, math.inf)
    before, started, rounds = torch.get_num_threads(), clock(), 0
    try:
        while rounds < ROUNDS or clock() - started < SECONDS:
            for setting in settings:
                torch.set_num_threads(setting.threads)
                took = _seconds_per_step(decoders[setting.precision](brief), clock)
                seconds[setting] = min(seconds[setting], took)
            rounds += 1
    finally:
        torch.set_num_threads(before)
    return Probe(_clearly_least(seconds), seconds)


@torch.inference_mode()
def _seconds_per_step(decoding: Decoding, clock: Callable[[], float]) -> float:
    """Without the prompts' passes, which also warm up."""
    decoding.fill()
    started, steps = clock(), 0
    while steps < STEPS and decoding.fill():
        decoding.step()
        steps += 1
    return (clock() - started) / steps if steps else 0.0


def _clearly_least(seconds: Mapping[Setting, float]) -> Setting:
    best, *others = seconds
    for setting in others:
        if seconds[setting] < (1 - CLEARLY) * seconds[best]:
            best = setting
    return best
