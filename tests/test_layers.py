"""The import table: arrows point down, nothing runs in circles, optional packages stay optional."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "mtp").rglob("*.py"))
# A module may import what stands in the levels above its own line, the first two lines nothing.
LEAVES = {
    *("mtp.heads", "mtp.loss", "mtp.distributed", "mtp.tokenizer", "mtp.overlap"),
    *("mtp.packages", "mtp.blocks", "mtp.optim", "mtp.packed", "mtp.decode.contract"),
    *("mtp.records", "mtp.rotary", "mtp.files"),
    *("mtp.decode.depth", "mtp.evaluate.micro", "mtp.evaluate.sandbox", "mtp.evaluate._child"),
    *("mtp.evaluate.scores", "mtp.evaluate.schemas", "mtp.consistency.filters"),
    *("mtp.interop.fetch", "mtp.versions"),
    *("mtp.tasks.copying", "mtp.tasks.induction", "mtp.tasks.polynomial", "mtp.tasks.star_graph"),
}
EXACT = {
    "mtp.cache": {"mtp.decode.contract"},
    "mtp.model": {
        *("mtp.cache", "mtp.heads", "mtp.loss", "mtp.packed", "mtp.rotary"),
        "mtp.decode.contract",
    },
    "mtp.tasks.table": {
        *("mtp.tasks.copying", "mtp.tasks.induction", "mtp.tasks.polynomial"),
        "mtp.tasks.star_graph",
    },
    "mtp.documents": {
        *("mtp.evaluate.micro", "mtp.overlap", "mtp.packages", "mtp.records", "mtp.tasks.table"),
    },
    "mtp.encoding": {"mtp.records", "mtp.tokenizer"},
    "mtp.data": {
        *("mtp.documents", "mtp.encoding", "mtp.files", "mtp.loss", "mtp.records"),
        *("mtp.tokenizer", "mtp.versions"),
    },
    "mtp.shards": {
        *("mtp.data", "mtp.documents", "mtp.encoding", "mtp.records", "mtp.tokenizer"),
    },
    "mtp.decode.sampling": {"mtp.decode.contract"},
    "mtp.decode.beam": {"mtp.decode.contract"},
    "mtp.decode.lookup": {"mtp.decode.contract"},
    "mtp.decode.jacobi": {"mtp.decode.contract", "mtp.decode.sampling"},
    "mtp.meter": {"mtp.distributed", "mtp.loss"},
    "mtp.divergence": {"mtp.loss"},
    "mtp.objectives": {"mtp.loss"},
    "mtp.evaluate.sql": {"mtp.evaluate.schemas"},
    "mtp.evaluate.code": {
        *("mtp.decode.contract", "mtp.evaluate.sandbox", "mtp.records", "mtp.tokenizer"),
    },
}
SIBLINGS = {"mtp.checkpoint", "mtp.decode.drafters", "mtp.decode.loop"}
USERS = {  # of models, drafters, the loop, checkpoints
    *("mtp.testing", "mtp.decode.health", "mtp.decode.joint", "mtp.decode.probe"),
    *("mtp.evaluate.samples", "mtp.interop.attach", "mtp.interop.huggingface"),
    *("mtp.interop.llama", "mtp.interop.meta", "mtp.interop.hub"),
    *("mtp.interop.states", "mtp.interop.draft_loss"),
}
ADAPTER = "mtp.evaluate.harness"  # of runs and of others' models, to a package it cannot do without
SHIPPED = "mtp.interop.custom_generate"  # goes out with models, to where only transformers is
# each may import those before it
ORDERED = [
    *("mtp.consistency.trajectories", "mtp.consistency.files", "mtp.consistency.measures"),
    *("mtp.consistency.on_policy", "mtp.consistency.packing", "mtp.consistency.loss"),
    *("mtp.train", "mtp.problems", "mtp.distill", "mtp.estimate", "mtp.hooks", "mtp.run_dir"),
    "mtp.run",
]
ABOVE = {  # some of USERS, or of those before
    "mtp.interop.sequential": {"mtp.interop.attach", "mtp.interop.llama"},
    "mtp.interop.medusa": {"mtp.interop.attach"},
    "mtp.interop.folder": {
        *("mtp.interop.attach", "mtp.interop.huggingface", "mtp.interop.llama"),
    },
    "mtp.interop.tuning": {"mtp.interop.llama"},
    "mtp.interop.speculative": {"mtp.interop.attach", "mtp.interop.llama"},
    ADAPTER: {"mtp.interop.folder"},
}


def name_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in FILES}
INNER = {name: file for name, file in MODULES.items() if file.name != "__init__.py"}


@cache
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file):
    """Full names of all that a file imports, in functions too; names of modules where they are."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            inner = {f"{source}.{alias.name}" for alias in node.names}
            yield from (name if name in MODULES else source for name in inner)


def ours(file):
    return {name for name in imports(file) if name.split(".")[0] in ("mtp", "")}


def allowed(name):
    if name in LEAVES or name == SHIPPED:
        return set()
    if name in EXACT:
        return EXACT[name]
    if name in SIBLINGS:
        return LEAVES | EXACT.keys()
    if name in USERS:
        return LEAVES | EXACT.keys() | SIBLINGS
    if name in ABOVE:
        return LEAVES | EXACT.keys() | SIBLINGS | ABOVE[name]
    return LEAVES | EXACT.keys() | SIBLINGS | set(ORDERED[: ORDERED.index(name)])


def test_every_module_has_its_place_in_the_table():
    assert INNER.keys() == LEAVES | EXACT.keys() | SIBLINGS | USERS | ABOVE.keys() | {
        SHIPPED,
        *ORDERED,
    }


@pytest.mark.parametrize("name", INNER)
def test_modules_import_only_from_below(name):
    """Also never from the package itself, `from mtp import load`, which is above them all."""
    assert ours(INNER[name]) <= allowed(name)


def test_imports_have_no_cycle():
    graph = {name: ours(file) for name, file in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_only_scripts_know_hydra():
    files = [*FILES, *(ROOT / "benchmarks").glob("*.py")]
    knowing = [
        file for file in files if {"hydra", "omegaconf"} & {x.split(".")[0] for x in imports(file)}
    ]
    assert not knowing


def test_the_library_knows_neither_scripts_nor_benchmarks():
    above = {"scripts", "benchmarks", "tests"}
    assert not [file for file in FILES if above & {x.split(".")[0] for x in imports(file)}]


def test_the_library_does_not_print():
    printing = [
        f"{file}:{node.lineno}"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Name) and node.id == "print"
    ]
    assert not printing


WITHOUT = """
import importlib, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in MISSING:
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
for name in MODULES:
    importlib.import_module(name)
try:
    import safetensors
except ImportError:
    print("all imported")
try:
    import mtp.evaluate.harness
except ImportError as error:
    print(error)
"""


def required(name, found):
    """Add to `found` what an installed package needs, itself included, extras left out."""
    if name in found:
        return
    found.add(name)
    for line in metadata.requires(name) or []:
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            required(canonicalize_name(need.name), found)


def test_every_module_and_benchmark_imports_with_torch_and_numpy_alone():
    """All other packages are as if they were not installed, those that torch needs left aside."""
    there: set[str] = set()
    for name in ("torch", "numpy"):
        required(name, there)
    missing = {
        module
        for module, owners in metadata.packages_distributions().items()
        if there.isdisjoint(map(canonicalize_name, owners))
    } - {"mtp", "benchmarks"}
    names = [
        *(MODULES.keys() - {ADAPTER, SHIPPED}),
        *map(name_of, (ROOT / "benchmarks").glob("*.py")),
    ]
    script = f"MISSING = {missing}\nMODULES = {names}\n{WITHOUT}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    needs = "the harness needs, in a checkout: pip install '.[lm-eval]'"
    assert done.stdout == f"all imported\n{needs}\n", done.stderr


# The picture in README.


def floors():
    """Modules from the top floor down, as README has them. A folder stands for all in it."""
    picture = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    for floor in picture[1].split("    |\n"):
        words = [word for line in floor.splitlines() for word in line[:60].split()]
        yield {
            module
            for word in words
            for module in INNER
            if module == f"mtp.{word}" or word[-1] == "/" and module.startswith(f"mtp.{word[:-1]}.")
        }


def test_the_house_in_readme_is_the_one_that_stands():
    """Who imports nothing of ours stands on the ground, wherever its file lies."""
    top_down = list(floors())
    assert sorted(module for floor in top_down for module in floor) == sorted(INNER)
    ground = {module for module in INNER if not ours(INNER[module]) & INNER.keys()}
    below = set(ground)
    for floor in reversed(top_down):
        below |= floor
        for module in floor:
            assert ours(INNER[module]) & INNER.keys() <= below, module
