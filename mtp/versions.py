"""Every format on disk has a version in its header, so that a later one is named, not misread."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "format_version"


def check_version(header: Mapping[str, Any], newest: int, where: str | Path) -> None:
    """ValueError where a header is of a later version than `newest`, or of none that there was.
    One without the key is of version 1: some formats had none at first.
    """
    version = header.get(KEY, 1)
    if version not in range(1, newest + 1):
        raise ValueError(f"{where} has format version {version!r}; this release reads {newest}")
