"""A model by its folder, whatever wrote it: a run or checkpoint of ours, or a Hugging Face folder.

    found = find_model(folder)
    model = found.load(device, dtype)                        or, with heads that were attached to it
    model = found.load(device, dtype, heads_folder)
    generate(model, [Request(found.tokenizer.encode(text), 100, stop=stop_at(*found.ends))])

What is missing is said before weights are read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtp import checkpoint
from mtp.interop.attach import load_heads
from mtp.tokenizer import Tokenizer


@dataclass(frozen=True)
class FoundModel:
    """theirs: whether it is a causal LM of transformers. ends: ids that end a text."""

    folder: Path
    theirs: bool
    tokenizer: Tokenizer
    ends: tuple[int, ...]

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        heads: str | Path | None = None,
    ) -> Any:
        """A target of `mtp.generate`, to be left as it is: see `mtp.packed`. heads: a folder of
        those that were attached to it.
        """
        load = load_causal_lm if self.theirs else checkpoint.load
        model = load(self.folder, device, dtype)
        return (model if heads is None else load_heads(model, heads)).packed()


def find_model(where: str | Path, special: bool = True) -> FoundModel:
    """The model at `where`. special: see `mtp.tokenizer`. FileNotFoundError, ValueError or
    ImportError says what is missing.
    """
    folder = checkpoint.find(where)
    if not is_theirs(folder):
        tokenizer = checkpoint.load_tokenizer(folder)
        return FoundModel(folder, False, tokenizer, (tokenizer.end_id,))
    _import_transformers(folder)
    from mtp.tokenizer import HuggingFaceTokenizer

    theirs = HuggingFaceTokenizer(folder, special)
    return FoundModel(folder, True, theirs, _ends(folder, theirs.end_id))


def is_theirs(folder: Path) -> bool:
    """Whether the config in a folder is one of transformers."""
    file = folder / "config.json"
    try:
        return "model_type" in json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def load_causal_lm(folder: str | Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The causal LM of a Hugging Face folder in our adapter; weights from safetensors alone."""
    transformers = _import_transformers(folder)
    from mtp.interop.huggingface import CausalLM

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True
    )
    return CausalLM(model.to(device))


def _ends(folder: Path, end_id: int) -> tuple[int, ...]:
    """What the folder's own settings of generation end a text with, and the tokenizer's end."""
    from transformers import GenerationConfig

    written = (folder / "generation_config.json").is_file()
    listed = GenerationConfig.from_pretrained(folder).eos_token_id if written else None
    found = [end_id, *(listed if isinstance(listed, list) else [listed])]
    return tuple(dict.fromkeys(i for i in found if i is not None))


def _import_transformers(where: str | Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{where} needs, in a checkout: pip install '.[hf]'") from error
    return transformers
