"""Pictures of intervals: what a benchmark over seeds or batches says at one look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Lines = Mapping[str, Mapping[str, float]]  # by name: mean, low and high


def interval_panels(title: str, panels: Mapping[str, Lines], note: str, path: Path) -> None:
    """A panel for each measure, by its name, with a line per row; `note` says what lines are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    longest = max(len(lines) for lines in panels.values())
    size = (0.8 + 3.8 * len(panels), 1.5 + 0.34 * longest)
    figure, grid = plt.subplots(
        1, len(panels), figsize=size, dpi=110, squeeze=False, layout="constrained"
    )
    for axes, (measure, lines) in zip(grid[0], panels.items(), strict=True):
        for y, line in enumerate(lines.values()):
            axes.plot([line["low"], line["high"]], [y, y], color=f"C{y}", lw=2)
            axes.plot(line["mean"], y, "o", color=f"C{y}")
        axes.set_yticks(range(len(lines)), list(lines), fontsize=8)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_title(measure, fontsize=9, loc="left")
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=10, wrap=True)
    figure.supxlabel(note, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def choice_panels(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Of `benchmarks.choose_n`: a panel for each choice, with the score of every n, its interval,
    and a ring around the chosen one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        1, len(table), figsize=(0.6 + 2.9 * len(table), 3.2), dpi=110, squeeze=False
    )
    for axes, line in zip(grid[0], table, strict=True):
        ns = [x["n"] for x in line["grid"]]
        for x, at in enumerate(line["grid"]):
            axes.plot([x, x], [at["low"], at["high"]], color="C0", lw=2)
            axes.plot(x, at["mean"], "o", color="C0")
        x = ns.index(line["chosen"])
        axes.plot(x, line["grid"][x]["mean"], "o", ms=15, mfc="none", color="C3", label="chosen")
        axes.set_xticks(range(len(ns)), map(str, ns))
        axes.set_xlabel("n", fontsize=9)
        axes.set_title(f"{line['setting']}: {line['metric']}", fontsize=9, loc="left")
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle("Future tokens: scores of the whole grid, 95 % over seeds", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
