"""A model by its folder, whatever wrote it: a run or checkpoint of ours, or a Hugging Face folder,
which may be named as the hub names it.

    found = find_model(where)
    model = found.load(device, dtype)                        or, with heads that were attached to it
    model = found.load(device, dtype, heads_folder)
    generate(model, [Request(found.tokenizer.encode(text), 100, stop=stop_at(*found.ends))])

A Llama that `mtp.interop.llama` serves is opened as our `Transformer`, which decodes faster than
transformers' through its adapter; heads know their trunk in the form in which it is opened here.
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
from mtp.interop.fetch import fetched
from mtp.interop.llama import load_llama, our_config
from mtp.tokenizer import Tokenizer


@dataclass(frozen=True)
class FoundModel:
    """theirs: whether it is a Hugging Face folder. ends: ids that end a text."""

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
        model = self.open(device, dtype)
        return (model if heads is None else load_heads(model, heads)).packed()

    def open(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        """A `Transformer` or `CausalLM` that may be trained."""
        load = load_causal_lm if self.theirs else checkpoint.load
        return load(self.folder, device, dtype)


def find_model(where: str | Path, special: bool = True) -> FoundModel:
    """The model at `where`. special: see `mtp.tokenizer`. FileNotFoundError, ValueError or
    ImportError says what is missing.
    """
    folder = checkpoint.find(fetched(where))
    if not is_theirs(folder):
        tokenizer = checkpoint.load_tokenizer(folder)
        return FoundModel(folder, False, tokenizer, (tokenizer.end_id,))
    _import_transformers(folder)
    from mtp.tokenizer import HuggingFaceTokenizer

    theirs = HuggingFaceTokenizer(folder, special)
    return FoundModel(folder, True, theirs, _ends(folder, theirs.end_id))


def is_theirs(folder: Path) -> bool:
    """Whether the config in a folder is one of transformers."""
    return "model_type" in _config(folder)


def is_llama(folder: Path) -> bool:
    """Whether the config in a Hugging Face folder says what our `Transformer` computes."""
    try:
        our_config(_config(folder))
    except ValueError:
        return False
    return True


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        return {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def load_causal_lm(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The causal LM of a Hugging Face folder: our `Transformer` if it is such a Llama, else what
    transformers makes of it, in our adapter. Weights from safetensors alone.
    """
    if is_llama(folder):
        return load_llama(folder, dtype=dtype).to(device)
    transformers = _import_transformers(folder)
    from mtp.interop.huggingface import CausalLM

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True
    )
    return CausalLM(model.to(device))


def _ends(folder: Path, end_id: int) -> tuple[int, ...]:
    """What the folder's settings of generation, or else its config, end a text with, and the
    tokenizer's end.
    """
    from transformers import GenerationConfig

    written = (folder / "generation_config.json").is_file()
    theirs = GenerationConfig.from_pretrained(folder).to_dict() if written else _config(folder)
    listed = theirs.get("eos_token_id")
    found = [end_id, *(listed if isinstance(listed, list) else [listed])]
    return tuple(dict.fromkeys(i for i in found if i is not None))


def _import_transformers(where: str | Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{where} needs, in a checkout: pip install '.[hf]'") from error
    return transformers
