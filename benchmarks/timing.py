"""What benchmarks share about clocks on a machine that does other things too: calls take turns, and
medians of their ratios are reported with quartiles.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch

ALL_THREADS = torch.get_num_threads()  # as many as cores that this process may use
Group = TypeVar("Group")  # of texts, or one
Result = TypeVar("Result")


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """What `times` calls take, with all that they left to a GPU."""
    _wait()
    started = time.perf_counter()
    for _ in range(times):
        call()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratio(a: Callable[[], object], b: Callable[[], object], repeats: int, burst: int = 1) -> float:
    """Median of time(a) / time(b) over interleaved pairs of `burst` calls each, after two warm-ups
    of each.
    """
    for _ in range(2):
        a(), b()
    pairs = []
    for i in range(repeats):
        first, second = (a, b) if i % 2 else (b, a)
        times = {first: seconds(first, burst), second: seconds(second, burst)}
        pairs.append(times[a] / times[b])
    return statistics.median(pairs)


class Turns(NamedTuple, Generic[Result]):
    """Of every contender, for each group of prompts: seconds of each round, and what came out of
    the last.
    """

    took: dict[str, list[list[float]]]
    done: dict[str, list[Result]]


def take_turns(
    found: Mapping[str, Callable[[Group, int], Result]],
    groups: Sequence[Group],
    new: int,
    rounds: int,
    tell: Callable[[int, int], object] = lambda taken, of: None,
) -> Turns[Result]:
    """Every contender (group, new tokens) has every group in every round, in an order that moves on
    each time and turns round in every other round. tell: hears how many turns of all are taken.
    """
    took: dict[str, list[list[float]]] = {name: [[] for _ in groups] for name in found}
    done: dict[str, list[Result]] = {name: [] for name in found}

    def turn(name: str, group: int) -> None:
        done[name][group:] = [found[name](groups[group], new)]

    names = list(found)
    tell(0, rounds * len(groups))
    for i in range(rounds):
        for group in range(len(groups)):
            first = (i + group) % len(names)
            order = [*names[first:], *names[:first]]
            for name in order[::-1] if i % 2 else order:
                took[name][group].append(seconds(partial(turn, name, group)))
            tell(i * len(groups) + group + 1, rounds * len(groups))
    return Turns(took, done)


def progress(what: str, every: float = 2.0) -> Callable[[int, int], None]:
    """Tells on stderr how many of all are done, and how long the others will take. To be told that
    none is done yet starts its clock.
    """
    started = told = time.monotonic()
    first: int | None = None  # of this command, which may go on with another's

    def tell(done: int, total: int) -> None:
        nonlocal started, told, first
        now, first = time.monotonic(), done - 1 if first is None else first
        if not done:
            started, first = now, 0
        elif now - told >= every or done == total:
            told, left = now, int((now - started) / (done - first) * (total - done))
            said = f"{done}/{total} {what}  {left // 60}:{left % 60:02d} left"
            print(said, file=sys.stderr)

    return tell


def spread(values: Sequence[float]) -> list[float]:
    """First and third quartile."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return [low, high]


def fastest_threads(call: Callable[[], object]) -> int:
    """1, or all threads: on a busy machine two can be far slower than one. Fastest of three."""
    times = {}
    for threads in sorted({1, ALL_THREADS}):
        torch.set_num_threads(threads)
        times[threads] = min(seconds(call) for _ in range(3))
    return min(times, key=lambda threads: times[threads])


def copy_bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes per second that copying `size` bytes reads and writes. Median of nine."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * size / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(9))
