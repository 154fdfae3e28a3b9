"""What every command shares: compose configs/NAME.yaml over its dataclass and call one function.

What goes wrong ends in one line on stderr that names the key and what is allowed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def register(name: str, schema: type) -> None:
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def launch(name: str, schema: type, action: Callable[[Any], object]) -> None:
    """Run `action` on the object that the command line describes."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr, force=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed by Hydra
    register(name, schema)

    @hydra.main(version_base=None, config_path=str(CONFIGS), config_name=name)
    def main(config: DictConfig) -> None:
        with _errors_in_one_line():  # inside too, else Hydra adds lines of its own
            action(OmegaConf.to_object(config))

    with _errors_in_one_line():
        main()


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {_in_one_line(error)}")


def _in_one_line(error: BaseException) -> str:
    """Hydra tells what in the first line and why in the cause; the keys of the place are added."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: give a value, {error.full_key}=..."
    cause = error.__cause__
    if not isinstance(cause, OmegaConfBaseException):
        return str(error).replace("\n", " ")
    place = cause.object_type
    known = [f.name for f in fields(place)] if isinstance(place, type) else []
    allowed = f"; allowed are {', '.join(known)}" if known and "not in" in str(cause) else ""
    return f"{str(error).splitlines()[0]} {str(cause).splitlines()[0]}{allowed}"
