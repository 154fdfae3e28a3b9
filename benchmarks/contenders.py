"""Who decodes prompts in batches, in turns: the library's own decoders, a bare loop, and those of
transformers; and what the turns say of each.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch

import mtp
from benchmarks.bare import bare_loop
from benchmarks.demo_decode import repetition
from benchmarks.peers import Peer, checked, llama
from benchmarks.timing import Turns, spread
from benchmarks.ways import PLAIN
from mtp.decode.depth import AdaptiveDepth
from mtp.decode.drafters import DraftModel, OwnHeads, PromptLookup
from mtp.model import Transformer

NODES = 16  # of the tree
LOOKUP = 10  # tokens that prompt lookup copies
BARE, THEIRS = "bare loop", "transformers"
Prompts = Sequence[Sequence[int]]


class Decoded(NamedTuple):
    """steps: passes, each row's counted. drafted, accepted: at each depth, as in `Completion`."""

    texts: list[list[int]]
    steps: int
    drafted: list[int]
    accepted: list[int]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


Contender = Callable[[Prompts, int], Decoded]


def ours(model: Transformer, draft: Transformer | None) -> dict[str, dict[str, Any]]:
    """Words of `generate`; a new way to decode is one line."""
    deepest = model.extra_heads
    return {
        PLAIN: {},
        **{heads(k): {"drafter": OwnHeads(k)} for k in range(1, deepest + 1)},
        "adaptive": {"drafter": OwnHeads(), "depth": AdaptiveDepth()},
        f"tree of {NODES}": {"drafter": OwnHeads(tree=NODES)},
        "prompt lookup": {"drafter": PromptLookup(LOOKUP)},
        **({"draft model": {"drafter": DraftModel(draft)}} if draft else {}),
    }


def heads(depth: int) -> str:
    return f"{depth} head{'s' * (depth > 1)}"


def decode_ours(
    model: Transformer,
    words: dict[str, Any],
    rows: int,
    prompts: Prompts,
    new: int,
    stop: Callable[[list[int]], bool] | None = None,
) -> Decoded:
    requests = [mtp.Request(prompt, new, stop=stop) for prompt in prompts]
    return decode_requests(model, words, rows, requests)


def decode_requests(
    model: Any, words: dict[str, Any], rows: int, requests: Sequence[mtp.Request]
) -> Decoded:
    done = mtp.generate(model, requests, batch_size=rows, **words)
    drafted, accepted = (_sums(getattr(c, key) for c in done) for key in ("drafted", "accepted"))
    return Decoded([c.tokens for c in done], sum(c.steps for c in done), drafted, accepted)


@torch.inference_mode()
def decode_bare(model: Transformer, rows: int, prompts: Prompts, new: int) -> Decoded:
    batches = [bare_loop(model, some, new) for some in _by(rows, prompts)]
    texts = [list(text) for batch in batches for text in zip(*batch, strict=True)]
    return Decoded(texts, (new - 1) * len(prompts), [], [])


def decode_peer(peer: Peer, rows: int, prompts: Prompts, new: int) -> Decoded:
    """It does not say at which depth it accepts."""
    texts, steps = [], 0
    for some in _by(rows, prompts):
        texts += peer(some, new)
        steps += peer.passes * len(some)
    return Decoded(texts, steps, [], [new * len(prompts) - steps])


def _by(rows: int, prompts: Prompts) -> list[Prompts]:
    return [prompts[i : i + rows] for i in range(0, len(prompts), rows)]


def peers(model: Transformer, draft: Transformer | None) -> dict[str, Peer]:
    """transformers', none where it is not installed."""
    if find_spec("transformers") is None:
        print("transformers is not installed: its decoding is left out", file=sys.stderr)
        return {}
    target = checked(model)
    found = {THEIRS: Peer(target)}
    found[f"{THEIRS}, prompt lookup"] = Peer(target, prompt_lookup_num_tokens=LOOKUP)
    if draft is not None:
        found[f"{THEIRS}, draft model"] = Peer(target, assistant_model=llama(draft))
    return found


def contenders(
    model: Transformer, mine: Mapping[str, dict[str, Any]], theirs: Mapping[str, Peer], rows: int
) -> dict[str, Contender]:
    return {
        **{name: partial(decode_ours, model, words, rows) for name, words in mine.items()},
        BARE: partial(decode_bare, model, rows),
        **{
            name: partial(decode_peer, peer, rows)
            for name, peer in theirs.items()
            if rows == 1 or not peer.options  # they take drafts for single texts only
        },
    }


def _sums(rows: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip_longest(*rows, fillvalue=0)]


def figures(turns: Turns[Decoded], name: str, rows: int, plain: str = PLAIN) -> dict[str, Any]:
    """Of one contender at one batch size: what its turns alone say, against those of `plain`."""
    done, medians = turns.done[name], [statistics.median(x) for x in turns.took[name]]
    base = sum(statistics.median(x) for x in turns.took[plain])
    pairs = zip(chain(*turns.took[plain]), chain(*turns.took[name]), strict=True)
    steps = sum(d.steps for d in done)
    drafted, accepted = _sums(d.drafted for d in done), _sums(d.accepted for d in done)
    return {
        "tokens_per_second": sum(d.tokens for d in done) / sum(medians),
        "speedup": base / sum(medians),
        "speedup_iqr": spread([slow / own for slow, own in pairs]),
        "step_seconds": sum(medians) * rows / steps,
        "acceptance_length": 1 + sum(accepted) / steps,
        "acceptance": [a / max(1, d) for a, d in zip(accepted, drafted, strict=False)],
        "repetition": statistics.mean(repetition(t) for d in done for t in d.texts),
        "rounds_apart": statistics.median(
            (max(x) - min(x)) / m for x, m in zip(turns.took[name], medians, strict=True)
        ),
    }
