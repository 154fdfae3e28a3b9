"""Words in a row that two sets of texts share: what a test set has in common with training."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain


class Overlap:
    """The texts that share n words in a row with one of the given texts.

    Words are runs of letters, digits and underscores, in lower case, so that spaces, line ends,
    punctuation and quotes do not hide a copy.
    """

    def __init__(self, texts: Iterable[str], n: int = 13) -> None:
        self.n = n
        self._ngrams = {ngram for text in texts for ngram in _ngrams(_words(text), n)}

    def __contains__(self, text: str) -> bool:
        return not self._ngrams.isdisjoint(_ngrams(_words(text), self.n))


def ngram_overlap(train: Iterable[str], held_out: Iterable[str], n: int = 13) -> float:
    """The share of the held-out texts' distinct n-grams of words that training texts contain.

    Words are what white space separates.
    """
    wanted = set(chain.from_iterable(_ngrams(text.split(), n) for text in held_out))
    unseen = wanted.copy()
    for text in train:
        unseen.difference_update(_ngrams(text.split(), n))
    return 1 - len(unseen) / len(wanted) if wanted else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _ngrams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)
