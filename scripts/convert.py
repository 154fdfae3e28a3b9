"""Turn a model's folder into another format's.

python scripts/convert.py source_format=meta source=7B_1T_4 out_format=llama out=llama-7b

`--help` lists the formats. The tokenizer goes along where both formats have a place for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import MISSING

import mtp
from mtp import checkpoint
from mtp.interop.fetch import fetched
from mtp.interop.llama import load_llama, save_llama
from mtp.interop.meta import load_meta, save_meta
from mtp.interop.sequential import save_mimo, save_transformers
from mtp.interop.speculative import save_speculative
from mtp.tokenizer import (
    INDEX_FILE,
    MODEL_FILE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    check_vocabulary,
)
from mtp.train import PRECISIONS
from scripts.cli import launch

Read = tuple[mtp.Transformer, Tokenizer | None]
Write = Callable[[mtp.Transformer, Tokenizer | None, Any], object]


class Format(NamedTuple):
    """read(folder, dtype) -> model, tokenizer; write(model, tokenizer, config). None: only out."""

    read: Callable[[str, torch.dtype], Read] | None
    write: Write


@dataclass
class ConvertConfig:
    source_format: str = MISSING  # mtp, llama or meta
    source: str = MISSING  # a folder; of a llama also a name on the Hugging Face hub
    out_format: str = MISSING  # or one that goes only out
    out: str = MISSING  # a new folder
    precision: str = "float32"  # or bfloat16: of the weights written
    like: str | None = None  # Hugging Face folder whose tokenizer goes out instead of the source's

    def __post_init__(self) -> None:
        for key, allowed in (
            ("source_format", [name for name, format in FORMATS.items() if format.read]),
            ("out_format", FORMATS),
            ("precision", PRECISIONS),
        ):
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(f"{key}={value!r}: allowed are {', '.join(allowed)}")
        if self.like is not None and self.out_format not in LIKE:
            raise ValueError(
                f"like={self.like!r} is for out_format={', '.join(LIKE)}, not {self.out_format}"
            )
        if Path(self.out).exists():
            raise ValueError(f"out={self.out!r}: exists already and is not overwritten")


def _read_ours(source: str, dtype: torch.dtype) -> Read:
    folder = checkpoint.find(source)
    has_one = (folder / INDEX_FILE).is_file()
    return mtp.load(folder, dtype=dtype), mtp.load_tokenizer(folder) if has_one else None


def _read_llama(source: str, dtype: torch.dtype) -> Read:
    folder = fetched(source)
    model, tokenizer = load_llama(folder, dtype=dtype), None
    if (folder / MODEL_FILE).is_file():
        tokenizer = mtp.load_tokenizer(folder / MODEL_FILE)
    elif (folder / INDEX_FILE).is_file():
        tokenizer = mtp.load_tokenizer(folder)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config.vocab_size, source)
    return model, tokenizer


def _write_meta(model: mtp.Transformer, tokenizer: Tokenizer | None, config: Any) -> object:
    fits = isinstance(tokenizer, SentencePieceTokenizer)
    return save_meta(model, config.out, tokenizer if fits else None)


def _with_theirs(save: Callable[..., object]) -> Write:
    """A write that takes Hugging Face's tokenizers along."""

    def write(model: mtp.Transformer, tokenizer: Tokenizer | None, config: Any) -> object:
        fits = isinstance(tokenizer, HuggingFaceTokenizer)
        return save(model, config.out, config.like or (tokenizer if fits else None))

    return write


LIKE = ("llama", "speculative", "transformers", "mimo")
FORMATS = {
    "mtp": Format(_read_ours, lambda model, tokenizer, c: mtp.save(model, c.out, tokenizer)),
    "llama": Format(_read_llama, _with_theirs(save_llama)),
    "meta": Format(load_meta, _write_meta),
    "speculative": Format(None, _with_theirs(save_speculative)),
    "transformers": Format(None, _with_theirs(save_transformers)),
    "mimo": Format(None, _with_theirs(save_mimo)),
}


def convert(config: ConvertConfig) -> None:
    dtype = PRECISIONS[config.precision]
    read = FORMATS[config.source_format].read
    assert read is not None  # or the config would have been refused
    model, tokenizer = read(config.source, dtype)
    FORMATS[config.out_format].write(model, tokenizer, config)
    alone = "" if any(Path(config.out).glob("tokenizer*")) else ", without a tokenizer"
    print(f"written: {config.out}{alone}")


if __name__ == "__main__":
    launch("convert", ConvertConfig, convert)
