"""Hugging Face transformers on our weights: its `generate` decodes beside ours.

They go out as `mtp.interop.llama` sends them. Only calls import transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from mtp.interop.llama import llama_config, llama_weights
from mtp.model import Transformer

CLOSE = 1e-4  # between its logits and ours, both in fp32


class Peer:
    """A Llama's `generate` with its own defaults, greedy, and how often the last call read it."""

    def __init__(self, llama: Any, **options: Any) -> None:
        self.llama, self.options, self.passes = llama, options, 0

    def _count(self, *_: Any) -> None:
        self.passes += 1

    def __call__(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Prompts of equal length -> `new` tokens after each."""
        tokens = torch.tensor([list(prompt) for prompt in prompts], device=self.llama.device)
        self.passes, counting = 0, self.llama.register_forward_pre_hook(self._count)
        found = self.llama.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
            **self.options,
        )
        counting.remove()
        return found[:, tokens.shape[1] :].tolist()


def checked(model: Transformer) -> Any:
    """The Llama of our trunk and head 1, after its logits were found equal to ours, in fp32 copies.
    ValueError where they are not.
    """
    single = copy.deepcopy(model).float()
    tokens = torch.arange(32, device=model.embedding.weight.device)[None]
    tokens = tokens * 7919 % model.config.vocab_size
    with torch.inference_mode():
        apart = float((llama(single)(tokens).logits - single(tokens)).abs().max())
    if not apart <= CLOSE:
        raise ValueError(f"logits of transformers differ by {apart:.1e}: allowed is {CLOSE}")
    return llama(model)


def llama(model: Transformer) -> Any:
    """A LlamaForCausalLM with copies of our weights, of their type and on their device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    weight = model.embedding.weight
    config = AutoConfig.for_model(**llama_config(model.config))
    # Not `.to(dtype)`: that would round the frequencies of its rotary positions too.
    peer = AutoModelForCausalLM.from_config(config, dtype=weight.dtype).to(weight.device).eval()
    peer.load_state_dict(llama_weights(model))
    return peer
