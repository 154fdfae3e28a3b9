"""What decoding costs besides time: joules, where the GPU counts them, and passes and positions of
every model, from which operations follow, everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

IDLE_SECONDS = 5.0  # the counter moves some ten times a second
Counter = Callable[[], float]  # joules since some moment


def energy_counter(device: torch.device) -> Counter | None:
    """NVML's total energy of this GPU, all of it: other work on it counts too. None where there is
    no such counter: on a CPU, without pynvml (nvidia-ml-py), on GPUs before Volta.
    """
    if device.type != "cuda":
        return None
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        number = torch.cuda.current_device() if device.index is None else device.index
        uuid = torch.cuda.get_device_properties(number).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None

    def joules() -> float:
        torch.cuda.synchronize(device)
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000

    return joules


def idle_watts(counter: Counter) -> float:
    """While nothing is asked of the GPU, which keeps its clocks for a while after work."""
    before, started = counter(), time.perf_counter()
    time.sleep(IDLE_SECONDS)
    return (counter() - before) / (time.perf_counter() - started)


@dataclass
class Work:
    """Passes through a model, or through extra heads, and the positions that they read."""

    passes: int = 0
    positions: int = 0


@contextmanager
def counted(model: Any, method: str = "read") -> Iterator[Work]:
    """Counts the calls of `model.read` or `model.guess` while it is open. Each head that guesses
    reads its positions itself.
    """
    call, work = getattr(model, method), Work()

    def counting(*words: Any) -> Any:
        work.passes += 1
        if method == "read":
            work.positions += words[0].numel()
        else:
            _, _, layout, _, upto = words
            work.positions += layout.positions.numel() * (upto - 1)
        return call(*words)

    setattr(model, method, counting)
    try:
        yield work
    finally:
        delattr(model, method)


def parameters_of_pass(model: Any) -> int:
    """That one position of `model.read` and its logits multiply by. Of a model before it is packed:
    packed matrices are no parameters.
    """
    module = model if isinstance(model, torch.nn.Module) else model.model
    embedding = model.embedding.weight
    outputs = model.output.weights if hasattr(model, "output") else [model.head.weight]
    looked_up = 0 if outputs[0] is embedding else embedding.numel()  # tied, it multiplies too
    extra = [] if not model.extra_heads else model.heads.heads[1:]
    unused = sum(p.numel() for head in extra for p in head.parameters())
    unused += sum(weight.numel() for weight in outputs[1:])
    return sum(p.numel() for p in module.parameters()) - looked_up - unused


def parameters_of_head(model: Any) -> int:
    """That an extra head multiplies by, with its unembedding, on an average of all."""
    heads = model.heads.heads[1:]
    own = sum(p.numel() for head in heads for p in head.parameters())
    return own // len(heads) + model.output.weights[0].numel()


def weight_bytes(model: Any) -> int:
    """Of a model before it is packed; an adapter is no module but holds one."""
    module = model if isinstance(model, torch.nn.Module) else model.model
    return sum(p.nbytes for p in module.parameters())
