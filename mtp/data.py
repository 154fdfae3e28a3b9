"""Documents in one stream -> packed rows of T + n ids -> batches, with explicit, resumable state.

All documents of a corpus form one stream, each followed by the end token, which belongs to its
document. Row r covers stream[r T : r T + T + n]: head i at position t predicts row[t + 1 + i], so
consecutive rows overlap by n and every token after the first is a target of each head at most once,
of head 0 exactly once. Padding, at the end of the last row, has document number -1.

Two documents of 12 tokens in all (1 to 6 and 7 to 10, end token 0), T = 4, n = 2:

    stream   1  2  3  4  5  6  0 | 7  8  9 10  0
    row 0    1  2  3  4  5  6                          doc 0 0 0 0 0 0
    row 1                5  6  0  7  8  9              doc 0 0 0 1 1 1
    row 2                            8  9 10  0  -  -  doc 1 1 1 1 -1 -1
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtp.documents import DataConfig, iter_documents
from mtp.encoding import corpus_fingerprint, encode_document, join
from mtp.files import write_text
from mtp.loss import Batch
from mtp.records import Document
from mtp.tokenizer import Tokenizer
from mtp.versions import check_version

FORMAT_VERSION = 1  # of shards
PARTS = ("train", "validation")  # folders of shards; held-out documents are in PARTS[True]


# Token ids in one stream.


class Pieces:
    """Several arrays, such as memory-mapped shards, read as one by arrays of indices."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._arrays = arrays
        self._starts = np.cumsum([0, *(len(array) for array in arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        out = np.empty(index.shape, self._arrays[0].dtype)
        piece = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(piece):
            here = piece == number
            out[here] = self._arrays[number][index[here] - self._starts[number]]
        return out


@dataclass(frozen=True, eq=False)
class Corpus:
    """One stream of tokens and where its documents end, in memory or memory-mapped."""

    tokens: np.ndarray | Pieces  # uint16 or uint32
    ends: np.ndarray  # int64, one past each document's end token
    keep: np.ndarray | Pieces | None  # bool, whether a token is a target; None: all are
    n_bytes: int  # of the documents' UTF-8
    fingerprint: str  # of documents and tokenizer

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / len(self.tokens)

    @classmethod
    def from_documents(cls, documents: Iterable[Document], tokenizer: Tokenizer) -> "Corpus":
        encoded = [encode_document(document, tokenizer) for document in documents]
        if not encoded:
            raise ValueError("a corpus needs at least one document")
        tokens, ends, keep = join(encoded)
        if not keep.any():
            raise ValueError("a corpus needs at least one target: no completion, no assistant turn")
        n_bytes = sum(document.n_bytes for document in encoded)
        fingerprint = corpus_fingerprint(tokenizer, (document.digest for document in encoded))
        return cls(tokens, ends, None if keep.all() else keep, n_bytes, fingerprint)

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer) -> "Corpus":
        """Memory-maps what `prepare_shards` wrote."""
        index_file = Path(folder) / "index.json"
        if not index_file.is_file():
            raise ValueError(f"data.path: no shards in {folder} (no {index_file.name})")
        index = json.loads(index_file.read_text(encoding="utf-8"))
        check_version(index, FORMAT_VERSION, index_file)
        if index["tokenizer"] != tokenizer.fingerprint:
            raise ValueError(
                f"{folder}: made with the tokenizer of fingerprint {index['tokenizer']}, "
                f"data.tokenizer has {tokenizer.fingerprint}"
            )

        def arrays(part: str) -> list[np.ndarray]:
            files = (shard_file(folder, i, part) for i in range(index["n_shards"]))
            return [np.load(file, mmap_mode="r") for file in files]

        tokens = arrays("tokens")
        starts = np.cumsum([0, *(len(shard) for shard in tokens[:-1])])
        pairs = zip(arrays("ends"), starts, strict=True)
        ends = np.concatenate([ends + start for ends, start in pairs])
        keep = None if index["all_targets"] else Pieces(arrays("keep"))
        return cls(Pieces(tokens), ends, keep, index["n_bytes"], index["fingerprint"])


def shard_file(folder: str | Path, number: int, part: str) -> Path:
    """part: tokens, ends or keep."""
    return Path(folder) / f"shard-{number:05d}.{part}.npy"


def load_corpora(config: DataConfig, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """The training and the validation corpus."""
    return load_corpus(config, tokenizer, False), load_corpus(config, tokenizer, True)


def load_corpus(config: DataConfig, tokenizer: Tokenizer, held_out: bool) -> Corpus:
    """One of the two; of a streamed source only the held-out one, which has to fit in memory."""
    if config.source == "shards":
        return Corpus.open(Path(str(config.path)) / PARTS[held_out], tokenizer)
    if config.streaming and not held_out:
        raise ValueError("data.streaming: a stream is no corpus; train on StreamingBatches")
    return Corpus.from_documents(iter_documents(config, held_out), tokenizer)


def frequent_tokens(corpus: Corpus, count: int) -> torch.Tensor:
    """Ids of the most frequent tokens, for `OwnHeads(vocabulary=...)`: the end token, without which
    no guess ends a text, then the others by frequency; at most `count`, fewer if fewer occur.
    """
    check_positive(count=count)
    tokens, size, times = corpus.tokens, 2**22, Counter[int]()
    for start in range(0, len(tokens), size):  # memory-mapped shards need not fit in memory
        part = tokens[np.arange(start, min(start + size, len(tokens)))]
        ids, counts = np.unique(part, return_counts=True)
        times.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
    end = int(tokens[corpus.ends[:1] - 1][0])
    others = [token for token, _ in times.most_common(count) if token != end]
    return torch.tensor([end, *others[: count - 1]])


def write_vocabulary(file: Path, ids: torch.Tensor) -> None:
    """What heads are to guess, as a JSON list of ids."""
    write_text(file, json.dumps(ids.tolist()) + "\n")


def read_vocabulary(file: str | None) -> list[int] | None:
    """What `write_vocabulary` wrote; None where no file is named. ValueError if it holds no list
    of ids.
    """
    if not file:
        return None
    try:
        ids = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"vocabulary={file} holds no list of token ids")
    return ids


# Rows -> batches.


class Batches:
    """Batches of B rows in an order that depends on (seed, epoch) alone; endless without `epochs`.

    The state is one counter of rows over all ranks. Ranks partition each global batch: with W of
    them, rank r takes rows g B W + r B + (0 .. B-1) of batch g, so the state moves between world
    sizes. After the last epoch, rows of padding complete the last batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        n_future_tokens: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        shuffle: bool = True,
    ) -> None:
        _check_sizes(seq_len, n_future_tokens, batch_size, rank, world_size)
        n_tokens, width = len(corpus.tokens), seq_len + n_future_tokens
        if n_tokens < width:
            raise ValueError(
                f"corpus: {n_tokens} tokens, one row needs {width} (seq_len + n_future_tokens)"
            )
        self.n_rows = math.ceil((n_tokens - 1) / seq_len)  # of one epoch
        self._corpus, self._seq_len, self._width, self._seed = corpus, seq_len, width, seed
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._epochs = math.inf if epochs is None else epochs
        self._identity = {
            "corpus": corpus.fingerprint,
            "seq_len": seq_len,
            "seed": seed,
            "shuffle": shuffle,
        }
        self._row = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        total = self._epochs * self.n_rows
        if self._row >= total:
            raise StopIteration
        number = self._row + self._rank * self._batch_size + np.arange(self._batch_size)
        self._row += self._world_size * self._batch_size
        return self.take(self._in_order(number), number < total)

    def state_dict(self) -> dict[str, Any]:
        return {"row": self._row, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_identity(state, self._identity)
        self._row = state["row"]

    def _in_order(self, number: np.ndarray) -> np.ndarray:
        epoch, row = np.divmod(number, self.n_rows)
        for one in np.unique(epoch) if self._identity["shuffle"] else ():
            here = epoch == one
            row[here] = _permutation(self._seed, int(one), self.n_rows)[row[here]]
        return row

    def take(self, row: np.ndarray, real: np.ndarray) -> Batch:
        """Rows by their numbers (B,); padding where one is not `real` (B,)."""
        corpus, n_tokens = self._corpus, len(self._corpus.tokens)
        index = row[:, None] * self._seq_len + np.arange(self._width)
        inside = (index < n_tokens) & real[:, None]
        index = np.minimum(index, n_tokens - 1)
        ids = np.where(inside, corpus.tokens[index].astype(np.int64), 0)
        doc = np.where(inside, np.searchsorted(corpus.ends, index, side="right"), -1)
        keep = inside if corpus.keep is None else inside & corpus.keep[index]
        return Batch(torch.from_numpy(ids), torch.from_numpy(doc), torch.from_numpy(keep))


class StreamingBatches:
    """Batches of documents too many to hold, in their own order, over and over.

    `documents()` opens the stream from its start. The state is the document and the token in it
    where the next global batch starts; resuming reads up to there again. Every rank reads all
    documents and keeps its rows, so here too the state moves between world sizes.
    """

    def __init__(
        self,
        documents: Callable[[], Iterable[Document]],
        tokenizer: Tokenizer,
        seq_len: int,
        n_future_tokens: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_sizes(seq_len, n_future_tokens, batch_size, rank, world_size)
        self._documents, self._tokenizer = documents, tokenizer
        self._used = world_size * batch_size * seq_len  # tokens of one global batch
        first = (rank * batch_size + np.arange(batch_size)) * seq_len
        self._index = first[:, None] + np.arange(seq_len + n_future_tokens)
        self._needed = self._used + n_future_tokens
        self._identity = {"tokenizer": tokenizer.fingerprint, "seq_len": seq_len}
        self._seek(0, 0)

    def __iter__(self) -> "StreamingBatches":
        return self

    def __next__(self) -> Batch:
        self._fill(self._needed)
        ids, doc, keep = map(torch.from_numpy, self._buffer[:, self._index])
        self._advance(self._used)
        return Batch(ids, doc, keep.bool())

    def state_dict(self) -> dict[str, Any]:
        document = int(self._buffer[1, 0])
        position = {"document": document, "offset": self._offset, "ahead": self._ahead()}
        return {**position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_identity(state, self._identity)
        self._seek(state["document"], state["offset"])
        check_identity(state, {"ahead": self._ahead()})

    def _seek(self, document: int, offset: int) -> None:
        self._source = enumerate(islice(_forever(self._documents), document, None), document)
        self._buffer = np.empty((3, 0), np.int64)  # ids, document numbers, targets
        self._offset = 0  # of the buffer's first token in its document
        self._fill(offset + 1)
        self._advance(offset)

    def _fill(self, n_tokens: int) -> None:
        parts, size = [self._buffer], self._buffer.shape[1]
        while size < n_tokens:
            number, document = next(self._source)
            ids, keep, *_ = encode_document(document, self._tokenizer)
            parts.append(np.stack([ids, np.full(len(ids), number), keep]).astype(np.int64))
            size += len(ids)
        self._buffer = np.concatenate(parts, axis=1)

    def _advance(self, n_tokens: int) -> None:
        doc = self._buffer[1]
        start = int(np.searchsorted(doc, doc[n_tokens]))  # of the document that comes first now
        self._offset = n_tokens - start + (self._offset if start == 0 else 0)
        self._buffer = self._buffer[:, n_tokens:]

    def _ahead(self) -> list[int]:
        """The next few tokens: they tell whether a state belongs to these documents."""
        self._fill(16)
        return self._buffer[0, :16].tolist()


def _forever(documents: Callable[[], Iterable[Document]]) -> Iterator[Document]:
    while True:
        empty = True
        for document in documents():
            empty = False
            yield document
        if empty:
            raise ValueError("documents: the stream is empty")


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def _check_sizes(
    seq_len: int, n_future_tokens: int, batch_size: int, rank: int, world_size: int
) -> None:
    check_positive(seq_len=seq_len, n_future_tokens=n_future_tokens, batch_size=batch_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: must be at least 0 and below world_size={world_size}")


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")


def check_identity(state: dict[str, Any], identity: dict[str, Any]) -> None:
    for name, value in identity.items():
        if state.get(name) != value:
            raise ValueError(f"state of other data: its {name} is {state.get(name)}, not {value}")
