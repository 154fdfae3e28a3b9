"""Which way to decode pays for a model of yours on prompts of yours?

python scripts/pilot.py model=FOLDER prompts=my.jsonl

`model` is a run, a checkpoint, or a Hugging Face folder of a causal LM or its name on the hub;
`heads` may name a folder of scripts/attach.py beside it, `draft` a smaller model of the same
tokenizer. `prompts` is a file of JSON lines (*.jsonl), each with a prompt and, if its text is to
be scored, an answer or a completion; of any other file every line is a prompt. All decoders that
fit take turns, and `out` gets pilot.html, pilot.md and pilot.json: how much faster each is, with an
interval, what it costs, what it changes, and go or no go. It says first how long it will take, and
takes as many of the prompts as fit in `minutes`. With sampling.temperature above 0 it tries joint
decoding too, which is lossy, within `budget`. `--cfg job` prints every key.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pilot import Case, PilotConfig, pilot
from benchmarks.pilot_page import pilot_markdown, pilot_page
from benchmarks.record import read, record
from mtp.files import write_text
from scripts.cli import REPORTS, launch, read_lines


def read_cases(file: Path) -> list[Case]:
    lines = [(i, line) for i, line in enumerate(read_lines(file), 1) if line.strip()]
    if file.suffix != ".jsonl":
        return [Case(line) for _, line in lines]
    return [_case(line, f"{file}, line {i}") for i, line in lines]


def _case(line: str, where: str) -> Case:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ValueError(f"{where}: give an object with a text under prompt")
    if not found["prompt"].strip():
        raise ValueError(f"{where}: the prompt is empty")
    given = {key: found[key] for key in ("answer", "completion") if found.get(key) is not None}
    return Case(found["prompt"], **{key: str(value).strip() for key, value in given.items()})


def main(config: PilotConfig) -> None:
    say = partial(print, file=sys.stderr, flush=True)
    values = pilot(config, read_cases(Path(config.prompts)), say)
    file = record("pilot", values, config, Path(config.out))
    kept = read(file)
    write_text(file.with_suffix(".html"), pilot_page(kept))
    write_text(file.with_suffix(".md"), pilot_markdown(kept))
    say(f"written: {file.with_suffix('.html')}, and the same as .md and .json")
    print(values["answer"])


if __name__ == "__main__":
    launch("pilot", PilotConfig, main, REPORTS)
