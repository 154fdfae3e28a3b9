"""Meta's multi-token release, in and out.

    model, tokenizer = load_meta(folder)     params.json, consolidated.pth, tokenizer.model
    save_meta(model, folder, tokenizer)      the same files

The trunk and the next token's head are numbered together in `layers`, as a Llama's are; heads 2..n
are `extra_heads`. Rotary positions turn neighbours (2j, 2j + 1) there and halves (j, j + d/2) here:
rows of queries and keys change places on the way, and no bit of them. Every key of params.json is
handled, known to change nothing, or refused by name.

consolidated.pth is a pickle. It is read by torch's own reader for weights, which builds tensors and
runs nothing, and mapped: what does not fit is told before anything is read whole.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp.files import whole
from mtp.model import ModelConfig, Transformer
from mtp.tokenizer import INDEX_FILE, MODEL_FILE, SentencePieceTokenizer, Tokenizer

PARAMS, WEIGHTS = "params.json", "consolidated.pth"
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

NEEDED = ("dim", "n_layers", "n_heads", "vocab_size")
WRITTEN = (*NEEDED, "n_kv_heads", "n_future_tokens", "multiple_of", "norm_eps", "rope_theta")
OURS = (*WRITTEN, "max_seq_len")  # which their readers take from the caller, and not twice
REAL = ("norm_eps", "rope_theta", "ffn_dim_multiplier")
HARMLESS = ("max_batch_size",)  # of their cache
FIXED = {"head": "transformer", "unembedding": "shared", "rope_scaling": None}


def load_meta(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[Transformer, SentencePieceTokenizer | None]:
    """The model of a folder with all its heads, and the tokenizer from there or the folder above.

    ValueError names a key of params.json that we do not serve, every tensor that is missing,
    surplus or misshapen, a file that is damaged or would run code, and a tokenizer of another
    vocabulary; FileNotFoundError a file that is not there.
    """
    folder = Path(folder)
    tokenizer = find_tokenizer(folder)
    config = our_config(_read_params(folder / PARAMS, tokenizer), folder / PARAMS)
    _check_vocabulary(tokenizer, config.vocab_size)
    stored = _read_tensors(folder / WEIGHTS)
    # On `meta`, torch's word for no device, nothing is allocated yet.
    with torch.device("meta"):
        shapes = {k: _rows(t).shape for k, t in meta_weights(Transformer(config)).items()}
    _check_tensors(folder / WEIGHTS, stored, shapes)
    model = Transformer(config, torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for name, ours in meta_weights(model).items():
            ours.copy_(stored[name].reshape(ours.shape))
    return model, tokenizer


def save_meta(model: Transformer, folder: str | Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write model and tokenizer as Meta's release has them, complete or not at all. A tied
    unembedding is written twice. FileExistsError if `folder` exists; OSError, naming it, if it
    cannot be written whole.
    """
    folder, params = Path(folder), meta_params(model.config)
    if not isinstance(tokenizer, SentencePieceTokenizer | None):
        raise ValueError(f"{type(tokenizer).__name__} has no place in {folder}: only SentencePiece")
    _check_vocabulary(tokenizer, model.config.vocab_size)
    # Clones: of a view torch would write what it is a view of.
    weights = {k: _rows(t.detach()).clone() for k, t in meta_weights(model).items()}
    with whole(folder, sum(t.nbytes for t in weights.values())) as temporary:
        _write_tensors(weights, temporary / WEIGHTS)
        (temporary / PARAMS).write_text(json.dumps(params, indent=1) + "\n")
        if tokenizer is not None:
            tokenizer.save(temporary)
            (temporary / INDEX_FILE).unlink()  # Meta's readers have no use for it
    return folder


def find_tokenizer(folder: Path) -> SentencePieceTokenizer | None:
    """The release keeps one tokenizer above its models' folders."""
    for file in (folder / MODEL_FILE, folder.resolve().parent / MODEL_FILE):
        if file.is_file():
            return SentencePieceTokenizer(file)
    return None


def our_config(params: Mapping[str, Any], where: Any = PARAMS) -> ModelConfig:
    """A params.json, as a dict, in our words, most of which are the same; ValueError names what
    has none.
    """
    given = {key: value for key, value in params.items() if value is not None}
    if unknown := sorted(given.keys() - {*OURS, *REAL, *HARMLESS}):
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)} may change what it computes")
    if missing := [key for key in NEEDED if key not in given]:
        raise ValueError(f"{where}: gives no {', '.join(missing)}")
    for key, value in given.items():
        if type(value) is not int and not (key in REAL and type(value) is float):
            raise ValueError(f"{where}: {key}={value!r} must be a number")
    same = {"n_future_tokens": 1} | {key: given[key] for key in OURS if key in given}
    return _widened(ModelConfig(**same), given.get("ffn_dim_multiplier"))


def meta_params(config: ModelConfig) -> dict[str, Any]:
    """What params.json says of a model; ValueError names what it has no word for."""
    for key, only in FIXED.items():
        if (value := getattr(config, key)) != only:
            raise ValueError(f"{key}={value!r} has no place in Meta's format: allowed is {only!r}")
    given = {key: getattr(config, key) for key in WRITTEN}
    params = {key: value for key, value in given.items() if value is not None}
    if config.ffn_dim != replace(config, hidden_dim=None).ffn_dim:
        # The half is cut off again, whichever way the quotient was rounded.
        factor = (config.ffn_dim + 0.5) / (8 * config.dim // 3)
        params |= {"multiple_of": 1, "ffn_dim_multiplier": factor}
    return params


def _widened(config: ModelConfig, factor: float | None) -> ModelConfig:
    """Meta widens the feed-forward layer before it is rounded up to `multiple_of`."""
    if factor is None:
        return config
    wanted = int(factor * (8 * config.dim // 3))
    return replace(config, hidden_dim=-(-wanted // config.multiple_of) * config.multiple_of)


def meta_weights(model: Transformer) -> dict[str, Tensor]:
    """Views of our weights under Meta's names: read to go out, written to come in. Those of queries
    and keys are (heads, d/2, 2, dim): row by row, they have Meta's order.
    """
    first, *later = model.heads.heads
    blocks = {f"layers.{i}": block for i, block in enumerate([*model.trunk, first])}
    blocks |= {f"extra_heads.{i}": block for i, block in enumerate(later)}
    return {
        "tok_embeddings.weight": model.embedding.weight,
        **{
            f"{place}.{name}.weight": tensor
            for place, block in blocks.items()
            for name, tensor in _block_weights(block).items()
        },
        "norm.weight": model.norm.weight,
        "output.weight": model.output.weights[0],
    }


def _block_weights(block: Any) -> dict[str, Tensor]:
    queries, keys = block.n_heads * block.head_dim, block.kv_heads * block.head_dim
    q, k, v = block.wqkv.weight.split([queries, keys, keys])
    gate, up = block.w13.weight.chunk(2)
    return {
        "attention.wq": _neighbours(q, block.head_dim),
        "attention.wk": _neighbours(k, block.head_dim),
        "attention.wv": v,
        "attention.wo": block.wo.weight,
        "feed_forward.w1": gate,
        "feed_forward.w2": block.w2.weight,
        "feed_forward.w3": up,
        "attention_norm": block.attention_norm.weight,
        "ffn_norm": block.ffn_norm.weight,
    }


def _neighbours(rows: Tensor, d: int) -> Tensor:
    """(heads * d, dim) -> (heads, d/2, 2, dim): the two that turn together lie side by side."""
    return rows.view(-1, 2, d // 2, rows.shape[-1]).transpose(1, 2)


def _rows(view: Tensor) -> Tensor:
    return view.flatten(0, 2) if view.ndim == 4 else view


def _read_params(file: Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
    try:
        params = {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if params.get("vocab_size") == -1:  # Llama 2's way of saying: as many as the tokenizer has
        if tokenizer is None:
            raise ValueError(f"{file}: vocab_size=-1 means that of {MODEL_FILE}, which is missing")
        params["vocab_size"] = tokenizer.vocab_size
    return params


def _check_vocabulary(tokenizer: Tokenizer | None, vocab_size: int) -> None:
    if tokenizer is not None and tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"{MODEL_FILE} has {tokenizer.vocab_size} pieces, the model vocab_size={vocab_size}: "
            f"they do not belong together"
        )


def _read_tensors(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        stored = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds {_suspects(file)}: weights are tensors alone, and nothing else is run"
        ) from error
    except Exception as error:  # a damaged pickle may fail in any way
        why = str(error).partition(". ")[0]
        raise ValueError(f"{file} is damaged or was written by an old torch: {why}") from error
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        raise ValueError(f"{file} holds no tensors by name")
    stored.pop("rope.freqs", None)  # early Llamas stored what params.json says
    return stored


def _suspects(file: Path) -> str:
    """What a pickle wants to call, read without calling it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # made to confuse: the reason for refusing it stays the first one
        names = []
    return ", ".join(names) or "what is no tensor"


def _check_tensors(
    file: Path, stored: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    problems = [f"missing: {name}" for name in shapes if name not in stored]
    problems += [f"surplus: {name}" for name in stored if name not in shapes]
    for name in shapes.keys() & stored.keys():
        t, wanted = stored[name], tuple(shapes[name])
        if not isinstance(t, Tensor):
            problems.append(f"misshapen: {name} is a {type(t).__name__}")
        elif tuple(t.shape) != wanted or t.dtype not in TYPES:
            found, allowed = f"{_word(t.dtype)} {tuple(t.shape)}", ", ".join(map(_word, TYPES))
            problems.append(f"misshapen: {name} is {found}, {PARAMS} wants {wanted}, of {allowed}")
    if problems:
        raise ValueError(f"{file} does not fit its {PARAMS}. " + "; ".join(problems))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_tensors(weights: Mapping[str, Tensor], file: Path) -> None:
    try:
        torch.save(dict(weights), file)
    except RuntimeError as error:  # its way of saying that the disk is full
        raise OSError(str(error)) from error
