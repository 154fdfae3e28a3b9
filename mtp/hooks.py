"""What happens beside training: each hook is called after every step with the run's `Progress`."""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from mtp.decode.contract import Request
from mtp.decode.drafters import OwnHeads
from mtp.decode.loop import generate
from mtp.distributed import rank, world_size
from mtp.files import write_text
from mtp.tokenizer import Tokenizer
from mtp.train import Progress

log = logging.getLogger("mtp")


class JsonlLog:
    """A hook: one JSON object per logged step. On resuming, lines past the checkpoint's step are
    dropped.
    """

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = (
            [line for line in read_jsonl(path) if line["step"] <= resumed_at]
            if path.exists()
            else []
        )
        if rank() == 0:
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def __call__(self, progress: Progress) -> None:
        if progress.metrics and rank() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(progress.counters() | progress.metrics) + "\n")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Complete lines only: a killed run may leave half of one."""
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def console(progress: Progress) -> None:
    """A hook: one line per logged step."""
    m = progress.metrics
    if not m or rank() != 0:
        return
    left = progress.seconds_left
    line = f"step {progress.step:>6} ({progress.done:4.0%})  {_losses(m)}"
    speed = f"{m['tokens_per_second']:,.0f} tokens/s"
    log.info("%s  %s  %s left", line, speed, timedelta(seconds=int(left)))
    if "val_loss_1" in m:
        bits = [f"{m[k]:.2f}" for k in m if k.startswith("val_bits_per_byte_")]
        right = f", {m['val_accuracy']:.1%} of answers right" if "val_accuracy" in m else ""
        log.info(
            "   held out: bits per byte %s, acceptance length %.2f%s",
            " ".join(bits),
            m["val_acceptance_length"],
            right,
        )
    if "val_kl" in m:
        shares = m["val_acceptance"], m["val_agreement"]
        log.info("   held out: KL %.3f, acceptance %.3f, agreement %.3f", m["val_kl"], *shares)


def _losses(metrics: dict[str, float]) -> str:
    """See `mtp.loss.Metrics`."""
    found = {k.removeprefix("loss_"): x for k, x in metrics.items() if k.startswith("loss_")}
    if all(name.isdecimal() for name in found):
        return f"loss per head {' '.join(f'{x:.2f}' for x in found.values())}"
    return f"loss {', '.join(f'{name} {x:.3f}' for name, x in found.items())}"


class Utilisation:
    """A hook: memory_gib (peak, of the device or else of this process), model TFLOP/s per rank and,
    on devices whose peak is known, their share of it (MFU). n unembeddings count, recomputation
    does not.
    """

    def __init__(self, flops_per_token: float, precision: str) -> None:
        self.flops, self.precision = flops_per_token, precision

    def __call__(self, progress: Progress) -> None:
        m = progress.metrics
        if "tokens_per_second" not in m:
            return
        device = next(progress.model.parameters()).device
        rate = self.flops * m["tokens_per_second"] / world_size()
        m["memory_gib"] = _peak_memory(device) / 2**30
        m["model_tflops"] = rate / 1e12
        peak = peak_flops(device)
        if peak and self.precision == "bfloat16":
            m["mfu"] = rate / peak


# Dense bfloat16 operations per second by the makers' data sheets; the first name that fits counts.
PEAK_FLOPS = {
    **{"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12},
    **{"H200 NVL": 835e12, "H200": 989e12, "A100": 312e12},
}


def peak_flops(device: torch.device) -> float | None:
    """Of a device whose data sheet is known, in dense bfloat16."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StopSignals:
    """While it is entered, SIGTERM, SIGUSR2 (by custom, SLURM's notice of a time limit) and the
    first SIGINT only ask for a stop. Call it to hear whether one did; a SIGINT after that is the
    usual KeyboardInterrupt. In the end, whoever handled SIGTERM or SIGUSR2 before hears of it.
    """

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return bool(self.heard)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others may not
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.heard.append(number)
        log.warning("%s: stopping after this step", signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        for number in set(self.heard) - {signal.SIGINT}:
            if callable(self.before[number]):
                signal.raise_signal(number)


class WeightsAndBiases:
    """A hook: every metric to a project of Weights & Biases. Needs the wandb package."""

    def __init__(self, project: str, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("wandb=PROJECT needs: pip install wandb") from error
        self.run = None
        if rank() == 0:
            name = str(folder.resolve()).strip("/").replace("/", "-")[-64:]  # the same on resuming
            self.run = wandb.init(
                project=project, id=name, dir=str(folder), config=config, resume="allow"
            )

    def __call__(self, progress: Progress) -> None:
        if self.run is not None and progress.metrics:
            self.run.log(progress.metrics, step=progress.step)


class TensorBoard:
    """A hook: every metric as a scalar. Needs the tensorboard package."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "tensorboard=true needs, in a checkout: pip install '.[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(str(folder)) if rank() == 0 else None

    def __call__(self, progress: Progress) -> None:
        if self.writer is not None:
            for name, value in progress.metrics.items():
                self.writer.add_scalar(name, value, progress.step)


class Samples:
    """A hook: continues a prompt greedily, as far as the context reaches, `first` seconds into the
    run and then every `every`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        every: float,
        first: float = 10.0,
        new_tokens: int = 80,
    ) -> None:
        self.tokenizer, self.prompt, self.every = tokenizer, prompt, every
        self.next, self.new_tokens = first, new_tokens

    def __call__(self, progress: Progress) -> None:
        if progress.seconds < self.next:
            return
        self.next = progress.seconds + self.every
        model: Any = progress.model
        context = model.config.max_seq_len
        prompt = self.tokenizer.encode(self.prompt)[: context - 1] or [self.tokenizer.end_id]
        request = Request(prompt, min(self.new_tokens, context - len(prompt)))
        text = self.tokenizer.decode(
            generate(model, [request], OwnHeads() if model.extra_heads else None)[0].tokens
        )
        log.info("   sample: %s", f"{self.prompt}⟶{text}".replace("\n", "\n           "))
