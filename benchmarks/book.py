"""The results book: each claim with its published number, ours, and a verdict, from records alone.

    python -m benchmarks.book

It writes benchmarks/results/README.md. A verdict is of the claim's direction at the size measured
here, by a rule that stands beside it; published numbers are the papers' own, of models up to a
thousand times larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from benchmarks.claims import CLAIMS, Claim
from benchmarks.record import ROOT, read
from mtp.files import write_text

RESULTS = ROOT / "benchmarks" / "results"


def book(folder: Path) -> Iterator[str]:
    yield "# Results\n"
    yield "Made by `python -m benchmarks.book` from the records in this folder: do not edit.\n"
    for paper, claims in groupby(CLAIMS, key=lambda claim: claim.paper):
        yield f"\n## {paper}\n\n"
        yield "| claim | published | here | verdict | command | record |\n"
        yield "|---|---|---|---|---|---|\n"
        for claim in claims:
            yield row(claim, folder)
    yield "\n## Every decoder in one table\n\n"
    for file in sorted(folder.glob("decoders*.json")):
        if not file.stem.endswith("_quick"):
            yield decoders(file)


def decoders(file: Path) -> str:
    entry, name = read(file), file.stem
    model = Path(entry["config"]["model"]).name
    where = f"{entry['hardware']}, {entry['date']}, {entry['commit']}"
    return f"- {model}: [table]({name}.md), [picture]({name}.png), [record]({name}.json), {where}\n"


def row(claim: Claim, folder: Path) -> str:
    file = folder / f"{claim.record}.json"
    entry = read(file) if file.is_file() else None
    ours, kept = "", ""
    if entry is not None:
        ours = claim.ours(entry["values"])
        name = f"{claim.record}.json"
        kept = f"[{name}]({name}), {entry['hardware']}, {entry['date']}, {entry['commit']}"
    cells = (claim.text, claim.published, ours, claim.verdict(entry), f"`{claim.command}`", kept)
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    write_text(RESULTS / "README.md", "".join(book(RESULTS)))
    print(RESULTS / "README.md")
