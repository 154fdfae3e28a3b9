"""Residual heads as servers run them that know Medusa (Cai et al. 2024). Format tested, not served
here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mtp.decode.drafters import OwnHeads
from mtp.files import PYTORCH, whole, write_tensors
from mtp.interop.attach import AttachedHeads
from mtp.packed import refuse_packed


def save_medusa(
    model: AttachedHeads, folder: str | Path, vocabulary: Sequence[int] | Tensor | None = None
) -> Path:
    """Write residual heads as the Medusa draft model that vLLM loads beside the trunk:
    `config.json`, `model.safetensors`.

    vocabulary: the only ids that heads are to score, see `OwnHeads`; the unembedding's other rows
    stay behind. FileExistsError, OSError: see `mtp.files.whole`.
    """
    if model.kind != "residual":
        raise ValueError(f"kind={model.kind!r} is no Medusa head: allowed is residual")
    refuse_packed(model)
    folder, drafter = Path(folder), OwnHeads(vocabulary=vocabulary)
    drafter.attach(model)
    matrix = model.output.weights[0].detach()
    if vocabulary is not None:
        matrix = matrix[drafter.ids]
    weights = {"lm_head.weight": matrix}
    for i in range(model.extra_heads):
        proj = model.heads.get_parameter(f"heads.{i + 1}.proj.weight")
        weights[f"blocks.{i}.layers.0.weight"] = proj.detach().to(matrix)
    if vocabulary is not None:
        weights["token_map"] = drafter.ids
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": matrix.shape[1],
        "vocab_size": model.config.vocab_size,
        "truncated_vocab_size": len(matrix),
        "num_heads": model.extra_heads,
        "num_hidden_layers": 1,
        "original_lm_head": True,  # one unembedding for all heads
        "medusa_fc_bias": False,
        "torch_dtype": str(matrix.dtype).removeprefix("torch."),
    }
    with whole(folder, sum(t.nbytes for t in weights.values())) as temporary:
        write_tensors(weights, temporary / "model.safetensors", PYTORCH)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
