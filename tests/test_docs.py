"""README and CONTRIBUTING are front doors: what they show runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mtp.heads import HEADS
from mtp.tasks.table import TASKS

ROOT = Path(__file__).resolve().parent.parent
TINY = "model.dim=16 model.n_layers=4 data.seq_len=32 train.batch_size=1 train.eval_batches=1"


def blocks(page: str, language: str) -> str:
    text = (ROOT / page).read_text()
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_python_on_the_page_runs(page: str) -> None:
    tables = [(table, dict(table)) for table in (HEADS, TASKS)]
    try:
        exec(compile(blocks(page, "python"), page, "exec"), {"__name__": "page"})
    finally:  # an example may register a head kind or a task
        for table, before in tables:
            table.clear()
            table.update(before)


def test_commands_of_the_readme_run_in_their_order(tmp_path: Path) -> None:
    for name in ("scripts", "configs", "mtp"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for line in blocks("README.md", "sh").splitlines():
        training = "scripts/train.py" in line and "dry_run" not in line
        words = shlex.split(line, comments=True)
        words += f"sample_every=0 {TINY}".split() if training else []
        assert words[0] == "python"
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True
        )
        assert done.returncode == 0, (line, done.stderr.decode())


def test_readme_names_every_module() -> None:
    tree = blocks("README.md", "text")
    modules = [p.name for p in (ROOT / "mtp").rglob("*.py") if p.name != "__init__.py"]
    assert [name for name in modules if name not in tree] == []
