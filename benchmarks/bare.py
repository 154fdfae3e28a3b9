"""The honest baseline: the plainest cached greedy loop one can write for our weights, and what
verifying costs without any decoder.

Batch 1, caches in plain tensors, positions as Python ints, no layouts, drafters or rules. A speedup
against a slow baseline is no speedup, so every decode benchmark times this loop beside ours, in the
same process, interleaved.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp.model import Transformer, rotate

Caches = list[tuple[Tensor, Tensor]]


def empty_caches(model: Transformer, layers: int, slots: int) -> Caches:
    shape = (1, slots, model.config.kv_heads, model.config.head_dim)
    return [
        (model.embedding.weight.new_zeros(shape), model.embedding.weight.new_zeros(shape))
        for _ in range(layers)
    ]


def block(
    b: Any,
    x: Tensor,
    rotation: Sequence[Tensor],
    cache: tuple[Tensor, Tensor],
    at: int,
    mask: Tensor | None,
) -> Tensor:
    (keys, values), T, H, G = cache, x.shape[1], b.n_heads, b.kv_heads
    qkv = b.wqkv(b.attention_norm(x)).view(1, T, H + 2 * G, b.head_dim)
    qk = rotate(qkv[:, :, : H + G], (rotation[0], rotation[1]))
    keys[:, at : at + T], values[:, at : at + T] = qk[:, :, H:], qkv[:, :, H + G :]
    y = F.scaled_dot_product_attention(
        qk[:, :, :H].transpose(1, 2),
        keys[:, : at + T].transpose(1, 2),
        values[:, : at + T].transpose(1, 2),
        attn_mask=mask,
        is_causal=at == 0 and T > 1,
        enable_gqa=G < H,
    )
    x = x + b.wo(y.transpose(1, 2).flatten(2))
    gate, up = b.w13(b.ffn_norm(x)).chunk(2, -1)
    return x + b.w2(F.silu(gate) * up)


def next_latent(
    model: Transformer, tokens: Tensor, caches: Caches, at: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """tokens (1, T) at positions at.. -> (latent of head 1, trunk output), each (1, T, D). Parallel
    transformer heads.
    """
    rotation = model.rotary.table[at : at + tokens.shape[1]].unbind(1)
    x = model.embedding(tokens)
    for b, cache in zip(model.trunk, caches, strict=False):
        x = block(b, x, rotation, cache, at, mask)
    return block(model.heads.heads[0], x, rotation, caches[len(model.trunk)], at, mask), x


@torch.inference_mode()
def bare_loop(model: Transformer, prompt: Sequence[int], new: int) -> list[int]:
    """Greedy decoding of `new` tokens."""
    caches = empty_caches(model, len(model.trunk) + 1, len(prompt) + new)
    latent, _ = next_latent(model, torch.tensor([list(prompt)]), caches, 0)
    out: list[int] = []
    weight = model.output.weights[0]
    while True:
        token = F.linear(model.norm(latent[:, -1:]), weight).argmax(-1)
        out.append(int(token))
        if len(out) == new:
            return out
        latent, _ = next_latent(model, token, caches, len(prompt) + len(out) - 1)


@torch.inference_mode()
def verify_cost(model: Transformer, cached: int, repeats: int = 60) -> float:
    """Time of one forward over n positions through trunk and all n heads, over that of one position
    through trunk and head 1.

    Same cache length, interleaved, median of the pairs' ratios; no decoding logic in either. Extra
    heads are unembedded at one position, as a drafter needs them.
    """
    n, weight = model.config.n_future_tokens, model.output.weights
    caches = empty_caches(model, len(model.trunk) + n, cached + n)
    mask = torch.zeros(n, cached + n).masked_fill_(
        torch.ones(n, cached + n).triu(cached + 1).bool(), float("-inf")
    )
    rotation = model.rotary.table[cached : cached + n].unbind(1)
    tokens = torch.zeros(1, n, dtype=torch.long)

    def plain() -> None:
        latent, _ = next_latent(model, tokens[:, :1], caches, cached)
        F.linear(model.norm(latent), weight[0]).argmax(-1)

    def verify() -> None:
        latent, z = next_latent(model, tokens, caches, cached, mask)
        F.linear(model.norm(latent), weight[0]).argmax(-1)
        for i, head in enumerate(list(model.heads.heads)[1:], 1):
            latent = block(head, z, rotation, caches[len(model.trunk) + i], cached, mask)
            F.linear(model.norm(latent[:, -1:]), weight[i % len(weight)]).argmax(-1)

    return ratio(verify, plain, repeats)[0]


def ratio(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and interquartile range of time(a) / time(b) over interleaved pairs, after two
    warm-ups of each.
    """
    for _ in range(2):
        a(), b()
    pairs = []
    for i in range(repeats):
        first, second = (a, b) if i % 2 else (b, a)
        times = {first: _seconds(first), second: _seconds(second)}
        pairs.append(times[a] / times[b])
    quartiles = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else [pairs[0]] * 3
    return statistics.median(pairs), quartiles[2] - quartiles[0]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def fastest_threads(model: Transformer, prompt: Sequence[int], new: int = 32) -> int:
    """1, or all threads: on a busy machine two can be far slower than one. Fastest of a few."""
    times = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        times[threads] = min(_seconds(lambda: bare_loop(model, prompt, new)) for _ in range(3))
    return min(times, key=lambda threads: times[threads])
