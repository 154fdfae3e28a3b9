"""Prediction heads behind one contract. A head turns the trunk's output z into the latent from
which token t + i is predicted.

    next(z, *place, layers)                   -> latent of head 1, memo: what the others read
    rest(memo, future, *place, layers, upto)  -> latents of heads 2 .. upto, one after another

`place` (rotation, layout) and `layers` (one key/value cache per attention layer, or None in
training) go to the blocks untouched: a head neither knows positions nor caches. `next_layers`
counts the attention layers that head 1 needs, `rest_layers` those that only drafts need; a decoder
therefore keeps them in separate caches. `memo_copies` is the memo's width in units of d.

`reads_ahead` says that head i also reads the tokens up to t + i - 1: training gives it those of the
text, decoding those that the heads before it guess. future(j): embeddings (B, T, D) of the tokens j
ahead, complete once head j's latent was taken. Kinds (paper, section 2 and appendix B):

    transformer  one block per head, all reading z        (the method)
    linear       one d x d map per head, all reading z
    residual     head 1 is z itself, others z + SiLU(Wz)  (Medusa, Cai et al. 2024)
    identity     every head is z itself: with a shared unembedding several targets on one set of
                 logits, without parameters (modded-nanogpt), with replicated ones n linear maps to
                 the vocabulary (facebookresearch/lingua)
    causal       head i reads head i - 1
    anticausal   head n reads z, head i reads head i + 1, so head 1 comes last
    sequential   head 1 is z itself, a block per later head reads head i - 1 and token t + i - 1
                 (DeepSeek-V3, DeepSeek-AI 2024, section 2.2)

Blocks of heads are taken from the trunk; the other kinds leave it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layers = Sequence[Any]
Make = Callable[[], nn.Module]
Future = Callable[[int], Tensor]


class LinearHead(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rotation: Any, layout: Any, layer: Any = None) -> Tensor:
        return self.proj(x).to(x.dtype)  # under autocast the norm wants the trunk's own type


class ResidualHead(nn.Module):
    """z + SiLU(Wz) with W = 0 at first, so that a fresh head repeats the next-token head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim, bias=False)
        self.proj.starts_at_zero = True  # type: ignore[assignment]

    def forward(self, x: Tensor, rotation: Any, layout: Any, layer: Any = None) -> Tensor:
        return x + F.silu(self.proj(x))


class IdentityHead(nn.Module):
    def forward(self, x: Tensor, rotation: Any, layout: Any, layer: Any = None) -> Tensor:
        return x


class ParallelHeads(nn.Module):
    """Independent heads on z, so that each can run forward and backward alone. With caches or
    without.
    """

    independent = True
    reads_ahead = False
    memo_copies = 1

    def __init__(self, heads: Sequence[nn.Module], layers_per_head: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.next_layers = layers_per_head
        self.rest_layers = layers_per_head * (len(heads) - 1)

    def next(self, z: Tensor, rotation: Any, layout: Any, layers: Layers) -> tuple[Tensor, Tensor]:
        return self.heads[0](z, rotation, layout, *layers[:1]), z

    def rest(
        self, memo: Tensor, future: Future, rotation: Any, layout: Any, layers: Layers, upto: int
    ) -> Iterable[Tensor]:
        return [
            head(memo, rotation, layout, *layers[i : i + 1])
            for i, head in enumerate(self.heads[1:upto])
        ]


class CausalHeads(nn.Module):
    independent = False
    reads_ahead = False
    memo_copies = 1

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.next_layers, self.rest_layers = 1, len(heads) - 1

    def next(self, z: Tensor, rotation: Any, layout: Any, layers: Layers) -> tuple[Tensor, Tensor]:
        first = self.heads[0](z, rotation, layout, *layers[:1])
        return first, first

    def rest(
        self, memo: Tensor, future: Future, rotation: Any, layout: Any, layers: Layers, upto: int
    ) -> Iterable[Tensor]:
        latents, x = [], memo
        for i, head in enumerate(self.heads[1:upto]):
            x = head(x, rotation, layout, *layers[i : i + 1])
            latents.append(x)
        return latents


class AnticausalHeads(nn.Module):
    """The next token needs every head; the memo holds the latents of heads 2..n side by side."""

    independent = False
    reads_ahead = False

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.next_layers, self.rest_layers = len(heads), 0
        self.memo_copies = max(1, len(heads) - 1)

    def next(self, z: Tensor, rotation: Any, layout: Any, layers: Layers) -> tuple[Tensor, Tensor]:
        latents, x = [], z
        for i in range(len(self.heads) - 1, -1, -1):
            x = self.heads[i](x, rotation, layout, *layers[i : i + 1])
            latents.append(x)
        return x, torch.cat(latents[-2::-1], -1) if len(latents) > 1 else x

    def rest(
        self, memo: Tensor, future: Future, rotation: Any, layout: Any, layers: Layers, upto: int
    ) -> Iterable[Tensor]:
        return list(memo.chunk(len(self.heads) - 1, -1)[: upto - 1]) if upto > 1 else []


class SequentialHead(nn.Module):
    """A block on [normed embedding of the newest token, normed hidden state]. post_norm: for heads
    that end in a norm of their own, before which the model's does nothing or is not reached.
    """

    def __init__(self, dim: int, block: Make, norm: Make, post_norm: Make = nn.Identity) -> None:
        super().__init__()
        self.enorm, self.hnorm = norm(), norm()
        self.eh_proj = nn.Linear(2 * dim, dim, bias=False)
        self.block, self.post_norm = block(), post_norm()

    def forward(
        self, x: Tensor, embedded: Tensor, rotation: Any, layout: Any, layer: Any = None
    ) -> Tensor:
        """x, embedded (B, T, D) -> latent (B, T, D)."""
        y = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(x)], -1))
        return self.post_norm(self.block(y.to(x.dtype), rotation, layout, layer))


class SequentialHeads(nn.Module):
    """Each reads the one before. What stands between z and the memo, and again between a latent and
    the unembedding, is undone and done: `scale` (D,), the weight of the last norm, or None.
    """

    independent = False
    reads_ahead = True
    memo_copies = 1

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList([IdentityHead(), *heads])
        self.next_layers, self.rest_layers = 0, len(heads)
        self.scale: Tensor | None
        self.register_buffer("scale", None, persistent=False)

    def next(self, z: Tensor, rotation: Any, layout: Any, layers: Layers) -> tuple[Tensor, Tensor]:
        return self.heads[0](z, rotation, layout), z

    def rest(
        self, memo: Tensor, future: Future, rotation: Any, layout: Any, layers: Layers, upto: int
    ) -> Iterator[Tensor]:
        x = memo if self.scale is None else memo / self.scale
        for i, head in enumerate(self.heads[1:upto]):
            x = head(x, future(i + 1), rotation, layout, *layers[i : i + 1])
            yield x if self.scale is None else x * self.scale


Heads = ParallelHeads | CausalHeads | AnticausalHeads | SequentialHeads


class HeadKind(NamedTuple):
    """build(n, dim, block, norm) -> heads, of new blocks and norms like the model's own.
    takes_blocks: they are blocks of the trunk.
    """

    build: Callable[[int, int, Make, Make], Heads]
    takes_blocks: bool


def _parallel(n: int, dim: int, block: Make, norm: Make) -> Heads:
    return ParallelHeads([block() for _ in range(n)], layers_per_head=1)


def _linear(n: int, dim: int, block: Make, norm: Make) -> Heads:
    return ParallelHeads([LinearHead(dim) for _ in range(n)], layers_per_head=0)


def _residual(n: int, dim: int, block: Make, norm: Make) -> Heads:
    later = [ResidualHead(dim) for _ in range(n - 1)]
    return ParallelHeads([IdentityHead(), *later], layers_per_head=0)


def _identity(n: int, dim: int, block: Make, norm: Make) -> Heads:
    return ParallelHeads([IdentityHead() for _ in range(n)], layers_per_head=0)


def _causal(n: int, dim: int, block: Make, norm: Make) -> Heads:
    return CausalHeads([block() for _ in range(n)])


def _anticausal(n: int, dim: int, block: Make, norm: Make) -> Heads:
    return AnticausalHeads([block() for _ in range(n)])


def _sequential(n: int, dim: int, block: Make, norm: Make) -> Heads:
    return SequentialHeads([SequentialHead(dim, block, norm) for _ in range(n - 1)])


HEADS: dict[str, HeadKind] = {
    "transformer": HeadKind(_parallel, takes_blocks=True),
    "linear": HeadKind(_linear, takes_blocks=False),
    "residual": HeadKind(_residual, takes_blocks=False),
    "identity": HeadKind(_identity, takes_blocks=False),
    "causal": HeadKind(_causal, takes_blocks=True),
    "anticausal": HeadKind(_anticausal, takes_blocks=True),
    "sequential": HeadKind(_sequential, takes_blocks=False),
}
