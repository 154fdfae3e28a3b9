"""Documents -> token ids, and which of them are targets."""

import hashlib
import json
from collections.abc import Iterable
from itertools import chain, takewhile
from typing import NamedTuple

import numpy as np

from mtp.records import PLAIN_CHAT, ChatTemplate, Document, chat_segments
from mtp.tokenizer import Tokenizer


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


def join(encoded: list[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Their tokens in one line, where each ends, and which tokens are targets."""
    ends = np.cumsum([len(document.ids) for document in encoded], dtype=np.int64)
    ids, keep = zip(*((document.ids, document.keep) for document in encoded), strict=True)
    return np.concatenate(ids), ends, np.concatenate(keep)


def corpus_fingerprint(tokenizer: Tokenizer, digests: Iterable[bytes]) -> str:
    digest = hashlib.sha256(tokenizer.fingerprint.encode("ascii"))
    for document in digests:
        digest.update(document)
    return digest.hexdigest()[:16]
