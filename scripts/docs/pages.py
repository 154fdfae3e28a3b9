"""The documentation's pages: Markdown and notebooks, from index.md on wherever links lead.

A line `<!-- results: HEADING -->` stands for the part of the results book whose heading begins so:
what was measured is told by records, and nowhere typed.
"""

from __future__ import annotations

import json
import re
from os.path import relpath
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "scripts" / "docs"
BOOK = ROOT / "benchmarks" / "results" / "README.md"
PAGES = (".md", ".ipynb")
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")  # of Markdown, to a file


def read(source: Path) -> str:
    """A page as Markdown; of a notebook its cells."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".ipynb":
        return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    return re.sub(r"<!-- results: (.+) -->", lambda found: _measured(found[1], source), text)


def crawl() -> tuple[dict[Path, str], set[Path]]:
    """Every page, in the order in which links lead there, and the other files that pages show or
    link to. ValueError names a link to nothing.
    """
    pages: dict[Path, str] = {}
    files: set[Path] = set()
    waiting = [HOME / "index.md"]
    for source in waiting:
        pages[source] = read(source)
        for link in LINK.findall(pages[source]):
            target = (source.parent / link).resolve()
            if not target.is_file() or not target.is_relative_to(ROOT):
                raise ValueError(f"{source.relative_to(ROOT)}: links to {link}, which is no file")
            if target.suffix not in PAGES:
                files.add(target)
            elif target not in waiting:
                waiting.append(target)
    return pages, files


def place(source: Path) -> Path:
    """Where in the site a file of the checkout lies."""
    path = source.relative_to(HOME if source.is_relative_to(HOME) else ROOT)
    return path.with_suffix(".html") if path.suffix in PAGES else path


def title(text: str) -> str:
    return text.partition("\n")[0].removeprefix("# ")


def _cell(cell: dict) -> str:
    text = "".join(cell["source"])
    return f"```python\n{text}\n```" if cell["cell_type"] == "code" else text


def _measured(heading: str, source: Path) -> str:
    parts = re.split(r"^## ", BOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [part.partition("\n")[2] for part in parts if part.startswith(heading)]
    if len(found) != 1:
        raise ValueError(f"{source.relative_to(ROOT)}: the book has no one part {heading!r}")
    there = relpath(BOOK.parent, source.parent)
    return LINK.sub(lambda link: f"{there}/{link[1]}", found[0].strip())
