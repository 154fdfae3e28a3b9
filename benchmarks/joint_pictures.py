"""The pictures of joint decoding and of drafts: what speed costs in quality, and what size buys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.joint_measures import curve


def joint_panels(
    found: Mapping[str, Mapping[str, Any]], measures: Sequence[str], path: Path
) -> None:
    """A panel per measure (perplexity, score): tokens per second of every way against it. Exact
    ways small, with a line for plain decoding, one for the fastest of all at each temperature, and
    dashed the curve: what exact ways reach at no worse quality.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (6.4 * len(measures) + 0.4, 5.2)
    figure, grid = plt.subplots(
        1, len(measures), figsize=size, dpi=110, squeeze=False, layout="constrained"
    )
    for axes, measure in zip(grid.flat, measures, strict=True):
        _exact_points(axes, found, measure)
        for kind, style in JOINT_STYLES.items():
            named = {name.removeprefix(f"{kind}, width "): f for name, f in found.items()}
            some = {name: f for name, f in named.items() if name not in found}
            _points(axes, some, measure, style, kind)
        if measure == "score":
            axes.invert_xaxis()
        axes.set_xlabel(f"{measure} (better to the left)", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    grid[0, 0].set_ylabel("tokens per second", fontsize=9)
    grid[0, 0].legend(frameon=False, fontsize=8, title="joint: width, threshold", title_fontsize=7)
    figure.savefig(path)
    plt.close(figure)


JOINT_STYLES = {"MTAD": "C1o", "MMTAD": "C3s", "MTAD of heads": "C2^", "beam search": "C4*"}


def _exact_points(axes: Any, found: Mapping[str, Mapping[str, Any]], measure: str) -> None:
    exact = [f for f in found.values() if f["family"] == "exact"]
    plain = [f for name, f in found.items() if name.startswith("plain")]
    fastest: dict[str, Mapping[str, Any]] = {}
    for f in sorted(exact, key=lambda f: (f["temperature"], f["tokens_per_second"])):
        fastest[f"T {f['temperature']:g}"] = f
    axes.plot(*_places(exact, measure), "C0.", alpha=0.4)
    axes.plot(*_places(plain, measure), "-o", color="0.5", ms=4, label="plain")
    _points(axes, fastest, measure, "C0o-", "exact, the fastest")
    _curve(axes, found, exact, measure)


LOSSES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # in which mixtures of ways are linear
    "perplexity": np.log,
    "score": lambda score: 1 - score,
}


def _curve(
    axes: Any,
    found: Mapping[str, Mapping[str, Any]],
    exact: Sequence[Mapping[str, Any]],
    measure: str,
) -> None:
    loss, (values, speeds) = LOSSES[measure], _places(exact, measure)
    corners = curve(loss(np.array(values)).tolist(), [1 / speed for speed in speeds])
    of_all, _ = _places(found.values(), measure)
    xs = np.linspace(min(of_all), max(of_all), 200)
    xs = xs[loss(xs) >= corners[0][0]]
    axes.plot(xs, 1 / np.interp(loss(xs), *corners), "--", color="C0", lw=1, label="exact curve")


def _points(
    axes: Any, some: Mapping[str, Mapping[str, Any]], measure: str, style: str, label: str
) -> None:
    """By what is written beside them; nothing if there are none."""
    if some:
        (line,) = axes.plot(*_places(some.values(), measure), style, ms=5, label=label)
        written = {"fontsize": 6, "color": line.get_color(), "textcoords": "offset points"}
        for name, f in some.items():
            axes.annotate(name, (f[measure], f["tokens_per_second"]), (4, 3), **written)


def _places(
    some: Iterable[Mapping[str, Any]], measure: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    xs, ys = zip(*((f[measure], f["tokens_per_second"]) for f in some), strict=True)
    return xs, ys


def draft_panels(domains: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Against the cost of a draft's token, on every domain: the share of its guesses that is kept,
    and how many times as fast as plain decoding it is, exact and joint.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2), dpi=110, layout="constrained")
    for i, (name, found) in enumerate(domains.items()):
        drafts = sorted(found["drafts"].items(), key=lambda item: item[1]["cost"])
        costs = [f["cost"] for _, f in drafts]
        left.plot(costs, [f["acceptance"] for _, f in drafts], f"C{i}o-", label=name)
        for draft, f in drafts:
            at = (f["cost"], f["acceptance"])
            left.annotate(
                Path(draft).name, at, (4, 4), fontsize=7, color=f"C{i}", textcoords="offset points"
            )
        for kind, style in (("exact", "o-"), ("joint", "s--")):
            means, lows, highs = (
                np.array([f[kind]["speed"][key] for _, f in drafts])
                for key in ("mean", "low", "high")
            )
            errors = [means - lows, highs - means]
            line = {"color": f"C{i}", "capsize": 2, "label": f"{name}, {kind}"}
            right.errorbar(costs, means, errors, fmt=style, **line)
    right.axhline(1, color="0.6", lw=1)
    left.set_ylabel("acceptance (teacher-forced)")
    right.set_ylabel("times as fast as plain decoding")
    for axes in (left, right):
        axes.set_xlabel("seconds for a token of the draft, in those of the target")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
