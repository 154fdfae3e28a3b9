"""Every way of the library to decode that fits a model, by its name, and how exact it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from benchmarks.ways import PLAIN, Setting, Way, grows_beams
from mtp.decode.contract import Drafter, NoDraft
from mtp.decode.drafters import (
    BeamHeads,
    BeamModel,
    DraftModel,
    Jacobi,
    OwnHeads,
    PromptLookup,
)
from mtp.decode.loop import cache_bytes
from mtp.decode.sampling import Sampling

SAME_TEXT, SAME_LAW, LOSSY = "same text", "same law", "lossy"
BRANCHES = 4  # of n-grams beside a Jacobi window
WIDTH = 4  # of joint decoding's beams
LOOKUP, WINDOW, TREE, AHEAD, BEAM = (4, 10), (7, 15), (8, 16), (2, 4, 8), (2, 4)  # guesses per step


class Guessing(NamedTuple):
    """drafter: for a number of guesses per step, of which `depths` are to be tried. calls: see
    `Way.guesses`.
    """

    drafter: Callable[[int], Drafter]
    depths: tuple[int, ...]
    calls: tuple[Any, str]


def exact_ways(setting: Setting, sampling: Sampling) -> dict[str, Way]:
    """All that keep the text, and, where tokens are drawn, those that keep its law alone."""
    law: dict[str, Any] = {"sampling": sampling}
    found = {
        PLAIN: Way(SAME_TEXT, law),
        "prompt lookup": Way(SAME_TEXT, law, PromptLookup, LOOKUP),
        "Jacobi": Way(SAME_TEXT, law, lambda k: Jacobi(k + 1), WINDOW),
        "own n-grams": Way(SAME_TEXT, law, lambda k: Jacobi(k + 1, BRANCHES), WINDOW),
    }
    rules = {SAME_TEXT: "match"} | ({SAME_LAW: "block"} if sampling.temperature else {})
    for kind, rule in rules.items():
        at, said = law | {"rule": rule}, f", rule {rule}" * (kind == SAME_LAW)
        for name, chain in chains(setting).items():
            found[f"{name}{said}"] = Way(kind, at, *chain)
    if grows_beams(setting.target):
        of_tree = partial(OwnHeads, None, vocabulary=setting.vocabulary)
        tree = Guessing(of_tree, TREE, (setting.target, "guess"))
        found[f"{setting.heads}, tree"] = Way(SAME_TEXT, law, *tree)
    return found


def chains(setting: Setting) -> dict[str, Guessing]:
    target, draft, found = setting.target, setting.draft, dict[str, Guessing]()
    if most := target.extra_heads:
        depths = tuple(sorted({1, -(-most // 2), most}))
        of_heads = partial(OwnHeads, vocabulary=setting.vocabulary)
        found[f"{setting.heads}, chain"] = Guessing(of_heads, depths, (target, "guess"))
    if draft is not None:
        found["draft model"] = Guessing(partial(DraftModel, draft), AHEAD, (draft, "read"))
    return found


def beams(setting: Setting, sampling: Sampling, whole: bool = False) -> dict[str, Guessing]:
    """For joint decoding; none for a greedy text, which is one. whole: the draft model's as a tree
    too.
    """
    target, draft, found = setting.target, setting.draft, dict[str, Guessing]()
    if not sampling.temperature:
        return found
    if grows_beams(target):
        depths = tuple(sorted({-(-target.extra_heads // 2), target.extra_heads}))
        of_heads = partial(BeamHeads, width=WIDTH, vocabulary=setting.vocabulary)
        found[f"MTAD, {setting.heads}"] = Guessing(of_heads, depths, (target, "guess"))
    if draft is not None:
        of_model = partial(BeamModel, draft, width=WIDTH)
        found["MTAD, draft model"] = Guessing(of_model, BEAM, (draft, "read"))
        if whole:
            tree = partial(of_model, whole=True)
            found["MMTAD, draft model"] = Guessing(tree, BEAM, (draft, "read"))
    return found


def joint_way(sampling: Sampling, beam: Guessing, depth: int, threshold: float) -> Way:
    at = {"sampling": sampling, "rule": "joint", "threshold": threshold}
    return Way(LOSSY, at, beam.drafter, (depth,), beam.calls)


def left_out(setting: Setting, sampling: Sampling) -> dict[str, str]:
    """Ways that are not tried, each with the reason."""
    target, draft, found = setting.target, setting.draft, dict[str, str]()
    if not target.extra_heads:
        found["own heads"] = "the model has none: scripts/attach.py trains some, heads=FOLDER"
    elif target.reads_ahead:
        found[f"{setting.heads}, tree"] = "the heads read each other's guesses, which are one chain"
    if draft is None:
        found["draft model"] = "none was given: draft=FOLDER"
    if not sampling.temperature:
        found["joint"] = "greedy decoding has one text: joint decoding wants a temperature above 0"
    elif not beams(setting, sampling):
        found["joint"] = "it drafts with another model, or heads that guess without each other"
    return found


def memory_bytes(setting: Setting, way: Way, depth: int | None, rows: int = 1) -> int:
    """Counted, not measured: weights, and caches for `rows` texts, the longest of these."""
    target, draft = setting.target, setting.draft
    drafter = way.drafter(depth) if way.drafter and depth else NoDraft()
    drafter.attach(target)
    longest = max(len(r.prompt) + r.max_new_tokens for r in setting.requests)
    slots = longest + 1 + drafter.nodes
    weights = setting.weights
    held = weights["target"] + cache_bytes(target, rows, slots, drafter.needs_memo)
    if way.guesses and way.guesses[0] is draft:
        held += weights["draft"] + cache_bytes(draft, rows, slots, False)
    return held
