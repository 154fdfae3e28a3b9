"""Models on the Hugging Face hub: a checkpoint's folder with a card.

    push_to_hub(model, "me/model", tokenizer, card)
    model, tokenizer = from_pretrained("me/model")       or a folder of save_pretrained's

Weights travel as safetensors; of what else a repository holds, nothing is fetched or opened. The
mixin of huggingface_hub is not used: it falls back to pickles, and passes over tensors that do not
fit.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mtp import checkpoint
from mtp.files import write_text
from mtp.interop.fetch import fetched
from mtp.model import ModelConfig, Transformer
from mtp.tokenizer import Tokenizer, check_vocabulary

FETCHED = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)
CARD = "README.md"
TAGS = ("multi-token-prediction", "speculative-decoding")


@dataclass(frozen=True)
class Card:
    """What only the one who trained a model can say of it.

    acceptance: tokens per step, teacher-forced on held-out text, by what text it was.
    """

    data: str
    acceptance: Mapping[str, float] = field(default_factory=dict)
    license: str | None = None
    language: Sequence[str] = ()
    datasets: Sequence[str] = ()
    base_model: str | None = None


def save_pretrained(
    model: Transformer,
    folder: str | Path,
    tokenizer: Tokenizer,
    card: Card,
    name: str | None = None,
) -> Path:
    """Write a checkpoint and, last, its card. FileExistsError, OSError: see `mtp.checkpoint.save`.

    name: by what the card says to open it, if not by the folder.
    """
    folder = Path(folder)
    check_vocabulary(tokenizer, model.config.vocab_size, folder)
    text = card_text(model, card, name or str(folder))
    checkpoint.save(model, folder, tokenizer)
    write_text(folder / CARD, text)
    return folder


def push_to_hub(
    model: Transformer, name: str, tokenizer: Tokenizer, card: Card, private: bool | None = None
) -> str:
    """Upload to the repository `name`, which is made if need be, as who is logged in there;
    -> the commit's address. Errors are huggingface_hub's own.
    """
    api = _hub().HfApi()
    with tempfile.TemporaryDirectory() as place:
        folder = save_pretrained(model, Path(place, "model"), tokenizer, card, name)
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder).commit_url)


def from_pretrained(
    where: str | Path,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a folder or, where there is none, of a repository. ValueError names a
    file that is damaged and every tensor that is missing, surplus or misshapen; FileNotFoundError
    where there is neither.
    """
    folder = checkpoint.find(fetched(where, revision, FETCHED))
    checkpoint.check(folder)
    tokenizer = checkpoint.load_tokenizer(folder)
    check_vocabulary(tokenizer, checkpoint.load_config(folder).vocab_size, folder)
    return checkpoint.load(folder, device, dtype), tokenizer


def card_text(model: Transformer, card: Card, name: str) -> str:
    """A model card: data, heads, acceptance, how to run it."""
    head = {
        "library_name": "mtp",
        "pipeline_tag": "text-generation",
        "tags": TAGS,
        "license": card.license,
        "language": card.language,
        "datasets": card.datasets,
        "base_model": card.base_model,
    }
    front = [f"{key}: {json.dumps(value)}" for key, value in head.items() if value]  # JSON is YAML
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return "\n".join(
        [
            *("---", *front, "---", f"# {name}"),
            *("", "## Data", "", card.data),
            *("", "## Heads", "", f"{size:,.1f}M parameters. {_shape(model.config)}"),
            *("", "## Acceptance", "", *_acceptance(card.acceptance)),
            *("", "## How to run", "", "```python", *_code(model, name), "```", ""),
        ]
    )


def _shape(config: ModelConfig) -> str:
    return (
        f"A trunk of {config.trunk_layers} layers of width {config.dim}; "
        f"{config.n_future_tokens} heads of kind {config.head}, {config.unembedding} unembedding; "
        f"vocabulary {config.vocab_size}, context {config.max_seq_len}."
    )


def _acceptance(measured: Mapping[str, float]) -> list[str]:
    if not measured:
        return ["Not measured."]
    return [
        "Tokens per step when all heads draft, teacher-forced on held-out text:",
        "",
        *(f"- {text}: {length:.2f}" for text, length in measured.items()),
    ]


def _code(model: Transformer, name: str) -> list[str]:
    drafter = ", OwnHeads()" if model.extra_heads else ""
    return [
        f"from mtp import {'OwnHeads, ' if drafter else ''}Request, generate",
        "from mtp.interop.hub import from_pretrained",
        "",
        f"model, tokenizer = from_pretrained({json.dumps(name)})",
        'request = Request(tokenizer.encode("Once upon a time"), max_new_tokens=100)',
        f"completion = generate(model, [request]{drafter})[0]",
        "print(tokenizer.decode(completion.tokens))",
    ]


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the hub needs, in a checkout: pip install '.[hf]'") from error
    return huggingface_hub
