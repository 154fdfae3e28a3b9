"""Prompt lookup: the text itself drafts, by what it said before. For texts that repeat much."""

from __future__ import annotations

from typing import Any

import torch

from mtp.decode.contract import Draft, State, check_guesses


class PromptLookup:
    """Guesses what followed the last few tokens of the text when they came before (Saxena 2023),
    again and again where the text ends first. The longest match of at most `longest` and at least
    `shortest` tokens counts; of equally long ones the most recent.
    """

    needs_memo = False

    def __init__(self, depth: int = 10, longest: int = 3, shortest: int = 1) -> None:
        check_guesses(depth=depth)
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"shortest={shortest} must be at least 1 and at most longest={longest}"
            )
        self.depth = self.nodes = depth
        self.sizes = range(longest, shortest - 1, -1)

    def attach(self, model: Any) -> None: ...

    def begin(self, rows: int, slots: int) -> None:
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.after: list[dict[tuple[int, ...], int]] = [{} for _ in range(rows)]

    def admit(self, state: State, row: int, source: int | None) -> None:
        self.texts[row], self.after[row] = [], {}
        self._extend(row, state.text[row, : state.length[row]].tolist())

    def propose(self, state: State, k: int) -> Draft:
        ends = [n + 1 for n in state.length]
        known = [len(text) for text, _ in zip(self.texts, ends, strict=False)]
        first = min(known)
        news = state.text[:, first : max(ends)].tolist()
        for row, end in enumerate(ends):
            self._extend(row, news[row][known[row] - first : end - first])
        guesses = [self._following(row, k) for row in range(len(ends))]
        if not any(guesses):
            return Draft(state.text[:, :0])  # a plain step costs less than k refusals
        tokens = [guess or [-1] * k for guess in guesses]
        return Draft(torch.tensor(tokens, device=state.text.device))

    def _extend(self, row: int, new: list[int]) -> None:
        """Runs of tokens are filed when something follows them: the last ones are not yet."""
        text, after = self.texts[row], self.after[row]
        for token in new:
            for n in self.sizes:
                after[tuple(text[-n:])] = len(text)
            text.append(token)

    def _following(self, row: int, k: int) -> list[int]:
        text, after = self.texts[row], self.after[row]
        for n in self.sizes:
            if at := after.get(tuple(text[-n:])):
                found = text[at : at + k]
                return [found[i % len(found)] for i in range(k)]
        return []
