"""Sequential heads in the layouts of those who serve them. Formats tested, not served here.

    save_transformers(model, folder)   a Llama with layers that generate(use_mtp=True) drafts with
    save_mimo(model, folder)           MiMo's layout, whose one head vLLM drafts with

Both take a `Transformer` of head kind sequential, or such heads attached to a `Transformer`, and
write trunk and heads in one folder. In both, the text is the trunk's own.

transformers' layers read what its unembedding reads, ours the hidden state before the last norm.
They are the same function if that norm weighs nothing: its weight goes into the unembedding, which
then is a matrix of its own beside the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp.interop.attach import AttachedHeads
from mtp.interop.llama import Like, layer_weights, llama_config, llama_weights, write_folder
from mtp.model import Transformer
from mtp.packed import refuse_packed

Weights = dict[str, Tensor]


class Parts(NamedTuple):
    trunk: Transformer
    heads: list[Any]  # SequentialHead


def save_transformers(
    model: Transformer | AttachedHeads, folder: str | Path, like: Like = None
) -> Path:
    """Write the layout of transformers' MtpLayer: `num_mtp_layers`, `mtp.layers.{k}.*`.

    To draft with them, transformers wants a class that knows of the keys, such as LlamaForCausalLM
    with `_keys_to_ignore_on_load_unexpected = [r"^mtp\\."]`; without it the folder is a plain
    Llama. ValueError: another head kind, or more heads than the trunk has layers, whose names
    transformers would mistake for layers of the trunk. like, and other errors: see `save_llama`.
    """
    trunk, heads = _parts(model)
    config = llama_config(trunk.config) | {"tie_word_embeddings": False}
    if len(heads) > config["num_hidden_layers"]:
        raise ValueError(
            f"n_future_tokens={len(heads) + 1}: at most as many heads as layers of the trunk can "
            f"go out, which are {config['num_hidden_layers']}"
        )
    config["num_mtp_layers"] = len(heads)
    weights, norm = llama_weights(trunk), trunk.norm.weight
    weights["model.norm.weight"] = torch.ones_like(norm)
    weights["lm_head.weight"] = weights["lm_head.weight"] * norm
    for k, head in enumerate(heads):
        own = {"enorm": head.enorm.weight, "hnorm": head.hnorm.weight}
        own |= {"eh_proj": head.eh_proj.weight, "post_norm": _post_norm(head, norm)}
        own |= {f"mtp_block.{name}": t for name, t in layer_weights(head.block).items()}
        weights |= {f"mtp.layers.{k}.{name}.weight": t.to(norm) for name, t in own.items()}
    return write_folder(folder, config, weights, like)


def save_mimo(model: Transformer | AttachedHeads, folder: str | Path, like: Like = None) -> Path:
    """Write MiMo's layout: a Qwen2 without biases beside `model.mtp_layers.0.*`. vLLM runs that one
    head, and blanks the embedding in its first column, which costs some of its guesses.

    ValueError: another head kind, or more than one head. like, and other errors: see `save_llama`.
    """
    trunk, heads = _parts(model)
    if len(heads) != 1:
        raise ValueError(f"n_future_tokens={len(heads) + 1}: MiMo's layout holds one head, so 2")
    (head,), norm = heads, trunk.norm.weight
    config = llama_config(trunk.config) | {
        "architectures": ["MiMoForCausalLM"],  # by which vLLM knows it
        "model_type": "qwen2",  # a config that every reader has, of a model that is the same
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,  # the head's reader wants the matrix by its name
    }
    weights = llama_weights(trunk)
    weights["lm_head.weight"] = weights["lm_head.weight"].clone()  # where it is the embedding's
    embedded, hidden = head.eh_proj.weight.chunk(2, 1)
    own = {"token_layernorm": head.enorm.weight, "hidden_layernorm": head.hnorm.weight}
    own |= {"input_proj": torch.cat([hidden, embedded], 1)}
    own |= {"final_layernorm": _post_norm(head, norm) * norm, **layer_weights(head.block)}
    weights |= {f"model.mtp_layers.0.{name}.weight": t.to(norm) for name, t in own.items()}
    return write_folder(folder, config, weights | _no_biases(weights), like)


def _parts(model: Transformer | AttachedHeads) -> Parts:
    if isinstance(model, AttachedHeads):
        trunk, kind = model.trunk.model, model.kind
    else:
        trunk, kind = model, model.config.head
    if kind != "sequential":
        raise ValueError(f"kind={kind!r} is no sequential head: allowed is sequential")
    if not isinstance(trunk, Transformer):
        raise ValueError(
            f"{trunk.name} is another library's model: heads go out on a trunk of ours, as "
            f"load_llama opens it"
        )
    if trunk.config.unembedding == "replicated":
        raise ValueError("unembedding=replicated: these layouts have one for all heads: shared")
    refuse_packed(trunk)
    return Parts(trunk, list(model.heads.heads[1:]))


def _post_norm(head: Any, like: Tensor) -> Tensor:
    """The weight of the head's own last norm; ones where it ends in the model's."""
    weight = getattr(head.post_norm, "weight", None)
    return torch.ones_like(like) if weight is None else weight.to(like)


def _no_biases(weights: Mapping[str, Tensor]) -> Weights:
    """Qwen2's attention has biases; zeros say the same as none."""
    maps = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    return {
        name.removesuffix("weight") + "bias": torch.zeros_like(t[:, 0])
        for name, t in weights.items()
        if name.endswith(maps)
    }
