"""The Llama family of Hugging Face, in and out.

    model = load_llama(folder or name)      config.json and safetensors, in one file or several
    save_llama(model, folder, like=...)     what transformers and whoever reads its Llamas open

A Llama's last layer is our head 1; heads beyond it start fresh on the way in and stay behind on the
way out. Every key of a config is handled, known to change nothing, or refused by name. transformers
itself is not needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp.files import PYTORCH, whole, write_tensors
from mtp.heads import HEADS
from mtp.interop.fetch import fetched
from mtp.model import Block, ModelConfig, Transformer
from mtp.tokenizer import HuggingFaceTokenizer, check_vocabulary

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Head 1 is a layer of the trunk's kind, or nothing.
KINDS = ("transformer", "causal", "residual", "sequential")
TYPES = ("F64", "F32", "F16", "BF16")
Like = str | Path | HuggingFaceTokenizer | None

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
}
OPTIONAL_SIZES = {  # and what a config means that does not give them
    "num_key_value_heads": ("n_kv_heads", None),
    "max_position_embeddings": ("max_seq_len", 2048),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_embeddings", False),
}
OTHERWISE_READ = {
    *("num_hidden_layers", "head_dim"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
}
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_decoder": (False,),  # means: has no cross-attention
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
}
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
HARMLESS = {  # to the function that the model is
    *SPECIAL_IDS,
    *("initializer_range", "use_cache", "attention_dropout", "pretraining_tp", "is_llama_config"),
    *("dtype", "torch_dtype", "transformers_version", "transformers.js_config"),
    *("_name_or_path", "_model_name_or_path", "unk_token_id"),  # the last two: from GGUF files
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "_attn_implementation_autoset"),
}
COMES_ALONG = (  # of the folder that an export is to be like: tokenizer, chat template, sampling
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "generation_config.json"),
)


def load_llama(
    folder: str | Path,
    n_future_tokens: int = 1,
    head: str = "transformer",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """The LlamaForCausalLM in a folder as our model, or, where there is none, in the hub's
    repository of that name. Heads 2 to `n_future_tokens` are fresh.

    ValueError names a config key that we do not serve, and the file of every tensor that is
    missing, surplus or misshapen; FileNotFoundError a file that is not there.
    """
    _check_kind(head)
    folder = fetched(folder)
    config = our_config(_read_json(folder / CONFIG), n_future_tokens, head, where=folder / CONFIG)
    tied, files = config.tie_embeddings, _find_tensors(folder)
    # On `meta` nothing is allocated yet: what does not fit is told before work is lost.
    with torch.device("meta"):
        shapes = {k: tuple(t.shape) for k, t in llama_weights(Transformer(config)).items()}
    _check_tensors(folder, files, shapes, tied)
    model = Transformer(config, torch.Generator().manual_seed(0)).to(dtype)
    _fill(llama_weights(model), files, tied)
    return model


def our_config(
    theirs: Mapping[str, Any], n_future_tokens: int = 1, head: str = "transformer", where: Any = ""
) -> ModelConfig:
    """A LlamaForCausalLM's config, as a dict, in our words; ValueError names what has none."""
    _refuse_unknown(theirs, where)
    theta, scaling = _rope(theirs, where)
    layers = theirs["num_hidden_layers"]
    config = ModelConfig(
        n_layers=layers + (n_future_tokens - 1 if HEADS[head].takes_blocks else 0),
        n_future_tokens=n_future_tokens,
        head=head,
        rope_theta=theta,
        rope_scaling=scaling,
        **{ours: theirs[key] for key, ours in SIZES.items()},
        **{ours: theirs.get(key, default) for key, (ours, default) in OPTIONAL_SIZES.items()},
    )
    if theirs.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"{where}: head_dim={theirs['head_dim']} must be hidden_size / num_attention_heads = "
            f"{config.head_dim}"
        )
    return config


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """A LlamaConfig's values for trunk and head 1, in the words that all its readers know."""
    _check_kind(config.head)
    scaling = config.rope_scaling
    optional = {key: getattr(config, ours) for key, (ours, _) in OPTIONAL_SIZES.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": config.trunk_layers + HEADS[config.head].takes_blocks,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **scaling},
        **{key: getattr(config, ours) for key, ours in SIZES.items()},
        **optional,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.ffn_dim,
        **dict.fromkeys(SPECIAL_IDS),
    }


def llama_weights(model: Transformer) -> dict[str, Tensor]:
    """Views of our weights under a Llama's names: read to go out, written to come in."""
    first = model.heads.heads[0]
    blocks = [*model.trunk, *([first] if isinstance(first, Block) else [])]
    return {
        "model.embed_tokens.weight": model.embedding.weight,
        **{
            f"model.layers.{i}.{name}.weight": tensor
            for i, block in enumerate(blocks)
            for name, tensor in layer_weights(block).items()
        },
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output.weights[0],
    }


def layer_weights(block: Any) -> dict[str, Tensor]:
    """Views of one block's weights under a Llama's names, to which `.weight` is added."""
    queries, keys = block.n_heads * block.head_dim, block.kv_heads * block.head_dim
    q, k, v = block.wqkv.weight.split([queries, keys, keys])
    gate, up = block.w13.weight.chunk(2)
    return {
        "input_layernorm": block.attention_norm.weight,
        "self_attn.q_proj": q,
        "self_attn.k_proj": k,
        "self_attn.v_proj": v,
        "self_attn.o_proj": block.wo.weight,
        "post_attention_layernorm": block.ffn_norm.weight,
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": block.w2.weight,
    }


def save_llama(
    model: Transformer,
    folder: str | Path,
    like: Like = None,
    also: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Write trunk and head 1 as a plain LlamaForCausalLM, complete or not at all; other heads stay
    behind. FileExistsError if `folder` exists; OSError, naming it, if it cannot be written whole.

    like: a Hugging Face folder of the same vocabulary, or a tokenizer; tokenizer, chat template and
    special ids come along, of a folder the generation config too. also: writes to the folder what
    else is to lie there.
    """
    weights = llama_weights(model)
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]
    return write_folder(folder, llama_config(model.config), weights, like, also)


def write_folder(
    folder: str | Path,
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    like: Like = None,
    also: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """A Hugging Face folder of a config and weights by their names, see `save_llama`."""
    folder, dtype = Path(folder), weights["model.embed_tokens.weight"].dtype
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    config |= _special_ids(like, config["vocab_size"])
    weights = {name: t.detach().contiguous() for name, t in weights.items()}
    with whole(folder, sum(t.nbytes for t in weights.values())) as temporary:
        write_tensors(weights, temporary / WEIGHTS, PYTORCH)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        take_along(like, temporary)
        also(temporary)
    return folder


def take_along(like: Like, folder: Path) -> None:
    """Give an export's folder its tokenizer, see `save_llama`."""
    if isinstance(like, HuggingFaceTokenizer):
        like.save(folder)
    elif like is not None:
        for file in (Path(like, name) for name in COMES_ALONG):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _special_ids(like: Like, vocab_size: int) -> dict[str, Any]:
    if like is None:
        return {}
    if isinstance(like, HuggingFaceTokenizer):
        check_vocabulary(like, vocab_size, like.theirs.name_or_path)
        return {key: getattr(like.theirs, key) for key in SPECIAL_IDS}
    file = Path(like, CONFIG)
    theirs = _read_json(file)
    if theirs.get("vocab_size") != vocab_size:
        raise ValueError(
            f"{file}: vocab_size={theirs.get('vocab_size')} is not the model's "
            f"{vocab_size}: its tokenizer would give other ids"
        )
    return {key: theirs.get(key) for key in SPECIAL_IDS}


def _check_kind(head: str) -> None:
    if head not in KINDS:
        raise ValueError(f"head={head!r} is no layer of a Llama: allowed are {', '.join(KINDS)}")


def _refuse_unknown(theirs: Mapping[str, Any], where: Any) -> None:
    served = SIZES.keys() | OPTIONAL_SIZES.keys() | OTHERWISE_READ | FIXED.keys() | HARMLESS
    if unknown := sorted(theirs.keys() - served):
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)} may change what it computes")
    if missing := sorted((SIZES.keys() | {"num_hidden_layers", "model_type"}) - theirs.keys()):
        raise ValueError(f"{where}: gives no {', '.join(missing)}")
    for key, allowed in FIXED.items():
        if key in theirs and theirs[key] not in allowed:
            raise ValueError(
                f"{where}: {key}={theirs[key]!r} is not served: allowed is {allowed[0]!r}"
            )


def _rope(theirs: Mapping[str, Any], where: Any) -> tuple[float, dict[str, float] | None]:
    """Base and scaling of the rotary positions, which lie in one dict since transformers 5."""
    given = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    theta = given.pop("rope_theta", theirs.get("rope_theta", 10000.0))
    old_word = given.pop("type", "default")
    kind = given.pop("rope_type", old_word)
    if kind == "llama3":
        given.setdefault("original_max_position_embeddings", theirs.get("max_position_embeddings"))
        return theta, given  # whose names ModelConfig checks
    if kind != "default":
        raise ValueError(f"{where}: rope_type={kind!r} is not served: allowed are default, llama3")
    if given.pop("partial_rotary_factor", 1.0) != 1.0 or given:
        raise ValueError(f"{where}: the default rope_type takes no {', '.join(given) or 'part'}")
    return theta, None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _find_tensors(folder: Path) -> dict[str, Path]:
    """The file of each tensor, by its name."""
    index = folder / INDEX
    if not index.is_file():
        return dict.fromkeys(_names(folder / WEIGHTS), folder / WEIGHTS)
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(Path(f).name == f for f in listed.values()):
        raise ValueError(f"{index}: weight_map must name a file beside it for each tensor")
    files = [folder / name for name in sorted(set(listed.values()))]
    found = {name: file for file in files for name in _names(file)}
    for name, file in listed.items():
        if found.get(name) != folder / file:
            raise ValueError(f"{index}: says that {name} lies in {file}, but it does not")
    return found


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: weights are read from safetensors alone")
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _names(file: Path) -> list[str]:
    with _open(file) as opened:
        return [*opened.keys()]


def _slices(files: Mapping[str, Path]) -> Iterator[tuple[str, Any]]:
    """Each tensor's name and what reads it, each file opened once."""
    for file in sorted(set(files.values())):
        with _open(file) as opened:
            yield from ((name, opened.get_slice(name)) for name in opened.keys())


def _check_tensors(
    folder: Path, files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]], tied: bool
) -> None:
    optional = {"lm_head.weight"} if tied else set()
    problems = [f"missing: {name}" for name in sorted(shapes.keys() - files.keys() - optional)]
    for name, stored in _slices(files):
        shape, kind = tuple(stored.get_shape()), stored.get_dtype()
        if name.endswith(".rotary_emb.inv_freq"):
            continue  # early Llamas stored what their config says
        if name not in shapes:
            problems.append(f"surplus: {name} in {files[name].name}")
        elif shape != shapes[name] or kind not in TYPES:
            problems.append(
                f"misshapen: {name} in {files[name].name} is {kind} {shape}, the config wants "
                f"{shapes[name]}, of {', '.join(TYPES)}"
            )
    if problems:
        raise ValueError(f"{folder} does not fit its config. " + "; ".join(problems))


@torch.no_grad()
def _fill(weights: Mapping[str, Tensor], files: Mapping[str, Path], tied: bool) -> None:
    twin: Tensor | None = None
    for name, stored in _slices(files):
        if tied and name == "lm_head.weight":
            twin = stored[:]
        elif name in weights:
            weights[name].copy_(stored[:])
    if twin is not None and not torch.equal(
        weights["lm_head.weight"], twin.to(weights["lm_head.weight"])
    ):
        raise ValueError(
            f"{files['lm_head.weight']}: lm_head.weight differs from model.embed_tokens.weight, "
            f"though the config says tie_word_embeddings"
        )
