"""What every command shares: compose configs/NAME.yaml over its dataclass and call one function.

What goes wrong ends in one line on stderr that names the key and what is allowed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

log = logging.getLogger("mtp")
ERRORS = (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException)
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
REPORTS = CONFIGS / "report"  # of commands whose keys, such as model=, are no choice of a file


def register(name: str, schema: type) -> None:
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def launch(
    name: str, schema: type, action: Callable[[Any], object], configs: Path = CONFIGS
) -> None:
    """Run `action` on the object that the command line describes, or, with -m, on each of a sweep's
    objects in turn or wherever hydra.launcher sends them. A job's run_dir is a folder in the
    sweep's, named after what tells it from the others. One that fails does not keep the others from
    running, but the command fails.
    """
    _log_to_stderr()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed by Hydra
    register(name, schema)

    @hydra.main(version_base=None, config_path=str(configs), config_name=name)
    def main(config: DictConfig) -> None:
        if HydraConfig.get().mode is not RunMode.MULTIRUN:
            with _errors_in_one_line():  # inside too, else Hydra adds lines of its own
                action(OmegaConf.to_object(config))
            return
        _log_to_stderr()  # a launcher may have started another process
        job = ",".join(word for word in HydraConfig.get().overrides.task if word not in common)
        if job and "run_dir" in config:
            config.run_dir = str(Path(config.run_dir, job.replace("/", "_")))
        try:
            action(OmegaConf.to_object(config))
        except Exception as error:  # Hydra goes on to the next job, and raises the first in the end
            expected = isinstance(error, ERRORS)
            log.error("error in job %s: %s", job, _in_one_line(error), exc_info=not expected)
            raise

    with _errors_in_one_line():
        common = _common(sys.argv[1:])
        main()


def read_lines(path: Path) -> list[str]:
    """Of a text file; the last one may lack its end. ValueError names what is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 at byte {error.start}") from error


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr, force=True)


def _common(words: Sequence[str]) -> set[str]:
    """What all jobs of a sweep are told, in the form in which Hydra tells it to them."""
    given = [word for word in words if "=" in word and not word.startswith("-")]
    return {
        f"{override.get_key_element()}={override.get_value_element_as_str()}"
        for override in OverridesParser.create().parse_overrides(given)
        if not override.is_sweep_override()
    }


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except ERRORS as error:
        sys.exit(f"error: {_in_one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("stopped")


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
