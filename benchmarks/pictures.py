"""What people would rather look at: the loss curve of a run, and a page that shows who guessed
what.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

from benchmarks.page import page
from mtp.decode.contract import Completion

# Head 1 (the target's own token) is plain; deeper guesses are warmer. Told apart by colour-blind
# readers too: lightness falls with depth.
COLOURS = ("#ffffff", "#d7ecff", "#9fd3ff", "#ffd27a", "#ff9d5c", "#e06c4c", "#c04a6b", "#8d4fa8")
HEADS_STYLE = """
pre { font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: break-spaces;
      overflow-wrap: anywhere; background: #fff; border: 1px solid #dfe3ea; border-radius: 6px;
      padding: .8rem }
.prompt { color: #8a93a3 } small { color: #5c6675 }
i { font-style: normal; border-radius: 2px }
"""


def drawn(draw: Callable[..., object], *what: Any) -> None:
    """A picture of what a record says: where matplotlib is missing, a benchmark ends without."""
    try:
        draw(*what)
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)


def loss_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss per head against tokens seen, and held-out loss where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=130, layout="constrained")
    heads = [key for key in rows[-1] if key.startswith("loss_")]
    for i, key in enumerate(heads):
        colour = f"C{i}"
        tokens = [row["tokens"] / 1e6 for row in rows if key in row]
        axes.plot(tokens, [row[key] for row in rows if key in row], color=colour, lw=1.4)
        held_out = [(row["tokens"] / 1e6, row[f"val_{key}"]) for row in rows if f"val_{key}" in row]
        axes.plot(*zip(*held_out, strict=True), "o", color=colour, label=f"head {i + 1}")
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title("Loss per head: training (line), held out (dot)", fontsize=11)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def memory_panels(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel per type and shape: GiB counted for each n, a line per way, recomputed heads dashed;
    models with a whole trunk stand apart on the right.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def distinct(*keys: str) -> list[Any]:
        return list(dict.fromkeys(tuple(c[key] for key in keys) for c in cases))

    dtypes, shapes, columns = distinct("dtype"), distinct("shape"), distinct("n", "whole_trunk")
    size = (2.9 * len(shapes) + 0.4, 2.6 * len(dtypes) + 0.9)
    figure, grid = plt.subplots(
        len(dtypes), len(shapes), figsize=size, dpi=110, squeeze=False, layout="constrained"
    )
    colours = {"reference": "0.45", "trunk": "C0", "latents": "C1"}
    for axes, ((dtype,), (shape,)) in zip(grid.flat, product(dtypes, shapes), strict=True):
        for (way,) in distinct("way"):
            base, recomputed, _ = way.partition("+")
            line = "o--" if recomputed else "o-"
            for whole in (False, True):
                chosen = (shape, dtype, way, whole)
                row = [
                    c
                    for c in cases
                    if (c["shape"], c["dtype"], c["way"], c["whole_trunk"]) == chosen
                ]
                axes.plot(
                    [columns.index((c["n"], whole)) for c in row],
                    [c["counted"] / 2**30 for c in row],
                    line,
                    color=colours[base],
                    label=None if whole else way,
                    ms=4,
                    mfc="white" if recomputed else None,
                )
        labels = [f"{n}\nwhole" if whole else str(n) for n, whole in columns]
        axes.set_xticks(range(len(columns)), labels)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{shape}, {dtype}", fontsize=10)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.supxlabel("future tokens n, at equal parameters or beside a whole trunk", fontsize=10)
    figure.supylabel("GiB above parameters and gradients", fontsize=10)
    lines = grid.flat[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def decode_panels(found: Mapping[str, Mapping[str, dict[str, Any]]], path: Path) -> None:
    """A panel per setting: tokens per second of every contender, ours in blue, and its speedup
    over the first one with quartiles.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (7.5, 0.6 + sum(0.6 + 0.26 * len(of_all) for of_all in found.values()))
    ratios = {"height_ratios": [2 + len(of_all) for of_all in found.values()]}
    figure, grid = plt.subplots(
        len(found), figsize=size, dpi=110, squeeze=False, gridspec_kw=ratios, layout="constrained"
    )
    for axes, (setting, of_all) in zip(grid.flat, found.items(), strict=True):
        plain = next(iter(of_all.values()))["tokens_per_second"]
        for name, f in of_all.items():
            speed, (low, high) = f["tokens_per_second"], f["speedup_iqr"]
            axes.barh(name, speed, color="C0" if f["ours"] else "0.6", height=0.7)
            axes.plot([low * plain, high * plain], [name, name], color="0.2", lw=1.2)
            axes.text(0, name, f" {f['speedup']:.2f}", va="center", color="white", fontsize=8)
        axes.invert_yaxis()
        axes.set_title(setting, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.supxlabel("tokens per second; in the bars the speedup, lines its quartiles", fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def pass_panels(title: str, cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """pass@k of every model with its interval: a row of panels per k, a column per temperature."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ks = [line["k"] for line in cells[0]["pass"]]
    temperatures = list(dict.fromkeys(cell["temperature"] for cell in cells))
    labels = list(dict.fromkeys(cell["label"] for cell in cells))
    size = (3.2 * len(temperatures) + 1.8, len(ks) * (0.7 + 0.3 * len(labels)) + 0.9)
    figure, grid = plt.subplots(
        len(ks),
        len(temperatures),
        figsize=size,
        dpi=110,
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for (row, k), (column, temperature) in product(enumerate(ks), enumerate(temperatures)):
        axes = grid[row, column]
        for cell in (cell for cell in cells if cell["temperature"] == temperature):
            line, y = cell["pass"][row], labels.index(cell["label"])
            if "missing" in line:
                axes.text(0, y, " too few samples", va="center", color="0.5", fontsize=8)
                continue
            low, mean, high = (100 * line[key] for key in ("low", "mean", "high"))
            axes.plot([low, high], [y, y], color=f"C{y}", lw=2)
            axes.plot(mean, y, "o", color=f"C{y}")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_title(f"pass@{k}, temperature {temperature:g}", fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    highest = max(line.get("high", 0.0) for cell in cells for line in cell["pass"])
    grid[0, 0].set_xlim(0, max(1.0, 104 * highest))  # of all panels: they share it
    figure.suptitle(title, fontsize=8, wrap=True)
    figure.supxlabel("per cent of problems; lines are 90 % intervals", fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def heads_page(
    title: str,
    sentence: str,
    completions: Iterable[tuple[str, Completion]],
    show: Callable[[int], str],
    path: Path,
) -> None:
    """An HTML page: every generated token on the colour of the head that guessed it. `show`: token
    id -> text.
    """
    done = list(completions)
    deepest = max((head for _, c in done for head in c.heads), default=1)
    legend = " ".join(
        _mark(h, f" head {h} " if h > 1 else " head 1 ") for h in range(1, deepest + 1)
    )
    blocks = "".join(_block(prompt, completion, show) for prompt, completion in done)
    body = f"""<p>{html.escape(sentence)}</p>
<p>Each new token stands on the colour of the head that guessed it; on white is what the next-token
head added itself, one token per step. {legend}</p>
{blocks}"""
    path.write_text(page(title, body, HEADS_STYLE), encoding="utf-8")


def _block(prompt: str, completion: Completion, show: Callable[[int], str]) -> str:
    pairs = zip(completion.heads, completion.tokens, strict=True)
    marked = "".join(
        _mark(head, "".join(show(token) for _, token in group))
        for head, group in groupby(pairs, key=lambda pair: pair[0])
    )
    length = completion.mean_acceptance_length
    caption = f"{len(completion.tokens)} tokens in {completion.steps} steps, {length:.2f} per step"
    shown = f'<span class="prompt">{html.escape(prompt)}</span>{marked}'
    return f"<small>{caption}</small><pre>{shown}</pre>\n"


def _mark(head: int, text: str) -> str:
    colour = COLOURS[min(head, len(COLOURS)) - 1]
    ink = "#fff" if head > 5 else "inherit"
    return f'<i style="background:{colour};color:{ink}" title="head {head}">{html.escape(text)}</i>'


def consistency_panels(found: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Left the speedup of every way to decode with quartiles, a colour for each model; right the
    window's sweep, for the models that have one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(11, 5), dpi=110, layout="constrained")
    for colour, (who, of_all) in zip(("0.6", "C1", "C0"), found.items(), strict=True):
        for way, f in of_all.items():
            bars.barh(f"{who}, {way}", f["speedup"], color=colour, height=0.7)
            bars.plot(f["speedup_iqr"], [f"{who}, {way}"] * 2, color="0.2", lw=1.2)
        sweep = {way.split()[1]: f for way, f in of_all.items() if way.split()[-1].isdecimal()}
        if len(sweep) > 1:
            for key, line in (("tokens_per_forward", "o-"), ("speedup", "s--")):
                label, heights = f"{who}, {key}".replace("_", " "), [f[key] for f in sweep.values()]
                curves.plot(list(sweep), heights, line, color=colour, label=label)
    bars.invert_yaxis()
    bars.axvline(1, color="0.4", lw=0.8)
    bars.set_xlabel("speedup over the same model's plain decoding, with quartiles", fontsize=9)
    bars.tick_params(labelsize=8)
    curves.set_xlabel("Jacobi window", fontsize=9)
    curves.set_ylim(bottom=0)
    curves.grid(alpha=0.25)
    curves.legend(frameon=False, fontsize=8)
    for axes in (bars, curves):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def study_panels(
    question: str, measure: str, lines: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """A panel for every place of a study's table: the measure over steps, a colour for each arm, a
    thin line for each seed and a thick one for their mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [
        ", ".join(f"{k.split('.')[-1]} {v}" for k, v in line["place"].items()) for line in lines
    ]
    places = list(dict.fromkeys(names))
    figure, grid = plt.subplots(
        1,
        len(places),
        figsize=(0.6 + 3.6 * len(places), 3.8),
        dpi=110,
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    arms = list(dict.fromkeys(str(line["arm"]) for line in lines))
    for name, line in zip(names, lines, strict=True):
        axes, colour = grid[0, places.index(name)], f"C{arms.index(str(line['arm']))}"
        steps = [step for step, _ in line["curves"][0]]
        marker = "." if len(steps) == 1 else None  # a line of one point is none
        heights = [[value for _, value in run] for run in line["curves"]]
        for run in line["curves"]:
            axes.plot(*zip(*run, strict=True), color=colour, lw=0.6, alpha=0.6, marker=marker)
        if len({len(h) for h in heights}) == 1:  # not where the clock ended the runs
            mean = [sum(h) / len(h) for h in zip(*heights, strict=True)]
            axes.plot(steps, mean, color=colour, lw=2, marker=marker)
        axes.plot([], [], color=colour, lw=2, label=str(line["arm"]))
        axes.set_title(name, fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.supxlabel("steps", fontsize=9)
    grid[0, 0].set_ylabel(measure.replace("_", " "), fontsize=9)
    figure.suptitle(question, fontsize=9, wrap=True)
    figure.savefig(path)
    plt.close(figure)
