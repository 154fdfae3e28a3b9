"""The honest baseline: the plainest cached greedy loop one can write for our weights, and what
verifying costs without any decoder.

Batch 1, caches in plain tensors, positions as Python ints, no layouts, drafters or rules. A speedup
against a slow baseline is no speedup, so every decode benchmark times this loop beside ours, in the
same process, interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import ratio, seconds
from mtp.decode.contract import Request
from mtp.decode.loop import Decoding
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


def bare_loop(model: Transformer, prompt: Sequence[int], new: int) -> Iterator[int]:
    """Greedy decoding of `new` tokens, one at a time. Call under inference_mode."""
    caches = empty_caches(model, len(model.trunk) + 1, len(prompt) + new)
    latent, _ = next_latent(model, torch.tensor([list(prompt)]), caches, 0)
    weight = model.output.weights[0]
    for at in range(len(prompt), len(prompt) + new):
        token = F.linear(model.norm(latent[:, -1:]), weight).argmax(-1)
        yield int(token)
        if at + 1 < len(prompt) + new:
            latent, _ = next_latent(model, token, caches, at)


@torch.inference_mode()
def plain_steps_against_bare(
    model: Transformer, prompt: Sequence[int], new: int
) -> tuple[list[float], bool]:
    """Time of a step of the plainest loop over that of a step of ours, pair by pair, the two taking
    turns within one text; and whether the texts are the same.
    """
    ours = Decoding(model, [Request(prompt, new)])
    bare = bare_loop(model, prompt, new)
    ours.fill()
    text, pairs = [next(bare)], []

    def our_step() -> None:
        ours.fill()
        ours.step()

    def bare_step() -> None:
        text.append(next(bare))

    for i in range(new - 1):
        first, second = (our_step, bare_step) if i % 2 else (bare_step, our_step)
        took = {first: seconds(first), second: seconds(second)}
        pairs.append(took[bare_step] / took[our_step])
    return pairs, text == ours.completions[0].tokens


@torch.inference_mode()
def verify_cost(model: Transformer, cached: int, repeats: int = 30) -> float:
    """Time of one forward over n positions through trunk and all n heads, over that of one position
    through trunk and head 1.

    Same cache length, no decoding logic in either, median of the pairs' ratios. A pair is two short
    bursts, since a decoder takes many like steps in a row and finds its weights and code in the
    processor's caches. Extra heads are unembedded at one position, as a drafter needs them.
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

    return ratio(verify, plain, repeats, burst=8)
