"""A corpus on disk, made once by several processes; `mtp.data.Corpus.open` reads it."""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mtp.data import FORMAT_VERSION, PARTS, check_positive, shard_file
from mtp.documents import DataConfig, iter_documents
from mtp.encoding import Encoded, corpus_fingerprint, encode_document, join
from mtp.records import Document
from mtp.tokenizer import Tokenizer, load_tokenizer


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
    check_positive(workers=workers, shard_tokens=shard_tokens)
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
        for part, array in zip(("tokens", "ends", "keep"), join(group), strict=True):
            np.save(shard_file(folder, n_shards, part), array)
        n_shards += 1
        n_bytes += sum(document.n_bytes for document in group)
        all_targets &= all(document.keep.all() for document in group)
        digests += (document.digest for document in group)
    if all_targets:
        for file in folder.glob("*.keep.npy"):
            file.unlink()
    index = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": corpus_fingerprint(tokenizer, digests),
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
