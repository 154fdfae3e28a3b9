"""Drafters: what proposes the next tokens. Unless a rule is lossy the text never depends on them,
only the number of steps does.

A drafter owns every cache that the next token does not need, indexed by its own `seen`, and brings
it up to date when it is asked: ragged rows, full acceptance and skipped steps need no case of their
own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mtp.decode.beam import Beams, best_tree
from mtp.decode.contract import (
    Draft,
    Drafter,
    Layout,
    NoDraft,
    State,
    chain,
    check_guesses,
    tree,
)
from mtp.decode.jacobi import Jacobi
from mtp.decode.lookup import PromptLookup


class Reader:
    """A drafter's own cache, and how much of each row's text it holds."""

    def __init__(self, cache: Any, rows: int) -> None:
        self.cache, self.seen = cache, [0] * rows

    def admit(self, row: int, source: int | None, length: int) -> bool:
        """Begin a text of `length` tokens with what `source` holds of it; is any left to read?"""
        known = 0 if source is None else min(self.seen[source], length)
        if source is not None and source != row:
            self.cache.copy(source, row, known)
        self.seen[row] = known
        return known < length

    def catch_up(
        self, first: int, ends: list[int], provisional: int = 0
    ) -> tuple[Layout, list[int]]:
        """The pass after which rows from `first` on hold ends[r] tokens each, and the column of
        each row's last one. All are as wide as the row that lags most; they read some anew, as
        they do with the last `provisional` ones in the next pass.
        """
        rows = slice(first, first + len(ends))
        # Without layers there is nothing to catch up with.
        seen = self.seen[rows] if self.cache.layers else ends
        width = max(1, *(end - known for end, known in zip(ends, seen, strict=True)))
        starts = [max(0, end - width) for end in ends]
        self.seen[rows] = [max(0, end - provisional) for end in ends]
        layout = chain(first, starts, width, self.cache.slots, self.cache.k)
        return layout, [end - 1 - start for end, start in zip(ends, starts, strict=True)]


class Following:
    """Tokens that follow those of a pass, to be embedded for heads that read ahead. Beyond the
    pending token they are guesses, which heads make one after another.
    """

    def __init__(self, model: Any, text: Tensor, layout: Layout, most: int) -> None:
        self.model, self.text, self.layout, self.most = model, text, layout, most

    @cached_property
    def tokens(self) -> Tensor:
        """(R, T + most), from the first token of the pass on."""
        rows, width = self.layout.positions.shape
        first = self.layout.where.view(rows, width)[:, :1]
        columns = torch.arange(width + self.most, device=first.device)
        return self.text.flatten()[first + columns]

    def guess(self, columns: Sequence[int], tokens: Tensor) -> None:
        """tokens (R, 1), one at each row's column."""
        self.tokens[range(len(columns)), columns] = tokens[:, 0]

    def __call__(self, j: int) -> Tensor:
        width = self.layout.positions.shape[1]
        return self.model.embedding(self.tokens[:, j : j + width])


class OwnHeads:
    """Self-speculative decoding (Gloeckle et al. 2024; Stern et al. 2018): heads 2..1+depth guess,
    head 1 decides.

    depth: most guesses in a line, at most n - 1 (the default). tree: offer that many guesses per
    step, the most probable paths through the heads' best tokens, instead of one chain. vocabulary:
    the only token ids that heads score; few and frequent ones make a step shorter. Others have no
    chance, and fill a tree only where it has room left. Every head kind works: what a head needs is
    in the memo, or in the guesses of those before it, which then are no tree.
    """

    needs_memo = True

    def __init__(
        self,
        depth: int | None = None,
        tree: int | None = None,
        vocabulary: Sequence[int] | Tensor | None = None,
    ) -> None:
        check_guesses(depth=depth, tree=tree)
        self.wanted, self.tree = depth, tree
        self.vocabulary = None if vocabulary is None else _distinct(vocabulary)
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
        if self.tree and model.reads_ahead:
            raise ValueError(
                f"tree={self.tree} needs heads that guess without each other: the model's read the "
                f"guesses of those before, which are one chain"
            )
        self.nodes = self.tree or self.depth
        self.ahead = self.depth if model.reads_ahead else 0
        self.model = model
        if self.vocabulary is not None:
            self._take_rows(self.vocabulary)

    def _take_rows(self, vocabulary: Tensor) -> None:
        last = self.model.config.vocab_size - 1
        if vocabulary.min() < 0 or vocabulary.max() > last:
            raise ValueError(f"vocabulary has token ids outside 0..{last}")
        self.ids = vocabulary.to(self.model.embedding.weight.device)
        self.matrices = self.model.output.rows(self.ids)

    def begin(self, rows: int, slots: int) -> None:
        cache = self.model.new_cache(self.model.rest_layers, rows, slots)
        # One for each depth: a guess wants its head and those before it, the others may lag.
        self.readers = [Reader(cache, rows) for _ in range(self.depth)]

    def admit(self, state: State, row: int, source: int | None) -> None:
        known = max(0, state.length[row] - self.ahead)  # what no guess has a part in
        if any([reader.admit(row, source, known) for reader in self.readers]):
            # alone, so that a long prompt does not widen everyone's window
            layout, _ = self._catch_up(self.depth, row, [known])
            for _ in self._guess(state, layout, self._following(state, layout), self.depth):
                pass  # heads fill their caches

    def propose(self, state: State, k: int) -> Draft:
        # The pending token is certain, so one guess fewer has a part in a head's last entries.
        layout, columns = self._catch_up(k, 0, state.length, max(0, self.ahead - 1))
        future = self._following(state, layout)
        latents = (_at(x, columns) for x in self._guess(state, layout, future, k))
        if self.ahead:
            return self._propose_in_turn(state, columns, future, latents)
        return self._offer(state, self._logits([*latents]))

    def _offer(self, state: State, logits: Tensor) -> Draft:
        return best_tree(state.scores(logits), self.tree) if self.tree else state.draw(logits)

    def _catch_up(
        self, k: int, first: int, ends: list[int], provisional: int = 0
    ) -> tuple[Layout, list[int]]:
        """As `Reader.catch_up`, of the first k extra heads: the last of them lags most."""
        reader = self.readers[k - 1]
        found = reader.catch_up(first, ends, provisional)
        for shallower in self.readers[: k - 1]:
            shallower.seen[:] = reader.seen
        return found

    def _propose_in_turn(
        self, state: State, columns: list[int], future: Following, latents: Iterable[Tensor]
    ) -> Draft:
        """Each guess is what the next head reads."""
        drafts: list[Draft] = []
        for i, latent in enumerate(latents):
            drafts.append(state.draw(self._logits([latent], i), i))
            future.guess([column + 2 + i for column in columns], drafts[i].tokens)
        return _line(drafts)

    def _following(self, state: State, layout: Layout) -> Following:
        return Following(self.model, state.text, layout, 1 + self.depth)

    def _guess(self, state: State, layout: Layout, future: Following, k: int) -> Iterable[Tensor]:
        """-> latents (R, T, D) of the first k extra heads, one after another."""
        assert state.memo is not None
        memo = state.memo.flatten(0, 1).index_select(0, layout.where)
        memo = memo.view(*layout.positions.shape, memo.shape[-1])
        return self.model.guess(memo, future, layout, self.readers[0].cache, 1 + k)

    def _logits(self, latents: list[Tensor], skipped: int = 0) -> Tensor:
        """Latents (R, D), after those of `skipped` extra heads -> logits (R, K, V), -inf for tokens
        that are not to be guessed.
        """
        if self.vocabulary is None:
            return self.model.draft_logits(latents, first=2 + skipped)
        some = self.model.draft_logits(latents, self.matrices, first=2 + skipped)
        sizes = (*some.shape[:-1], self.model.config.vocab_size)
        return some.new_full(sizes, float("-inf")).index_copy_(-1, self.ids, some)


class DraftModel:
    """Speculative decoding (Leviathan et al. 2023; Chen et al. 2023): a smaller model with the same
    vocabulary writes `depth` tokens ahead, one by one.
    """

    needs_memo = False

    def __init__(self, model: Any, depth: int = 4) -> None:
        check_guesses(depth=depth)
        self.model = model
        self.depth = self.nodes = self.grown = depth  # grown: how many guesses it makes itself

    def attach(self, model: Any) -> None:
        own, target = self.model.config.vocab_size, model.config.vocab_size
        if own != target:
            raise ValueError(
                f"the draft model has vocab_size={own}, the target {target}: they must be equal"
            )

    def begin(self, rows: int, slots: int) -> None:
        longest, most = slots - 1 - self.nodes, self.model.config.max_seq_len
        if longest > most:
            raise ValueError(
                f"texts of up to {longest} tokens exceed the draft model's max_seq_len={most}: "
                f"shorten the prompts or lower max_new_tokens"
            )
        slots = longest + 1 + self.grown
        self.reader = Reader(self.model.new_cache(self.model.next_layers, rows, slots), rows)

    def admit(self, state: State, row: int, source: int | None) -> None:
        if self.reader.admit(row, source, state.length[row]):  # alone: see OwnHeads
            self._read(state.text, row, [state.length[row]])

    def propose(self, state: State, k: int) -> Draft:
        cache = self.reader.cache
        latent = self._read(state.text, 0, [n + 1 for n in state.length])  # with the pending token
        drafts = [state.draw(self.model.logits(latent))]
        for ahead in range(1, k):  # guesses lie beyond what `seen` says is held: a loan
            at = chain(0, [n + ahead for n in state.length], 1, cache.slots, cache.k)
            latent, _ = self.model.read(drafts[-1].tokens, at, cache)
            drafts.append(state.draw(self.model.logits(latent), ahead))
        return _line(drafts)

    def _read(self, text: Tensor, first: int, ends: list[int]) -> Tensor:
        """Bring rows from `first` on up to ends[r] tokens; -> latent (R, 1, D) of the last."""
        layout, columns = self.reader.catch_up(first, ends)
        tokens = text[layout.rows].gather(1, layout.positions)  # its cache may be longer
        latent, _ = self.model.read(tokens, layout, self.reader.cache)
        return _at(latent, columns)[:, None]


class BeamModel(DraftModel):
    """The drafter of multi-token assisted decoding (Qin et al. 2025): the `width` most promising
    paths of a smaller model, `depth` tokens long, as the acceptance rule draws or ranks them. They
    grow as a tree in its cache. whole: the target reads them all, in place of the best one.

    Where fewer than `width` tokens have any probability, the rest of the beam stays empty.
    """

    def __init__(self, model: Any, depth: int = 4, width: int = 4, whole: bool = False) -> None:
        super().__init__(model, depth)
        check_guesses(width=width)
        self.width, self.whole, self.grown = width, whole, depth * width
        self.nodes = self.grown if whole else depth

    def attach(self, model: Any) -> None:
        super().attach(model)
        _check_width(self.width, model)
        own, target = _parameters(self.model), _parameters(model)
        if own > target:
            warnings.warn(
                f"the model that drafts has {own / target:.1f} times the target's parameters: each "
                f"of the {self.depth} tokens that it looks ahead costs about that many times a "
                f"step without drafts",
                stacklevel=2,
            )

    def propose(self, state: State, k: int) -> Draft:
        assert state.branches is not None
        cache, beams = self.reader.cache, Beams(self.width)
        latent = self._read(state.text, 0, [n + 1 for n in state.length])  # with the pending token
        beams.grow(*state.branches(self.model.logits(latent), 0))
        for ahead in range(1, k):  # on loan, as in a chain
            lineage, held = beams.tree().lineage, 1 + (ahead - 1) * self.width
            at = tree(state.length, lineage, cache.slots, cache.k, first=held)
            latent, _ = self.model.read(beams.tokens[-1].clamp(min=0), at, cache)
            beams.grow(*state.branches(self.model.logits(latent), ahead))
        return beams.tree() if self.whole else beams.best()


class BeamHeads(OwnHeads):
    """`BeamModel` with the target's own heads in place of another model. They guess without each
    other: the law of a path is the product of theirs, and the draft costs no pass.
    """

    def __init__(
        self,
        depth: int | None = None,
        width: int = 4,
        whole: bool = False,
        vocabulary: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__(depth, vocabulary=vocabulary)
        check_guesses(width=width)
        self.width, self.whole = width, whole

    def attach(self, model: Any) -> None:
        super().attach(model)
        _check_width(self.width, model)
        if model.reads_ahead:
            raise ValueError(
                "beams need heads that guess without each other: the model's read the guesses of "
                "those before, which are one chain, as drafter=heads makes it"
            )
        self.nodes = self.depth * (self.width if self.whole else 1)

    def _offer(self, state: State, logits: Tensor) -> Draft:
        assert state.branches is not None
        beams, paths = Beams(self.width), 1
        for ahead in range(logits.shape[1]):
            of_head = logits[:, ahead, None].expand(-1, paths, -1)
            beams.grow(*state.branches(of_head, ahead))
            paths = self.width
        return beams.tree() if self.whole else beams.best()


def _line(drafts: Sequence[Draft]) -> Draft:
    """Guesses of one token each as one chain."""
    probs = [draft.probs for draft in drafts if draft.probs is not None]
    tokens = torch.cat([draft.tokens for draft in drafts], 1)
    return Draft(tokens, torch.cat(probs, 1) if probs else None)


def _at(x: Tensor, columns: Sequence[int]) -> Tensor:
    """x (R, T, D), one column per row -> (R, D)."""
    if len(columns) == 1 or x.shape[1] == 1:
        return x[:, columns[0]]
    return x[torch.arange(len(columns), device=x.device), torch.tensor(columns, device=x.device)]


def _check_width(width: int, model: Any) -> None:
    if width > (most := model.config.vocab_size):
        raise ValueError(f"width={width} exceeds vocab_size={most}: beams begin with other tokens")


def _parameters(model: Any) -> int:
    """Also of an adapter, which is no module but holds one."""
    module = model if isinstance(model, nn.Module) else model.model
    return sum(parameter.numel() for parameter in module.parameters())


def _distinct(vocabulary: Sequence[int] | Tensor) -> Tensor:
    ids = torch.as_tensor(vocabulary)
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"vocabulary has shape {tuple(ids.shape)} and type {ids.dtype}: "
            f"it must be a row of token ids, at least one"
        )
    if len(ids.unique()) < len(ids):
        raise ValueError("vocabulary names a token twice: its ids must differ")
    return ids.long()


def _jacobi(depth: int = 15, pool: int = 0, first: str = "text") -> Jacobi:
    """A window holds the pending token and `depth` guesses."""
    check_guesses(depth=depth)
    if first not in ("text", "heads"):
        raise ValueError(f"first={first!r} is unknown: allowed are text, heads")
    return Jacobi(depth + 1, pool, OwnHeads() if first == "heads" else None)


def _beam(draft: Any = None, **words: Any) -> Drafter:
    return BeamHeads(**words) if draft is None else BeamModel(draft, **words)


DRAFTERS: dict[str, tuple[Callable[..., Drafter], tuple[str, ...]]] = {  # and what they take
    "none": (NoDraft, ()),
    "heads": (OwnHeads, ("depth", "tree", "vocabulary")),
    "model": (lambda draft, **words: DraftModel(draft, **words), ("draft", "depth")),
    "lookup": (PromptLookup, ("depth",)),
    "jacobi": (_jacobi, ("depth", "pool", "first")),
    "beam": (_beam, ("draft", "depth", "width", "whole")),
}


def make_drafter(name: str, **settings: Any) -> Drafter:
    """A drafter by its word. settings: depth, tree, vocabulary, draft (the model for "model", and
    for "beam", which else takes the target's heads), pool and first ("text" or "heads", for
    "jacobi"), width and whole (for "beam"), as far as it takes them; None lets it choose.
    ValueError names what is allowed.
    """
    if name not in DRAFTERS:
        raise ValueError(f"drafter={name!r} is unknown: allowed are {', '.join(DRAFTERS)}")
    make, taken = DRAFTERS[name]
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given:
        if key not in taken:
            takers = [word for word, (_, keys) in DRAFTERS.items() if key in keys]
            raise ValueError(f"drafter={name} takes no {key}=: only {', '.join(takers)} may")
    if name == "model" and "draft" not in given:
        raise ValueError("drafter=model needs draft=: the model that drafts")
    return make(**given)
