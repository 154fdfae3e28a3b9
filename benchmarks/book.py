"""The results book: each claim with its published number, ours, and a verdict, from records alone.

    python -m benchmarks.book

It writes benchmarks/results/README.md. A verdict is of the claim's direction at the size measured
here, by a rule that stands beside it; published numbers are the papers' own, of models up to a
thousand times larger.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT
from mtp.checkpoint import write_text

RESULTS = ROOT / "benchmarks" / "results"
HOLDS, FAILS, WAITS = "holds", "does not hold at this size", "not measured yet"
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """record: the name of a file in benchmarks/results. holds: of its values; None: they settle
    nothing, for `reason`.
    """

    paper: str
    text: str
    published: str
    command: str
    record: str
    ours: Callable[[Values], str]
    holds: Callable[[Values], bool] | None
    reason: str = ""

    def verdict(self, entry: Mapping[str, Any] | None) -> str:
        if entry is None:
            return WAITS
        if self.holds is None:
            return f"not testable here: {self.reason}"
        return HOLDS if self.holds(entry["values"]) else FAILS


# What the records say.


def percent(share: Mapping[str, Any], level: int = 95) -> str:
    return (
        f"{100 * share['mean']:.1f} % ({level} % interval {100 * share['low']:.1f} to "
        f"{100 * share['high']:.1f})"
    )


def of_micro(v: Values) -> str:
    best = {row["label"]: row for row in v["best"] if row["k"] == 1}
    one, four = best["code1"], best["code4"]
    return f"micro-programs, pass@1: n = 1 {percent(one, 90)}, n = 4 {percent(four, 90)}"


def of_attached(v: Values) -> str:
    low, high = v["decoded"]["the kind trained on"][v["kind"]]["speedup_iqr"]
    return (
        f"SmolLM2-135M, {v['training_minutes']:.0f} minutes in all: {v['kind']} heads "
        f"{v['speedup']:.2f} times on the kind trained on (quartiles {low:.2f}, {high:.2f}), "
        f"{v['speedup_another']:.2f} on another"
    )


def of_consistency(v: Values, task: str = "text to SQL") -> str:
    low, high = (100 * x for x in v["quality_difference_interval"])
    return (
        f"{task}: {v['jacobi_after_tokens_per_forward']:.2f} tokens per forward, control "
        f"{v['jacobi_control_tokens_per_forward']:.2f}; {v['speedup']:.2f} times as fast; "
        f"quality less the control's {low:+.1f} to {high:+.1f} points"
    )


def of_joint(v: Values) -> str:
    joint, exact = v["best_mtad_at_no_worse_quality"], v["best_exact"]
    above = ", ".join(v["above_exact_curve"]) or "nowhere"
    size = f"{v['parameters']['target'] / 1e6:.0f}M parameters a token"
    lies = f"{size}, above the curve of exact ways {above}"
    if joint is None:
        return f"{lies}; none is as good as {exact['name']}"
    return (
        f"{lies}; {joint['name']} has {v['tokens_per_second_ratio']:.2f} of the speed of "
        f"{exact['name']} at perplexity {joint['perplexity']:.3f} and {exact['perplexity']:.3f}"
    )


def is_remedied(v: Values) -> bool:
    """On every domain but the first, the draft that is at home there is kept more than others of
    its size.
    """
    _, *others = v["domains"]

    def best_of_its_size(draft: str, other: str) -> bool:
        drafts = v["domains"][other]["drafts"].values()
        one = v["domains"][other]["drafts"][draft]
        size = one["parameters"]
        return one["acceptance"] == max(f["acceptance"] for f in drafts if f["parameters"] == size)

    at_home = [(draft, x) for draft, of in v["drift"].items() for x in others if of[x] > 1]
    return bool(at_home) and all(best_of_its_size(*pair) for pair in at_home)


def of_drafts(v: Values) -> str:
    def shown(draft: str) -> str:
        here = [found["drafts"][draft] for found in v["domains"].values()]
        kept = " and ".join(f"{f['acceptance']:.2f}" for f in here)
        speed = " and ".join(f"{f['exact']['speed']['mean']:.2f}" for f in here)
        return f"{Path(draft).name} keeps {kept}, {speed} times"

    drafts = next(iter(v["domains"].values()))["drafts"]
    lines = "; ".join(shown(draft) for draft in drafts)
    return f"share of guesses kept and speed over plain, on {' and '.join(v['domains'])}: {lines}"


def by_width(v: Values, budget: str = "parameters") -> dict[int | None, dict[Any, Values]]:
    """A study's lines at one budget: arm -> line for every width, None where it has only one."""
    found: dict[int | None, dict[Any, Values]] = {}
    for line in v["table"]:
        if line["place"]["budget"] == budget:
            found.setdefault(line["place"].get("model.dim"), {})[line["arm"]] = line
    return found


def over_baseline(*arms: Any, budget: str = "parameters") -> Callable[[Values], str]:
    def ours(v: Values) -> str:
        said = []
        for width, lines in by_width(v, budget).items():
            parts = [f"{arm} {signed(lines[arm]['difference'])}" for arm in arms]
            said.append(f"width {width}: " * (width is not None) + ", ".join(parts))
        first = next(iter(by_width(v, budget).values()))
        return f"bits per byte over {next(iter(first))}, equal {budget}: {'; '.join(said)}"

    return ours


def signed(difference: Values) -> str:
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def costs_less_than(v: Values, arm: Any, other: Any) -> bool:
    return all(
        lines[arm]["difference"]["high"] < lines[other]["difference"]["low"]
        for lines in by_width(v).values()
    )


def shrinks(v: Values, arm: Any) -> bool:
    smallest, *_, largest = (lines[arm]["difference"] for lines in by_width(v).values())
    return largest["high"] < smallest["low"]


def helps(v: Values, arm: Any, budget: str = "parameters") -> bool:
    """At the largest width."""
    *_, largest = by_width(v, budget).values()
    return largest[arm]["verdict"] == "better"


def is_best(v: Values, arm: Any) -> bool:
    *_, largest = by_width(v).values()
    return largest[arm]["mean"] == min(line["mean"] for line in largest.values())


def of_retrofit(v: Values) -> str:
    def shown(way: str) -> str:
        line = v["table"][way]
        text, bits = line["acceptance_text"], line["bits_per_byte"]
        return (
            f"{way} {text['mean']:.2f} (90 % interval {text['low']:.2f} to {text['high']:.2f}) "
            f"at {bits['mean']:.2f} bits per byte"
        )

    lines = "; ".join(shown(way) for way in ("pretrained", *ATTACHED_WAYS))
    return f"teacher-forced tokens per step, {v['seeds']} seeds: {lines}"


def attached_foresee_less(v: Values) -> bool:
    lines = (v["table"][way]["acceptance_text"] for way in ATTACHED_WAYS)
    return all(line["difference"]["high"] < 0 for line in lines)


def of_information(v: Values) -> str:
    shared, aligned = v["information"], v["gradients"]
    parts = ", ".join(f"{name} {shared[key]['mean']:.2f}" for name, key in INFORMATION.items())
    heads = ", ".join(f"{aligned[f'output_{i}']['mean']:.2f}" for i in range(2, v["n"] + 1))
    return (
        f"{parts} bits; {100 * shared['share_next_2']['mean']:.0f} % of the loss of the next "
        f"token is what both share, {100 * shared['share_two_2']['mean']:.0f} % of that of two. "
        f"Cosine of the gradients of heads 2 to {v['n']} with head 1's: {heads}"
    )


def of_choices(v: Values) -> str:
    choice, n = v["choices"], v["n"]
    forks, others = (choice[key] for key in ("terms_forks", "terms_others"))
    return (
        f"n = {n}: tokens of {v['bits']:g} bits or more weigh {forks['mean']:.2f} times "
        f"(90 % interval {forks['low']:.2f} to {forks['high']:.2f}) what their own n terms do, of "
        f"at most {(n + 1) / 2:g} in the paper's model, others {others['mean']:.2f} times"
    )


def of_choices_of_n(v: Values) -> str:
    chosen = "; ".join(
        f"{x['setting']}, {x['metric']}: {x['chosen']}, best {x['best']}" for x in v["table"]
    )
    constants = ", ".join(f"n = {c['n']} {c['inside']}" for c in v["constants"])
    return (
        f"{v['inside']} of {v['choices']} in the best's 95 % interval, at most "
        f"{100 * v['most_share']:.0f} % of the grid's operations ({chosen}); constants: {constants}"
    )


def chooses_n(v: Values) -> bool:
    everywhere = v["inside"] == v["choices"]
    return everywhere and v["most_share"] <= 0.5 and v["no_constant_as_good"]


ATTACHED_WAYS = ("frozen", "joint", "own text")  # of `benchmarks.retrofit`
INFORMATION = {"H(X given Y)": "x_given_y_2", "I(X;Y)": "shared_2", "H(Y given X)": "y_given_x_2"}
MTP = "Multi-token prediction (Gloeckle et al. 2024, arXiv 2404.19737)"
CLLM = "Consistency models (Kou et al. 2024, arXiv 2403.00835)"
JOINT = "Joint decoding (Qin et al. 2025, arXiv 2407.09722)"
OBJECTIVES = "Other weights and objectives"
OTHERS = "Heads for finished models"

CLAIMS = (
    Claim(
        MTP,
        "Heads that run one after another cost no memory",
        "O(V + d) in place of O(nV + d) (section 2)",
        "python -m benchmarks.train_memory",
        "train_memory",
        lambda v: (
            f"peak above parameters and gradients over n = 1: {v['peak_n4_over_n1']:.2f} at n = 4 "
            f"and {v['peak_n8_over_n1']:.2f} at n = 8 with equal parameters, "
            f"{v['peak_n8_over_n1_whole_trunk']:.2f} at n = 8 beside a whole trunk"
        ),
        lambda v: max(v["peak_n4_over_n1"], v["peak_n8_over_n1"]) <= 1,
    ),
    Claim(
        MTP,
        "... and no time",
        "none (section 2)",
        "python -m benchmarks.train_speed",
        "train_speed",
        lambda v: (
            f"time at n = 4 over n = 1, over the ratio of their operations: {v['overhead']:.2f} "
            f"with 32768 tokens, {v['overhead_small_vocab']:.2f} with 256"
        ),
        lambda v: max(v["overhead"], v["overhead_small_vocab"]) <= 1.05,
    ),
    Claim(
        MTP,
        "A model drafts for itself and decodes faster, the same text",
        "code, 7B, n = 4: 3.05 times, 3.50 tokens per forward (table S2)",
        "make demo",
        "demo",
        lambda v: (
            f"{v['speedup']:.2f} times at {v['mean_acceptance_length']:.2f} tokens per forward, "
            f"2.3M parameters; teacher-forced {v['acceptance_length_text']:.2f}"
        ),
        lambda v: v["identical"] and v["speedup"] > 1,
    ),
    Claim(
        MTP,
        "Models of bytes gain more",
        "7B, n = 8: 6.39 times, 7.04 bytes per forward (table S3)",
        "python -m benchmarks.decode model=runs/bytes8",
        "decode",
        lambda v: (
            f"{v['heads_speedup']:.2f} times at {v['acceptance_length']:.2f} bytes per forward, "
            f"21M parameters; teacher-forced {v['acceptance_length_text']:.2f}"
        ),
        lambda v: v["identical"] and v["heads_speedup"] > 1,
    ),
    Claim(
        MTP,
        "The speedup is the same for all batch sizes",
        "up to 42 texts, a plot (figure S10)",
        "python -m benchmarks.decode model=runs/bytes8",
        "decode",
        lambda v: "; ".join(
            f"batch {rows}: {speedup:.2f} times" for rows, speedup in v["speedup_by_batch"].items()
        ),
        lambda v: min(v["speedup_by_batch"].values()) > 0.9 * max(v["speedup_by_batch"].values()),
    ),
    Claim(
        MTP,
        "Large models solve more problems of code, small ones fewer",
        "HumanEval pass@1, n = 1 and 4: 14.1 and 15.8 % at 13B, 1.9 and 1.2 % at 0.3B (table S7)",
        "python -m benchmarks.code models='[runs/code1,runs/code4]' exact=true",
        "code_micro",
        of_micro,
        None,
        "our models solve no problem of HumanEval; programs they can solve are another measure",
    ),
    Claim(
        MTP,
        "What two tokens share counts twice in their loss",
        "H(X) + H(Y) = H(X given Y) + 2 I(X;Y) + H(Y given X) (lemma L.3)",
        "python -m benchmarks.alignment checkpoint=runs/bytes4",
        "alignment",
        of_information,
        lambda v: v["information"]["shared_2"]["low"] > 0,
    ),
    Claim(
        MTP,
        "Choices that later tokens hang on weigh more",
        "(n + 1) / 2 times as much as inconsequential ones (appendix L.3)",
        "python -m benchmarks.alignment checkpoint=runs/bytes4",
        "alignment",
        of_choices,
        lambda v: v["choices"]["terms_forks"]["low"] > v["choices"]["terms_others"]["high"],
    ),
    Claim(
        MTP,
        "What it costs small models shrinks as they grow",
        "HumanEval pass@1, n = 4 and 1: 1.2 and 1.9 % at 0.3B, 7.2 and 7.2 % at 3B, 15.8 and "
        "14.1 % at 13B (table S7)",
        "python -m benchmarks.science study=sizes",
        "science_sizes",
        over_baseline(2, 4),
        lambda v: shrinks(v, 4),
    ),
    Claim(
        MTP,
        "Models of bytes are best with eight future bytes",
        "7B, MBPP pass@1: 19.3 % at n = 1, 32.3 % at n = 8, 28.6 % at n = 16 (table 1)",
        "python -m benchmarks.science study=bytes",
        "science_bytes",
        over_baseline(4, 8, 16),
        lambda v: helps(v, 8) and is_best(v, 8),
    ),
    Claim(
        MTP,
        "The number of future tokens can be chosen automatically",
        "left open (section 7); of a grid at 7B best are 4 pieces of code, 8 bytes (table 1)",
        "python -m benchmarks.choose_n",
        "choose_n_whole",
        of_choices_of_n,
        chooses_n,
    ),
    Claim(
        OBJECTIVES,
        "A reverse curriculum costs the next token less than the plain sum",
        "1.3B, perplexity of MiniPile: 47 of the next token alone, 57 of the sum, 57 forward, 50 "
        "reverse (Aynetdinov & Akbik 2025, arXiv 2505.22757)",
        "python -m benchmarks.science study=weights",
        "science_weights",
        over_baseline("sum", "forward", "reverse"),
        lambda v: costs_less_than(v, "reverse", "sum"),
    ),
    Claim(
        OBJECTIVES,
        "The order of what comes helps the next token where more tokens hurt it",
        "340M, perplexity of Lambada: 30.3 of the next token alone, 35.3 of four, 28.8 with the "
        "order (Zuhri et al. 2025, arXiv 2508.19228)",
        "python -m benchmarks.science study=objectives",
        "science_objectives",
        over_baseline("parallel", "order"),
        lambda v: helps(v, "order"),
    ),
    Claim(
        OBJECTIVES,
        "Several targets on one set of logits, annealed, reach a loss sooner",
        "124M, to a loss of 3.28: 119.8 in place of 122.8 s (modded-nanogpt, record of 2025-12-22)",
        "python -m benchmarks.science study=objectives",
        "science_objectives",
        over_baseline("same_logits", budget="operations"),
        lambda v: helps(v, "same_logits", "operations"),
    ),
    Claim(
        OTHERS,
        "Heads that are attached to a finished model and trained for minutes make it faster",
        "no number of comparable size",
        "python -m benchmarks.attached trunk=FOLDER other=FILE",
        "attached",
        of_attached,
        lambda v: v["speedup"] > 1 and v["identical_or_near_ties"],
    ),
    Claim(
        OTHERS,
        "Heads trained from the start foresee more than heads attached afterwards",
        "no number of comparable size",
        "python -m benchmarks.retrofit",
        "retrofit",
        of_retrofit,
        attached_foresee_less,
    ),
    Claim(
        CLLM,
        "A model learns to jump along its own Jacobi trajectories and answers as well",
        "2.4 to 3.4 times faster, 7B (abstract)",
        "python -m benchmarks.consistency base=runs/sql",
        "consistency",
        of_consistency,
        lambda v: v["speedup"] > 1 and v["quality_difference_interval"][0] > -0.02,
    ),
    Claim(
        CLLM,
        "... of text that is less regular",
        "as above",
        "python -m benchmarks.consistency task=docstrings base=runs/docstrings prompts=3000 "
        "steps=400 problems=441 name=consistency_docstrings",
        "consistency_docstrings",
        partial(of_consistency, task="functions from their docstrings"),
        lambda v: v["speedup"] > 1 and v["quality_difference_interval"][0] > -0.02,
    ),
    Claim(
        JOINT,
        "Blocks accepted by their joint probability are faster than exact ways of the same quality",
        "1.42 times standard speculative decoding, 13B to 70B (abstract of versions 2 to 4)",
        "python -m benchmarks.joint model=runs/sql draft=runs/sql_draft task=sql",
        "joint",
        of_joint,
        lambda v: bool(v["above_exact_curve"]),
    ),
    Claim(
        JOINT,
        "... of bytes of source code, by a draft of 0.1 of the size",
        "as above",
        "python -m benchmarks.joint model=runs/bytes4 draft=runs/draft_2m name=joint_bytes "
        "prompts=16 rounds=2 temperatures=[0.0,0.4,0.7,1.0] widths=[1,4] thresholds=[0.1,0.5,0.9]",
        "joint_bytes",
        of_joint,
        lambda v: bool(v["above_exact_curve"]),
    ),
    Claim(
        JOINT,
        "... of SmolLM2-135M, by heads attached to it",
        "as above",
        "python -m benchmarks.joint model=FOLDER heads=HEADS text=FILE name=joint_smollm2",
        "joint_smollm2",
        of_joint,
        lambda v: bool(v["above_exact_curve"]),
    ),
    Claim(
        JOINT,
        "A draft is accepted less on text of another domain, and distillation there is the remedy",
        "no number of comparable size",
        "python -m benchmarks.drafts model=runs/bytes4 prompts=24 rounds=2 "
        """drafts='["runs/draft_0.5m","runs/draft_2m","runs/draft_8m","runs/draft_2m_verse"]' """
        """texts='{"source code":"","verse":"runs/verse_val.txt"}'""",
        "drafts",
        of_drafts,
        is_remedied,
    ),
)

# The page.


def book(folder: Path) -> Iterator[str]:
    yield "# Results\n"
    yield "Made by `python -m benchmarks.book` from the records in this folder: do not edit.\n"
    for paper, claims in groupby(CLAIMS, key=lambda claim: claim.paper):
        yield f"\n## {paper}\n\n"
        yield "| claim | published | here | verdict | command | record |\n"
        yield "|---|---|---|---|---|---|\n"
        for claim in claims:
            yield row(claim, folder)


def row(claim: Claim, folder: Path) -> str:
    entry = read(folder / f"{claim.record}.json")
    ours, kept = "", ""
    if entry is not None:
        ours = claim.ours(entry["values"])
        name = f"{claim.record}.json"
        kept = f"[{name}]({name}), {entry['hardware']}, {entry['date']}, {entry['commit']}"
    cells = (claim.text, claim.published, ours, claim.verdict(entry), f"`{claim.command}`", kept)
    return f"| {' | '.join(cells)} |\n"


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


if __name__ == "__main__":
    write_text(RESULTS / "README.md", "".join(book(RESULTS)))
    print(RESULTS / "README.md")
