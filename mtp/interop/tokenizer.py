"""The tokenizer of a Hugging Face folder, for data and decoding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from mtp.documents import ChatTemplate, Messages


class HuggingFaceTokenizer:
    """Its end-of-sentence token ends documents. ValueError where it has none, or is not of the
    `tokenizers` library, whose file says all that it does. special: `encode` puts before a text
    what the model's texts begin with; in documents and chat templates it is not wanted.
    """

    def __init__(self, folder: str | Path, special: bool = False) -> None:
        from transformers import AutoTokenizer

        self.theirs, self.special = AutoTokenizer.from_pretrained(folder), special
        if not self.theirs.is_fast:
            raise ValueError(f"{folder}: its tokenizer has no tokenizer.json")
        if self.theirs.eos_token_id is None:
            raise ValueError(f"{folder}: its tokenizer has no eos_token to end documents")
        self.end_id: int = self.theirs.eos_token_id
        self.vocab_size: int = len(self.theirs)
        written = self.theirs.backend_tokenizer.to_str() + "special" * special
        template = ChatTemplate(self._render, self.theirs.eos_token)
        self.chat = template if self.theirs.chat_template else None
        self.fingerprint = hashlib.sha256(written.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return self.theirs.encode(text, add_special_tokens=self.special)

    def decode(self, ids: Iterable[int]) -> str:
        """As the ids say: the usual cleaning takes spaces before commas."""
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self.theirs.decode(
            kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _render(self, messages: Messages, open_answer: bool) -> str:
        from jinja2 import TemplateError  # which transformers writes chats with

        try:
            return self.theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_answer
            )
        except TemplateError as error:  # raised by templates that want roles in turns
            raise ValueError(f"the chat template refuses {messages!r}: {error}") from error

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder, which this class reads."""
        self.theirs.save_pretrained(folder)
