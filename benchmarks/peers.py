"""Hugging Face transformers on our weights: its `generate` decodes beside ours.

Trunk and head 1 are a Llama whose last layer is that head; rotary halves, norms and SwiGLU are the
same, our joint maps are split. What only drafts need stays behind. Only calls import transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
    from transformers import AutoModelForCausalLM, LlamaConfig

    c, weight = model.config, model.embedding.weight
    if c.head != "transformer":
        raise ValueError(f"head={c.head!r} is no layer of a Llama: allowed is transformer")
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.ffn_dim,
        num_hidden_layers=c.trunk_layers + 1,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.kv_heads,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        bos_token_id=None,
        eos_token_id=None,  # a text goes on to its full length
    )
    # Not `.to(dtype)`: that would round the frequencies of its rotary positions too.
    peer = AutoModelForCausalLM.from_config(config, dtype=weight.dtype).to(weight.device).eval()
    peer.load_state_dict(llama_weights(model))
    return peer


def llama_weights(model: Transformer) -> dict[str, Tensor]:
    """Our weights under a Llama's names."""
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output.weights[0],
    }
    blocks: list[Any] = [*model.trunk, model.heads.heads[0]]
    for i, b in enumerate(blocks):
        queries, keys = b.n_heads * b.head_dim, b.kv_heads * b.head_dim
        q, k, v = b.wqkv.weight.split([queries, keys, keys])
        gate, up = b.w13.weight.chunk(2)
        layer = {
            "input_layernorm": b.attention_norm.weight,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": b.wo.weight,
            "post_attention_layernorm": b.ffn_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": b.w2.weight,
        }
        weights |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return weights
