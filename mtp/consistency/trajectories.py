"""Jacobi trajectories: what consistency training learns from.

A response is decoded window by window. The states of a window of n tokens go from a first guess,
tokens of its context at random, to the fixed point, the model's own text; each is what the model
says to the one before it, place by place, in one pass (Song et al. 2021; CLLMs, arXiv 2403.00835):

    y_i <- argmax p(. | context, y_<i)      i = 1 .. n, all at once

A place is settled once all before it were right: it is not judged again. So each pass settles one
more at least, a window ends after at most n passes in any arithmetic, and no pass is spent on
seeing that nothing changes. Only what is not yet settled is read again.

Letters: B rows, C columns of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from mtp.decode.contract import Place, Request, chain
from mtp.decode.loop import check_request, require_memory
from mtp.decode.sampling import TARGET, Sampling, for_laws, uniform

START, AUGMENT = 3, 4  # purposes of noise, beside those of sampling


@dataclass(frozen=True)
class Trajectory:
    """Of one response. windows[w][s]: n ids, state s of window w, from the first guess to the fixed
    point, which comes once; window w holds the response's tokens from w * n on, after the prompt
    and the fixed points before it. length: tokens of the response, its end token included; what the
    last window holds beyond them has no meaning.
    """

    prompt: list[int]
    windows: list[list[list[int]]]
    length: int

    @property
    def response(self) -> list[int]:
        return [token for states in self.windows for token in states[-1]][: self.length]


class Collection:
    """Iterating over it decodes `requests` with the model and yields their trajectories, in order;
    a new iteration goes on where the last was left.

    `batch_size` responses are decoded at once, each at a window of its own; one that ends makes
    room for the next. Responses are those of `generate` with the same requests and sampling.
    passes, columns: forward passes so far after the prompts', and tokens read in them.

    ValueError: see `generate`; whole windows must fit the context too.
    """

    def __init__(
        self,
        model: Any,
        requests: Sequence[Request],
        window: int = 16,
        batch_size: int = 8,
        sampling: Sampling | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        check_requests(model, requests, window)
        self.model, self.requests, self.window = model, requests, window
        self.sampling = sampling or Sampling()
        rows = min(batch_size, len(requests))
        self.slots = max((len(r.prompt) + whole_windows(r, window) for r in requests), default=1)
        require_memory(model, rows, self.slots, False)
        self.cache = model.new_cache(model.next_layers, rows, self.slots)
        self.most, self.rows = rows, list[_Row]()
        self.passes = self.columns = self.admitted = self.told = 0
        self.done: dict[int, Trajectory] = {}  # by request: ended before one that comes first

    def __iter__(self) -> Iterator[Trajectory]:
        while self.told < len(self.requests):
            while self.told not in self.done:
                with self._modes():  # and not around what is yielded
                    self._fill()
                    self._step()
                    self._take_out()
            self.told += 1
            yield self.done.pop(self.told - 1)

    @contextmanager
    def _modes(self) -> Iterator[None]:
        with torch.inference_mode(), torch.autocast(self.cache.k.device.type, enabled=False):
            yield

    def _fill(self) -> None:
        """Read prompts, but for their last token, into free rows."""
        while len(self.rows) < self.most and self.admitted < len(self.requests):
            row = _Row(self.admitted, self.requests[self.admitted], self.window)
            if read := row.context[:-1]:
                layout = chain(len(self.rows), [0], len(read), self.slots, self.cache.k)
                self.model.read(self._tensor([read]), layout, self.cache)
            self.rows.append(row)
            self.admitted += 1

    def _step(self) -> None:
        """One pass: the places that no row has settled yet, of all rows."""
        rows = self.rows
        columns = self.window - min(row.settled for row in rows)
        places = [len(row.context) + self.window - columns for row in rows]
        starts = [place - 1 for place in places]  # each is said by the token before it
        layout = chain(0, starts, columns, self.slots, self.cache.k)
        tokens = self._tensor([row.read()[-columns:] for row in rows])
        latent, _ = self.model.read(tokens, layout, self.cache)
        logits = for_laws(self.model.logits(latent))
        place = Place([row.request.seed for row in rows], places, columns)
        noise = self.sampling.noise(place, logits, TARGET)
        choices = self.sampling.scores(logits, noise).argmax(-1).tolist()
        for row, choice in zip(rows, choices, strict=True):
            row.take(choice)
        self.passes += 1
        self.columns += columns * len(rows)

    def _take_out(self) -> None:
        """Rows that ended; the last row moves to the place of each."""
        for at in reversed(range(len(self.rows))):
            row = self.rows[at]
            if row.ended:
                self.done[row.number] = row.trajectory()
                last = self.rows.pop()
                if last is not row:
                    self.rows[at] = last
                    self.cache.copy(len(self.rows), at, self.slots)

    def _tensor(self, ids: list[list[int]]) -> torch.Tensor:
        return torch.tensor(ids, device=self.cache.k.device)


def check_requests(model: Any, requests: Sequence[Request], window: int) -> None:
    """ValueError names what cannot be collected."""
    if window < 1:
        raise ValueError(f"window={window} must be at least 1")
    for i, request in enumerate(requests):
        check_request(model, i, replace(request, max_new_tokens=whole_windows(request, window)))


def whole_windows(request: Request, window: int) -> int:
    """Most tokens that the windows of a request hold."""
    return -(-request.max_new_tokens // window) * window


class _Row:
    """A response on its way: the windows so far, the last of them unfinished. context: prompt and
    earlier fixed points. response: all tokens that are settled.
    """

    def __init__(self, number: int, request: Request, window: int) -> None:
        self.number, self.request, self.window = number, request, window
        self.context, self.response = list(request.prompt), list[int]()
        self.windows: list[list[list[int]]] = []
        self.ended = False
        self._open_window()

    def _open_window(self) -> None:
        place = Place([self.request.seed], [len(self.context)], self.window)
        shares = uniform(place, 1, START).flatten().tolist()
        first_guess = [self.context[int(share * len(self.context))] for share in shares]
        self.windows.append([first_guess])
        self.settled = 0  # tokens of the window

    def read(self) -> list[int]:
        """The tokens that say the window's, one for each."""
        return [self.context[-1], *self.windows[-1][-1][:-1]]

    def take(self, choices: list[int]) -> None:
        """The model's tokens for the last places of the window, all unsettled ones among them."""
        states = self.windows[-1]
        state = states[-1]
        following = state[: self.settled] + choices[self.settled - self.window :]
        pairs = zip(state, following, strict=True)
        right = next((i for i, (old, new) in enumerate(pairs) if old != new), self.window)
        self._settle(following[self.settled : right + 1])
        if self.settled > right:
            states.append(following)
        if self.settled == self.window and not self.ended:
            self.context += following
            self._open_window()

    def _settle(self, tokens: list[int]) -> None:
        """Up to the end of the response."""
        request = self.request
        for token in tokens:
            self.response.append(token)
            self.settled += 1
            full = len(self.response) == request.max_new_tokens
            if full or (request.stop and request.stop(self.response)):
                self.ended = True
                return

    def trajectory(self) -> Trajectory:
        return Trajectory(list(self.request.prompt), self.windows, len(self.response))


def augmented(trajectory: Trajectory, seed: int) -> Trajectory:
    """In each state but a window's last two, some wrong tokens are put right, so that there are
    pairs of a state and its fixed point that no pass makes (published code of arXiv 2403.00835).

    Of the w wrong tokens of a state, w // 2 draws with replacement among all but the first say
    which. Other seeds draw others. Tokens after the response's end are never wrong.
    """
    windows, at = [], 0
    for states in trajectory.windows:
        counts = trajectory.length - at
        place = Place([seed], [at], len(states[0]))
        shares = uniform(place, len(states), AUGMENT)[0].T.tolist()
        pairs = zip(states[:-2], shares, strict=False)
        changed = [_put_right(s[:counts], states[-1], u) + s[counts:] for s, u in pairs]
        windows.append(changed + states[-2:])
        at += len(states[0])
    return replace(trajectory, windows=windows)


def _put_right(state: list[int], final: list[int], shares: list[float]) -> list[int]:
    wrong = [i for i, token in enumerate(state) if token != final[i]]
    later, state = wrong[1:], list(state)
    for share in shares[: len(wrong) // 2]:
        at = later[int(share * len(later))]
        state[at] = final[at]
    return state
