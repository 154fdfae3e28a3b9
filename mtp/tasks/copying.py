"""Copying: "qwfp=qwfp". What any model must learn in minutes, to see that all else is in order."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass


@dataclass(frozen=True)
class Copying:
    """length: letters of a word. symbols: how many different ones there are."""

    length: int = 10
    symbols: int = 26

    learns_prompt = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length={self.length}: must be at least 1")
        if not 2 <= self.symbols <= 26:
            raise ValueError(f"symbols={self.symbols}: allowed: 2 to 26")

    @property
    def longest(self) -> int:
        return 2 * self.length + 1

    def draw(self, rng: random.Random) -> tuple[str, str]:
        word = "".join(rng.choices(string.ascii_lowercase[: self.symbols], k=self.length))
        return f"{word}=", word

    @staticmethod
    def is_right(prompt: str, answer: str) -> bool:
        return answer + "=" == prompt
