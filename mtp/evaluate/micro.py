"""Micro-programs: small Python tasks in MBPP's schema, for models too small for MBPP.

A task applies one to three primitive steps, one a line, to a list, a string or a number:

    def total(xs):
        \"\"\"Keep the even numbers, then return the sum.

        assert total([4, 7, 10]) == 14
        (two more)
        \"\"\"
        xs = [x for x in xs if x % 2 == 0]
        return sum(xs)

Its template is the primitives in order, and for a single step the constant too. A third of the
templates, by a hash of their steps, is held out: tests ask only for these, training documents never
do. Only a single step without a constant always belongs to training, so that every primitive is
taught; a model has to copy constants and to combine what it learned one by one.

Levels: 1 one step, with a constant; 2 two steps without constants; 3 two steps, with constants;
4 three steps with at most one constant; 5 three steps with more.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple

Task = dict[str, Any]
LEVELS = (1, 2, 3, 4, 5)
PER_CELL = 20  # tasks of each area and level


class Primitive(NamedTuple):
    name: str
    code: str  # an expression of {v}, for a pair also {w}, and {k}, the constant
    says: tuple[str, ...]  # what a task's text may call it
    constants: Sequence[Any]
    takes: str  # "list", "string", "number" or "pair"
    gives: str  # also "flag"


CONSTANTS: dict[str, Sequence[Any]] = {
    "": (),
    "few": range(2, 6),
    "some": range(3, 20),
    "many": range(2, 40),
    "letter": "abcdeghiklmnoprstu",
}

# name | code | what the text says / in other words | constants. Equal code has equal names.
TABLE = {
    ("list", "list", "list"): """
        evens | [x for x in {v} if x % 2 == 0] | keep the even numbers / drop the odd numbers
        odds | [x for x in {v} if x % 2 == 1] | keep the odd numbers / drop the even numbers
        positive | [x for x in {v} if x > 0] | keep the positive numbers / keep numbers above zero
        negative | [x for x in {v} if x < 0] | keep the negative numbers / keep numbers below zero
        above | [x for x in {v} if x > {k}] | keep numbers above {k} / keep numbers over {k} | some
        below | [x for x in {v} if x < {k}] | keep numbers below {k} / keep numbers under {k} | some
        without | [x for x in {v} if x != {k}] | remove every {k} / drop numbers equal to {k} | some
        add | [x + {k} for x in {v}] | add {k} to each number / increase each number by {k} | many
        less | [x - {k} for x in {v}] | subtract {k} from each / decrease each number by {k} | many
        times | [x * {k} for x in {v}] | multiply each number by {k} / scale each by {k} | many
        squares | [x * x for x in {v}] | square each number / take the square of each number
        negated | [-x for x in {v}] | negate each number / flip the sign of each number
        absolute | [abs(x) for x in {v}] | make each number absolute / take each absolute value
        ascending | sorted({v}) | sort the list / sort in ascending order
        descending | sorted({v}, reverse=True) | sort in descending order / sort from high to low
        backwards | {v}[::-1] | reverse the list / reverse the order
        first | {v}[:{k}] | take the first {k} numbers / keep only the first {k} numbers | few
        last | {v}[-{k}:] | take the last {k} numbers / keep only the last {k} numbers | few
        skip | {v}[{k}:] | skip the first {k} numbers / drop the first {k} numbers | few
    """,
    ("list", "list", "number"): """
        total | sum({v}) | return the sum / add them all up
        size | len({v}) | return how many there are / count them
        largest | max({v}, default=0) | return the largest or 0 / find the maximum or 0
        smallest | min({v}, default=0) | return the smallest or 0 / find the minimum or 0
    """,
    ("string", "string", "string"): """
        upper | {v}.upper() | convert to upper case / make all letters upper case
        lower | {v}.lower() | convert to lower case / make all letters lower case
        swapped | {v}.swapcase() | swap the case / flip the case of each letter
        title | {v}.title() | capitalize each word / convert to title case
        backwards | {v}[::-1] | reverse the string / reverse the characters
        joined | {v}.replace(' ', '') | remove the spaces / drop all spaces
        dashed | {v}.replace(' ', '-') | replace spaces by dashes / turn spaces into dashes
        ordered | ''.join(sorted({v})) | sort the characters / put the characters in order
        doubled | {v} + {v} | double the string / repeat the string twice
        mute | ''.join(c for c in {v} if c not in 'aeiou') | remove the vowels / drop all vowels
        without | {v}.replace('{k}', '') | remove every '{k}' / drop each '{k}' | letter
        starred | {v}.replace('{k}', '*') | replace '{k}' by '*' / turn each '{k}' into '*' | letter
        first | {v}[:{k}] | take the first {k} characters / keep the first {k} characters | few
        last | {v}[-{k}:] | take the last {k} characters / keep the last {k} characters | few
        skip | {v}[{k}:] | skip the first {k} characters / drop the first {k} characters | few
        prefixed | '{k}' + {v} | put '{k}' in front / add '{k}' at the start | letter
        suffixed | {v} + '{k}' | append '{k}' / add '{k}' at the end | letter
    """,
    ("string", "string", "number"): """
        size | len({v}) | return the length / count the characters
        words | len({v}.split()) | return the number of words / count the words
        vowels | sum(c in 'aeiou' for c in {v}) | return the number of vowels / count the vowels
        count | {v}.count('{k}') | return the number of '{k}' / count each '{k}' | letter
    """,
    ("arithmetic", "pair", "number"): """
        added | {v} + {w} | add the two numbers / take the sum of both
        product | {v} * {w} | multiply the two numbers / take the product of both
        difference | {v} - {w} | subtract the second from the first / take first minus second
        larger | max({v}, {w}) | take the larger number / take the maximum of both
        smaller | min({v}, {w}) | take the smaller number / take the minimum of both
    """,
    ("arithmetic", "number", "number"): """
        add | {v} + {k} | add {k} / increase by {k} | many
        less | {v} - {k} | subtract {k} / decrease by {k} | many
        times | {v} * {k} | multiply by {k} / scale by {k} | many
        divided | {v} // {k} | divide by {k}, rounding down / floor divide by {k} | some
        remainder | {v} % {k} | take the remainder modulo {k} / take it modulo {k} | some
        square | {v} * {v} | square it / take the square
        cube | {v} * {v} * {v} | cube it / take the cube
        doubled | {v} + {v} | double it / add it to itself
        halved | {v} // 2 | halve it, rounding down / floor divide by two
        unit | abs({v}) % 10 | take the last digit / keep the last digit
        negated | -{v} | negate it / flip the sign
        absolute | abs({v}) | take the absolute value / make it absolute
        digits | sum(int(d) for d in str(abs({v}))) | take the sum of digits / add up the digits
        width | len(str(abs({v}))) | count the digits / take the number of digits
        atleast | max({v}, {k}) | raise it to at least {k} / take the maximum with {k} | many
        atmost | min({v}, {k}) | lower it to at most {k} / take the minimum with {k} | many
    """,
    ("arithmetic", "number", "flag"): """
        even | {v} % 2 == 0 | check whether it is even / return whether it is even
        exceeds | {v} > {k} | check whether it is above {k} / return whether it is above {k} | many
        divisible | {v} % {k} == 0 | check whether {k} divides it / check divisibility by {k} | some
    """,
}


def _parse() -> dict[str, list[Primitive]]:
    areas: dict[str, list[Primitive]] = {}
    for (area, takes, gives), rows in TABLE.items():
        for row in rows.strip().splitlines():
            name, code, says, *constants = map(str.strip, row.split(" | "))
            phrases = tuple(map(str.strip, says.split(" / ")))
            known = CONSTANTS["".join(constants)]
            areas.setdefault(area, []).append(Primitive(name, code, phrases, known, takes, gives))
    return areas


PRIMITIVES = _parse()

# One name each, and functions are called by their last step: a small model sees few documents, and
# what it has to learn is the steps.
ARGUMENTS = {"list": "xs", "string": "s", "number": "n", "pair": "a, b"}
WORDS = (
    *("Apple", "banana", "Cherry", "data", "Earth", "green", "house", "kite", "Lemon", "moon"),
    *("number", "orange", "Paris", "quiet", "river", "stone", "Table", "under", "water", "zebra"),
)
JOINTS = (", then ", " and then ", "; then ")


class Step(NamedTuple):
    primitive: Primitive
    constant: Any  # None: the primitive has none

    def code(self, arguments: str) -> str:
        v, _, w = arguments.partition(", ")
        return self.primitive.code.format(v=v, w=w, k=self.constant)


def tasks(split: str = "test") -> list[Task]:
    """300 tasks of held-out templates ("test") or of training templates ("train"), always the same.

    Twenty of each area and level, in MBPP's schema and with `area`, `level` and `template`.
    """
    if split not in ("test", "train"):
        raise ValueError(f"split={split!r}: allowed: test, train")
    rng, code = random.Random(f"micro {split}"), itemgetter("code")
    found = [
        task
        for level in LEVELS
        for area in PRIMITIVES
        for task in islice(_distinct(code, rng, [area], [level], split == "test"), PER_CELL)
    ]
    first = 1 if split == "test" else 1 + len(found)
    return [{"task_id": first + i, **task} for i, task in enumerate(found)]


def prompt(task: Task) -> str:
    """The function's signature and docstring: the task's text and its three asserts."""
    signature = task["code"].split("\n", 1)[0]
    checks = "".join(f"    {check}\n" for check in task["test_list"])
    return f'{signature}\n    """{task["text"]}\n\n{checks}    """\n'


def completion(task: Task) -> str:
    """The body that follows the prompt; a model's ends before the first line without indent."""
    return task["code"].split("\n", 1)[1] + "\n"


def training_text(count: int | None = None, seed: int = 0) -> Iterator[str]:
    """Documents of training templates only, each a prompt and its completion, all different.

    Without a count they do not end.
    """
    rng = random.Random(f"micro documents {seed}")
    for task in islice(_distinct(prompt, rng, list(PRIMITIVES), (0, *LEVELS), False), count):
        yield prompt(task) + completion(task)


def held_out(template: str) -> bool:
    """Whether tests ask for this template, so that training documents never do."""
    _, steps = template.split(": ")
    plain = " " not in steps  # one step without a constant
    return not plain and hashlib.sha256(steps.encode("ascii")).digest()[0] % 3 == 0


def _distinct(
    key: Callable[[Task], str],
    rng: random.Random,
    areas: Sequence[str],
    levels: Sequence[int],
    wanted: bool,
) -> Iterator[Task]:
    """Endless tasks that differ by `key`, of templates held out or not."""
    seen: set[str] = set()
    while True:
        area, level = rng.choice(areas), rng.choice(levels)
        steps = _steps(rng, area)
        template = _template(area, steps)
        if _level(steps) != level or held_out(template) != wanted:
            continue
        task = _task(rng, steps)
        if task and key(task) not in seen:
            seen.add(key(task))
            yield {**task, "area": area, "level": level, "template": template}


def _steps(rng: random.Random, area: str) -> list[Step]:
    """One to three steps, each of what the one before gives, none twice."""
    steps: list[Step] = []
    for _ in range(rng.randint(1, 3)):
        fitting = [p for p in PRIMITIVES[area] if _fits(p, steps)]
        if fitting:
            primitive = rng.choice(fitting)
            constant = rng.choice(primitive.constants) if primitive.constants else None
            steps.append(Step(primitive, constant))
    return steps


def _fits(primitive: Primitive, steps: list[Step]) -> bool:
    if not steps:
        return True
    names = [step.primitive.name for step in steps]
    return primitive.takes == steps[-1].primitive.gives and primitive.name not in names


def _level(steps: list[Step]) -> int:
    """1 to 5; 0 for one step without a constant."""
    constants = sum(step.constant is not None for step in steps)
    if len(steps) == 1:
        return constants
    return 2 * len(steps) - 2 + (constants >= len(steps) - 1)


def _template(area: str, steps: list[Step]) -> str:
    if len(steps) == 1 and steps[0].constant is not None:
        return f"{area}: {steps[0].primitive.name} {steps[0].constant}"
    return f"{area}: {', '.join(step.primitive.name for step in steps)}"


def _task(rng: random.Random, steps: list[Step]) -> Task | None:
    """None where no inputs were found that tell the function from a shorter one."""
    takes = steps[0].primitive.takes
    arguments, name = ARGUMENTS[takes], steps[-1].primitive.name
    body = _body(steps, arguments)
    shorter = [steps[:i] + steps[i + 1 :] for i in range(len(steps))]
    for _ in range(8):
        inputs = [_input(rng, takes) for _ in range(3)]
        results = _results(body, arguments, inputs)
        enough = 2 if steps[-1].primitive.gives == "flag" else 3
        if len(set(results)) == enough and not any(
            _results(_body(others, arguments), arguments, inputs) == results for others in shorter
        ):
            checks = [f"assert {name}({i}) == {r}" for i, r in zip(inputs, results, strict=True)]
            code = f"def {name}({arguments}):\n{body}"
            return {"text": _text(rng, steps), "code": code, "test_list": checks}
    return None


def _body(steps: list[Step], arguments: str) -> str:
    variable = arguments.split(", ")[0]
    lines = [step.code(arguments) for step in steps] or [variable]
    return "".join(f"    {variable} = {line}\n" for line in lines[:-1]) + f"    return {lines[-1]}"


def _results(body: str, arguments: str, inputs: list[str]) -> list[str]:
    """What the function gives for each of the inputs, as source text."""
    names: dict[str, Any] = {}
    exec(f"def function({arguments}):\n{body}", names)
    return [repr(eval(f"function({text})", names)) for text in inputs]


def _input(rng: random.Random, takes: str) -> str:
    if takes == "list":
        return repr([rng.randint(-9, 20) for _ in range(rng.randint(3, 5))])
    if takes == "string":
        return repr(" ".join(rng.sample(WORDS, rng.randint(1, 3))))
    bounds = rng.choices((9, 60, 300), k=2 if takes == "pair" else 1)
    return ", ".join(str(rng.randint(-bound // 3, bound)) for bound in bounds)


def _text(rng: random.Random, steps: list[Step]) -> str:
    phrases = [rng.choice(p.says).format(k=constant) for p, constant in steps]
    text = rng.choice(JOINTS).join(phrases)
    return f"{text[0].upper()}{text[1:]}."
