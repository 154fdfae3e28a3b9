"""The way through a star (Bachmann & Nagarajan 2024, 2403.06963): the task on which learning the
next token alone goes wrong.

From a start, `degree` arms of `length` nodes (the start included) go out. The question lists all
edges in random order, each from the start outwards, then start and goal, which ends one of the
arms; the answer is the way:

    "cd,xa,ab,xc/xb=" -> "xab"

Only the step out of the start is hard: it asks which arm the goal ends. All later ones follow an
edge from the token before, so that a next-token learner fits them without looking at the goal, and
is left with guessing the arm: 1 / degree of the answers are right. Nodes are letters and digits,
so that each is one token of bytes.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

NODES = string.ascii_letters + string.digits


@dataclass(frozen=True)
class StarGraph:
    """nodes: the names there are, of which every graph takes 1 + degree x (length - 1)."""

    degree: int = 3
    length: int = 3
    nodes: int = 30

    learns_prompt = False

    def __post_init__(self) -> None:
        for key in ("degree", "length"):
            if getattr(self, key) < 2:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 2")
        if not self._taken <= self.nodes <= len(NODES):
            raise ValueError(
                f"nodes={self.nodes}: allowed: {self._taken} (what degree={self.degree} and "
                f"length={self.length} take) to {len(NODES)}"
            )

    @property
    def _taken(self) -> int:
        return 1 + self.degree * (self.length - 1)

    @property
    def longest(self) -> int:
        return 3 * (self._taken - 1) + 3 + self.length

    def draw(self, rng: random.Random) -> tuple[str, str]:
        start, *others = rng.sample(NODES[: self.nodes], self._taken)
        arms = [[start, *others[i :: self.degree]] for i in range(self.degree)]
        edges = [a + b for arm in arms for a, b in zip(arm, arm[1:], strict=False)]
        rng.shuffle(edges)
        way = "".join(rng.choice(arms))
        return f"{','.join(edges)}/{start}{way[-1]}=", way

    @staticmethod
    def is_right(prompt: str, answer: str) -> bool:
        """By walking from the goal back to the start: every other node has one edge into it."""
        edges, _, ends = prompt.partition("/")
        before = {edge[1]: edge[0] for edge in edges.split(",")}
        start, goal = ends[0], ends[1]
        way = [goal]
        while way[-1] != start:
            way.append(before[way[-1]])
        return list(answer) == way[::-1]
