"""Text to token ids and back.

A tokenizer is whatever has the names of `Tokenizer`: bytes (no training, no dependencies), a
SentencePiece model, that of a Hugging Face folder, or an object of the caller's own. `encode` adds
nothing to the text; who packs documents appends `end_id` to each. `decode(encode(text)) == text`
holds for bytes always, and for models of `train_sentencepiece` for every text without U+2581,
SentencePiece's own sign for a space, which comes back as one.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

INDEX_FILE, MODEL_FILE = "tokenizer.json", "tokenizer.model"
LONGEST_WAIT = 16  # ids; no character takes as many, but what is no text never becomes one


class Tokenizer(Protocol):
    vocab_size: int
    end_id: int  # ends every document
    fingerprint: str  # equal if and only if the same text gives the same ids

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str:
        """Drops ids that stand for no text; replaces bytes that are no UTF-8 by U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what `load_tokenizer(folder)` reads."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of the text's UTF-8, 256 ends a document."""

    vocab_size = 257
    end_id = 256
    fingerprint = hashlib.sha256(b"bytes").hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        _write_index(folder, "bytes")


class SentencePieceTokenizer:
    """A SentencePiece model; its end-of-sentence token ends documents."""

    def __init__(self, model_file: str | Path) -> None:
        self._proto = Path(model_file).read_bytes()
        self._model = _sentencepiece().SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(self._proto)
        except RuntimeError as error:
            raise ValueError(f"{model_file}: is no SentencePiece model ({error})") from error
        self.vocab_size: int = self._model.vocab_size()
        self.end_id: int = self._model.eos_id()
        if self.end_id < 0:
            raise ValueError(f"{model_file}: has no end-of-sentence token (eos) to end documents")
        self.fingerprint = hashlib.sha256(self._proto).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids if self._stands_for_text(int(i))])

    def save(self, folder: Path) -> None:
        _write_index(folder, "sentencepiece")
        (folder / MODEL_FILE).write_bytes(self._proto)

    def _stands_for_text(self, i: int) -> bool:
        model = self._model
        return 0 <= i < self.vocab_size and not (model.is_control(i) or model.is_unknown(i))


class HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder; its end-of-sentence token ends documents. ValueError
    where it has none, or is not of the `tokenizers` library, whose file says all that it does.

    special: `encode` puts before a text what the model's texts begin with; in documents and chat
    templates it is not wanted, and it is not saved. `chat`: how its model's chats are written, see
    `mtp.records.ChatTemplate`; None if nobody says.
    """

    def __init__(self, folder: str | Path, special: bool = False) -> None:
        self.theirs, self.special = _of_transformers(folder), special
        if not self.theirs.is_fast:
            raise ValueError(f"{folder}: its tokenizer has no {INDEX_FILE}")
        if self.theirs.eos_token_id is None:
            raise ValueError(f"{folder}: its tokenizer has no eos_token to end documents")
        self.end_id: int = self.theirs.eos_token_id
        self.vocab_size: int = len(self.theirs)
        has_template = bool(self.theirs.chat_template)
        self.chat = (self._render, str(self.theirs.eos_token)) if has_template else None
        written = self.theirs.backend_tokenizer.to_str() + "special" * special
        self.fingerprint = hashlib.sha256(written.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return self.theirs.encode(text, add_special_tokens=self.special)

    def decode(self, ids: Iterable[int]) -> str:
        """As the ids say: the usual cleaning takes spaces before commas."""
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self.theirs.decode(
            kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _render(self, messages: Sequence[Mapping[str, str]], open_answer: bool) -> str:
        from jinja2 import TemplateError  # which transformers writes chats with

        try:
            return self.theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_answer
            )
        except TemplateError as error:  # raised by templates that want roles in turns
            raise ValueError(f"the chat template refuses {messages!r}: {error}") from error

    def save(self, folder: Path) -> None:
        """With its chat template, as transformers writes them."""
        self.theirs.save_pretrained(folder)


class TextStream:
    """Text of ids as they come: `push` returns what is whole by now, `close` the rest.

    A character that takes several ids waits for its last one. Each id costs the decoding of a few,
    however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.told: list[int] = []  # the last ids before `new`: some tokenizers trim a text's start
        self.new: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        return "".join(map(self._push, ids))

    def _push(self, i: int) -> str:
        self.new.append(i)
        text = self._untold()
        if text.endswith("\ufffd") and len(self.new) < LONGEST_WAIT:  # a character's beginning?
            return ""
        self.told, self.new = [*self.told, *self.new][-16:], []
        return text

    def close(self) -> str:
        text, self.told, self.new = self._untold(), [], []
        return text

    def _untold(self) -> str:
        before = len(self.tokenizer.decode(self.told))
        return self.tokenizer.decode([*self.told, *self.new])[before:]


def train_sentencepiece(
    texts: Iterable[str], model_file: Path, vocab_size: int
) -> SentencePieceTokenizer:
    """Byte-pair encoding that keeps every character, space, tab and newline of the text."""
    model = io.BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,  # longer texts would be left out silently
            num_threads=1,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size={vocab_size}: SentencePiece refuses: {error}") from error
    partial = model_file.with_name(f".{model_file.name}.{os.getpid()}.partial")
    partial.write_bytes(model.getvalue())
    partial.replace(model_file)
    return SentencePieceTokenizer(model_file)


def load_tokenizer(where: str | Path) -> Tokenizer:
    """The word "bytes", a SentencePiece `.model` file, a Hugging Face folder, or a folder that
    `save` wrote to.
    """
    if where == "bytes":
        return ByteTokenizer()
    path = Path(where)
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path)
    kind = _read_kind(path)
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "sentencepiece":
        return SentencePieceTokenizer(path / MODEL_FILE)
    if kind == "tokenizers":
        return HuggingFaceTokenizer(path)
    raise ValueError(
        f"tokenizer={str(where)!r}: allowed are the word 'bytes', a SentencePiece .model file, "
        f"and a folder with a {INDEX_FILE} of Hugging Face, or whose kind is 'bytes' or "
        f"'sentencepiece'"
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str | Path) -> None:
    """ValueError if a model of `vocab_size` does not know all ids; more it may know."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"vocab_size={vocab_size}: they do not belong together"
        )


def _write_index(folder: Path, kind: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_FILE).write_text(json.dumps({"kind": kind}) + "\n", encoding="utf-8")


def _read_kind(folder: Path) -> str | None:
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        return None
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        return "tokenizers" if "model" in index else index.get("kind")
    except (ValueError, AttributeError, TypeError):
        return None


def _of_transformers(folder: str | Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("its tokenizers need, in a checkout: pip install '.[hf]'") from error
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library knows no other
        if Path(folder).is_dir() and not any(Path(folder).glob("*token*")):
            raise ValueError(f"{folder} holds no tokenizer, such as tokenizer.json") from error
        raise ValueError(f"{folder}: its tokenizer cannot be read: {error}") from error


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError(
            "SentencePiece tokenizers need, in a checkout: pip install '.[text]'"
        ) from error
    return sentencepiece
