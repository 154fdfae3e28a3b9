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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp.decode.contract import Draft, Drafter, NoDraft, State
from mtp.decode.sampling import FILL, Place, uniform

RUN = 4  # tokens in a branch: few runs that were once rejected stand for longer
Runs = dict[int, dict[tuple[int, ...], None]]  # token -> what was guessed to follow, newest last


class Jacobi:
    """window: the pending token and the guesses after it, as many in every step: those that are
    taken leave room at the end for tokens drawn from the text so far. What is not read, since a
    step is shorter, is kept.

    pool: up to that many runs of guesses that once followed the pending token, and did not stand,
    are offered as branches beside the window, of 4 tokens each (Fu et al. 2024). first: a drafter
    of chains, whose guesses take the window's first places.
    """

    def __init__(self, window: int = 16, pool: int = 0, first: Drafter | None = None) -> None:
        if window < 2:
            raise ValueError(f"window={window} must be at least 2: the pending token and a guess")
        if pool < 0:
            raise ValueError(f"pool={pool} must be at least 0 (0: no branches)")
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
        self.runs: list[Runs] = [{} for _ in range(rows)]

    def admit(self, state: State, row: int, source: int | None) -> None:
        if state.choices is None:
            state.choices = torch.full_like(state.text, -1)
        self.first.admit(state, row, source)
        self.runs[row] = {}
        # A text that moves keeps its length; another's runs are not those of this one.
        if source is not None and source != row and state.length[source] == state.length[row]:
            self.runs[row] = dict(self.runs[source])

    def propose(self, state: State, k: int) -> Draft:
        carried = self._carried(state, k)
        tokens = torch.where(carried < 0, _from_text(state, k), carried)
        draft = _begin_with(self.first.propose(state, min(k, self.first.depth)), tokens)
        return self._branch(state, draft, carried) if self.pool else draft

    def _carried(self, state: State, k: int) -> Tensor:
        """The target's choices for the places after the pending token (B, k); -1: none yet."""
        assert state.choices is not None
        length = torch.tensor(state.length, device=state.text.device)[:, None]
        return state.choices.gather(1, length + torch.arange(k, device=length.device))

    def _branch(self, state: State, draft: Draft, carried: Tensor) -> Draft:
        """The chain, with what its rows' pools know to follow the pending token beside it."""
        pending = state.text[range(len(state.length)), state.length].tolist()
        trees = []
        chains, own = draft.tokens.tolist(), carried.tolist()
        for row, token in enumerate(pending):
            runs = self.runs[row]
            trees.append(_grown(chains[row], [*runs.get(token, ())][::-1]))
            _file(runs, [token, *own[row]], self.pool)
        width = max(len(tokens) for tokens, _ in trees)
        if width == draft.tokens.shape[1]:
            return draft  # a chain costs less than a tree
        device = draft.tokens.device
        tokens, parents = (
            torch.tensor([x + [-1] * (width - len(x)) for x in rows], device=device)
            for rows in zip(*trees, strict=True)
        )
        return Draft(tokens, parents=parents)


def _from_text(state: State, k: int) -> Tensor:
    """Tokens of the text so far (B, k), at random by request and place."""
    place = Place(state.seed, [n + 1 for n in state.length], k)
    u = uniform(place, 1, FILL, state.text.device)[..., 0]
    known = torch.tensor(state.length, device=u.device)[:, None] + 1
    return state.text.gather(1, (u * known).long())


def _begin_with(first: Draft, tokens: Tensor) -> Draft:
    """A chain (B, K) with the guesses of `first`, where it offers some, in its first places."""
    width = first.tokens.shape[1]
    near = torch.where(first.tokens < 0, tokens[:, :width], first.tokens)
    rest = tokens[:, width:]
    whole = torch.cat([near, rest], 1)
    if first.probs is None:
        return Draft(whole)
    certain = F.one_hot(rest, first.probs.shape[-1]).to(first.probs)
    return Draft(whole, torch.cat([first.probs, certain], 1))


def _grown(chain: list[int], runs: list[tuple[int, ...]]) -> tuple[list[int], list[int]]:
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


def _file(runs: Runs, window: list[int], most: int) -> None:
    """Note what follows each token of a window, up to the first -1; the `most` newest stay."""
    known = window[: (window + [-1]).index(-1)]
    for i, token in enumerate(known[:-1]):
        following = runs.setdefault(token, {})
        run = tuple(known[i + 1 : i + 1 + RUN])
        following.pop(run, None)
        following[run] = None
        if len(following) > most:
            del following[next(iter(following))]
