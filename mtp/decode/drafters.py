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

    depth: most guesses per step, at most n - 1 (the default). Every head kind works: what a head
    needs is in the memo.
    """

    needs_memo = True

    def __init__(self, depth: int | None = None) -> None:
        if depth is not None and depth < 1:
            raise ValueError(f"depth={depth} must be at least 1; for none use no drafter")
        self.wanted = depth
        self.depth = depth or 0

    def begin(self, model: Any, rows: int, slots: int) -> None:
        most = model.extra_heads
        if most < 1:
            raise ValueError(
                "the model has n_future_tokens=1 and no head to draft with: use no drafter"
            )
        if self.wanted is not None and self.wanted > most:
            raise ValueError(f"depth={self.wanted} exceeds the model's {most} extra heads")
        self.depth = self.wanted or most
        self.model, self.slots = model, slots
        self.cache = model.new_cache(model.rest_layers, rows, slots)
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
        return state.draw(self.model.draft_logits(latents[:k]))

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
