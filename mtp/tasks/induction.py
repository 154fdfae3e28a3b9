"""Induction (Gloeckle et al. 2024, section 4.1): does a model find what followed a name before?

Stories of a small grammar, in which only names have capital letters and every name has two letters,
two tokens of bytes. They are drawn anew for each story, with different first letters: the second
letter of a known name stands in the text and nowhere else.

    "the fox saw Qe by the river. Qe gave a pear to Zu. the owl followed Q" -> "e."

Everything is a target, as in any text; what is asked is the second letter of the story's last name.
The paper takes children's stories and puts such names into its test alone; we have none to ship.
"""

from __future__ import annotations

import random
import re
import string
from dataclasses import dataclass

SENTENCES = (
    *("{a} went to the {place}", "{a} lived by the {place}", "one day {a} found a {thing}"),
    *("{a} met {b} by the {place}", "{a} and {b} looked for a {thing}", "the {animal} saw {a}"),
    *("in the {place} {a} was happy", "{a} gave a {thing} to {b}", "{a} told {b} of the {animal}"),
    *("the {animal} followed {a}", "at the {place} there was {a}", "the {thing} was for {a}"),
    *(
        "then the {animal} ran to {a}",
        "{a} had a {thing} from {b}",
        "{a} ran off with the {thing}",
    ),
)
WORDS = {
    "place": ("river", "forest", "garden", "hill", "old mill", "barn", "lake", "market"),
    "thing": ("pear", "ball", "red hat", "lamp", "book", "shell", "drum", "cake"),
    "animal": ("fox", "owl", "dog", "brown bear", "hare", "cat", "goose", "mouse"),
}
ENDINGS = tuple(s for s in SENTENCES if s.endswith(("{a}", "{b}")))
LONGEST_WORDS = {kind: max(words, key=len) for kind, words in WORDS.items()}
LONGEST = max(len(s.format(a="Aa", b="Bb", **LONGEST_WORDS)) for s in SENTENCES)


@dataclass(frozen=True)
class Induction:
    """sentences: of a story, the last of which ends with a name. names: of its characters."""

    sentences: int = 6
    names: int = 3

    learns_prompt = True

    def __post_init__(self) -> None:
        if self.sentences < 2:
            raise ValueError(f"sentences={self.sentences}: must be at least 2")
        if not 2 <= self.names <= 26:
            raise ValueError(f"names={self.names}: allowed: 2 to 26")

    @property
    def longest(self) -> int:
        return (LONGEST + len(". ")) * self.sentences - 1

    def draw(self, rng: random.Random) -> tuple[str, str]:
        first = rng.sample(string.ascii_uppercase, self.names)
        names = [a + rng.choice(string.ascii_lowercase) for a in first]
        told = [_sentence(rng, rng.choice(SENTENCES), names) for _ in range(self.sentences - 1)]
        known = [name for name in names if any(name in sentence for sentence in told)]
        end = _sentence(rng, rng.choice(ENDINGS), names, last=rng.choice(known))
        text = f"{'. '.join([*told, end])}."
        return text[:-2], text[-2:]

    @staticmethod
    def is_right(prompt: str, answer: str) -> bool:
        """Whether the answer begins with what followed the prompt's last letter before."""
        before = re.findall(f"{prompt[-1]}(.)", prompt)
        return len(set(before)) == 1 and answer.startswith(before[0])


def _sentence(rng: random.Random, form: str, names: list[str], last: str | None = None) -> str:
    """last: the name that it is to end with."""
    a, b = rng.sample(names, 2)
    if last is not None:
        a, b = last, rng.choice([name for name in names if name != last])
        a, b = (a, b) if form.endswith("{a}") else (b, a)
    return form.format(a=a, b=b, **{kind: rng.choice(words) for kind, words in WORDS.items()})
