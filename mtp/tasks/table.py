"""The synthetic tasks by name. A task is a frozen dataclass of its parameters with what `Task`
says; a new one is one small file and one line here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Protocol

from mtp.tasks.copying import Copying
from mtp.tasks.induction import Induction
from mtp.tasks.polynomial import PolynomialArithmetic
from mtp.tasks.star_graph import StarGraph


class Task(Protocol):
    """Problems are ASCII, so that a byte is a token. Parameters that make no task raise a
    ValueError that begins with their name.
    """

    @property
    def longest(self) -> int:
        """Bytes of prompt and answer, at most."""
        ...

    @property
    def learns_prompt(self) -> bool:
        """Whether prompts are targets too, or answers only."""
        ...

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """A prompt and its answer, by the generator alone."""
        ...

    def is_right(self, prompt: str, answer: str) -> bool:
        """Whether a model's answer is, found from the prompt by other means than `draw`'s."""
        ...


TASKS: dict[str, type[Any]] = {
    "copying": Copying,
    "induction": Induction,
    "polynomial": PolynomialArithmetic,
    "star_graph": StarGraph,
}


def make_task(name: str | None, args: Mapping[str, int]) -> Task:
    """ValueError says what is wrong and what is allowed."""
    if name not in TASKS:
        raise ValueError(f"task={name!r}: allowed: {', '.join(TASKS)}")
    known = [f.name for f in fields(TASKS[name])]
    if unknown := sorted(args.keys() - set(known)):
        raise ValueError(f"task_args: {name} has no {unknown[0]}; it has {', '.join(known)}")
    for key, value in args.items():
        if type(value) is not int:
            raise ValueError(f"task_args.{key}={value!r}: must be a whole number")
    try:
        return TASKS[name](**args)
    except ValueError as error:
        raise ValueError(f"task_args.{error}") from None
