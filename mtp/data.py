"""Documents -> token ids -> packed rows of T + n ids -> batches, with explicit, resumable state.

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

import hashlib
import json
import math
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain, islice, takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mtp.documents import (
    PLAIN_CHAT,
    ChatTemplate,
    DataConfig,
    Document,
    chat_segments,
    iter_documents,
)
from mtp.loss import Batch
from mtp.tokenizer import Tokenizer, load_tokenizer

PARTS = ("train", "validation")  # folders of shards; held-out documents are in PARTS[True]


# Documents -> token ids.


class Encoded(NamedTuple):
    ids: np.ndarray  # the document's tokens and the end token
    keep: np.ndarray  # bool, whether each is a target
    n_bytes: int
    digest: bytes  # of the document


def encode_document(document: Document, tokenizer: Tokenizer) -> Encoded:
    """The end token is a target where the last segment is one; where ids are given, it is one only
    if it is among them, since a text that was cut off does not end there.
    """
    document = in_template(document, tokenizer)
    segments = encode_segments(document, tokenizer)
    (last, is_target), end = segments[-1], [tokenizer.end_id]
    if last[-1:] != end:
        segments.append((end, is_target and document.ids is None))
    ids, targets = zip(*segments, strict=True)
    keep = np.repeat(targets, [len(part) for part in ids])
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    said = [document.segments, *([document.ids] if document.ids else [])]
    digest = hashlib.sha256("".join(map(json.dumps, said)).encode("ascii")).digest()
    n_bytes = len(document.text.encode("utf-8"))
    return Encoded(np.fromiter(chain.from_iterable(ids), dtype), keep, n_bytes, digest)


def in_template(document: Document, tokenizer: Tokenizer) -> Document:
    """A chat as the tokenizer's model knows chats, if that is said; anything else as it is."""
    template = chat_template(tokenizer)
    if document.messages is None or template is PLAIN_CHAT:
        return document
    return document._replace(segments=chat_segments(document.messages, template))


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The tokenizer's own, which it may have as `chat`, or the plain one."""
    own = getattr(tokenizer, "chat", None)
    return ChatTemplate(*own) if own else PLAIN_CHAT


def encode_segments(document: Document, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """Ids of each segment, and whether they are targets."""
    targets = [is_target for _, is_target in document.segments]
    if document.ids is None:
        ids = [tokenizer.encode(text) for text, _ in document.segments]
    elif document.ids.tokenizer == tokenizer.fingerprint:
        ids = [*document.ids.segments]
    else:
        raise ValueError(
            f"a document holds ids of the tokenizer of fingerprint {document.ids.tokenizer}, "
            f"data.tokenizer has {tokenizer.fingerprint}"
        )
    return list(zip(ids, targets, strict=True))


def prompt_of(document: Document, tokenizer: Tokenizer, limit: int | None = None) -> list[int]:
    """Ids that a model is to go on with: a chat up to where its first answer begins, as later words
    go with answers that are not the model's; a prompt without its completion; the first `limit` of
    other text.
    """
    if said := document.messages:
        before = list(takewhile(lambda message: message["role"] != "assistant", said))
        return tokenizer.encode(chat_template(tokenizer).render(before, True))
    (first, is_target), *more = encode_segments(document, tokenizer)
    return first[:limit] if is_target or not more else first


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
        tokens, ends, keep = _join(encoded)
        if not keep.any():
            raise ValueError("a corpus needs at least one target: no completion, no assistant turn")
        n_bytes = sum(document.n_bytes for document in encoded)
        fingerprint = _fingerprint(tokenizer, (document.digest for document in encoded))
        return cls(tokens, ends, None if keep.all() else keep, n_bytes, fingerprint)

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer) -> "Corpus":
        """Memory-maps what `prepare_shards` wrote."""
        index_file = Path(folder) / "index.json"
        if not index_file.is_file():
            raise ValueError(f"data.path: no shards in {folder} (no {index_file.name})")
        index = json.loads(index_file.read_text(encoding="utf-8"))
        if index["tokenizer"] != tokenizer.fingerprint:
            raise ValueError(
                f"{folder}: made with the tokenizer of fingerprint {index['tokenizer']}, "
                f"data.tokenizer has {tokenizer.fingerprint}"
            )

        def arrays(part: str) -> list[np.ndarray]:
            files = (_shard(folder, i, part) for i in range(index["n_shards"]))
            return [np.load(file, mmap_mode="r") for file in files]

        tokens = arrays("tokens")
        starts = np.cumsum([0, *(len(shard) for shard in tokens[:-1])])
        pairs = zip(arrays("ends"), starts, strict=True)
        ends = np.concatenate([ends + start for ends, start in pairs])
        keep = None if index["all_targets"] else Pieces(arrays("keep"))
        return cls(Pieces(tokens), ends, keep, index["n_bytes"], index["fingerprint"])


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
    _check_positive(count=count)
    tokens, size, times = corpus.tokens, 2**22, Counter[int]()
    for start in range(0, len(tokens), size):  # memory-mapped shards need not fit in memory
        part = tokens[np.arange(start, min(start + size, len(tokens)))]
        ids, counts = np.unique(part, return_counts=True)
        times.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
    end = int(tokens[corpus.ends[:1] - 1][0])
    others = [token for token, _ in times.most_common(count) if token != end]
    return torch.tensor([end, *others[: count - 1]])


def _join(encoded: list[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ends = np.cumsum([len(document.ids) for document in encoded], dtype=np.int64)
    ids, keep = zip(*((document.ids, document.keep) for document in encoded), strict=True)
    return np.concatenate(ids), ends, np.concatenate(keep)


def _fingerprint(tokenizer: Tokenizer, digests: Iterable[bytes]) -> str:
    digest = hashlib.sha256(tokenizer.fingerprint.encode("ascii"))
    for document in digests:
        digest.update(document)
    return digest.hexdigest()[:16]


# Shards.


def prepare_shards(
    config: DataConfig,
    out: str | Path,
    workers: int = 1,
    shard_tokens: int = 2**26,
    report: Callable[[int], None] = lambda n_tokens: None,
) -> None:
    """Writes both parts and the tokenizer to the new folder `out`, which appears when complete.

    `report` is called with the number of tokens of each document.
    """
    _check_positive(workers=workers, shard_tokens=shard_tokens)
    out = Path(out)
    if out.exists():
        raise ValueError(f"out={str(out)!r}: exists already and is not overwritten")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    tokenizer = load_tokenizer(config.tokenizer)
    try:
        tokenizer.save(partial / "tokenizer")
        for held_out in (True, False):  # the small part first: it finds what is wrong early
            documents = iter_documents(config, held_out)
            encoded = _encode_all(documents, config.tokenizer, workers)
            _write_shards(encoded, tokenizer, partial / PARTS[held_out], shard_tokens, report)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(
    encoded: Iterator[Encoded],
    tokenizer: Tokenizer,
    folder: Path,
    shard_tokens: int,
    report: Callable[[int], None],
) -> None:
    folder.mkdir()
    digests: list[bytes] = []
    n_shards, n_bytes, all_targets = 0, 0, True
    while group := _take(encoded, shard_tokens, report):
        for part, array in zip(("tokens", "ends", "keep"), _join(group), strict=True):
            np.save(_shard(folder, n_shards, part), array)
        n_shards += 1
        n_bytes += sum(document.n_bytes for document in group)
        all_targets &= all(document.keep.all() for document in group)
        digests += (document.digest for document in group)
    if all_targets:
        for file in folder.glob("*.keep.npy"):
            file.unlink()
    index = {
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": _fingerprint(tokenizer, digests),
        "n_shards": n_shards,
        "n_documents": len(digests),
        "n_bytes": n_bytes,
        "all_targets": bool(all_targets),
    }
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _take(
    encoded: Iterator[Encoded], n_tokens: int, report: Callable[[int], None]
) -> list[Encoded]:
    """Documents of at least n_tokens in all, fewer only where there are no more."""
    group: list[Encoded] = []
    size = 0
    while size < n_tokens and (document := next(encoded, None)):
        group.append(document)
        size += len(document.ids)
        report(len(document.ids))
    return group


def _shard(folder: str | Path, number: int, part: str) -> Path:
    return Path(folder) / f"shard-{number:05d}.{part}.npy"


def _encode_all(documents: Iterator[Document], where: str, workers: int) -> Iterator[Encoded]:
    """In the order of the documents, whatever the number of workers."""
    groups = iter(lambda: list(islice(documents, 64)), [])
    if workers == 1:
        yield from chain.from_iterable(_encode_group(group, where) for group in groups)
        return
    # Fork is not safe once torch has threads. A bounded queue keeps a large source out of memory.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending: deque[Future[list[Encoded]]] = deque()
        for group in groups:
            pending.append(pool.submit(_encode_group, group, where))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


def _encode_group(documents: list[Document], where: str) -> list[Encoded]:
    tokenizer = _cached_tokenizer(where)
    return [encode_document(document, tokenizer) for document in documents]


_cached_tokenizer = cache(load_tokenizer)  # once per worker process


# Token ids -> rows -> batches.


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
    _check_positive(seq_len=seq_len, n_future_tokens=n_future_tokens, batch_size=batch_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: must be at least 0 and below world_size={world_size}")


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")


def check_identity(state: dict[str, Any], identity: dict[str, Any]) -> None:
    for name, value in identity.items():
        if state.get(name) != value:
            raise ValueError(f"state of other data: its {name} is {state.get(name)}, not {value}")
