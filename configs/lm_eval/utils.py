"""What the tasks beside this file share. They run with any model of lm-evaluation-harness.

Without `--metadata` the data comes from the hub; with '{"path": "folder"}' it is read from there,
and '{"sandbox": "weak"}' lets programs run where the host cannot shut them in.
"""

import logging
from dataclasses import asdict
from functools import cache
from typing import Any

from datasets import Dataset

from mtp.evaluate.code import Problem, cut, load_benchmark
from mtp.evaluate.sandbox import Sandbox

log = logging.getLogger("lm_eval.mtp")


@cache
def shut_in(level: str) -> Sandbox:
    return Sandbox(level=level)


def problems(
    benchmark: str, form: str, path: str | None = None, sandbox: str = "strong", **_: Any
) -> dict[str, Dataset]:
    """Refuses before anything is written. _: the harness adds the model's arguments."""
    loaded = load_benchmark(benchmark, form=form, path=path)
    log.info("%s; %s", loaded.says, shut_in(sandbox).describe())
    rows = [{"problem": asdict(p), "sandbox": sandbox} for p in loaded.problems]
    return {"test": Dataset.from_list(rows)}


def verdict(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    problem = Problem(**doc["problem"])
    program = problem.program(cut(results[0], problem.stops))
    return {"pass@1": shut_in(doc["sandbox"]).run(program).passed}
