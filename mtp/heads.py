"""Prediction heads behind one contract. A head turns the trunk's output z into the latent from
which token t + i is predicted.

    next(z, *place, layers)           -> latent of head 1, memo: what the other heads read
    rest(memo, *place, layers, upto)  -> latents of heads 2 .. upto

`place` (rotation, layout) and `layers` (one key/value cache per attention layer, or None in
training) go to the blocks untouched: a head neither knows positions nor caches. `next_layers`
counts the attention layers that head 1 needs, `rest_layers` those that only drafts need; a decoder
therefore keeps them in separate caches. `memo_copies` is the memo's width in units of d. Kinds
(paper, section 2 and appendix B):

    transformer  one block per head, all reading z        (the method)
    linear       one d x d map per head, all reading z
    residual     head 1 is z itself, others z + SiLU(Wz)  (Medusa, Cai et al. 2024)
    causal       head i reads head i - 1
    anticausal   head n reads z, head i reads head i + 1, so head 1 comes last

Blocks of heads are taken from the trunk; linear and residual heads are small and leave it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layers = Sequence[Any]


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
    memo_copies = 1

    def __init__(self, heads: Sequence[nn.Module], layers_per_head: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.next_layers = layers_per_head
        self.rest_layers = layers_per_head * (len(heads) - 1)

    def next(self, z: Tensor, rotation: Any, layout: Any, layers: Layers) -> tuple[Tensor, Tensor]:
        return self.heads[0](z, rotation, layout, *layers[:1]), z

    def rest(
        self, memo: Tensor, rotation: Any, layout: Any, layers: Layers, upto: int
    ) -> list[Tensor]:
        return [
            head(memo, rotation, layout, *layers[i : i + 1])
            for i, head in enumerate(self.heads[1:upto])
        ]


class CausalHeads(nn.Module):
    independent = False
    memo_copies = 1

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.next_layers, self.rest_layers = 1, len(heads) - 1

    def next(self, z: Tensor, rotation: Any, layout: Any, layers: Layers) -> tuple[Tensor, Tensor]:
        first = self.heads[0](z, rotation, layout, *layers[:1])
        return first, first

    def rest(
        self, memo: Tensor, rotation: Any, layout: Any, layers: Layers, upto: int
    ) -> list[Tensor]:
        latents, x = [], memo
        for i, head in enumerate(self.heads[1:upto]):
            x = head(x, rotation, layout, *layers[i : i + 1])
            latents.append(x)
        return latents


class AnticausalHeads(nn.Module):
    """The next token needs every head; the memo holds the latents of heads 2..n side by side."""

    independent = False

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
        self, memo: Tensor, rotation: Any, layout: Any, layers: Layers, upto: int
    ) -> list[Tensor]:
        return list(memo.chunk(len(self.heads) - 1, -1)[: upto - 1]) if upto > 1 else []


Heads = ParallelHeads | CausalHeads | AnticausalHeads


class HeadKind(NamedTuple):
    """build(n, dim, block factory) -> heads. takes_blocks: they are blocks of the trunk."""

    build: Callable[[int, int, Callable[[], nn.Module]], Heads]
    takes_blocks: bool


def _parallel(n: int, dim: int, block: Callable[[], nn.Module]) -> Heads:
    return ParallelHeads([block() for _ in range(n)], layers_per_head=1)


def _linear(n: int, dim: int, block: Callable[[], nn.Module]) -> Heads:
    return ParallelHeads([LinearHead(dim) for _ in range(n)], layers_per_head=0)


def _residual(n: int, dim: int, block: Callable[[], nn.Module]) -> Heads:
    later = [ResidualHead(dim) for _ in range(n - 1)]
    return ParallelHeads([IdentityHead(), *later], layers_per_head=0)


def _causal(n: int, dim: int, block: Callable[[], nn.Module]) -> Heads:
    return CausalHeads([block() for _ in range(n)])


def _anticausal(n: int, dim: int, block: Callable[[], nn.Module]) -> Heads:
    return AnticausalHeads([block() for _ in range(n)])


HEADS: dict[str, HeadKind] = {
    "transformer": HeadKind(_parallel, takes_blocks=True),
    "linear": HeadKind(_linear, takes_blocks=False),
    "residual": HeadKind(_residual, takes_blocks=False),
    "causal": HeadKind(_causal, takes_blocks=True),
    "anticausal": HeadKind(_anticausal, takes_blocks=True),
}
