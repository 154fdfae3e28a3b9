"""Drafters: what proposes the next tokens. The text never depends on them, only the number of steps
does.

A drafter owns every cache that the next token does not need, indexed by its own `seen`, and brings
it up to date when it is asked: ragged rows, full acceptance and skipped steps need no case of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtp.decode.contract import Draft, Drafter, NoDraft, State, chain


class OwnHeads:
    """Self-speculative decoding (Gloeckle et al. 2024; Stern et al. 2018): heads 2..1+depth guess,
    head 1 decides.

    depth: most guesses in a line, at most n - 1 (the default). tree: offer that many guesses per
    step, the most probable paths through the heads' best tokens, instead of one chain. Every head
    kind works: what a head needs is in the memo.
    """

    needs_memo = True

    def __init__(self, depth: int | None = None, tree: int | None = None) -> None:
        for key, value in (("depth", depth), ("tree", tree)):
            if value is not None and value < 1:
                raise ValueError(f"{key}={value} must be at least 1; for no guesses use no drafter")
        self.wanted, self.tree = depth, tree
        self.depth = self.nodes = 0

    def attach(self, model: Any) -> None:
        most = model.extra_heads
        if most < 1:
            raise ValueError(
                "the model has n_future_tokens=1 and no head to draft with: use no drafter"
            )
        if self.wanted is not None and self.wanted > most:
            raise ValueError(f"depth={self.wanted} exceeds the model's {most} extra heads")
        self.depth = self.wanted or most
        self.nodes = self.tree or self.depth
        self.model = model

    def begin(self, rows: int, slots: int) -> None:
        self.slots = slots
        self.cache = self.model.new_cache(self.model.rest_layers, rows, slots)
        self.seen = [0] * rows

    def admit(self, state: State, row: int, source: int | None) -> None:
        self.seen[row] = 0
        if source is not None:
            self.seen[row] = min(self.seen[source], state.length[row])
            self.cache.copy(source, row, self.seen[row])
        if self.seen[row] < state.length[row]:
            self._read(
                state, row, row + 1
            )  # alone, so that a long prompt does not widen everyone's window

    def propose(self, state: State, k: int) -> Draft:
        latents = self._read(state, 0, len(state.length))
        logits = self.model.draft_logits(latents[:k])
        return best_tree(state.scores(logits), self.tree) if self.tree else state.draw(logits)

    def _read(self, state: State, first: int, last: int) -> list[Tensor]:
        """Bring rows first..last-1 up to date; -> latent (R, D) of each extra head at each row's
        last position.
        """
        assert state.memo is not None
        length, seen = state.length[first:last], self.seen[first:last]
        width = (
            1
            if not self.cache.layers
            else max(1, *(n - s for n, s in zip(length, seen, strict=True)))
        )
        starts = [max(0, n - width) for n in length]
        layout = chain(first, starts, width, self.slots, state.memo)
        memo = state.memo.flatten(0, 1).index_select(0, layout.where).view(len(length), width, -1)
        latents = self.model.guess(memo, layout, self.cache, self.depth + 1)
        self.seen[first:last] = length
        return [
            x[:, -1]
            if width == 1
            else _at(x, [n - 1 - s for n, s in zip(length, starts, strict=True)])
            for x in latents
        ]


def best_tree(scores: Tensor, nodes: int) -> Draft:
    """The `nodes` most probable beginnings of paths, if scores (B, K, V) are logits of K tokens
    that do not depend on each other: a tree, since none is more probable than its own beginning.
    """
    logp, token = scores.log_softmax(-1).topk(min(nodes, scores.shape[-1]), -1)
    width = token.shape[-1]
    joint, tokens = [logp[:, 0]], [token[:, 0]]
    parents = [torch.full_like(token[:, 0], -1)]
    for depth in range(1, token.shape[1]):
        grown = (joint[-1][:, :, None] + logp[:, depth, None]).flatten(1)
        best, at = grown.topk(min(nodes, grown.shape[1]), -1)
        parents.append(sum(x.shape[1] for x in joint[:-1]) + at // width)
        tokens.append(token[:, depth].gather(1, at % width))
        joint.append(best)
    # Of equals the first: it lies nearer to the root. Then in order, so that parents come first.
    order = torch.cat(joint, 1).sort(dim=-1, descending=True, stable=True).indices
    kept = order[:, :nodes].sort(-1).values
    parent = torch.cat(parents, 1).gather(1, kept)
    place = torch.searchsorted(kept, parent.clamp(min=0))
    return Draft(torch.cat(tokens, 1).gather(1, kept), parents=torch.where(parent < 0, -1, place))


def _at(x: Tensor, columns: Sequence[int]) -> Tensor:
    """x (R, T, D), one column per row -> (R, D)."""
    if len(columns) == 1:
        return x[:, columns[0]]
    return x[torch.arange(len(columns), device=x.device), torch.tensor(columns, device=x.device)]


DRAFTERS: dict[str, Callable[[int | None], Drafter]] = {
    "none": lambda depth: NoDraft(),
    "heads": OwnHeads,
}


def make_drafter(name: str, depth: int | None = None) -> Drafter:
    """A drafter by its word; depth None lets it choose. ValueError names the allowed words."""
    if name not in DRAFTERS:
        raise ValueError(f"drafter={name!r} is unknown: allowed are {', '.join(DRAFTERS)}")
    return DRAFTERS[name](depth)
