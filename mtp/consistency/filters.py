"""Which responses are not worth learning from: those that repeat themselves, or are too short or
too long. A model trained on its own repetitions collapses to them. The prompt is never looked at:
indentation or a list of equal numbers in it says nothing of the response.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby

SENTENCE_END = re.compile(r"\n|(?<=[.!?])\s")
SENTENCE_WORDS = 3  # at least: "else:" or "}" may come as often as they like


@dataclass
class FilterConfig:
    """A response is dropped that has fewer tokens than `min_tokens` or more than `max_tokens`, the
    same token `token_times` times in a row, one n-gram of `ngram` tokens `ngram_times` times, or
    one sentence or line `sentence_times` times. 0 switches a rule off.
    """

    min_tokens: int = 0
    max_tokens: int = 0
    token_times: int = 10
    ngram: int = 8
    ngram_times: int = 4
    sentence_times: int = 4

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), 1 if f.name == "ngram" else 0
            once = f.name.endswith("_times") and value == 1  # would drop every response
            if value < least or once:
                allowed = "0 or at least 2" if f.name.endswith("_times") else f"at least {least}"
                raise ValueError(f"filters.{f.name}={value} must be {allowed}")
        if 0 < self.max_tokens < self.min_tokens:
            raise ValueError(
                f"filters.max_tokens={self.max_tokens} must be 0 or at least "
                f"min_tokens={self.min_tokens}"
            )


def why_dropped(response: Sequence[int], text: str, config: FilterConfig) -> str | None:
    """The first rule of RULES that drops a response, given as ids and as text; None: it is kept."""
    return next((word for word, drops in RULES.items() if drops(response, text, config)), None)


def _length(response: Sequence[int], text: str, config: FilterConfig) -> bool:
    return not config.min_tokens <= len(response) <= (config.max_tokens or len(response))


def _token_repetition(response: Sequence[int], text: str, config: FilterConfig) -> bool:
    runs = (sum(1 for _ in run) for _, run in groupby(response))
    return 0 < config.token_times <= max(runs, default=0)


def _ngram_repetition(response: Sequence[int], text: str, config: FilterConfig) -> bool:
    ngrams = zip(*(response[i:] for i in range(config.ngram)), strict=False)
    return 0 < config.ngram_times <= _most(ngrams)


def _sentence_repetition(response: Sequence[int], text: str, config: FilterConfig) -> bool:
    sentences = (" ".join(sentence.split()) for sentence in SENTENCE_END.split(text))
    long_enough = (s for s in sentences if len(s.split(" ")) >= SENTENCE_WORDS)
    return 0 < config.sentence_times <= _most(long_enough)


def _most(things: Iterable[object]) -> int:
    """How often the most frequent one comes."""
    return max(Counter(things).values(), default=0)


RULES: dict[str, Callable[[Sequence[int], str, FilterConfig], bool]] = {
    "length": _length,
    "token_repetition": _token_repetition,
    "ngram_repetition": _ngram_repetition,
    "sentence_repetition": _sentence_repetition,
}
