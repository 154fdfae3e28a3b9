"""A trunk that learns with its attached heads: by small matrices beside its own (LoRA, Hu et al.
2021), or all of it.

    settle = tune(model, "lora")
    train(model, batches, DraftLoss(4, next_token=True), config)
    settle()
    save_trunk(model, "run/trunk", tokenizer)
    save_heads(model, "run/heads")

Head 1's own loss, next_token=True, keeps such a trunk a language model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtp import checkpoint
from mtp.files import whole
from mtp.interop.llama import save_llama
from mtp.model import Transformer
from mtp.tokenizer import Tokenizer

LEARNING = ("frozen", "lora", "all")
WIDE = (torch.float32, torch.float64)  # AdamW's small steps are lost on narrower weights


def tune(model: Any, learning: str, rank: int = 16, seed: int = 0) -> Callable[[], None]:
    """Let the trunk of an `AttachedHeads` learn, too. What is returned ends that: the trunk is then
    a plain model again, with what it learned.

    learning: "frozen" leaves it alone; "lora" puts matrices of `rank` beside each map of its
    blocks, to be merged in the end; "all" has every parameter learn. ValueError names what the
    trunk does not allow, ImportError the package that "lora" needs.
    """
    if learning not in LEARNING:
        raise ValueError(f"learning={learning!r} is unknown: allowed are {', '.join(LEARNING)}")
    if learning == "frozen":
        return lambda: None
    module = model.trunk.module
    if learning == "all" and (other := {p.dtype for p in module.parameters()} - {*WIDE}):
        raise ValueError(f"learning='all' wants a trunk of float32, not {other.pop()}: or use lora")
    lora = _add_lora(model.trunk.model, module, rank, seed) if learning == "lora" else None
    # A name must not hold dots.
    learn = {n.replace(".", "/"): p for n, p in module.named_parameters() if p.requires_grad}
    model.tuned.update(learn)

    def settle() -> None:
        model.tuned.clear()
        if lora is not None:
            lora.merge_and_unload()
            module.requires_grad_(True)
        for p in module.parameters():
            p.grad = None

    return settle


def _add_lora(model: Any, module: nn.Module, rank: int, seed: int) -> Any:
    """peft's tuner, whose matrices change nothing yet."""
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ImportError("learning='lora' needs, in a checkout: pip install '.[lora]'") from error
    maps = _maps(model, module)
    if not maps:
        raise ValueError(
            f"learning='lora': {type(module).__name__} has no nn.Linear to put matrices beside: "
            f"use all"
        )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=maps)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LoraModel(module, config, "default")


def _maps(model: Any, module: nn.Module) -> list[str]:
    """The names of the maps in a trunk's blocks: what head 1 reads through."""
    if isinstance(model, Transformer):
        used = {m for part in (*model.trunk, model.heads.heads[0]) for m in part.modules()}
    else:
        used = {*model.base.modules()} - {model.head}
    return [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and m in used]


def save_trunk(
    model: Any, folder: str | Path, tokenizer: Tokenizer, like: Path | None = None
) -> Path:
    """Write the trunk of an `AttachedHeads` as what it is: a checkpoint of ours, which `mtp.load`
    opens, or a Hugging Face folder. FileExistsError, OSError: see `mtp.files.whole`.

    like: the Hugging Face folder that a Llama was opened from, which is then written as one, too.
    """
    folder, module = Path(folder), model.trunk.module
    if model.tuned:
        raise ValueError("the trunk still learns: settle it first, see `tune`")
    if isinstance(module, Transformer):
        if like is not None:
            return save_llama(module, folder, like)
        return checkpoint.save(module, folder, tokenizer)
    with whole(folder, sum(p.nbytes for p in module.parameters())) as temporary:
        theirs: Any = module
        theirs.save_pretrained(temporary)
        tokenizer.save(temporary)
    return folder
