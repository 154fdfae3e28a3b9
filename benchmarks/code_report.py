"""What the samples of a comparison say: figures, and the tables that people read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

from benchmarks.code_samples import TOO_LONG, Cell
from benchmarks.page import markdown_table
from mtp.evaluate.samples import Sample, tally
from mtp.evaluate.scores import Rates, best_temperature, compare, pass_rates, pass_table


def figures(cells: Sequence[Cell], ks: Sequence[int]) -> dict[str, Any]:
    """cells: in order, each beside the first at its temperature. best: chosen afterwards, apart."""
    first: dict[float, Cell] = {}
    shared = coded_by_all(cells)
    return {
        "cells": [
            figures_of(cell, ks, shared)
            | against(first.setdefault(cell.temperature, cell), cell, ks)
            for cell in cells
        ],
        "best": best(cells, ks),
        "exact": [exactness(a, b) for a, b in pairs(cells)],
    }


def figures_of(cell: Cell, ks: Sequence[int], shared: set[str]) -> dict[str, Any]:
    samples, counts = cell.samples, tally(cell.samples)
    drawn = [s for s in samples if s.verdict != TOO_LONG]
    tokens, steps, accepted = (
        sum(s.details[key] for s in drawn) for key in ("tokens", "steps", "accepted")
    )
    return {
        **{"model": cell.name, "where": cell.model.where, "drafter": cell.drafter},
        **{"label": cell.label, "temperature": cell.temperature, "n": cell.n},
        "problems": len(counts),
        "pass": pass_table(counts, ks),
        "parts": parts(pass_rates(counts, 1)),
        "verdicts": dict(Counter(s.verdict for s in samples)),
        TOO_LONG: list(dict.fromkeys(s.task_id for s in samples if s.verdict == TOO_LONG)),
        "ran_into_limit": sum(not s.details["ended"] for s in drawn),
        "bits_per_byte": bits_per_byte(samples, shared),
        "references_scored": len(shared),
        "tokens": tokens,
        "acceptance_length": 1 + accepted / steps if steps else None,
        "tokens_per_forward": tokens / (steps + len(drawn)) if drawn else None,
    }


def parts(rates: Rates) -> dict[str, float]:
    """Mean pass@1 of parts that tasks' names tell apart, as micro-programs' levels; {} for one."""
    found = defaultdict(list)
    for task, rate in rates.items():
        found[task.rpartition("/")[0]].append(rate)
    return {part: sum(x) / len(x) for part, x in found.items()} if len(found) > 1 else {}


def coded(samples: Iterable[Sample]) -> dict[str, Mapping[str, Any]]:
    return {s.task_id: s.details for s in samples if "reference_bits" in s.details}


def coded_by_all(cells: Iterable[Cell]) -> set[str]:
    """Tasks whose references fit every model after their prompts."""
    return reduce(set.intersection, ({*coded(cell.samples)} for cell in cells))


def bits_per_byte(samples: Iterable[Sample], tasks: set[str]) -> float | None:
    details = [d for task, d in coded(samples).items() if task in tasks]
    bits, size = (sum(d[key] for d in details) for key in ("reference_bits", "reference_bytes"))
    return bits / size if size else None


def against(first: Cell, cell: Cell, ks: Sequence[int]) -> dict[str, Any]:
    """The cell less the first one at its temperature, over the same problems, for each k."""
    if cell is first:
        return {}
    a, b = tally(first.samples), tally(cell.samples)
    found = {k: compare(pass_rates(a, k), pass_rates(b, k)) for k in ks if k <= cell.n}
    lines = [{"k": k, **c._asdict(), **c.difference._asdict()} for k, c in found.items()]
    for line in lines:
        line.pop("difference")
    return {"against": first.label, "less_first": lines}


def best(cells: Sequence[Cell], ks: Sequence[int]) -> list[dict[str, Any]]:
    """By model and k, where there is a choice of temperatures."""
    lines = []
    for label in dict.fromkeys(cell.label for cell in cells):
        for k in ks:
            able = [cell for cell in cells if cell.label == label and cell.n >= k]
            if len(able) > 1:
                rates = {cell.temperature: pass_rates(tally(cell.samples), k) for cell in able}
                t, found = best_temperature(rates)
                lines.append({"label": label, "k": k, "temperature": t, **found._asdict()})
    return lines


def pairs(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Cells that differ in the drafter alone, the plain one first."""
    plain = {(c.name, c.temperature): c for c in cells if c.drafter == "none"}
    drafted = [c for c in cells if c.drafter != "none"]
    return [(plain[key], c) for c in drafted if (key := (c.name, c.temperature)) in plain]


def exactness(plain: Cell, drafted: Cell) -> dict[str, Any]:
    """Samples of the same ids; in single precision near-ties may part a few, and are named."""
    both = list(zip(plain.samples, drafted.samples, strict=True))
    apart = [a for a, b in both if a.details.get("ids") != b.details.get("ids")]
    return {
        **{"model": plain.name, "drafter": drafted.drafter, "temperature": plain.temperature},
        **{"samples": len(both), "same": len(both) - len(apart), "identical": not apart},
        "apart": [f"{sample.task_id} {sample.number}" for sample in apart],
    }


# Tables.


def markdown(found: Mapping[str, Any]) -> str:
    says, sandbox = found["benchmark"], found["sandbox"]
    sections = [
        f"{says}.\n\nPrograms ran in {sandbox}.\n\nIn brackets: 90 % bootstrap over problems.",
        table("Fixed temperatures", map(row, found["cells"])),
        table("Beside the first model, problem by problem", beside(found["cells"])),
        table(
            "Each model's best temperature, chosen on these problems", map(chosen, found["best"])
        ),
        table("pass@1 by part", by_part(found["cells"])),
        table("Drafted and plain samples", map(same, found["exact"])),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def table(title: str, rows: Iterable[Mapping[str, str]]) -> str:
    lines = list(rows)
    if not lines:
        return ""
    return f"**{title}**\n\n{markdown_table(lines)}"


def percent(x: Mapping[str, Any], form: str = ".1f") -> str:
    mean, low, high = (f"{100 * x[key]:{form}}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def row(cell: Mapping[str, Any]) -> dict[str, str]:
    def shown(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    few = f"n = {cell['n']} is too few"
    passed = {f"pass@{x['k']}, %": few if "missing" in x else percent(x) for x in cell["pass"]}
    return {
        "model": cell["label"],
        "temperature": f"{cell['temperature']:g}",
        "n": str(cell["n"]),
        **passed,
        "bits per byte": shown(cell["bits_per_byte"]),
        "acceptance length": shown(cell["acceptance_length"]),
        "tokens per forward": shown(cell["tokens_per_forward"]),
        "prompts too long": str(len(cell[TOO_LONG])),
        "ran into the limit": str(cell["ran_into_limit"]),
    }


def beside(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "model": f"{cell['label']} less {cell['against']}",
            "temperature": f"{cell['temperature']:g}",
            "k": str(x["k"]),
            "points": percent(x, "+.1f"),
            "problems better, worse": f"{x['better']}, {x['worse']}",
            "McNemar's p": "-" if x["p"] is None else f"{x['p']:.3g}",
        }
        for cell in cells
        for x in cell.get("less_first", ())
    ]


def chosen(line: Mapping[str, Any]) -> dict[str, str]:
    score = {"temperature": f"{line['temperature']:g}", "%": percent(line)}
    return {"model": line["label"], "k": str(line["k"]), **score}


def by_part(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {"model": cell["label"], "temperature": f"{cell['temperature']:g}"}
        | {f"{part}, %": f"{100 * rate:.1f}" for part, rate in cell["parts"].items()}
        for cell in cells
        if cell["parts"]
    ]


def same(line: Mapping[str, Any]) -> dict[str, str]:
    return {
        "model": f"{line['model']}, {line['drafter']}",
        "temperature": f"{line['temperature']:g}",
        "identical": f"{line['same']} of {line['samples']}",
        "apart": ", ".join(line["apart"]) or "-",
    }
