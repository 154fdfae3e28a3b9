"""The words that models, drafters, rules and the loop share. Nothing here knows any of them.

A decoding *slot* is a place in a key/value cache; a *position* is a place in the text. A step feeds
T new columns to R neighbouring rows of the batch: `Layout` says where they go and what they may
see.

Letters: B rows of the batch, R rows of a pass, T new columns, S slots, K drafted tokens, V
vocabulary, D width of the memo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Layout(NamedTuple):
    """rows: which rows of the batch. where (R*T,): flat slots, row * slots + slot. positions (R,
    T).

    mask: what is added to attention scores, (R, 1, T, span); None says that a pass is causal from
    slot 0 on, or that its single column sees every slot below span, and lets attention take its
    fast path. span: upper bound of the slots in use.
    """

    rows: slice
    where: Tensor
    positions: Tensor
    mask: Tensor | None
    span: int


def chain(first_row: int, starts: Sequence[int], columns: int, slots: int, like: Tensor) -> Layout:
    """`columns` new tokens for each of len(starts) rows from `first_row` on, row r's from slot
    starts[r] on, each seeing all before.

    `like` gives device and floating type. Slots and positions coincide in a chain.

    >>> layout = chain(0, [2, 0], columns=2, slots=8, like=torch.zeros(()))
    >>> layout.where.tolist(), layout.positions.tolist(), layout.span
    ([2, 3, 8, 9], [[2, 3], [0, 1]], 4)
    """
    span = max(starts) + columns
    if span > slots:
        raise ValueError(f"{span} slots are needed but the cache has {slots}")
    rows = slice(first_row, first_row + len(starts))
    if len(starts) == 1:  # spares a plain step most of its set-up
        where = torch.arange(starts[0], span, device=like.device)
        positions = where.view(1, columns)
    else:
        columns_of = [range(start, start + columns) for start in starts]
        positions = torch.tensor(columns_of, device=like.device)
        where = positions.flatten()
    if rows.stop > 1:
        offsets = torch.arange(rows.start, rows.stop, device=like.device) * slots
        where = (positions + offsets[:, None]).flatten()
    from_zero = columns > 1 and not any(starts)
    if from_zero or (columns == 1 and min(starts) == max(starts)):
        return Layout(rows, where, positions, None, span)
    seen = torch.arange(span, device=like.device) <= positions[:, None, :, None]
    mask = torch.full(seen.shape, float("-inf"), dtype=like.dtype, device=like.device)
    return Layout(rows, where, positions, mask.masked_fill_(seen, 0.0), span)


@dataclass
class Draft:
    """tokens (B, K): a chain of guesses after the pending token. probs (B, K, V): the law each was
    drawn from; None: not drawn.
    """

    tokens: Tensor
    probs: Tensor | None = None


@dataclass
class State:
    """All that is known about the batch, and all that a drafter sees.

    text (B, S): `text[b, :length[b]]` is in the target's cache, `text[b, length[b]]` is decided but
    not yet read. memo (B, S, D): what the target left for its own heads, for positions < length;
    None unless the drafter asks. draw(logits (B, K, V)) -> Draft: guesses for the K places after
    the pending token, drawn as the acceptance rule wants them.
    """

    text: Tensor
    length: list[int]
    seed: list[int]
    memo: Tensor | None
    draw: Callable[[Tensor], Draft]


class Drafter(Protocol):
    """Guesses the next tokens of every row. It keeps what it likes, but the text never depends on
    it.
    """

    depth: int  # most tokens per step
    needs_memo: bool

    def begin(self, model: Any, rows: int, slots: int) -> None: ...

    def admit(self, state: State, row: int, source: int | None) -> None:
        """A new text stands in `row`; `source` is another row that holds the same prompt, if there
        is one.
        """

    def propose(self, state: State, k: int) -> Draft: ...


class NoDraft:
    """The drafter that never guesses: plain autoregressive decoding."""

    depth = 0
    needs_memo = False

    def begin(self, model: Any, rows: int, slots: int) -> None: ...

    def admit(self, state: State, row: int, source: int | None) -> None: ...

    def propose(self, state: State, k: int) -> Draft:
        return Draft(state.text[:, :0])


class Verdict(NamedTuple):
    """accepted (B,): how many of the draft's tokens stand; next (B,): the target's own token after
    them.
    """

    accepted: Tensor
    next: Tensor


class Place(NamedTuple):
    """What noise is keyed by: each row's request seed, and the position of the first token that
    logits speak of. On the host, both of length B.
    """

    seed: Sequence[int]
    first: Sequence[int]


class Rule(Protocol):
    """Decides which guesses stand."""

    def draw(self, logits: Tensor, place: Place) -> Draft:
        """Guesses from the logits (B, K, V) of a drafter."""

    def __call__(self, logits: Tensor, draft: Draft, place: Place) -> Verdict:
        """logits (B, 1 + K, V) of the target, after the pending token and after each guess."""


@dataclass
class Request:
    """One text to continue. prompt: ids, at least one. stop(new ids so far) -> True after the last
    token of the text.

    Equal seeds (0 to 2^63 - 1) give equal noise: samples of one prompt want different seeds.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    seed: int = 0
    stop: Callable[[list[int]], bool] | None = None


@dataclass
class Completion:
    """tokens: the new ids, a stop token included. heads: which head guessed each (1: the target's
    own choice).

    steps: forward passes after the prompt's. drafted, accepted: guesses offered and taken at each
    depth 1..K.
    """

    tokens: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    steps: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per step, the target's own included: 1 + accepted / steps."""
        return 1 + sum(self.accepted) / max(1, self.steps)


def stop_at(*ids: int) -> Callable[[list[int]], bool]:
    """A `Request.stop` for end tokens."""
    ends = frozenset(ids)
    return lambda new: new[-1] in ends
