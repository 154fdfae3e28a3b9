"""Turn a model's folder into another format's.

python scripts/convert.py source_format=meta source=7B_1T_4 out_format=llama out=llama-7b

`--help` lists the formats, and what goes along from each to each. heads=FOLDER names heads that
were attached to the source, which go out with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import MISSING

import mtp
from mtp import checkpoint
from mtp.data import read_vocabulary
from mtp.interop.attach import AttachedHeads, load_heads
from mtp.interop.fetch import fetched
from mtp.interop.folder import load_causal_lm
from mtp.interop.llama import load_llama, save_llama
from mtp.interop.medusa import save_medusa
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

Read = tuple[Any, Tokenizer | None]
Write = Callable[[Any, Tokenizer | None, Any], object]


class Format(NamedTuple):
    """read(folder, dtype) -> model, tokenizer; write(model, tokenizer, config). None: not this way.

    keys: of the config, that writing heeds. attached: only goes with heads=.
    """

    read: Callable[[str, torch.dtype], Read] | None
    write: Write | None
    keys: tuple[str, ...] = ()
    attached: bool = False


@dataclass
class ConvertConfig:
    source_format: str = MISSING  # mtp, llama, meta or causal_lm
    source: str = MISSING  # a folder; for llama and causal_lm also a name on the hub
    out_format: str = MISSING  # mtp, llama, meta, speculative, transformers, mimo or medusa
    out: str = MISSING  # a new folder
    precision: str = "float32"  # or bfloat16: of the weights written
    like: str | None = None  # Hugging Face folder whose tokenizer goes out instead of the source's
    heads: str | None = None  # folder of heads that were attached to the source
    vocabulary: str | None = None  # of medusa: scripts/draft_vocabulary.py wrote it

    def __post_init__(self) -> None:
        for key, allowed in (
            ("source_format", [name for name, format in FORMATS.items() if format.read]),
            ("out_format", [name for name, format in FORMATS.items() if format.write]),
            ("precision", PRECISIONS),
        ):
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(f"{key}={value!r}: allowed are {', '.join(allowed)}")
        self._check_keys()
        if Path(self.out).exists():
            raise ValueError(f"out={self.out!r}: exists already and is not overwritten")

    def _check_keys(self) -> None:
        for key in ("like", "heads", "vocabulary"):
            heeding = [name for name, format in FORMATS.items() if key in format.keys]
            if (value := getattr(self, key)) is not None and self.out_format not in heeding:
                raise ValueError(
                    f"{key}={value!r} is for out_format={', '.join(heeding)}, not {self.out_format}"
                )
        for key in ("source_format", "out_format"):
            if FORMATS[name := getattr(self, key)].attached and self.heads is None:
                raise ValueError(f"{key}={name}: needs heads=FOLDER, of heads attached to source")


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


def _read_causal_lm(source: str, dtype: torch.dtype) -> Read:
    folder = fetched(source)
    model = load_causal_lm(folder, torch.device("cpu"), dtype)
    return model, mtp.load_tokenizer(folder) if (folder / INDEX_FILE).is_file() else None


def _write_meta(model: mtp.Transformer, tokenizer: Tokenizer | None, config: Any) -> object:
    fits = isinstance(tokenizer, SentencePieceTokenizer)
    return save_meta(model, config.out, tokenizer if fits else None)


def _write_medusa(model: AttachedHeads, tokenizer: Tokenizer | None, config: Any) -> object:
    return save_medusa(model, config.out, read_vocabulary(config.vocabulary))


def _with_theirs(save: Callable[..., object]) -> Write:
    """A write that takes Hugging Face's tokenizers along."""

    def write(model: Any, tokenizer: Tokenizer | None, config: Any) -> object:
        fits = isinstance(tokenizer, HuggingFaceTokenizer)
        return save(model, config.out, config.like or (tokenizer if fits else None))

    return write


FORMATS = {
    "mtp": Format(_read_ours, lambda model, tokenizer, c: mtp.save(model, c.out, tokenizer)),
    "llama": Format(_read_llama, _with_theirs(save_llama), ("like",)),
    "meta": Format(load_meta, _write_meta),
    "causal_lm": Format(_read_causal_lm, None, attached=True),
    "speculative": Format(None, _with_theirs(save_speculative), ("like", "heads")),
    "transformers": Format(None, _with_theirs(save_transformers), ("like", "heads")),
    "mimo": Format(None, _with_theirs(save_mimo), ("like", "heads")),
    "medusa": Format(None, _write_medusa, ("heads", "vocabulary"), attached=True),
}


def convert(config: ConvertConfig) -> None:
    read, write = FORMATS[config.source_format].read, FORMATS[config.out_format].write
    assert read and write  # or the config would have been refused
    model, tokenizer = read(config.source, PRECISIONS[config.precision])
    if config.heads is not None:
        model = load_heads(model, config.heads)
    write(model, tokenizer, config)
    alone = "" if any(Path(config.out).glob("tokenizer*")) else ", without a tokenizer"
    print(f"written: {config.out}{alone}")


if __name__ == "__main__":
    launch("convert", ConvertConfig, convert)
