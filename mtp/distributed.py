"""Processes: who is there, what they agree on, and how a model is spread over them.

Without a process group there is one process and every answer is local. Models are spread by
PyTorch's FSDP2 (`fully_shard`), one unit per block and head, one for the unembedding, the rest in
the root: replicated, sharded, or sharded within machines and replicated between them. It needs no
help from the loss, because every use of a parameter happens inside its own module's forward.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

SHARDINGS = ("replicate", "shard", "hybrid")
T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's x, in place where there are several."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def sum_on_host(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over ranks of numbers that the host knows. No device is waited for, unless the process
    group knows no other way than `device`.
    """
    if world_size() == 1:
        return list(values)
    through = "cpu" if "cpu" in dist.get_backend_config() else device
    return sum_over_ranks(torch.tensor(values, dtype=torch.double, device=through)).tolist()


def from_rank_zero(call: Callable[[], T]) -> T:
    """Rank zero's result of `call` for all ranks. If it cannot, all ranks raise its error."""
    if world_size() == 1:
        return call()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = call()
        except Exception as error:  # whatever it is, the others must not wait
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def gather_objects(mine: T) -> list[T]:
    """What every rank has, in the order of ranks."""
    if world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun or SLURM's srun started, if they did, and leave together; ->
    the device of this one.
    """
    if "RANK" not in os.environ:
        os.environ.update(_slurm(os.environ))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # gloo beside NCCL: what the host knows is agreed on without waiting for the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield device  # after an error the others may be waiting for this one: it just ends
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads may still hold the last tensors; an interpreter that ends meanwhile aborts.
    time.sleep(0.5)


def _slurm(env: Any) -> dict[str, str]:
    """torchrun's variables from those of an srun step of several tasks; else none."""
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1":
        return {}
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"])
    assert first is not None
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": re.split(r"[(,]", env["SLURM_STEP_TASKS_PER_NODE"])[0],
        "MASTER_ADDR": env.get("MASTER_ADDR", first[1] + (first[2] or "")),
        "MASTER_PORT": env.get("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000)),
    }


def shard(model: Any, how: str) -> None:
    """Spread a `Transformer` over all ranks, in place: weights, gradients and the optimizer's state
    in fp32, as in one process. ValueError where `how` does not fit the ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if how not in SHARDINGS:
        raise ValueError(f"sharding={how!r} is unknown: allowed are {', '.join(SHARDINGS)}")
    world = world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if how == "hybrid" else world
    if world % here:
        raise ValueError(
            f"sharding='hybrid' needs as many processes on every machine, but {world} are no "
            f"multiple of the {here} on this one"
        )
    shape = {"replicate": (world, 1), "shard": (1, world), "hybrid": (world // here, here)}[how]
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    options: dict[str, Any] = {"mesh": mesh["shard"] if how == "shard" else mesh}
    for block in model.blocks:
        if any(True for _ in block.parameters()):
            fully_shard(block, **options)
    tied = model.embedding.weight is model.output.weights[0]
    ends: Any = [model.embedding, model.output] if tied else model.output
    fully_shard(ends, reshard_after_forward=False, **options)
    fully_shard(model, **options)
