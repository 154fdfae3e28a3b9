"""A page that draws Jacobi trajectories: a line per state of each window, tokens that the fixed
point has there in blue, others in red.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from benchmarks.page import page
from mtp.consistency.measures import States, counted
from mtp.consistency.trajectories import Trajectory
from mtp.files import write_text
from mtp.tokenizer import Tokenizer

STYLE = """
pre, li { font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
          overflow-wrap: anywhere }
pre { color: #5c6675 } ol { background: #fff; border: 1px solid #dfe3ea; border-radius: 6px;
      padding: .4rem .8rem .4rem 2.4rem }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
h3 { font-size: 14px; margin: 0 } i { font-style: normal; border-radius: 2px; margin-right: 1px }
.right { background: #d7ecff; color: #0b4a8f } .wrong { background: #fbdcd5; color: #a02413 }
"""


def trajectory_page(
    pairs: Sequence[tuple[Trajectory, Trajectory]],
    names: tuple[str, str],
    tokenizer: Tokenizer,
    path: Path,
) -> None:
    """Two models side by side, for each prompt."""
    blocks = "".join(_prompt(pair, names, tokenizer) for pair in pairs)
    body = f"""
<p>Each line is a state of a window, from a first guess to the text itself; one pass leads from a
line to the next. Tokens that are <i class="right">right</i> already are blue,
<i class="wrong">wrong</i> ones red.</p>
{blocks}"""
    write_text(path, page("Jacobi trajectories", body, STYLE))


def _prompt(
    pair: tuple[Trajectory, Trajectory], names: tuple[str, str], tokenizer: Tokenizer
) -> str:
    asked = html.escape(tokenizer.decode(pair[0].prompt))
    columns = "".join(_model(*one, tokenizer) for one in zip(pair, names, strict=True))
    return f'<pre>{asked}</pre>\n<div class="pair">{columns}</div>\n'


def _model(trajectory: Trajectory, name: str, tokenizer: Tokenizer) -> str:
    windows = counted(trajectory)
    steps = sum(len(states) - 1 for states in windows)
    drawn = "".join(f"<ol start=0>{_window(states, tokenizer)}</ol>\n" for states in windows)
    caption = f"{name}: {trajectory.length} tokens in {steps} steps"
    return f"<div><h3>{html.escape(caption)}</h3>{drawn}</div>"


def _window(states: States, tokenizer: Tokenizer) -> str:
    final = states[-1]
    return "".join(
        "<li>" + "".join(_mark(*pair, tokenizer) for pair in zip(state, final, strict=True))
        for state in states
    )


def _mark(token: int, final: int, tokenizer: Tokenizer) -> str:
    kind = "right" if token == final else "wrong"
    return f'<i class="{kind}">{html.escape(tokenizer.decode([token]) or "·")}</i>'
