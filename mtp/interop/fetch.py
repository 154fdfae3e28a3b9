"""Where a model is said to be: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")  # nothing that can run


def fetched(where: str | Path, revision: str | None = None, wanted: Sequence[str] = WANTED) -> Path:
    """The folder `where`, or, if there is none, one with the files of the repository of that name
    that match `wanted`, taken from the hub or from what it gave before. Of the repository's folders
    nothing is taken.

    FileNotFoundError where there is neither.
    """
    if Path(where).is_dir():
        return Path(where)
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{where} is no folder, and the hub needs, in a checkout: pip install '.[hf]'"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(where), revision=revision, allow_patterns=list(wanted), ignore_patterns=["*/*"]
            )
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{where} is no folder, and the hub gives no repository of that name: {reason}"
        ) from error
