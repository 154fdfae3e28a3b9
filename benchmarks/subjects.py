"""Models that a benchmark compares: checkpoints of ours, and folders of Hugging Face causal models.

All that can be refused is refused before weights are read: `subject` wants the files and the
tokenizer, `Subject.load` then gives the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mtp
from mtp.checkpoint import find, load_config
from mtp.evaluate.code import plain_chat
from mtp.tokenizer import Tokenizer

TRAINING = ("optimizer", "training")  # files of a checkpoint that say nothing of what it writes


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
    """The model at `where`: a run, a checkpoint or a Hugging Face folder. chat: questions will be
    asked. ValueError or FileNotFoundError says what is missing.
    """
    folder = find(where)
    if "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return _of_transformers(where, folder, chat)
    heads, tokenizer = load_config(folder).n_future_tokens > 1, mtp.load_tokenizer(folder)
    ends, load = (tokenizer.end_id,), partial(_load, folder)
    return Subject(where, digest(folder), heads, tokenizer, ends, plain_chat, load)


def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    return mtp.load(folder, device, dtype).packed()


def digest(folder: Path) -> str:
    """Of all files that say what a model writes, their names too."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if not path.name.startswith(TRAINING) and not path.parent.name.startswith(TRAINING):
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def _of_transformers(where: str, folder: Path, chat: bool) -> Subject:
    try:
        from transformers import GenerationConfig

        from mtp.tokenizer import HuggingFaceTokenizer
    except ImportError as error:
        raise ImportError(f"{where} needs, in a checkout: pip install '.[hf]'") from error
    try:
        tokenizer = HuggingFaceTokenizer(folder, special=not chat)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{where} holds no tokenizer that can be read: {error}") from error
    if chat and not tokenizer.theirs.chat_template:
        raise ValueError(f"{where} has no chat template: it cannot be asked in this form")
    written = folder / "generation_config.json"
    end = GenerationConfig.from_pretrained(folder).eos_token_id if written.is_file() else None
    found = [*(end if isinstance(end, list) else [end]), tokenizer.end_id]
    ends = tuple(dict.fromkeys(i for i in found if i is not None))
    load = partial(_load_theirs, folder)
    return Subject(
        where, digest(folder), False, tokenizer, ends, partial(_ask, tokenizer.theirs), load
    )


def _ask(theirs: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _load_theirs(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from mtp.interop.huggingface import CausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    return CausalLM(model.to(device)).packed()
