"""What the examples with a trainer share beside their point: rows of text and two small models."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mtp import ModelConfig, Transformer
from mtp.data import Corpus, load_corpora
from mtp.documents import DataConfig
from mtp.tokenizer import load_tokenizer
from scripts.examples.attached_heads import AttachedHeads


def small_transformer(n: int) -> nn.Module:
    """Ours, of bytes."""
    return Transformer(ModelConfig(dim=128, n_layers=6, n_future_tokens=n))


def small_llama(n: int) -> nn.Module:
    """Hugging Face's, of bytes and random; `from_pretrained` gives a trained one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return AttachedHeads(LlamaForCausalLM(config), n)


MODELS = {"transformer": small_transformer, "llama": small_llama}


class Setting(NamedTuple):
    """rows, held_out: (R, T + n) ids, each row overlapping the next by n."""

    model: nn.Module
    n_future_tokens: int
    steps: int
    rows: Tensor
    held_out: Tensor


def read(words: Sequence[str] | None, seq_len: int = 128) -> Setting:
    """What the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--n", type=int, default=4, help="future tokens")
    parser.add_argument("--source", default="stdlib", help="stdlib, text, jsonl or parquet")
    parser.add_argument("--path", help="its file or folder")
    args = parser.parse_args(words)

    def rows(corpus: Corpus) -> Tensor:
        tokens = torch.from_numpy(np.asarray(corpus.tokens).astype(np.int64))
        return tokens.unfold(0, seq_len + args.n, seq_len)

    corpora = load_corpora(DataConfig(args.source, args.path), load_tokenizer("bytes"))
    return Setting(MODELS[args.model](args.n), args.n, args.steps, *map(rows, corpora))
