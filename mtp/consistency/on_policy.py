"""On-policy: trajectories of the model in training, whose own fixed points move as it learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mtp.consistency.files import Origin
from mtp.consistency.filters import FilterConfig, why_dropped
from mtp.consistency.trajectories import Collection, Trajectory, check_requests
from mtp.decode.contract import Request, stop_at
from mtp.decode.sampling import Sampling
from mtp.tokenizer import Tokenizer


class OnPolicy:
    """Trajectories that the model makes as it is when they are drawn, without end: of the prompts
    in turn, each time with another seed, and with them other first guesses. Those that `keep` says
    no to are left out. The model decodes in one process, from its own weights.

    drawn: requests so far, all that there is to resume. ValueError at once where a prompt cannot be
    collected, see `Collection`.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        window: int = 16,
        max_new_tokens: int = 256,
        seed: int = 0,
        stop: Callable[[list[int]], bool] | None = None,
        sampling: Sampling | None = None,
        keep: Callable[[Trajectory], bool] = lambda trajectory: True,
    ) -> None:
        if not prompts:
            raise ValueError("no prompts to make trajectories from")
        self.requests = [
            Request(prompt, max_new_tokens, seed + i, stop) for i, prompt in enumerate(prompts)
        ]
        check_requests(model, self.requests, window)
        self.model, self.window, self.sampling = model, window, sampling
        self.keep, self.drawn = keep, 0

    def draw(self, count: int) -> list[Trajectory]:
        """Of the next `count` requests, decoded together."""
        some = [self._request(self.drawn + i) for i in range(count)]
        self.drawn += count
        with torch.compiler.set_stance("force_eager"):  # other shapes would compile again
            collection = Collection(self.model, some, self.window, count, self.sampling)
            return [trajectory for trajectory in collection if self.keep(trajectory)]

    def _request(self, number: int) -> Request:
        """Seeds of a later turn follow those of the one before."""
        request = self.requests[number % len(self.requests)]
        return replace(request, seed=self.requests[0].seed + number)


def as_collected(
    origin: Origin,
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    seed: int = 0,
) -> OnPolicy:
    """In the way that a collection was made: its windows, lengths, ends, sampling and filters.
    ValueError: its settings do not say them.
    """
    said = origin.settings
    try:
        most, ends = int(said["max_new_tokens"]), [int(i) for i in said["ends"]]
        sampling, filters = Sampling(**said["sampling"]), FilterConfig(**said["filters"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the settings of the collection do not say what trajectories of the model in training "
            f"are made with ({error!r}): scripts/collect_trajectories.py writes them"
        ) from error

    def keep(trajectory: Trajectory) -> bool:
        response = trajectory.response
        return why_dropped(response, tokenizer.decode(response), filters) is None

    return OnPolicy(model, prompts, origin.window, most, seed, stop_at(*ends), sampling, keep)
