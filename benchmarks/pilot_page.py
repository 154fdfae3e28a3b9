"""The record of a pilot (`benchmarks.pilot`) as a page and as a table. Every figure that they show
is one of the record; on the page each says which, in `data-from`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.decoder_ways import LOSSY, SAME_LAW, SAME_TEXT
from benchmarks.page import markdown_table, page

STYLE = """
body { max-width: 60rem } h2 { font-size: 1.15rem; margin: 0 } p { overflow-wrap: anywhere }
.ways { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
        gap: 1rem }
article { background: #fff; border: 1px solid #dfe3ea; border-radius: 6px; padding: .8rem 1rem }
.verdict { float: right; border-radius: 1rem; padding: 0 .7rem; font-size: .9rem }
.go { background: #d7ecff; color: #0b4a8f } .no { background: #fbdcd5; color: #a02413 }
.kind, small, dt { color: #5c6675; font-size: .9rem }
dl { margin: .6rem 0 0 } dl div { display: flex; justify-content: space-between; gap: .8rem }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums }
.ways + h2 { margin-top: 1.2rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #fff; padding: .5rem .8rem }
svg { width: 100%; height: 1.2rem; display: block; margin-top: .5rem }
"""
KINDS = {
    SAME_TEXT: "bit-identical text",
    SAME_LAW: "the same law, another text",
    LOSSY: "lossy",
}


class Figure(NamedTuple):
    """keys: below a decoder, of the number or, of an interval, its mean and two ends."""

    label: str
    keys: tuple[str, ...]
    form: Callable[[float], str]


def _interval(key: str) -> tuple[str, ...]:
    return tuple(f"{key}/{part}" for part in ("mean", "low", "high"))


FIGURES = (
    Figure("speed, times plain", _interval("speedup"), "{:.2f}".format),
    Figure("tokens per second", ("tokens_per_second",), "{:,.1f}".format),
    Figure("latency of a text, p50, s", ("seconds_p50",), "{:.3f}".format),
    Figure("latency of a text, p95, s", ("seconds_p95",), "{:.3f}".format),
    Figure("tokens per forward", ("tokens_per_target_forward",), "{:.2f}".format),
    Figure("guesses per step", ("guesses",), "{:.0f}".format),
    Figure("threshold", ("threshold",), "{:g}".format),
    Figure("perplexity", ("perplexity",), "{:.3f}".format),
    Figure("nats per token over plain", _interval("loss_rise"), "{:+.3f}".format),
    Figure("texts identical to plain, %", ("identical",), lambda x: f"{100 * x:.0f}"),
    Figure("score", ("score",), "{:.3f}".format),
    Figure("joules per token", ("joules_per_token",), "{:.3g}".format),
    Figure("GFLOP per token", ("operations_per_token",), lambda x: f"{x / 1e9:.3g}"),
    Figure("memory, MiB", ("memory_bytes",), lambda x: f"{x / 2**20:.1f}"),
)


def at(record: Mapping[str, Any], path: str) -> Any:
    """What stands in a record at keys joined by "/"; None where it has no such key."""
    found: Any = record
    for key in path.split("/"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def shown(record: Mapping[str, Any], path: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Label, and the paths and texts of the numbers, of each figure that a decoder has."""
    for figure in FIGURES:
        paths = [f"{path}/{key}" for key in figure.keys]
        if at(record, paths[0]) is not None:
            yield figure.label, [(where, figure.form(at(record, where))) for where in paths]


def _exactness(found: Mapping[str, Any]) -> str:
    """Passes of other widths round otherwise, and may part texts where two tokens nearly tie."""
    if found["kind"] == SAME_TEXT and found["identical"] < 1:
        return "bit-identical but for rounding"
    return KINDS[found["kind"]]


def _fastest_first(record: Mapping[str, Any]) -> list[str]:
    found = record["values"]["decoders"]
    return sorted(found, key=lambda name: -found[name]["speedup"]["mean"])


def _joined(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{texts[0]} ({texts[1]} to {texts[2]})"


# The page.


def pilot_page(record: Mapping[str, Any]) -> str:
    """record: as it lies in pilot.json."""
    widest = max(f["speedup"]["high"] for f in record["values"]["decoders"].values())
    cards = "".join(_card(record, name, widest) for name in _fastest_first(record))
    return page("Which decoder pays here?", f"{_top(record)}{cards}</div>\n{_end(record)}", STYLE)


def _said(record: Mapping[str, Any], path: str) -> str:
    text = html.escape(str(at(record, path)))
    return f'<span data-from="{html.escape(path)}">{text}</span>'


def _number(record: Mapping[str, Any], path: str, text: str) -> str:
    value = html.escape(str(at(record, path)))
    return f'<data value="{value}" data-from="{html.escape(path)}">{text}</data>'


def _plain(record: Mapping[str, Any], path: str) -> str:
    return _number(record, path, str(at(record, path)))


def _top(record: Mapping[str, Any]) -> str:
    v = "values"
    level = _number(record, f"{v}/level", f"{100 * at(record, f'{v}/level'):.0f}")
    return f"""<p><strong>{_said(record, f"{v}/answer")}</strong></p>
<p>{_said(record, f"{v}/model")} in {_said(record, f"{v}/precision")} on
{_plain(record, f"{v}/prompts/measured")} of the prompts in
{_said(record, f"{v}/prompts/file")}, one text at a time, temperature
{_plain(record, f"{v}/sampling/temperature")}, up to
{_plain(record, f"{v}/prompts/new_tokens")} new tokens. Other prompts chose the settings. All ways
took turns in one process; intervals are over prompts and hold together at {level}&nbsp;%. A way is
a go where it is surely faster than plain decoding and, if lossy, surely loses no more than
{_plain(record, f"{v}/budget")} nats per token.</p>
<div class="ways">
"""


def _card(record: Mapping[str, Any], name: str, widest: float) -> str:
    path, found = f"values/decoders/{name}", record["values"]["decoders"][name]
    rows = "".join(
        f"<div><dt>{label}</dt><dd>{_joined([_number(record, *x) for x in numbers])}</dd></div>"
        for label, numbers in shown(record, path)
    )
    badge = reason = ""
    if "go" in found:
        kind, word = ("go", "go") if found["go"] else ("no", "no go")
        badge = f'<span class="verdict {kind}">{word}</span>'
        reason = f"<p>{_said(record, f'{path}/reason')}</p>"
    return f"""<article>{badge}<h2>{html.escape(name)}</h2>
<span class="kind">{_exactness(found)}</span>{reason}{_bar(found["speedup"], widest)}
<dl>{rows}</dl></article>
"""


def _bar(speed: Mapping[str, float], widest: float) -> str:
    """The interval of the speed, its mean and, dashed, plain decoding's."""
    low, mean, high, one = (
        100 * x / widest for x in (speed["low"], speed["mean"], speed["high"], 1.0)
    )
    return f"""
<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="speed">
<rect x="0" y="4" width="{mean:.2f}" height="2" fill="#9fd3ff"/>
<rect x="{low:.2f}" y="1" width="{max(high - low, 0.3):.2f}" height="8" fill="#0b4a8f"
 opacity=".45"/><path d="M{one:.2f} 0V10" stroke="#a02413" stroke-width=".6"
 stroke-dasharray="2 1"/></svg>"""


def _end(record: Mapping[str, Any]) -> str:
    left = record["values"]["left_out"]
    lines = "".join(
        f"<li>{html.escape(name)}: {_said(record, f'values/left_out/{name}')}</li>" for name in left
    )
    texts = "".join(
        f"<pre><small>{_said(record, f'values/written/{i}/prompt')}</small>"
        f"{_said(record, f'values/written/{i}/text')}</pre>"
        for i in record["values"]["written"]
    )
    wrote = f"<h2>What plain decoding wrote</h2>{texts}" if texts else ""
    tried = f"<h2>Not measured</h2><ul>{lines}</ul>" if left else ""
    keys = ("date", "hardware", "torch", "commit", "command")
    facts = "<br>".join(f"{key}: {_said(record, key)}" for key in keys)
    return f"{wrote}{tried}<p><small>{facts}</small></p>\n"


# The table.


def pilot_markdown(record: Mapping[str, Any]) -> str:
    values = record["values"]
    rows = [_row(record, name) for name in _fastest_first(record)]
    every = dict.fromkeys(label for row in rows for label in row)
    lines = [{label: row.get(label, "-") for label in every} for row in rows]
    reasons = {name: f["reason"] for name, f in values["decoders"].items() if "reason" in f}
    said = "\n".join(f"- {name}: {why}" for name, why in (reasons | values["left_out"]).items())
    return (
        f"# Which decoder pays here?\n\n{values['answer']}\n\n{markdown_table(lines)}\n\n{said}\n\n"
        f"{record['date']}, {record['hardware']}, `{record['command']}`\n"
    )


def _row(record: Mapping[str, Any], name: str) -> dict[str, str]:
    found = record["values"]["decoders"][name]
    go = {True: "go", False: "no go"}.get(found.get("go"), "-")
    figures = shown(record, f"values/decoders/{name}")
    return {"decoder": name, "verdict": go, "exactness": _exactness(found)} | {
        label: _joined([text for _, text in numbers]) for label, numbers in figures
    }
