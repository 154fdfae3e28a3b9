"""The tokenizer of a Hugging Face folder, for data and decoding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


class HuggingFaceTokenizer:
    """Its end-of-sentence token ends documents. ValueError where it has none, or is not of the
    `tokenizers` library, whose file says all that it does.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        self._theirs = AutoTokenizer.from_pretrained(folder)
        if not self._theirs.is_fast:
            raise ValueError(f"{folder}: its tokenizer has no tokenizer.json")
        if self._theirs.eos_token_id is None:
            raise ValueError(f"{folder}: its tokenizer has no eos_token to end documents")
        self.end_id: int = self._theirs.eos_token_id
        self.vocab_size: int = len(self._theirs)
        written = self._theirs.backend_tokenizer.to_str()
        self.fingerprint = hashlib.sha256(written.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return self._theirs.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._theirs.decode(kept, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder, which this class reads."""
        self._theirs.save_pretrained(folder)
