"""What the pages and tables that people read share: one file without anything from elsewhere, as
readable on a phone as on a screen.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
       color: #1d2330; background: #f6f7f9 }
"""


def page(title: str, body: str, style: str = "") -> str:
    """An HTML document. body: HTML below the heading; style: what it wants besides STYLE."""
    shown = html.escape(title)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{shown}</title>
<style>{STYLE}{style}</style>
<h1>{shown}</h1>
{body}</html>
"""


def markdown_table(rows: Iterable[Mapping[str, str]]) -> str:
    """The keys of the first row are its head.

    >>> print(markdown_table([{"a": "1", "b": "2"}]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = list(rows)
    heads = list(lines[0])
    body = [heads, ["---"] * len(heads), *([line[head] for head in heads] for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in body)
