"""Models whose heads draft in transformers, without this library: a folder that any reader opens as
the plain model, and beside it the heads and the code that decodes with them.

    save_speculative(model, folder)

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.generate(ids, custom_generate=folder, trust_remote_code=True)

The code is `mtp.interop.custom_generate`, which is copied and imports nothing of ours.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from mtp.files import PYTORCH, whole, write_tensors
from mtp.interop.attach import AttachedHeads
from mtp.interop.llama import Like, layer_weights, llama_config, save_llama, take_along
from mtp.model import Block, ModelConfig, Transformer
from mtp.packed import refuse_packed

PLACE = "custom_generate"  # where transformers looks
CODE = Path(__file__).with_name("custom_generate.py")
REQUIRED = "transformers>=5\n"


def save_speculative(
    model: Transformer | AttachedHeads, folder: str | Path, like: Like = None
) -> Path:
    """Write the model as `save_llama` does, or, if it is one of transformers, as it is; beside it
    heads 2..n. It is complete or absent. FileExistsError, OSError: see `save_llama`.

    like: a Hugging Face folder or tokenizer that comes along. ValueError where there are no heads,
    or heads that are not of kind transformer, causal or residual with a shared unembedding.
    """
    _check(model)
    weights, spec = _weights(model), _spec(model)

    def add_heads(folder: Path) -> None:
        place = folder / PLACE
        place.mkdir()
        write_tensors(weights, place / "heads.safetensors", PYTORCH)
        (place / "heads.json").write_text(json.dumps(spec, indent=2) + "\n")
        (place / "requirements.txt").write_text(REQUIRED)
        shutil.copyfile(CODE, place / "generate.py")

    trunk = model.trunk.model if isinstance(model, AttachedHeads) else model
    if isinstance(trunk, Transformer):
        return save_llama(trunk, folder, like, add_heads)
    size = sum(t.nbytes for t in [*weights.values(), *trunk.model.parameters()])
    with whole(Path(folder), size) as temporary:
        trunk.model.save_pretrained(temporary)
        take_along(like, temporary)
        add_heads(temporary)
    return Path(folder)


def _check(model: Transformer | AttachedHeads) -> None:
    if not model.extra_heads:
        raise ValueError("n_future_tokens=1: there is no head to draft with")
    if len(model.output.weights) > 1:
        raise ValueError("unembedding='replicated': heads can go out with a shared one only")
    refuse_packed(model)
    window = (
        getattr(model.trunk.model, "window", None) if isinstance(model, AttachedHeads) else None
    )
    if window is not None:
        raise ValueError(
            f"sliding_window={window}: its slots cannot go back behind a refused guess"
        )


def _weights(model: Transformer | AttachedHeads) -> dict[str, Tensor]:
    """Heads 2..n under the names that the shipped code gives them."""
    found: dict[str, Tensor] = {}
    for i, head in enumerate(model.heads.heads[1:]):
        if isinstance(head, Block):
            layer = layer_weights(head).items()
            found |= {f"heads.{i}.layer.layers.0.{name}.weight": t.detach() for name, t in layer}
        else:
            found[f"heads.{i}.weight"] = head.get_parameter("proj.weight").detach()
    return found


def _spec(model: Transformer | AttachedHeads) -> dict[str, Any]:
    """What the shipped code is told: kind and number of the heads, the module whose output they
    read, and the norm between them and the unembedding.
    """
    if isinstance(model, AttachedHeads):  # all that comes before the unembedding
        kind, reads, norm = model.kind, _base_name(model.trunk.model), None
    else:
        kind, reads, norm = model.config.head, _layer_read(model.config), "model.norm"
    return {
        "kind": kind,
        "heads": model.extra_heads,
        "reads": reads,
        "norm": norm,
        "width": model.output.weights[0].shape[1],
        "block": None if kind == "residual" else llama_config(_block_config(model)),
    }


def _base_name(trunk: Any) -> str:
    return "model" if isinstance(trunk, Transformer) else trunk.model.base_model_prefix


def _layer_read(config: ModelConfig) -> str:
    """Parallel heads read the trunk, causal ones head 1, a Llama's last layer."""
    layers = config.trunk_layers + (config.head == "causal")
    return f"model.layers.{layers - 1}" if layers else "model.embed_tokens"


def _block_config(model: Transformer | AttachedHeads) -> ModelConfig:
    if isinstance(model, Transformer):
        return model.config
    block = model.heads.heads[1]
    assert isinstance(block, Block)
    return ModelConfig(
        dim=block.w2.out_features,
        n_layers=1,
        n_heads=block.n_heads,
        n_kv_heads=block.kv_heads,
        n_future_tokens=1,
        hidden_dim=block.w2.in_features,
        vocab_size=model.config.vocab_size,
        max_seq_len=model.config.max_seq_len,
    )
