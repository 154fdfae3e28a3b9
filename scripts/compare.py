"""What do more future tokens do on text of yours? Small models with each n, several seeds, one
table.

python scripts/compare.py data=my.jsonl n='[1,2,4]'
python scripts/compare.py data=my.jsonl n='[1,4]' model=3m train.steps=2000 device=cuda
python scripts/compare.py runs='[runs/a,runs/b,runs/compare]'

`data` is a file of JSON lines (*.jsonl) or Parquet (*.parquet), a text, or a folder of texts; a
tenth is held out. All models have equal parameters: extra heads take trunk layers. Each run is one
of scripts/train.py, which gets all words that are not keys here, experiment=NAME too; the same
command goes on where it was stopped, and reads finished runs back. `runs` joins finished runs from
what they logged, from folders of runs or of this command, instead of training. `out` gets
compare.md, compare.json and compare.png. Intervals are Student's t over seeds, 90 %; differences
from the first n pair runs of one seed. Memory is the device's peak, or else the process's.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.page import markdown_table
from benchmarks.pictures import drawn, study_panels
from benchmarks.record import record
from benchmarks.science import Study, cells_of, parameters_of, train_all, verdict
from mtp.evaluate.scores import over_seeds
from mtp.files import write_text
from mtp.hooks import read_jsonl
from mtp.run import METRICS, RECORD
from scripts.cli import REPORTS, launch

N = "model.n_future_tokens"
BITS, ACCEPTANCE = "val_bits_per_byte", "val_acceptance_length"
SMALL = {"model": "1m", "train.steps": 1000, "train.batch_size": 8, "train.eval_every": 100}
SAME = (  # what says which text is held out
    *("source", "path", "pattern", "val_path", "val_split", "val_fraction", "holdout"),
    *("tokenizer", "seq_len"),
)
Run = dict[str, Any]


@dataclass
class CompareConfig:
    data: str | None = None
    n: list[int] = field(default_factory=lambda: [1, 2, 4])  # the first is what others differ from
    seeds: int = 2
    words: list[str] = field(default_factory=list)  # of scripts/train.py: all that are no keys here
    runs: list[str] = field(default_factory=list)
    out: str = "runs/compare"

    def __post_init__(self) -> None:
        if (self.data is None) == (not self.runs):
            raise ValueError("give either data=FILE, to train on, or runs=[FOLDER,...], to join")
        if self.data is not None and not Path(self.data).exists():
            raise ValueError(f"data={self.data}: no such file or folder")
        if not self.n or min(self.n) < 1 or len({*self.n}) < len(self.n):
            raise ValueError(f"n={self.n}: give numbers of future tokens, each once, from 1 on")
        if set_here := [word for word in self.words if word.startswith((N, "run_dir", "resume"))]:
            raise ValueError(f"words={set_here}: are set here")


def gathered(words: Sequence[str]) -> list[str]:
    """A command line whose words for scripts/train.py are one list.

    >>> gathered(["n=[1,2]", "model=3m", "--cfg", "job"])
    ['n=[1,2]', '--cfg', 'job', 'words=["model=3m"]']
    """
    keys = {key.name for key in fields(CompareConfig)}
    passed = [
        word
        for word in words
        if "=" in word and word.partition("=")[0] not in keys and not word.startswith("-")
    ]
    own = [word for word in words if word not in passed]
    return [*own, f"words={json.dumps(passed)}"] if passed else own


def study_of(config: CompareConfig) -> Study:
    """As `benchmarks.science` trains them."""
    path = Path(str(config.data)).resolve()
    source = {".jsonl": "jsonl", ".parquet": "parquet"}.get(path.suffix, "text")
    said = [f"data.source={source}", f"data.path={json.dumps(str(path))}"]
    given = {word.partition("=")[0] for word in config.words}
    experiment = [word for word in config.words if word.startswith("experiment=")]
    small = {} if experiment else SMALL
    common = [*said, "data.val_fraction=0.1", "data.holdout=[]", "sample_every=0"]
    return Study(
        f"How many future tokens suit {path.name}?",
        experiment[-1].partition("=")[2] if experiment else None,
        arms={N: [*config.n]},
        seeds=config.seeds,
        measure=f"{BITS}_1",
        higher=False,
        words=[
            *common,
            *(f"{key}={value}" for key, value in small.items() if key not in given),
            *(word for word in config.words if word not in experiment),
        ],
    )


def newly_trained(config: CompareConfig) -> list[Path]:
    study = study_of(config)
    cells = cells_of(study)
    train_all(cells, study, Path(config.out))
    return [Path(config.out, cell.folder, "run") for cell in cells]


def found_in(folders: Sequence[str]) -> Iterator[Path]:
    """Runs, of folders that are runs or hold some of this command."""
    for folder in map(Path, folders):
        inner = sorted(file.parent for file in folder.glob(f"*/run/{RECORD}"))
        if not (folder / RECORD).is_file() and not inner:
            raise ValueError(f"runs={folder}: no run, which has {RECORD}, and no folder of runs")
        yield from inner or [folder]


def read_run(run_dir: Path) -> Run:
    """What a run logged. ValueError if it has not ended with a validation."""
    said = json.loads((run_dir / RECORD).read_text(encoding="utf-8"))
    if "model" not in said:
        raise ValueError(f"{run_dir}: its {RECORD} says no model: is it none of scripts/train.py?")
    rows = [*read_jsonl(run_dir / METRICS)]
    n = said["model"]["n_future_tokens"]
    if not rows or f"{BITS}_{n}" not in rows[-1]:
        raise ValueError(f"{run_dir}: its last line of {METRICS} has no {BITS}_{n}: not finished?")
    last, heads, training = rows[-1], range(1, n + 1), said["train"]
    return {
        "run": run_dir.parent.name if run_dir.name == "run" else run_dir.name,
        "n": n,
        "seed": training["seed"],
        "same": {f"data.{key}": said["data"][key] for key in SAME}
        | {"train.batch_size x eval_batches": training["batch_size"] * training["eval_batches"]},
        **{f"{BITS}_{i}": last[f"{BITS}_{i}"] for i in heads},
        "acceptance_length": last[ACCEPTANCE],
        "memory_gib": last["memory_gib"],
        "parameters": parameters_of(run_dir),
        **{key: last[key] for key in ("step", "tokens", "seconds")},
        "curves": {i: _curve(rows, f"{BITS}_{i}") for i in heads},
    }


def _curve(rows: Sequence[Mapping[str, float]], key: str) -> list[list[float]]:
    return [[row["step"], row[key]] for row in rows if key in row]


def check_alike(runs: Sequence[Run]) -> None:
    """Bits per byte of other held-out text would be no comparison."""
    for run in runs:
        for key, value in run["same"].items():
            if value != (first := runs[0]["same"][key]):
                raise ValueError(
                    f"{run['run']} has {key}={value!r}, {runs[0]['run']} has {first!r}: runs are "
                    f"compared on the same held-out text"
                )
    if twice := {(run["n"], run["seed"]) for run in runs if _alike(run, runs) > 1}:
        raise ValueError(f"n and seed {sorted(twice)}: are of several runs; give each once")


def _alike(run: Run, runs: Sequence[Run]) -> int:
    return sum((other["n"], other["seed"]) == (run["n"], run["seed"]) for other in runs)


# What they say.


def table(runs: Sequence[Run], ns: Sequence[int]) -> list[dict[str, Any]]:
    """A line for each n: means over seeds, with intervals where there are two or more."""
    of_n = {n: [run for run in runs if run["n"] == n] for n in ns}
    baseline = {run["seed"]: run for run in of_n[ns[0]]}
    return [
        {"n": n, "seeds": [run["seed"] for run in some]}
        | {key: mean_of([run[key] for run in some]) for key in measures(n)}
        | {"parameters": some[0]["parameters"], "tokens": [run["tokens"] for run in some]}
        | less_first(some, baseline)
        for n, some in of_n.items()
    ]


def measures(n: int) -> list[str]:
    heads = [f"{BITS}_{i}" for i in range(1, n + 1)]
    return [*heads, "acceptance_length", "memory_gib", "seconds"]


def mean_of(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"mean": values[0]}
    return over_seeds(values)._asdict()


def less_first(some: Sequence[Run], baseline: Mapping[int, Run]) -> dict[str, Any]:
    """Of the next token's bits per byte: this n's less the first one's, run by run of one seed."""
    pairs = [(run, baseline[run["seed"]]) for run in some if run["seed"] in baseline]
    if len(pairs) < 2 or pairs[0][0] is pairs[0][1]:
        return {}
    difference = over_seeds([a[f"{BITS}_1"] - b[f"{BITS}_1"] for a, b in pairs])
    return {"less_first": difference._asdict(), "verdict": verdict(difference, higher=False)}


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    deepest = max(line["n"] for line in lines)
    return markdown_table(
        {"n": str(line["n"]), "seeds": str(len(line["seeds"]))}
        | {f"bits per byte, head {i}": _shown(line, f"{BITS}_{i}") for i in range(1, deepest + 1)}
        | {
            "head 1 less the first n's": _shown(line, "less_first", "+.3f"),
            "verdict": line.get("verdict", "-"),
            "tokens per step, own heads": _shown(line, "acceptance_length", ".2f"),
            "memory, GiB": _shown(line, "memory_gib"),
            "seconds": _shown(line, "seconds", ".1f"),
            "parameters": f"{line['parameters']:,}",
        }
        for line in lines
    )


def _shown(line: Mapping[str, Any], key: str, form: str = ".3f") -> str:
    if key not in line:
        return "-"
    x = line[key]
    ends = f" ({x['low']:{form}} to {x['high']:{form}})" if "low" in x else ""
    return f"{x['mean']:{form}}{ends}"


def panels(runs: Sequence[Run], ns: Sequence[int]) -> list[dict[str, Any]]:
    """For `study_panels`: one for each head, a colour for each n."""
    return [
        {
            "place": {"head": i},
            "arm": f"n = {n}",
            "curves": [run["curves"][i] for run in runs if run["n"] == n],
        }
        for i in range(1, max(ns) + 1)
        for n in ns
        if i <= n
    ]


def main(config: CompareConfig) -> None:
    folders = found_in(config.runs) if config.runs else newly_trained(config)
    runs = [read_run(folder) for folder in folders]
    check_alike(runs)
    ns = sorted({run["n"] for run in runs}) if config.runs else config.n
    lines = table(runs, ns)
    file = record("compare", {"table": lines, "runs": runs}, config, Path(config.out))
    write_text(file.with_suffix(".md"), markdown(lines) + "\n")
    question = f"Bits per byte of held-out text, n = {', '.join(map(str, ns))}"
    pictured = panels(runs, ns)
    drawn(study_panels, question, "bits_per_byte", pictured, file.with_suffix(".png"))
    print(markdown(lines))


if __name__ == "__main__":
    sys.argv[1:] = gathered(sys.argv[1:])
    launch("compare", CompareConfig, main, REPORTS)
