"""Does a fast trainer wait for its data? The real loop and loader, a model that only takes time.

    python -m benchmarks.data_wait tokens_per_second=300000

The stub spends on every batch what a model of that speed would. The last line is one JSON object.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import launch, record
from mtp.data import Batches, load_corpus
from mtp.documents import DataConfig
from mtp.loss import Batch, Metrics
from mtp.tokenizer import load_tokenizer
from mtp.train import Progress, TrainConfig, train


@dataclass
class WaitConfig:
    tokens_per_second: float = 300_000
    steps: int = 400
    batch_size: int = 8
    seq_len: int = 256
    n_future_tokens: int = 4


class Stub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))


@dataclass
class TakesTime:
    seconds: float

    def count(self, batch: Batch) -> Tensor:
        return torch.ones(1)

    def __call__(
        self, model: nn.Module, batch: Batch, denominator: Tensor
    ) -> tuple[Tensor, Metrics]:
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            pass
        loss: Tensor = model.weight * torch.zeros(())  # type: ignore[operator]
        return loss, {"loss_1": (loss.detach(), torch.ones(()))}


def run(config: WaitConfig) -> dict[str, Any]:
    torch.set_num_threads(1)
    corpus = load_corpus(DataConfig(val_fraction=0.01), load_tokenizer("bytes"), held_out=False)
    batches = Batches(corpus, config.seq_len, config.n_future_tokens, config.batch_size)
    loss = TakesTime(config.batch_size * config.seq_len / config.tokens_per_second)
    waits: list[float] = []

    def note(progress: Progress) -> None:
        if progress.step > 20 and "data_wait" in progress.metrics:
            waits.append(progress.metrics["data_wait"])

    training = TrainConfig(steps=config.steps, batch_size=config.batch_size, log_every=20)
    train(Stub(), batches, loss, training, hooks=[note])
    figures = {"data_wait": median(waits), "data_wait_min_max": [min(waits), max(waits)]}
    record("data_wait", figures, config)
    return figures


if __name__ == "__main__":
    launch(WaitConfig, run)
