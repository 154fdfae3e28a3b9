"""How the samples of a comparison are drawn, judged and kept."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import mtp
from benchmarks.subjects import Subject
from mtp.decode.contract import Completion
from mtp.decode.drafters import make_drafter
from mtp.evaluate.code import (
    Benchmark,
    Problem,
    Score,
    completion_text,
    cut,
    reference_bits,
    score_by,
)
from mtp.evaluate.samples import Sample, SampleFile
from mtp.evaluate.sandbox import Sandbox
from mtp.tokenizer import Tokenizer

JUDGED = 32  # samples that wait for their verdicts together: at most these are drawn again
TOO_LONG = "prompt_too_long"  # in the place of a verdict


@dataclass
class Cell:
    """One model with one drafter at one temperature, and its samples. new_tokens: at most, and no
    more than the context holds. rows: decoded at a time.
    """

    model: Subject
    name: str  # of the model
    drafter: str
    sampling: mtp.Sampling
    new_tokens: int
    seed: int
    n: int
    rows: int
    problems: tuple[Problem, ...]
    file: SampleFile

    @property
    def label(self) -> str:
        return self.name if self.drafter == "none" else f"{self.name}, {self.drafter}"

    @property
    def temperature(self) -> float:
        return self.sampling.temperature

    @property
    def samples(self) -> list[Sample]:
        """Those asked for, in order; the file may hold more."""
        place = {problem.task_id: i for i, problem in enumerate(self.problems)}
        wanted = [s for s in self.file.samples if s.task_id in place and s.number < self.n]
        return sorted(wanted, key=lambda s: (place[s.task_id], s.number))

    @property
    def missing(self) -> list[tuple[Problem, int]]:
        every = ((p, i) for p in self.problems for i in range(self.n))
        done = self.file.done
        return [(p, i) for p, i in every if (p.task_id, i) not in done]


class Progress:
    """A line to stderr, not often: what is drawn, and how long the rest will take."""

    def __init__(self, total: int, every: float = 2.0) -> None:
        self.total, self.every, self.done = total, every, 0
        self.started, self.told = time.monotonic(), float("-inf")

    def add(self, cell: Cell, samples: int) -> None:
        self.done += samples
        now = time.monotonic()
        if now - self.told < self.every and self.done < self.total:
            return
        self.told, left = now, int((now - self.started) * (self.total - self.done) / self.done)
        passed = sum(sample.verdict == "passed" for sample in cell.samples)
        print(
            f"{self.done}/{self.total} samples  {cell.label} at {cell.temperature:g}: "
            f"{passed} of {len(cell.samples)} pass  {left // 60}:{left % 60:02d} left",
            file=sys.stderr,
        )


@dataclass
class Drawing:
    """A sample on its way: ids of the prompt, then what the model wrote."""

    problem: Problem
    number: int
    seed: int
    prompt: list[int]
    completion: Completion | None = None

    def sample(self, text: str, verdict: str, details: dict[str, Any]) -> Sample:
        read = hashlib.sha256(self.problem.prompt.encode()).hexdigest()[:16]
        task = self.problem.task_id
        return Sample(task, self.number, self.seed, read, text, verdict, details)


def draw(cell: Cell, model: Any, sandbox: Sandbox, progress: Progress) -> None:
    """All missing samples, each into the file with its verdict."""
    tokenizer, most = cell.model.tokenizer, model.config.max_seq_len
    score = score_by(model, model.embedding.weight.device)
    wanted = [
        Drawing(p, i, seed_of(cell.seed, p, i), tokenizer.encode(p.prompt)) for p, i in cell.missing
    ]
    too_long = [drawing for drawing in wanted if len(drawing.prompt) >= most]
    for drawing in too_long:
        cell.file.append(drawing.sample("", TOO_LONG, {}))
    progress.total -= len(too_long)
    fitting = [drawing for drawing in wanted if len(drawing.prompt) < most]
    completed = complete(cell, model, fitting)
    while some := list(islice(completed, JUDGED)):
        judge(cell, some, sandbox, score, most)
        progress.add(cell, len(some))


def seed_of(seed: int, problem: Problem, number: int) -> int:
    """Of its own for every sample, the same for all models, however many samples there are."""
    digest = hashlib.sha256(f"{seed} {problem.task_id} {number}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def complete(cell: Cell, model: Any, drawings: Sequence[Drawing]) -> Iterator[Drawing]:
    """As they end. Samples of one prompt share its pass; free rows take the next ones."""
    if not drawings:
        return
    most, requests = model.config.max_seq_len, []
    for d in drawings:
        room = min(cell.new_tokens, most - len(d.prompt))
        requests.append(mtp.Request(d.prompt, room, d.seed, stop_of(cell.model, d.problem.stops)))
    drafter = make_drafter(cell.drafter)
    decoding = mtp.Decoding(model, requests, drafter, cell.sampling, batch_size=cell.rows)
    for i, _ in decoding:
        if i not in decoding.owner:
            drawings[i].completion = decoding.completions[i]
            yield drawings[i]


def stop_of(model: Subject, stops: tuple[str, ...]) -> Callable[[list[int]], bool]:
    at_end, at_text = mtp.stop_at(*model.ends), mtp.stop_at_text(model.tokenizer, *stops)
    return lambda new: at_end(new) or at_text(new)


def judge(
    cell: Cell, drawings: Sequence[Drawing], sandbox: Sandbox, score: Score, most: int
) -> None:
    tokenizer = cell.model.tokenizer
    texts = [text_of(drawing, tokenizer) for drawing in drawings]
    programs = [d.problem.program(text) for d, text in zip(drawings, texts, strict=True)]
    outcomes = sandbox.run_all(programs)
    for drawing, text, outcome in zip(drawings, texts, outcomes, strict=True):
        if outcome.verdict == "harness_error":  # says nothing of the program
            raise OSError(f"the sandbox has stopped working: {outcome.output}")
        details = what_it_took(drawing, cell.model)
        if drawing.number == 0:
            details |= bits_of(drawing.problem, tokenizer, score, most)
        cell.file.append(drawing.sample(text, outcome.verdict, details))


def text_of(drawing: Drawing, tokenizer: Tokenizer) -> str:
    assert drawing.completion is not None
    text = completion_text(tokenizer, drawing.prompt, drawing.completion.tokens)
    return cut(text, drawing.problem.stops)


def what_it_took(drawing: Drawing, model: Subject) -> dict[str, Any]:
    """ids: a hash of them. ended: by itself, and not by the limit of tokens."""
    done = drawing.completion
    assert done is not None
    return {
        "ids": hashlib.sha256(str(done.tokens).encode()).hexdigest()[:16],
        "tokens": len(done.tokens),
        "steps": done.steps,
        "accepted": sum(done.accepted),
        "ended": stop_of(model, drawing.problem.stops)(done.tokens),
    }


def bits_of(problem: Problem, tokenizer: Tokenizer, score: Score, most: int) -> dict[str, Any]:
    """How long the reference is under the model; nothing where the two exceed the context."""
    if len(tokenizer.encode(problem.prompt + problem.reference)) > most:
        return {}
    alone = Benchmark("", "", (problem,))
    coded = reference_bits(alone, tokenizer, score)[problem.task_id]
    return {"reference_bits": coded.bits, "reference_bytes": coded.bytes}
