"""README, CONTRIBUTING and the documentation are front doors: what they show runs."""

import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mtp.heads import HEADS
from mtp.tasks.table import TASKS
from scripts.docs.pages import HOME, ROOT, crawl, read

TINY = "model.dim=16 model.n_layers=4 data.seq_len=32 train.batch_size=1 train.eval_batches=1"
TUTORIALS = sorted(HOME.glob("tutorials/*"))
NEEDED = {"hf_trainer": ("transformers", "accelerate"), "attach_heads": ("transformers",)}
SYSTEMS = ("multi_token_prediction", "consistency_models", "joint_decoding")


def fenced(text: str) -> list[tuple[str, str]]:
    """Language and content of each block."""
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def blocks(page: str, language: str) -> str:
    return "\n".join(code for word, code in fenced(read(ROOT / page)) if word == language)


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


def test_the_list_of_files_names_every_module() -> None:
    tree = blocks("CONTRIBUTING.md", "text")
    modules = [p.name for p in (ROOT / "mtp").rglob("*.py") if p.name != "__init__.py"]
    assert [name for name in modules if name not in tree] == []


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_from_top_to_bottom(page, command, tmp_path, monkeypatch) -> None:
    """Its commands, too: nothing but what it says itself is there when it begins."""
    for package in NEEDED.get(page.stem, ()):
        pytest.importorskip(package)
    pytest.importorskip("hydra")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for language, code in fenced(read(page)):
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
            continue
        assert language == "sh"
        for line in code.splitlines():
            python, script, *words = shlex.split(line)
            assert python == "python" and Path(script).parent == Path("scripts")
            command(Path(script).stem, *words)


def real_commands(page: Path) -> list[list[str]]:
    """Words of the commands that stand indented: those of a real run."""
    text = read(page).replace("\\\n", " ")
    lines = re.findall(r"^ {4}(python scripts/\w+\.py .*)$", text, re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_commands_of_real_size_are_understood(page: Path, tmp_path, monkeypatch) -> None:
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf
    from test_configs import CONFIGS, REPORT_SCHEMAS, SCHEMAS

    from scripts.cli import REPORTS, register

    monkeypatch.chdir(tmp_path)  # where no run is in the way
    for script, *words in real_commands(page):
        name = Path(script).stem
        assert (ROOT / script).is_file()
        schemas, folder = (SCHEMAS, CONFIGS) if name in SCHEMAS else (REPORT_SCHEMAS, REPORTS)
        register(name, schemas[name])
        with hydra.initialize_config_dir(str(folder), version_base=None):
            OmegaConf.to_object(hydra.compose(name, overrides=words))


def test_every_page_is_found_from_the_first() -> None:
    pages, _ = crawl()
    written = {p for p in HOME.rglob("*") if p.suffix in (".md", ".ipynb")}
    assert written <= set(pages)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_measured_by_records_alone(name: str) -> None:
    text = (HOME / f"{name}.md").read_text()
    assert "<!-- results: " in text and " | " in read(HOME / f"{name}.md")
    assert re.findall(r"\b\d+\.\d{1,2}\b", text) == []  # none that somebody typed


class Parts(HTMLParser):
    """What a page loads, where its links lead, and the places in it that links may name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, pairs) -> None:
        words = dict(pairs)
        self.places |= {words[key] for key in ("id", "name") if words.get(key)}
        if tag == "a" and "href" in words:
            self.links.append(words["href"])
        elif tag != "a":
            self.loads += [words[key] for key in ("src", "href") if words.get(key)]


def test_the_site_is_built_without_warnings_and_stands_alone(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    pytest.importorskip("lm_eval")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "scripts.docs.build", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = [p for p in site.rglob("*.html") if not (ROOT / p.relative_to(site)).is_file()]
    found = {p: Parts(p.read_text()) for p in made}  # and not what was copied
    assert site / "index.html" in found and site / "api/mtp/loss.html" in found
    for page, parts in found.items():
        for load in parts.loads:
            assert load.startswith("data:") or (page.parent / load).is_file(), (page, load)
        for link in parts.links:
            path, _, spot = link.partition("#")
            if re.match("https?:", link):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), (page, link)
            ours = site / "api" not in page.parents  # the tool may name what is torch's
            if spot and ours and target in found:
                assert spot in found[target].places, (page, link)
