"""A synthetic task (`mtp.tasks`) as batches to train on, and how often a model is right.

A row is one problem with the end token behind it, the rest padding. Problem number k of a part is
drawn from (seed, part, k) alone: training has as many as it wants, none is seen twice but by
chance, and any one can be made without those before it. Which are held out says a hash of their
text, as for other documents: no held-out problem is ever trained on.

"ab=ab" with T = 7, n = 2, where prompts are no targets (256 is the end token):

    row   97 98 61 97 98 256  0  0  0
    doc    0  0  0  0  0   0 -1 -1 -1
    keep   -  -  -  x  x   x  -  -  -
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from mtp.data import check_identity
from mtp.decode.contract import Request, stop_at
from mtp.decode.loop import generate
from mtp.decode.sampling import Sampling
from mtp.distributed import rank, world_size
from mtp.documents import DataConfig, is_held_out, problem
from mtp.encoding import encode_document
from mtp.loss import Batch
from mtp.records import Document
from mtp.tasks.table import make_task
from mtp.tokenizer import Tokenizer
from mtp.train import TrainConfig, validate

MOST_DRAWS = 100_000


class ProblemBatches:
    """Endless batches of B rows. The state is one counter of problems over all ranks, as of
    `mtp.data.Batches`: with W of them, rank r takes problems g B W + r B + (0 .. B-1) of batch g.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        n_future_tokens: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        held_out: bool = False,
    ) -> None:
        check_rows(config)
        self._config, self._tokenizer, self._held_out = config, tokenizer, held_out
        self._width = config.seq_len + n_future_tokens
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        keys = ("task", "task_args", "seed", "val_fraction")
        self._identity = {key: getattr(config, key) for key in keys} | {"held_out": held_out}
        self._problem = 0

    def __iter__(self) -> ProblemBatches:
        return self

    def __next__(self) -> Batch:
        first = self._problem + self._rank * self._batch_size
        self._problem += self._world_size * self._batch_size
        return self._rows(problems(self._config, self._held_out, first, self._batch_size))

    def state_dict(self) -> dict[str, Any]:
        return {"problem": self._problem, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_identity(state, self._identity)
        self._problem = state["problem"]

    def _rows(self, documents: Sequence[Document]) -> Batch:
        shape = (len(documents), self._width)
        row, doc, keep = np.zeros(shape, np.int64), np.full(shape, -1), np.zeros(shape, bool)
        for i, document in enumerate(documents):
            encoded = encode_document(document, self._tokenizer)
            here = slice(len(encoded.ids))
            row[i, here], doc[i, here], keep[i, here] = encoded.ids, 0, encoded.keep
        return Batch(torch.from_numpy(row), torch.from_numpy(doc), torch.from_numpy(keep))


def check_rows(config: DataConfig, max_seq_len: int | None = None) -> None:
    """ValueError unless the longest problem fits a row, whose last token is only a target, and a
    model's answer to it, with the end token, in max_seq_len.
    """
    longest = make_task(config.task, config.task_args).longest
    if config.seq_len < longest:
        raise ValueError(
            f"data.seq_len={config.seq_len}: data.task={config.task!r} has problems of {longest} "
            f"tokens, each in a row of its own"
        )
    if max_seq_len is not None and max_seq_len <= longest:
        raise ValueError(
            f"model.max_seq_len={max_seq_len}: data.task={config.task!r} has problems of {longest} "
            f"tokens, and answers end with one more"
        )


def problems(config: DataConfig, held_out: bool, first: int, count: int) -> list[Document]:
    """The problems of one part from number `first` on."""
    return [_problem(config, held_out, number) for number in range(first, first + count)]


def _problem(config: DataConfig, held_out: bool, number: int) -> Document:
    task = make_task(config.task, config.task_args)
    rng = random.Random(f"{config.seed} {held_out} {number}")
    for _ in range(MOST_DRAWS):
        document = problem(task, rng)
        if is_held_out(document, config) == held_out:
            return document
    part = "held-out" if held_out else "training"
    raise ValueError(
        f"data.val_fraction={config.val_fraction}: no {part} problem of data.task={config.task!r} "
        f"among {MOST_DRAWS} draws"
    )


def verdicts(
    model: Any, tokenizer: Tokenizer, config: DataConfig, documents: Sequence[Document], rows: int
) -> list[bool]:
    """Whether a model's greedy answer to each problem is right, up to its end token, by the task's
    own check of the prompt. An answer that does not end is cut behind the longest right one.
    """
    task = make_task(config.task, config.task_args)
    prompts = [document.segments[0][0] for document in documents]
    longest = max(len(tokenizer.encode(document.segments[1][0])) for document in documents)
    stop = stop_at(tokenizer.end_id)
    requests = [Request(tokenizer.encode(p), longest + 1, stop=stop) for p in prompts]
    answers = generate(model, requests, None, Sampling(temperature=0), batch_size=rows)
    pairs = zip(prompts, answers, strict=True)
    return [task.is_right(prompt, tokenizer.decode(done.tokens)) for prompt, done in pairs]


def evaluator(
    data: DataConfig, tokenizer: Tokenizer, config: TrainConfig, n: int
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Validation and val_accuracy on eval_batches batches of held-out problems, the same each time;
    the latter in one process only, as a sharded model does not decode.
    """
    rows, count = config.batch_size, -(-config.eval_batches // world_size())
    batches = ProblemBatches(data, tokenizer, n, rows, rank(), world_size(), held_out=True)
    chosen = list(islice(batches, count))
    asked = problems(data, True, 0, rows * count)

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        metrics = validate(model, chosen, n, bytes_per_token=1.0)
        if world_size() == 1:
            right = verdicts(model, tokenizer, data, asked, rows)
            metrics["val_accuracy"] = sum(right) / len(right)
        return metrics

    return evaluate
