"""The honest baseline: the plainest cached greedy loop one can write for our weights, and what
verifying costs without any decoder.

Caches in plain tensors, positions as Python ints, no layouts, drafters or rules. A speedup against
a slow baseline is no speedup, so every decode benchmark times this loop beside ours, in the same
process, interleaved.

Letters: B rows, T columns, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import ratio, seconds
from mtp.decode.contract import Request
from mtp.decode.loop import Decoding
from mtp.model import Transformer
from mtp.packed import project
from mtp.rotary import Rotation, rotate

Caches = list[tuple[Tensor, Tensor]]


class Columns(NamedTuple):
    """Where new columns go. index: of a cache's rows and slots. span: how many slots they look
    at. mask: what is added to their scores; None: causal from slot 0 on, or a single column.
    """

    index: Any
    span: int
    rotation: Rotation
    mask: Tensor | None = None


def empty_caches(model: Transformer, layers: int, rows: int, slots: int) -> Caches:
    shape = (rows, slots, model.config.kv_heads, model.config.head_dim)
    return [
        (model.embedding.weight.new_zeros(shape), model.embedding.weight.new_zeros(shape))
        for _ in range(layers)
    ]


def block(b: Any, x: Tensor, cache: tuple[Tensor, Tensor], at: Columns) -> Tensor:
    (keys, values), (B, T, _), H, G = cache, x.shape, b.n_heads, b.kv_heads
    qkv = b.wqkv(b.attention_norm(x)).view(B, T, H + 2 * G, b.head_dim)
    qk = rotate(qkv[:, :, : H + G], at.rotation)
    keys[at.index], values[at.index] = qk[:, :, H:], qkv[:, :, H + G :]
    y = F.scaled_dot_product_attention(
        qk[:, :, :H].transpose(1, 2),
        keys[:, : at.span].transpose(1, 2),
        values[:, : at.span].transpose(1, 2),
        attn_mask=at.mask,
        is_causal=at.mask is None and T > 1,
        enable_gqa=G < H,
    )
    x = x + b.wo(y.transpose(1, 2).flatten(2))
    gate, up = b.w13(b.ffn_norm(x)).chunk(2, -1)
    return x + b.w2(F.silu(gate) * up)


def next_latent(
    model: Transformer, tokens: Tensor, caches: Caches, at: Columns
) -> tuple[Tensor, Tensor]:
    """tokens (B, T) -> (latent of head 1, trunk output), each (B, T, D). Parallel transformer
    heads.
    """
    x = model.embedding(tokens)
    for b, cache in zip(model.trunk, caches, strict=False):
        x = block(b, x, cache, at)
    return block(model.heads.heads[0], x, caches[len(model.trunk)], at), x


def next_token(model: Transformer, latent: Tensor, head: int = 0) -> Tensor:
    """Latent (B, T, D) of a head -> ids (B, 1) after its last column."""
    matrices = model.output.matrices
    return project(model.norm(latent[:, -1:]), matrices[head % len(matrices)]).argmax(-1)


def bare_loop(
    model: Transformer, prompts: Sequence[Sequence[int]], new: int
) -> Iterator[list[int]]:
    """Greedy decoding of `new` tokens after each of B prompts of equal length: the next token of
    every row, again and again. Call under inference_mode.
    """
    tokens = torch.tensor([list(p) for p in prompts], device=model.embedding.weight.device)
    slots, at = tokens.shape[1] + new, 0
    caches = empty_caches(model, len(model.trunk) + 1, len(tokens), slots)
    cos, sin = model.rotary(torch.arange(slots, device=tokens.device))
    while True:
        end = at + tokens.shape[1]
        columns = Columns((slice(None), slice(at, end)), end, (cos[at:end], sin[at:end]))
        tokens = next_token(model, next_latent(model, tokens, caches, columns)[0])
        yield tokens[:, 0].tolist()
        at = end
        if at == slots - 1:
            return


def logits_in_passes(model: Transformer, tokens: Tensor, begin: int, width: int) -> Tensor:
    """Head 1's logits (T - begin, V) over tokens (1, T) from `begin` on: the beginning in one pass,
    then `width` tokens in each. Call under inference_mode.
    """
    caches, end = empty_caches(model, len(model.trunk) + 1, 1, tokens.shape[1]), 0
    found = []
    for some in (tokens[:, :begin], *tokens[:, begin:].split(width, 1)):
        columns = ragged(model, end, 1, some.shape[1])
        found.append(model.logits(next_latent(model, some, caches, columns)[0])[0])
        end += some.shape[1]
    return torch.cat(found[1:])


@torch.inference_mode()
def plain_steps_against_bare(
    model: Transformer, prompt: Sequence[int], new: int
) -> tuple[list[float], bool]:
    """Time of a step of the plainest loop over that of a step of ours, pair by pair, the two taking
    turns within one text; and whether the texts are the same.
    """
    ours = Decoding(model, [Request(prompt, new)])
    bare = bare_loop(model, [prompt], new)
    ours.fill()
    text, pairs = next(bare), []

    def our_step() -> None:
        ours.fill()
        ours.step()

    def bare_step() -> None:
        text.extend(next(bare))

    for i in range(new - 1):
        first, second = (our_step, bare_step) if i % 2 else (bare_step, our_step)
        took = {first: seconds(first), second: seconds(second)}
        pairs.append(took[bare_step] / took[our_step])
    return pairs, text == ours.completions[0].tokens


@torch.inference_mode()
def verify_cost(
    model: Transformer,
    cached: int,
    repeats: int = 30,
    rows: int = 1,
    width: int | None = None,
    heads: int | None = None,
) -> float:
    """Time of one forward over `width` positions through trunk and `heads` heads (both by default
    n), over that of one position through trunk and head 1.

    Same cache length, no decoding logic in either, median of the pairs' ratios. A pair is two short
    bursts, since a decoder takes many like steps in a row and finds its weights and code in the
    processor's caches. Extra heads are unembedded at one position, as a drafter needs them. Several
    rows lie at different lengths where they are verified, since they accept differently; plain
    steps leave them level.
    """
    n = model.config.n_future_tokens
    width, heads = width or n, heads or n
    device = model.embedding.weight.device
    caches = empty_caches(model, len(model.trunk) + heads, rows, cached + width)
    tokens = torch.zeros(rows, width, dtype=torch.long, device=device)
    one = torch.arange(cached, cached + 1, device=device)
    level = Columns((slice(None), slice(cached, cached + 1)), cached + 1, model.rotary(one))
    apart = ragged(model, cached, rows, width)

    def plain() -> None:
        next_token(model, next_latent(model, tokens[:, :1], caches, level)[0])

    def verify() -> None:
        latent, z = next_latent(model, tokens, caches, apart)
        model.logits(latent).argmax(-1)
        for i, head in enumerate(list(model.heads.heads)[1:heads], 1):
            next_token(model, block(head, z, caches[len(model.trunk) + i], apart), i)

    return ratio(verify, plain, repeats, burst=8)


def ragged(model: Transformer, cached: int, rows: int, width: int) -> Columns:
    """`width` columns in each row, row r's from slot cached - r % width on; a row alone needs no
    index.
    """
    like = model.embedding.weight
    row = torch.arange(rows, device=like.device)[:, None]
    slots = cached - row % width + torch.arange(width, device=like.device)
    span = cached + width
    seen = torch.arange(span, device=like.device) <= slots[:, None, :, None]
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    index = (row, slots) if rows > 1 else (slice(None), slice(cached, span))
    return Columns(index, span, model.rotary(slots), mask.masked_fill_(~seen, float("-inf")))
