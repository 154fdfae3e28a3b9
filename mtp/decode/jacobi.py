"""Jacobi decoding (Song et al. 2021; Santilli et al. 2023; Kou et al. 2024): the model is its own
drafter, without heads. A step reads a whole window of guesses; what the target itself would have
said after each of them is the next window.

The guesses after the first one that falls were read behind a wrong token, and yet some are right
already: the more, the better a model is trained to it. As noise belongs to positions, a sampled
choice stays the draw for its place however often it is guessed, and sampling converges as greedy
decoding does.

Letters: B rows, K guesses.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp.decode.contract import Draft, Drafter, NoDraft, State
from mtp.decode.sampling import FILL, Place, uniform

RUN = 4  # most tokens of a branch
Followers = dict[int, dict[int, None]]  # token -> what came after it, the newest last


class Jacobi:
    """window: the pending token and the guesses after it, as many in every step: those that are
    taken leave room at the end for tokens drawn from the text so far. What is not read, since a
    step is shorter, is kept.

    pool: so many branches of up to 4 tokens are offered beside the window (after Fu et al. 2024).
    They begin with the newest tokens that the target was seen to say after one like the pending
    one, in guesses that did not stand or in the text, and go on with what came after those. first:
    a drafter of chains, whose guesses take the window's first places.
    """

    def __init__(self, window: int = 16, pool: int = 0, first: Drafter | None = None) -> None:
        if window < 2:
            raise ValueError(f"window={window} must be at least 2: the pending token and a guess")
        if pool < 0:
            raise ValueError(f"pool={pool} must be at least 0; 0 makes no branches")
        self.depth, self.pool = window - 1, pool
        self.nodes = self.depth + pool * min(RUN, self.depth)
        self.first = first or NoDraft()
        self.needs_memo = self.first.needs_memo

    def attach(self, model: Any) -> None:
        self.first.attach(model)
        if self.first.nodes > self.first.depth:
            raise ValueError("first offers trees: the window's first places take a chain")

    def begin(self, rows: int, slots: int) -> None:
        self.first.begin(rows, slots)
        self.learned = [0] * rows  # slots of the text that `after` knows
        self.after: list[Followers] = [{} for _ in range(rows)]

    def admit(self, state: State, row: int, source: int | None) -> None:
        if state.choices is None:
            state.choices = torch.full_like(state.text, -1)
        self.first.admit(state, row, source)
        self.learned[row], self.after[row] = 0, {}  # one that moves learns from its text anew

    def propose(self, state: State, k: int) -> Draft:
        assert state.choices is not None
        length = torch.tensor(state.length, device=state.text.device)[:, None]
        carried = state.choices.gather(1, length + torch.arange(k, device=length.device))
        tokens = torch.where(carried < 0, _from_text(state, k), carried)
        draft = _begin_with(self.first.propose(state, min(k, self.first.depth)), tokens)
        return self._branched(state, draft) if self.pool else draft

    def _branched(self, state: State, draft: Draft) -> Draft:
        """The chain, and beside it what each row knows to follow its pending token."""
        self._learn(state)
        pending = state.text[range(len(state.length)), state.length].tolist()
        trees = [
            _grown(chain, _runs(after, token))
            for chain, after, token in zip(draft.tokens.tolist(), self.after, pending, strict=False)
        ]
        width = max(len(tokens) for tokens, _ in trees)
        if width == draft.tokens.shape[1]:
            return draft  # a chain costs less than a tree
        tokens, parents = (
            torch.tensor([x + [-1] * (width - len(x)) for x in rows], device=state.text.device)
            for rows in zip(*trees, strict=True)
        )
        return Draft(tokens, parents=parents)

    def _learn(self, state: State) -> None:
        """From the text since the last time, and from the guesses beyond the pending token with the
        choices after them: neighbours in a window were not guessed after one another.
        """
        assert state.choices is not None
        known = self.learned[: len(state.length)]
        first, last = min(known), max(state.length) + 1 + self.depth
        texts, choices = (x[:, first:last].tolist() for x in (state.text, state.choices))
        for row, (start, end) in enumerate(zip(known, state.length, strict=True)):
            text = texts[row][start - first : end + 1 - first]
            beyond = slice(end + 1 - first, None)
            guessed = zip(texts[row][beyond], choices[row][beyond], strict=True)
            _note(self.after[row], pairwise(text), self.pool)
            _note(self.after[row], (pair for pair in guessed if pair[1] >= 0), self.pool)
            self.learned[row] = end


def _from_text(state: State, k: int) -> Tensor:
    """Tokens of the text so far (B, k), at random by request and place."""
    place = Place(state.seed, [n + 1 for n in state.length], k)
    u = uniform(place, 1, FILL)[..., 0]  # on the host: not every device has fp64
    known = torch.tensor(state.length)[:, None] + 1
    return state.text.gather(1, (u * known).long().to(state.text.device))


def _begin_with(first: Draft, tokens: Tensor) -> Draft:
    """A chain (B, K) with the guesses of `first`, where it offers some, in its first places."""
    width = first.tokens.shape[1]
    near = torch.where(first.tokens < 0, tokens[:, :width], first.tokens)
    rest = tokens[:, width:]
    whole = torch.cat([near, rest], 1)
    if first.probs is None:
        return Draft(whole)
    certain = F.one_hot(rest.to(first.probs.device), first.probs.shape[-1]).to(first.probs)
    return Draft(whole, torch.cat([first.probs, certain], 1))


def _grown(chain: list[int], runs: list[list[int]]) -> tuple[list[int], list[int]]:
    """-> tokens and parents of a tree: the chain first, then what the runs add to it."""
    tokens, parents = list(chain), list(range(-1, len(chain) - 1))
    nodes = {edge: node for node, edge in enumerate(zip(parents, tokens, strict=True))}
    for run in runs:
        at = -1
        for token in run[: len(chain)]:
            if (at, token) not in nodes:
                nodes[at, token] = len(tokens)
                tokens.append(token)
                parents.append(at)
            at = nodes[at, token]
    return tokens, parents


def _note(after: Followers, pairs: Iterable[tuple[int, int]], most: int) -> None:
    for token, following in pairs:
        known = after.setdefault(token, {})
        known.pop(following, None)
        known[following] = None
        if len(known) > most:
            del known[next(iter(known))]


def _runs(after: Followers, token: int) -> list[list[int]]:
    """What may follow a token: each of its own followers, then always the newest."""
    runs = [[following] for following in reversed(after.get(token, {}))]
    for run in runs:
        while len(run) < RUN and run[-1] in after:
            run.append(next(reversed(after[run[-1]])))
    return runs
