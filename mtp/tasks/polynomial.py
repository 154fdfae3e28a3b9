"""Arithmetic of polynomials in F_7[X]/(X^5) (Gloeckle et al. 2024, section 4.2 and appendix K).

A polynomial is its five coefficients, the constant first. An expression of m operations is a random
tree of - (negation), +, * and @ (composition), in brackets:

    "((10000+-60000)*01000)=" -> "02000"        (1 + 1) X = 2 X

How expressions are written is our own choice, the paper does not say. Models are trained on m = 1
to 5 and asked for more. `pauses` signs stand before the equality sign: room to compute.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PRIME, SIZE = 7, 5
Polynomial = list[int]  # SIZE coefficients


@dataclass(frozen=True)
class PolynomialArithmetic:
    """least, most: operations of an expression, each number of them as often."""

    least: int = 1
    most: int = 5
    pauses: int = 0

    learns_prompt = False

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"least={self.least}: allowed: 1 to most={self.most}")
        if self.most > 99:
            raise ValueError(f"most={self.most}: must be at most 99")
        if self.pauses < 0:
            raise ValueError(f"pauses={self.pauses}: must be at least 0")

    @property
    def longest(self) -> int:
        return SIZE * (self.most + 1) + 3 * self.most + self.pauses + 1 + SIZE

    def draw(self, rng: random.Random) -> tuple[str, str]:
        text, value = _expression(rng, rng.randint(self.least, self.most))
        return f"{text}{'_' * self.pauses}=", _written(value)

    @staticmethod
    def is_right(prompt: str, answer: str) -> bool:
        rest, value = _read(prompt.rstrip("=").rstrip("_"))
        if rest:
            raise ValueError(f"{prompt!r}: no expression, {rest!r} is left over")
        return answer == "".join(str(value.get(i, 0)) for i in range(SIZE))


# Writing: by Horner's rule and convolution.


def _expression(rng: random.Random, operations: int) -> tuple[str, Polynomial]:
    if operations == 0:
        value = [rng.randrange(PRIME) for _ in range(SIZE)]
        return _written(value), value
    sign = rng.choice("-+*@")
    if sign == "-":
        text, value = _expression(rng, operations - 1)
        return f"-{text}", [-c % PRIME for c in value]
    here = rng.randrange(operations)
    left, f = _expression(rng, here)
    right, g = _expression(rng, operations - 1 - here)
    value = {"+": _sum, "*": _product, "@": _composed}[sign](f, g)
    return f"({left}{sign}{right})", value


def _written(value: Polynomial) -> str:
    return "".join(map(str, value))


def _sum(f: Polynomial, g: Polynomial) -> Polynomial:
    return [(a + b) % PRIME for a, b in zip(f, g, strict=True)]


def _product(f: Polynomial, g: Polynomial) -> Polynomial:
    return [sum(f[j] * g[i - j] for j in range(i + 1)) % PRIME for i in range(SIZE)]


def _composed(f: Polynomial, g: Polynomial) -> Polynomial:
    value = [0] * SIZE
    for c in reversed(f):
        value = _product(value, g)
        value[0] = (value[0] + c) % PRIME
    return value


# Checking: another reader, on sparse polynomials {power: coefficient}.

Sparse = dict[int, int]


def _read(text: str) -> tuple[str, Sparse]:
    """What an expression at the start of a text is worth, and the text behind it."""
    if text.startswith("-"):
        rest, value = _read(text[1:])
        return rest, {i: PRIME - c for i, c in value.items()}
    if not text.startswith("("):
        digits = text[:SIZE]
        return text[SIZE:], {i: int(c) for i, c in enumerate(digits) if c != "0"}
    rest, f = _read(text[1:])
    sign, (rest, g) = rest[0], _read(rest[1:])
    if sign == "+":
        value = _collected([*f.items(), *g.items()])
    elif sign == "*":
        value = _times(f, g)
    else:
        value = {}
        power = {0: 1}
        for i in range(SIZE):
            scaled = [(j, f.get(i, 0) * c) for j, c in power.items()]
            value, power = _collected([*value.items(), *scaled]), _times(power, g)
    return rest.removeprefix(")"), value


def _times(f: Sparse, g: Sparse) -> Sparse:
    return _collected([(i + j, a * b) for i, a in f.items() for j, b in g.items()])


def _collected(terms: list[tuple[int, int]]) -> Sparse:
    value: Sparse = {}
    for power, c in terms:
        if power < SIZE:
            value[power] = (value.get(power, 0) + c) % PRIME
    return {power: c for power, c in value.items() if c}
