"""What `benchmarks.pilot` takes, opens and tries: prompts, models, and every way to decode that
fits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import mtp
from benchmarks.ways import Setting, Way, set_up
from mtp.data import chat_template
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
from mtp.evaluate.scores import rouge_l, words
from mtp.interop.folder import FoundModel, find_model
from mtp.run import find_device
from mtp.train import PRECISIONS

PLAIN = "plain"
SAME_TEXT, SAME_LAW, LOSSY = "same text", "same law", "lossy"
FEWEST = 16  # prompts: fewer than eight that are measured cannot be this sure of anything
BRANCHES = 4  # of n-grams beside a Jacobi window
WIDTH = 4  # of joint decoding's beams
LOOKUP, WINDOW, TREE, AHEAD, BEAM = (4, 10), (7, 15), (8, 16), (2, 4, 8), (2, 4)  # guesses per step


@dataclass
class PilotConfig:
    """What `scripts/pilot.py` takes. heads: a folder of some that were attached to the model. chat:
    prompts are what a user says. budget: nats per token that a lossy way may lose, 0.05 are 5 % of
    perplexity. minutes: take as many of the prompts as fit in; null takes all.
    """

    model: str = ""  # a run or checkpoint, or a Hugging Face folder or its name on the hub
    prompts: str = ""  # a file of JSON lines (*.jsonl), or with a prompt on each line
    draft: str | None = None  # a smaller model of the same tokenizer
    heads: str | None = None
    chat: bool = False
    new_tokens: int = 128
    rounds: int = 2
    budget: float = 0.05
    minutes: float | None = 15.0
    precision: str = "float32"
    device: str = "auto"
    out: str = "runs/pilot"  # a folder for pilot.html, pilot.md and pilot.json
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: give a run, a checkpoint or a Hugging Face folder, model=...")
        if not self.prompts:
            raise ValueError("prompts: give a file of JSON lines or plain lines, prompts=...")
        for key in ("new_tokens", "rounds"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.budget < 0:
            raise ValueError(f"budget={self.budget} must be at least 0 nats per token")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes={self.minutes} must be above 0 (null for no limit)")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: allowed are {', '.join(PRECISIONS)}")


class Case(NamedTuple):
    """A prompt, and what its text is scored by, if anything: an answer that is to stand in it, not
    within a longer word, or else a completion, by its likeness (ROUGE-L of words).
    """

    prompt: str
    answer: str | None = None
    completion: str | None = None

    def score(self, text: str) -> float | None:
        if self.answer is not None:
            return float(bool(re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", text)))
        if self.completion is not None:
            return rouge_l(words(text), words(self.completion))
        return None


class Ready(NamedTuple):
    """What decodes what. heads: what to call the target's. cases: one for each request, where texts
    are scored by them.
    """

    setting: Setting
    heads: str
    cases: Sequence[Case] = ()

    def some(self, count: int) -> Ready:
        """`count` of the prompts, from all of the file; the first half to choose by."""
        chosen = [i * len(self.cases) // count for i in range(count)]
        requests = [self.setting.requests[i] for i in chosen]
        return self._replace(
            setting=replace(self.setting, requests=requests, probed=count // 2),
            cases=[self.cases[i] for i in chosen],
        )


def prepare(config: PilotConfig, cases: Sequence[Case]) -> Ready:
    """Refuses what cannot work: before weights are read, what files and tokenizers say."""
    if len(cases) < FEWEST:
        raise ValueError(
            f"prompts={config.prompts} holds {len(cases)}: give at least {FEWEST}, half of them "
            f"choose settings and half are measured"
        )
    find = partial(find_model, special=not config.chat)  # templates begin a text themselves
    found, auxiliary = find(config.model), None if config.draft is None else find(config.draft)
    if auxiliary and auxiliary.tokenizer.fingerprint != found.tokenizer.fingerprint:
        raise ValueError(f"draft={config.draft} has another tokenizer than {config.model}")
    requests = requests_of(config, cases, found)
    device, dtype = find_device(config.device), PRECISIONS[config.precision]
    target, draft = found.open(device, dtype), auxiliary and auxiliary.open(device, dtype)
    half = len(requests) // 2
    setting = set_up(target, draft, config.heads, requests, found.tokenizer, probed=half)
    return Ready(setting, "attached heads" if config.heads else "own heads", list(cases))


def requests_of(config: PilotConfig, cases: Sequence[Case], found: FoundModel) -> list[mtp.Request]:
    texts, stop = [case.prompt for case in cases], mtp.stop_at(*found.ends)
    if config.chat:
        template = chat_template(found.tokenizer)
        texts = [template.render([{"role": "user", "content": text}], True) for text in texts]
    return [
        mtp.Request(found.tokenizer.encode(text), config.new_tokens, seed, stop)
        for seed, text in enumerate(texts)
    ]


# Ways to decode.


class Guessing(NamedTuple):
    """drafter: for a number of guesses per step, of which `depths` are to be tried. calls: see
    `Way.guesses`.
    """

    drafter: Callable[[int], Drafter]
    depths: tuple[int, ...]
    calls: tuple[Any, str]


def exact_ways(ready: Ready, sampling: Sampling) -> dict[str, Way]:
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
        for name, chain in chains(ready).items():
            found[f"{name}{said}"] = Way(kind, at, *chain)
    if (target := ready.setting.target).extra_heads and not target.reads_ahead:
        tree = Guessing(lambda k: OwnHeads(tree=k), TREE, (target, "guess"))
        found[f"{ready.heads}, tree"] = Way(SAME_TEXT, law, *tree)
    return found


def chains(ready: Ready) -> dict[str, Guessing]:
    target, draft, found = ready.setting.target, ready.setting.draft, dict[str, Guessing]()
    if most := target.extra_heads:
        depths = tuple(sorted({1, -(-most // 2), most}))
        found[f"{ready.heads}, chain"] = Guessing(OwnHeads, depths, (target, "guess"))
    if draft is not None:
        found["draft model"] = Guessing(partial(DraftModel, draft), AHEAD, (draft, "read"))
    return found


def beams(ready: Ready, sampling: Sampling, whole: bool = False) -> dict[str, Guessing]:
    """For joint decoding; none for a greedy text, which is one. whole: the draft model's as a tree
    too.
    """
    target, draft, found = ready.setting.target, ready.setting.draft, dict[str, Guessing]()
    if not sampling.temperature:
        return found
    if (most := target.extra_heads) and not target.reads_ahead:
        depths = tuple(sorted({-(-most // 2), most}))
        of_heads = partial(BeamHeads, width=WIDTH)
        found[f"MTAD, {ready.heads}"] = Guessing(of_heads, depths, (target, "guess"))
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


def left_out(ready: Ready, sampling: Sampling) -> dict[str, str]:
    """Ways that are not tried, each with the reason."""
    target, draft, found = ready.setting.target, ready.setting.draft, dict[str, str]()
    if not target.extra_heads:
        found["own heads"] = "the model has none: scripts/attach.py trains some, heads=FOLDER"
    elif target.reads_ahead:
        found[f"{ready.heads}, tree"] = "the heads read each other's guesses, which are one chain"
    if draft is None:
        found["draft model"] = "none was given: draft=FOLDER"
    if not sampling.temperature:
        found["joint"] = "greedy decoding has one text: joint decoding wants sampling.temperature"
    elif not beams(ready, sampling):
        found["joint"] = "it drafts with another model, or heads that guess without each other"
    return found


def memory_bytes(ready: Ready, way: Way, depth: int | None, rows: int = 1) -> int:
    """Counted, not measured: weights, and caches for `rows` texts, the longest of these."""
    target, draft = ready.setting.target, ready.setting.draft
    drafter = way.drafter(depth) if way.drafter and depth else NoDraft()
    drafter.attach(target)
    longest = max(len(r.prompt) + r.max_new_tokens for r in ready.setting.requests)
    slots = longest + 1 + drafter.nodes
    weights = ready.setting.weights
    held = weights["target"] + cache_bytes(target, rows, slots, drafter.needs_memo)
    if way.guesses and way.guesses[0] is draft:
        held += weights["draft"] + cache_bytes(draft, rows, slots, False)
    return held
