"""How much memory does a training step take above its parameters, and does it grow with n?

    python -m benchmarks.train_memory
    python -m benchmarks.train_memory shapes=300m,1.3b,6.7b dtypes=bfloat16 name=train_memory_gpu

The peak is the most bytes alive at any moment of one forward and backward, above what stands before
the step: parameters, gradients (already allocated, as when gradients accumulate), optimizer state
and the batch. So all that a step makes counts: activations, logits, temporaries, and the gradients
that the sequential routine stores until backward, which are none of the ones allocated before.

It is counted with fake tensors, which have shapes but no memory, over the operations of a CPU: any
shape in seconds, and to the byte what the allocator of the CPU hands out (tests/test_memory.py).
Where there is a GPU, its allocator's own peak is measured too, for shapes that fit; its fused norms
keep less than the CPU's.

`shapes` are `small` and the paper's (configs/model/), each with rows of its full context. Equal
parameters: the heads' blocks come out of the trunk. Whole trunk: the trunk of n = 1 beside n heads.
The last line is one JSON object: ratios of the trunk cut, heads not recomputed (what a
`MultiTokenLoss` does by default), for the first shape and type, then for the others.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.pictures import drawn, memory_panels
from benchmarks.record import launch, record
from benchmarks.shapes import shape
from mtp.blocks import recompute_blocks
from mtp.loss import MultiTokenLoss, Score, plain_batch, reference, sequential
from mtp.model import ModelConfig, Transformer
from mtp.train import PRECISIONS


class Way(NamedTuple):
    score: Score
    cut: str
    recompute_heads: bool


WAYS = {
    "reference": Way(reference, "latents", False),
    "reference+recompute": Way(reference, "latents", True),
    "trunk": Way(sequential, "trunk", False),
    "trunk+recompute": Way(sequential, "trunk", True),
    "latents": Way(sequential, "latents", False),
    "latents+recompute": Way(sequential, "latents", True),
}
CASES = [(1, False), (2, False), (4, False), (8, False), (8, True)]  # n, whole trunk
# (n, whole trunk, way) -> bytes
Peak = Callable[[int, bool, str], float]


@dataclass
class MemoryConfig:
    """dtypes: of weights, gradients and activations. rows: per step. name: of the files written."""

    shapes: str = "small,300m,1.3b,6.7b,13b"
    dtypes: str = "float32,bfloat16"
    rows: int = 1
    name: str = "train_memory"

    def __post_init__(self) -> None:
        for name in self.shapes.split(","):
            shape(name)
        for dtype in self.dtypes.split(","):
            if dtype not in PRECISIONS:
                raise ValueError(
                    f"dtypes={dtype!r} is unknown: allowed are {', '.join(PRECISIONS)}"
                )


def with_heads(config: ModelConfig, n: int, whole_trunk: bool = False) -> ModelConfig:
    layers = config.n_layers + (n - 1 if whole_trunk else 0)
    return replace(config, n_future_tokens=n, n_layers=layers)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made inside this context and that something still
    holds: `now`, at their `peak`, and those of the `largest` one.

    A storage that comes out of an operation and did not go in is new. What one operation allocates
    for itself and frees again is not seen.
    """

    now = peak = largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        for key, storage in _storages(out).items():
            if key not in given:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    found = (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor))
    return {storage._cdata: storage for storage in found}


def count_step(
    config: ModelConfig, way: str, rows: int = 1, dtype: torch.dtype = torch.float32
) -> LiveBytes:
    """One forward and backward over `rows` rows of config.max_seq_len positions, without memory."""
    model = _empty(config, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = _prepare(model.to_empty(device="cpu"), WAYS[way], rows)
        with LiveBytes() as live:
            step()
    return live


def allocated_bytes(config: ModelConfig, way: str, rows: int, dtype: torch.dtype) -> int:
    """The peak by CUDA's allocator, in a step after one that warms up. Weights hold whatever
    memory held: sizes do not depend on them.
    """
    gc.collect()
    torch.cuda.empty_cache()
    step = _prepare(_empty(config, dtype).to_empty(device="cuda"), WAYS[way], rows)
    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def _empty(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        return Transformer(config).to(dtype)


def _prepare(model: Transformer, way: Way, rows: int) -> Callable[[], None]:
    """Allocate what stands before a step; -> the step."""
    if way.recompute_heads:
        recompute_blocks(model.heads.heads)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    config, n = model.config, model.config.n_future_tokens
    size = (rows, config.max_seq_len + n)
    device = model.embedding.weight.device
    batch = plain_batch(torch.randint(config.vocab_size, size, device=device))
    loss_fn = MultiTokenLoss(n, cut=way.cut, score=way.score)
    denominator = loss_fn.count(batch)

    def step() -> None:
        loss_fn(model, batch, denominator)[0].backward()

    return step


def figures(peak: Peak) -> dict[str, float]:
    """Ratios of the trunk cut without recomputation."""
    one = peak(1, False, "trunk")
    return {
        "peak_n4_over_n1": peak(4, False, "trunk") / one,
        "peak_n8_over_n1": peak(8, False, "trunk") / one,
        "peak_n8_over_n1_whole_trunk": peak(8, True, "trunk") / one,
        "sequential_over_reference_n4": peak(4, False, "trunk") / peak(4, False, "reference"),
    }


def measure(name: str, dtype: str, rows: int) -> Iterator[dict[str, Any]]:
    """Every case and way of one shape, in bytes: the peak `counted` and, where it fits a GPU,
    `allocated`.
    """
    for n, whole in CASES:
        for way in WAYS:
            config = with_heads(shape(name), n, whole)
            live = count_step(config, way, rows, PRECISIONS[dtype])
            case = {"shape": name, "dtype": dtype, "n": n, "whole_trunk": whole, "way": way}
            case |= {"counted": live.peak, "largest_tensor": live.largest}
            if _fits(config, PRECISIONS[dtype], live.peak):
                case["allocated"] = allocated_bytes(config, way, rows, PRECISIONS[dtype])
            yield case


def _fits(config: ModelConfig, dtype: torch.dtype, counted: int) -> bool:
    """Parameters, gradients and the peak, with a fifth to spare for what the allocator splits."""
    if not torch.cuda.is_available():
        return False
    standing = 2 * sum(p.nbytes for p in _empty(config, dtype).parameters())
    return 1.2 * (standing + counted) < torch.cuda.mem_get_info()[1]


def table(cases: list[dict[str, Any]]) -> str:
    """GiB, one line per n, one column per way."""
    lines = [f"{'n':>14} " + " ".join(f"{way:>19}" for way in WAYS)]
    for n, whole in CASES:
        row = [c for c in cases if (c["n"], c["whole_trunk"]) == (n, whole)]
        for key in ("counted", "allocated"):
            if any(key in c for c in row):
                label = f"{n}{' whole trunk' if whole else ''}" if key == "counted" else key
                cells = (f"{c[key] / 2**30:.3f}" if key in c else "-" for c in row)
                lines.append(f"{label:>14} " + " ".join(f"{cell:>19}" for cell in cells))
    return "\n".join(lines)


def run(config: MemoryConfig) -> dict[str, Any]:
    cases, ratios = [], {}
    for name in config.shapes.split(","):
        for dtype in config.dtypes.split(","):
            print(f"counting {name} {dtype} ...", file=sys.stderr)
            found = list(measure(name, dtype, config.rows))
            print(f"\n{name} {dtype}, GiB above parameters, gradients and optimizer state\n")
            print(table(found), flush=True)
            counted = {(c["n"], c["whole_trunk"], c["way"]): c["counted"] for c in found}
            ratios[f"{name} {dtype}"] = figures(lambda *key, of=counted: of[key])
            cases += found
    (first, head), *others = ratios.items()
    summary = {"shape": first, "way": "trunk", **head, "others": dict(others)}
    path = record(config.name, summary | {"cases": cases}, config)
    drawn(memory_panels, cases, path.with_suffix(".png"))
    return summary


if __name__ == "__main__":
    launch(MemoryConfig, run)
