"""The record of `benchmarks.decoders` as a table and as a picture. Both read the record alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.page import markdown_table

# By how exact a decoder is; told apart by colour-blind readers too.
COLOURS = {
    "same text": "#0b6bbf",
    "same law": "#3aa6a0",
    "lossy": "#d9822b",
    "same text as its own plain": "#8d4fa8",
}
MIB = 2**20
ROUNDING = (
    "\nIn half precision a pass over several tokens rounds otherwise than a pass over one, which "
    "parts texts where two tokens nearly tie.\n"
)


def decoders_markdown(record: Mapping[str, Any]) -> str:
    """A line for each decoder, in the order in which they stand in the record."""
    values, config = record["values"], record["config"]
    lines = [_line(name, f, config["batch"]) for name, f in values["rows"].items()]
    missing = "".join(f"\n- {name}: {why}" for name, why in values["left_out"].items())
    return (
        f"# Every decoder on {Path(config['model']).name}\n\n"
        f"{markdown_table(lines)}\n\nSpeed is over plain decoding: at batch 1 with intervals that "
        f"hold together at {values['level']:.0%}, at batch {config['batch']} with quartiles. Pairs "
        f"are of batch 1 and {config['batch']}; identical: what plain decoding wrote, too; "
        "on text is teacher-forced. A lower perplexity of a lossy row is no better text.\n"
        + ROUNDING * (config["precision"] != "float32")
        + _written(values["written"])
        + f"\nNot measured:\n{missing}\n" * bool(missing)
        + f"\n{record['date']}, {record['hardware']}, `{record['command']}`\n"
    )


def _written(texts: Mapping[str, Mapping[str, str]]) -> str:
    lines = (f"\n- after `{x['prompt']!r}`: `{x['text']!r}`" for x in texts.values())
    return f"\nPlain decoding wrote:\n{''.join(lines)}\n" * bool(texts)


def _line(name: str, f: Mapping[str, Any], batch: int) -> dict[str, str]:
    one, many = f["speedup"], f["batched"]
    low, high = many["speedup_iqr"]
    on_text = f["acceptance_length_text"]
    cost, unit = f["operations_per_token"] / 1e6, "MFLOP"
    if "joules_per_token" in f:
        cost, unit = f["joules_per_token"], "J"
    quality = f"perplexity {f['perplexity']:.3f}"
    if "score" in f:
        quality = f"score {f['score']['mean']:.3f}"
    return {
        "decoder": name,
        "exactness": f["kind"],
        "identical, %": f"{100 * f['identical']:.0f} / {100 * many['identical']:.0f}",
        "acceptance length": f"{f['acceptance_length']:.2f}",
        "on text": "-" if on_text is None else f"{on_text:.2f}",
        "speed, batch 1": f"{one['mean']:.2f} ({one['low']:.2f} to {one['high']:.2f})",
        f"speed, batch {batch}": f"{many['speedup']:.2f} ({low:.2f} to {high:.2f})",
        "p50, s": f"{f['seconds_p50']:.3f}",
        "p95, s": f"{f['seconds_p95']:.3f}",
        "quality": quality,
        "memory, MiB": f"{f['memory_bytes'] / MIB:.1f} / {many['memory_bytes'] / MIB:.1f}",
        "per token": f"{cost:.3g} {unit}",
    }


def decoder_bars(record: Mapping[str, Any], path: Path) -> None:
    """How many times as fast as plain decoding each is at batch 1, with its interval, coloured by
    how exact it is.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = record["values"]["rows"]
    names = list(rows)[::-1]  # the first on top
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.3 * len(rows)), dpi=120, layout="constrained")
    for y, name in enumerate(names):
        speed = rows[name]["speedup"]
        axes.barh(y, speed["mean"], color=COLOURS[rows[name]["kind"]], height=0.7)
        axes.plot([speed["low"], speed["high"]], [y, y], color="0.15", lw=1.4)
        axes.text(0.02, y, f"{speed['mean']:.2f}", va="center", color="white", fontsize=9)
    axes.axvline(1, color="0.4", lw=1, ls="--")
    axes.set_yticks(range(len(names)), names, fontsize=10)
    axes.set(xlim=(0, None), ylim=(-0.7, len(names) - 0.3))
    axes.set_xlabel("tokens per second over plain decoding, batch 1", fontsize=10)
    kinds = dict.fromkeys(f["kind"] for f in rows.values())
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in kinds]
    figure.legend(handles, list(kinds), loc="outside upper center", ncols=len(kinds), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
