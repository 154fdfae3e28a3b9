"""How many guesses a step makes: as many as pay, by what was accepted and how long steps took.

With guess j standing with probability a_j where those before it stand, a step of k guesses yields
1 + a_1 + a_1 a_2 + ... + a_1 ... a_k tokens per row. The depth with the most tokens per second is
taken, and the others are tried now and then, so that a change is noticed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Protocol

# Evidence of acceptance fades by this much a step: fifty steps tell a_j to 0.05, and a text that
# becomes another one is followed within some dozens of steps.
FORGOTTEN = 0.02
# Share of the time that may be lost to trying depths that seem not to be the best. What a drafter
# has to read after skipped steps comes on top: it cannot be had for less.
TRYING = 0.02
# The cost of a depth is the median of its last steps, so many: noise of a tenth becomes 0.03, and a
# cost that changed while others were better is noticed within eight tries.
TIMINGS = 15


class DepthPolicy(Protocol):
    """Decides how many guesses each step makes. The text never depends on it."""

    def choose(self, most: int) -> int:
        """Guesses in a line for the next step, 0..most; 0 skips the drafter."""

    def observe(self, k: int, accepted: Sequence[int], seconds: float) -> None:
        """A step of k guesses took this long; accepted: how many stood, for each busy row."""


@dataclass
class _Depth:
    """What is known of one depth: seconds of its last steps; how often its last guess was judged
    and how often it stood, per row and fading; from when on it may be tried again; steps since the
    last that was as deep.
    """

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=TIMINGS))
    judged: float = 0.0
    stood: float = 0.0
    due: float = 0.0
    skipped: int = 0


class AdaptiveDepth:
    """The depth with the most tokens per second (`DepthPolicy`).

    Costs are a table, measured depth by depth, and no line: the first guess brings the drafter's
    own cost with it, and rows come in tiles. All depths are tried at the start, twice. Later one
    that is not the best is tried again when the seconds that its last try lost are its part of
    TRYING of the time since; so trying in vain costs little, whatever a step costs, and a try that
    gains is followed by another at once.
    """

    def __init__(self) -> None:
        self.depths: list[_Depth] = []
        self.now = 0.0  # seconds of all steps
        self.best, self.rate = 0, 0.0  # of the last choice, tokens per second and row
        self.owed = 0.0  # seconds lost by tries, not yet waited for

    def choose(self, most: int) -> int:
        self.depths += [_Depth() for _ in range(len(self.depths), most + 1)]
        rates = self._rates(most)
        self.rate = max(rates)
        self.best = rates.index(self.rate)
        due = [k for k in range(most + 1) if k != self.best and self.depths[k].due <= self.now]
        return min(due, key=lambda k: self.depths[k].due, default=self.best)

    def observe(self, k: int, accepted: Sequence[int], seconds: float) -> None:
        depth = self.depths[k]
        # After many steps less deep a drafter first reads what it missed, which says nothing of
        # what the depth costs. A few are no more than it reads after a step that went well.
        usual = k == 0 or depth.skipped < len(self.depths)
        for j, other in enumerate(self.depths):
            other.skipped = 0 if j <= k else other.skipped + 1
        self.now += seconds
        if usual:
            depth.seconds.append(seconds)
        self._learn(k, accepted)
        if k != self.best:
            self._charge(depth, 1 + sum(accepted) / len(accepted), seconds, usual)

    def _charge(self, depth: _Depth, tokens: float, seconds: float, usual: bool) -> None:
        """Let a depth rest after a try. The first two are due at once, as one may be disturbed; so
        is one after an unusual try, which did not tell the cost.
        """
        if len(depth.seconds) > 1:
            cost = min(seconds, median_low(depth.seconds))  # a disturbance is not the try's fault
            self.owed += max(0.0, cost - tokens / self.rate) * (len(self.depths) - 1)
            if not usual:
                self.owed += seconds - cost  # read once for all depths
        if usual:
            depth.due = self.now + self.owed / TRYING
            self.owed = 0.0

    def _learn(self, k: int, accepted: Sequence[int]) -> None:
        for j, depth in enumerate(self.depths):
            depth.judged *= 1 - FORGOTTEN
            depth.stood *= 1 - FORGOTTEN
            if 1 <= j <= k:
                depth.judged += sum(a >= j - 1 for a in accepted) / len(accepted)
                depth.stood += sum(a >= j for a in accepted) / len(accepted)

    def _rates(self, most: int) -> list[float]:
        """Tokens per second and row at depths 0..most; 0 where no step was timed yet."""
        rates, tokens, standing, a = [], 1.0, 1.0, 0.5
        for k, depth in enumerate(self.depths[: most + 1]):
            if k > 0:
                # Where evidence lacks, a guess is as good as the one before; the first is a toss.
                a = (depth.stood + a) / (depth.judged + 1)
                standing *= a
                tokens += standing
            rates.append(tokens / median_low(depth.seconds) if depth.seconds else 0.0)
        return rates
