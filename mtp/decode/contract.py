"""The words that models, drafters, rules and the loop share. Nothing here knows any of them.

A decoding *slot* is a place in a key/value cache; a *position* is a place in the text. A step feeds
T new columns to R neighbouring rows of the batch: `Layout` says where they go and what they may
see.

A draft is a chain of guesses or a tree of them. Column 0 of a step is the pending token, column
1 + i the i-th guess; guesses lie in the cache by column until those that stand are moved together.

Letters: B rows of the batch, R rows of a pass, T new columns, S slots, K drafted tokens, V
vocabulary, D width of the memo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Layout(NamedTuple):
    """rows: which rows of the batch. where (R*T,): flat slots, row * slots + slot. positions (R,
    T).

    mask: what is added to attention scores, or bool, (R, 1, T, span); None says that a pass is
    causal from slot 0 on, or that its single column sees every slot below span, and lets attention
    take its fast path. span: upper bound of the slots in use.
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


def tree(
    starts: Sequence[int], lineage: Tensor, slots: int, like: Tensor, first: int = 0
) -> Layout:
    """The columns of a step's draft tree, for all rows: each sees its row's text and its lineage
    (B, T, T), see `Draft.lineage`. Its slot follows its column, its position its depth. Columns
    before `first` are in the cache already.
    """
    B, T, _ = lineage.shape
    span = max(starts) + T
    start = torch.tensor(starts, device=like.device)[:, None]
    at = start + torch.arange(T, device=like.device)
    where = at + torch.arange(B, device=like.device)[:, None] * slots
    lineage, where = lineage[:, first:], where[:, first:]
    positions = start + lineage.sum(-1) - 1
    seen = (torch.arange(span, device=like.device) < start)[:, None].repeat(1, T - first, 1)
    seen.scatter_(2, at[:, None].expand(B, T - first, T), lineage)
    mask = torch.full(seen.shape, float("-inf"), dtype=like.dtype, device=like.device)
    mask = mask.masked_fill_(seen, 0.0)[:, None]
    return Layout(slice(0, B), where.flatten(), positions, mask, span)


@dataclass
class Draft:
    """Guesses after the pending token. tokens (B, K); -1: nothing is offered there.

    probs (B, K, V): the law each was drawn from; None: not drawn. parents (B, K): the guess that
    each follows, by number, always an earlier one, or -1 for the pending token; None: a chain.
    logq (B, K): in place of probs, the log of each guess's own probability after those it follows.
    """

    tokens: Tensor
    probs: Tensor | None = None
    parents: Tensor | None = None
    logq: Tensor | None = None

    @cached_property
    def lineage(self) -> Tensor:
        """(B, 1 + K, 1 + K): whether column j is column i or one of its ancestors, for a tree.

        >>> Draft(torch.tensor([[5, 6, 7]]), parents=torch.tensor([[-1, -1, 1]])).lineage.long()
        tensor([[[1, 0, 0, 0],
                 [1, 1, 0, 0],
                 [1, 0, 1, 0],
                 [1, 0, 1, 1]]])
        """
        assert self.parents is not None
        T = self.parents.shape[1] + 1
        step = torch.eye(T, device=self.parents.device).repeat(len(self.parents), 1, 1)
        step[:, 1:].scatter_(2, self.parents[:, :, None] + 1, 1.0)
        for _ in range((T - 1).bit_length()):  # each doubles how far it reaches
            step = (step @ step).clamp_(max=1.0)
        return step.bool()


@dataclass
class State:
    """All that is known about the batch, and all that a drafter sees.

    text (B, S): `text[b, :length[b]]` is in the target's cache, `text[b, length[b]]` is decided but
    not yet read. memo (B, S, D): what the target left for its own heads, for positions < length;
    None unless the drafter asks.

    draw(logits (B, K, V), ahead=0) -> Draft: guesses for K places, the first of which lies `ahead`
    beyond the first one after the pending token, drawn as the acceptance rule wants them.
    scores(logits, ahead=0) -> (B, K, V): what such a guess has most of; for trees of the best few.
    branches(logits (B, W, V), ahead) -> log weights and luck, see `Rule.branches`; for beams.

    choices (B, S): the target's own token after each slot that a step read; beyond `length` as it
    was read behind guesses that did not stand. -1: none. A drafter that wants it puts it there, and
    the loop writes to it.
    """

    text: Tensor
    length: list[int]
    seed: list[int]
    memo: Tensor | None
    draw: Callable[..., Draft]
    scores: Callable[..., Tensor]
    choices: Tensor | None = None
    branches: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None


class Sizes(Protocol):
    """What decoding asks of a target's config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Target(Protocol):
    """What the loop asks of a model, and `DraftModel` of the one that drafts. A cache has the names
    of `mtp.cache.Cache`.

    next_layers, rest_layers: attention layers that the next token needs, and that only drafts need.
    extra_heads: how many heads can draft; where there are some, `OwnHeads` asks for more, such as
    reads_ahead: whether a head reads the guesses of those before it.
    """

    @property
    def config(self) -> Sizes: ...
    @property
    def embedding(self) -> Any:
        """Its `weight` tells device and type."""

    @property
    def next_layers(self) -> int: ...
    @property
    def rest_layers(self) -> int: ...
    @property
    def extra_heads(self) -> int: ...
    @property
    def memo_dim(self) -> int: ...

    def new_cache(self, layers: int, rows: int, slots: int) -> Any:
        """Positions may reach as far as `slots`, beyond config.max_seq_len: there lie guesses that
        are never kept.
        """

    def read(self, tokens: Tensor, layout: Layout, cache: Any) -> tuple[Tensor, Tensor]:
        """Feed tokens (R, T) -> latent (R, T, D), memo (R, T, memo_dim)."""

    def logits(self, latent: Tensor) -> Tensor:
        """Latent (..., D) -> logits of the next token (..., V)."""


class Drafter(Protocol):
    """Guesses the next tokens of every row. It keeps what it likes, but the text never depends on
    it, unless the rule is lossy.
    """

    depth: int  # most tokens that one step can accept
    nodes: int  # most tokens that it offers: more than depth in a tree
    needs_memo: bool

    def attach(self, model: Any) -> None:
        """Settle depth and nodes for this target; ValueError where it cannot be drafted for."""

    def begin(self, rows: int, slots: int) -> None:
        """Make caches of `slots` slots per row: 1 + nodes more than the longest text has."""

    def admit(self, state: State, row: int, source: int | None) -> None:
        """A new text stands in `row`; `source` is another row that holds the same prompt, if there
        is one.
        """

    def propose(self, state: State, k: int) -> Draft:
        """At most k guesses in a line, 1 <= k <= depth."""


class NoDraft:
    """The drafter that never guesses: plain autoregressive decoding."""

    depth = nodes = 0
    needs_memo = False

    def attach(self, model: Any) -> None: ...

    def begin(self, rows: int, slots: int) -> None: ...

    def admit(self, state: State, row: int, source: int | None) -> None: ...

    def propose(self, state: State, k: int) -> Draft:
        return Draft(state.text[:, :0])


def check_guesses(**most: int | None) -> None:
    for key, value in most.items():
        if value is not None and value < 1:
            raise ValueError(f"{key}={value} must be at least 1; for no guesses use no drafter")


class Verdict(NamedTuple):
    """accepted (B,): how many of the draft's tokens stand; next (B,): the target's own token after
    them. path (B, 1 + K): the columns that stand, of a tree; None: the first 1 + accepted ones.
    choice (B, 1 + K): the target's own token after each column; None: the rule does not make it.
    """

    accepted: Tensor
    next: Tensor
    path: Tensor | None = None
    choice: Tensor | None = None


@dataclass
class Place:
    """What noise is keyed by: each row's request seed, and the position of the first token that a
    step decides; both on the host, of length B. count: how many positions it may decide.
    """

    seed: Sequence[int]
    first: Sequence[int]
    count: int


class Rule(Protocol):
    """Decides which guesses stand.

    lossy: texts do not follow the target's law, and depend on how far drafts reach.
    """

    @property
    def lossy(self) -> bool: ...

    def draw(self, logits: Tensor, place: Place, ahead: int = 0) -> Draft:
        """Guesses from the logits (B, K, V) of a drafter for positions first + ahead and on."""

    def scores(self, logits: Tensor, place: Place, ahead: int = 0) -> Tensor:
        """What a guess for each of these positions should have most of, (B, K, V)."""

    def branches(self, logits: Tensor, place: Place, ahead: int) -> tuple[Tensor, Tensor]:
        """Logits (B, W, V) of W beams, all for position first + ahead -> log weight of each token
        after its beam (B, W, V), and luck: the beams of most weight and luck together go on.
        """

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

    logprobs: log p of each under the target's own law, before temperature and cuts, if asked for.
    steps: forward passes after the prompt's. drafted, accepted: in how many of them a guess was
    offered, and taken, at each depth 1..K.
    """

    tokens: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    steps: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per step, the target's own included: 1 + accepted / steps."""
        return 1 + sum(self.accepted) / max(1, self.steps)


def stop_at(*ids: int) -> Callable[[list[int]], bool]:
    """A `Request.stop` for end tokens: any one of them ends the text."""
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(
            f"stop_at{ids}: give token ids; strings go to stop_at_text(tokenizer, ...)"
        )
    ends = frozenset(ids)
    return lambda new: new[-1] in ends


def stop_at_text(tokenizer: Any, *texts: str) -> Callable[[list[int]], bool]:
    """A `Request.stop` for strings, wherever they begin and end within tokens. The tokens that
    complete one stay in the completion; `cut_at` removes it from the decoded text.
    """
    if not texts or not all(texts):
        raise ValueError(f"stop strings {texts!r}: give at least one, and none of them empty")
    longest = max(len(text.encode()) for text in texts)

    def ends(new: list[int]) -> bool:
        """All but the last token were looked at before: the end of the text is enough."""
        window, needed = longest + 4, longest + len(tokenizer.decode(new[-1:]).encode())
        tail = tokenizer.decode(new[-window:])
        while len(tail.encode()) < needed and window < len(new):  # some tokens are no text
            window *= 2
            tail = tokenizer.decode(new[-window:])
        return any(text in tail for text in texts)

    return ends


def cut_at(text: str, *stops: str) -> str:
    """The text before the first of the stop strings.

    >>> cut_at("return x\\n\\ndef g", "\\ndef", "\\n\\n")
    'return x'
    """
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
