"""What does it save that heads 2..n guess frequent tokens only, and what acceptance does it cost?

    python -m benchmarks.draft_vocabulary model=runs/v32k

Times are of `shape` with random weights: decoders that guess from all tokens and from fewer take
turns step by step. `drafting` is what `propose` takes of a step; ratios are to the full vocabulary
in the same round. Random guesses fail, so a step reads one new position: where they stand it reads
more, at the same cost for every vocabulary. A step's noise, for all tokens, is made while drafting,
though its verdict needs it: sampling saves a smaller part. Acceptance is of `model`, a run, with
guesses from the most frequent tokens of its training text, teacher-forced on held-out rows; these
are `coverage` of the rows' tokens. A weak model guesses only frequent tokens anyway: `oracle`, from
heads that know the rows, says what perfect ones lose. Last comes JSON of the first size and batch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import torch

import mtp
from benchmarks.contenders import Prompts
from benchmarks.decode import disturbances
from benchmarks.record import launch, record
from benchmarks.shapes import shape
from benchmarks.texts import coverage, on_text, rows_of
from benchmarks.timing import fastest_threads, seconds, spread
from mtp.data import frequent_tokens, load_corpus
from mtp.decode.contract import Draft, State
from mtp.decode.loop import Decoding
from mtp.documents import iter_documents
from mtp.run import data_of, find_device


@dataclass
class VocabularyConfig:
    model: str = "runs/v32k"
    shape: str = "small"
    sizes: str = "4096,1024,8192"
    batch: str = "1,8"
    temperature: float = 0.8
    rounds: int = 60
    texts: int = 64  # held-out rows
    tokens: int = 256  # of a row
    device: str = "auto"
    name: str = "draft_vocabulary"


class Timed(mtp.OwnHeads):
    """Keeps what its last proposal took."""

    def propose(self, state: State, k: int) -> Draft:
        drafts: list[Draft] = []
        self.took = seconds(lambda: drafts.append(super(Timed, self).propose(state, k)))
        return drafts[0]


Round = dict[int, tuple[float, float]]  # size -> seconds of drafting and of the whole step
Figures = dict[int, dict[str, Any]]  # size -> its figures, the full vocabulary's first


@torch.inference_mode()
def take_turns(
    model: mtp.Transformer, sizes: list[int], prompts: Prompts, sampling: mtp.Sampling, rounds: int
) -> list[Round]:
    full, new = model.config.vocab_size, model.config.n_future_tokens * (rounds + 3)
    requests = [mtp.Request(prompt, new, seed) for seed, prompt in enumerate(prompts)]
    drafters = {full: Timed()} | {s: Timed(vocabulary=torch.arange(s) * full // s) for s in sizes}
    order, decoders, found = [full, *sizes], {}, []
    for size, drafter in drafters.items():
        decoders[size] = Decoding(model, requests, drafter, sampling, batch_size=len(requests))
        decoders[size].fill()
    for _ in range(rounds + 2):  # the first two warm up
        steps = {size: seconds(decoders[size].step) for size in order}
        found.append({size: (drafters[size].took, step) for size, step in steps.items()})
        order.reverse()
    return found[2:]


def figures(rounds: list[Round], size: int, full: int) -> dict[str, Any]:
    found: dict[str, Any] = {"share_of_step": median(r[size][0] / r[size][1] for r in rounds)}
    for i, part in enumerate(("drafting", "step")):
        ratios = [r[size][i] / r[full][i] for r in rounds]
        found[f"{part}_seconds"] = median(r[size][i] for r in rounds)
        found |= {f"{part}_ratio": median(ratios), f"{part}_ratio_iqr": spread(ratios)}
    return found


def times(config: VocabularyConfig, sizes: list[int], device: torch.device) -> dict[str, Figures]:
    model = mtp.Transformer(shape(config.shape)).to(device).packed()
    full, found = model.config.vocab_size, {}
    ways = {"greedy": mtp.Sampling(), "sampled": mtp.Sampling(config.temperature)}
    for rows, way in product(map(int, config.batch.split(",")), ways):
        prompts = torch.randint(full, (rows, 32)).tolist()  # short: steps are timed, not prompts
        turns = partial(take_turns, model, sizes, prompts, ways[way])
        torch.set_num_threads(fastest_threads(partial(turns, 4)))
        rounds = turns(config.rounds)
        found[f"batch {rows}, {way}"] = {s: figures(rounds, s, full) for s in (full, *sizes)}
    return found


def acceptance(config: VocabularyConfig, sizes: list[int], device: torch.device) -> Figures:
    model, tokenizer = mtp.load(config.model, device), mtp.load_tokenizer(config.model)
    data = data_of(config.model)
    rows = rows_of(iter_documents(data, True), tokenizer, config.texts, config.tokens)
    frequent = frequent_tokens(load_corpus(data, tokenizer, False), max(sizes))
    full, found = model.config.vocab_size, {}
    for size in (full, *sizes):
        ids = frequent[:size] if size < full else torch.arange(full)
        length = 1 + sum(on_text(model, rows, 1, ids.to(device)).chain)
        known = coverage(rows, ids, model.extra_heads)
        found[size] = {"acceptance_length": length, "coverage": known[0], "oracle": 1 + sum(known)}
    return found


def table(name: str, found: Figures) -> str:
    rows = [(name, *next(iter(found.values())))]
    rows += [(str(size), *(f"{np.round(x, 4)}" for x in f.values())) for size, f in found.items()]
    return "\n".join(" ".join(f"{cell:>18}" for cell in row) for row in rows)


def run(config: VocabularyConfig) -> dict[str, Any]:
    load, device = os.getloadavg()[0], find_device(config.device)
    sizes = [int(size) for size in config.sizes.split(",")]
    lengths, timed = acceptance(config, sizes, device), times(config, sizes, device)
    for name, found in {config.model: lengths, **timed}.items():
        print(f"\n{table(name, found)}")
    (full, size, *_), (greedy, sampled, *_) = lengths, timed.values()
    values = {
        "drafting_ratio": greedy[size]["drafting_ratio"],
        "drafting_ratio_sampled": sampled[size]["drafting_ratio"],
        "acceptance_length_full": lengths[full]["acceptance_length"],
        "acceptance_length_restricted": lengths[size]["acceptance_length"],
        **{key: lengths[size][key] for key in ("coverage", "oracle")},
        "disturbed": disturbances(load, {}),
    }
    record(config.name, values | {"acceptance": lengths, "times": timed}, config)
    return values


if __name__ == "__main__":
    launch(VocabularyConfig, run)
