"""Models that a benchmark compares: checkpoints of ours, and folders of Hugging Face causal models.

All that can be refused is refused before weights are read: `subject` wants the files and the
tokenizer, `Subject.load` then gives the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mtp.checkpoint import fingerprint, load_config
from mtp.encoding import chat_template
from mtp.interop.folder import find_model
from mtp.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """hash: of the files behind it. heads: whether it has some that can draft. ends: ids that end a
    text. template: see `load_benchmark`. load(device, dtype) -> a target of `mtp.generate` that
    also maps ids (1, T) to logits (1, T, V).
    """

    where: str
    hash: str
    heads: bool
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    template: Callable[[str], str]
    load: Callable[[torch.device, torch.dtype], Any]


def subject(where: str, chat: bool = False) -> Subject:
    """The model at `where`, see `find_model`. chat: questions will be asked, in the tokenizer's own
    template if it has one; a Hugging Face folder without is refused by ValueError.
    """
    found = find_model(where, special=not chat)  # templates begin a text themselves
    template = chat_template(found.tokenizer)
    if chat and found.theirs and not template.end:
        raise ValueError(f"{where} has no chat template: it cannot be asked in this form")
    return Subject(
        where,
        fingerprint(found.folder),
        not found.theirs and load_config(found.folder).n_future_tokens > 1,
        found.tokenizer,
        found.ends,
        lambda question: template.render([{"role": "user", "content": question}], True),
        found.load,
    )
