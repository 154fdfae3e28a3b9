"""What a run measures of itself between two log lines."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from mtp.distributed import rank, sum_on_host, sum_over_ranks, world_size
from mtp.loss import Metrics


class Meter:
    """Sums over the steps since it was last read. Tensors stay on their device until then, so that
    no step waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first_bad = torch.full((), -1, dtype=torch.long, device=device)
        self.parts = 1  # of a step: its micro-batches and the gradient
        self._start_anew()

    def _start_anew(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.norm = torch.zeros((), device=self.device)
        self.steps, self.tokens, self.waited, self.seconds = 0, 0, 0.0, 0.0

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            old = self.sums.get(name, (0, 0))
            self.sums[name] = (old[0] + total.detach(), old[1] + count)

    def watch(self, step: int, losses: list[Tensor], norm: Tensor) -> None:
        """Remember where a loss, or else the gradient's norm, was first not finite."""
        self.norm = norm
        bad = ~torch.isfinite(torch.stack([*(x.detach().to(norm.dtype) for x in losses), norm]))
        place = step * len(bad) + bad.long().argmax()
        self.first_bad = torch.where((self.first_bad < 0) & bad.any(), place, self.first_bad)
        self.parts = len(bad)

    def end_step(self, tokens: int, started: float, catch_up: bool) -> float:
        """Seconds of the step; `catch_up` lets the device finish before the clock is read."""
        if catch_up:
            self.norm.item()
        seconds = time.perf_counter() - started
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        self.seconds += seconds
        return seconds

    def read(self) -> dict[str, float]:
        """Losses are means over ranks and steps, grad_norm is the last step's, times are this
        rank's; starts anew. ValueError says where something was not finite: step and micro-batch,
        counted from 1, and rank.
        """
        self._check_finite()
        pairs = {
            k: sum_over_ranks(torch.stack([s, c.to(s)])).tolist() for k, (s, c) in self.sums.items()
        }
        values = {name: total / max(count, 1) for name, (total, count) in pairs.items()}
        values["grad_norm"] = float(self.norm)
        values["tokens_per_second"] = self.tokens * world_size() / max(self.seconds, 1e-9)
        values["step_seconds"] = self.seconds / max(self.steps, 1)
        values["data_wait"] = self.waited / max(self.seconds, 1e-9)
        self._start_anew()
        return values

    def _check_finite(self) -> None:
        places = [0.0] * world_size()
        places[rank()] = self.first_bad.item() + 1.0
        places = sum_on_host(places, self.device)
        bad = [(int(place) - 1, number) for number, place in enumerate(places) if place > 0]
        if not bad:
            return
        place, number = min(bad)
        step, part = divmod(place, self.parts)
        what = "gradient" if part == self.parts - 1 else f"loss of micro-batch {part + 1}"
        raise ValueError(
            f"step {step + 1}: the {what} is not finite on rank {number}: lower the learning rate, "
            f"or look at that batch. Earlier checkpoints are untouched"
        )
