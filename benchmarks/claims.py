"""The claims that the results book puts to the test, and the rule by which each holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.readings import (
    Values,
    attached_foresee_less,
    chooses_n,
    costs_less_than,
    helps,
    helps_in_every_test,
    helps_small_models_most,
    is_best,
    is_remedied,
    of_attached,
    of_choices,
    of_choices_of_n,
    of_consistency,
    of_drafts,
    of_information,
    of_joint,
    of_micro,
    of_retrofit,
    over_baseline,
    right_answers,
    shrinks,
    solves_where_baseline_fails,
)

HOLDS, FAILS, WAITS = "holds", "does not hold at this size", "not measured yet"


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
        "python -m benchmarks.science study=sizes 'budgets=[\"parameters\"]' "
        '\'words=["train.steps=300","train.batch_size=4","train.eval_every=100"]\'',
        "science_sizes",
        over_baseline(2, 4),
        lambda v: shrinks(v, 4),
    ),
    Claim(
        MTP,
        "Part of what four tokens bring lasts over several epochs",
        "7B, four epochs: MBPP pass@1 43.1 in place of 40.7 %, HumanEval 31.6 and 31.7 % (table 1)",
        "python -m benchmarks.science study=epochs "
        '\'words=["model.dim=64","train.steps=480","train.batch_size=4","train.eval_every=160"]\'',
        "science_epochs",
        over_baseline(2, 4),
        lambda v: helps(v, 4),
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
        "A model that was trained on four tokens is best fine-tuned on the next one alone",
        "7B, CodeContests, a plot: best, four tokens in both phases next, one in both last (figure "
        "4)",
        "python -m benchmarks.science study=finetune",
        "science_finetune",
        over_baseline("four_then_one", "four_then_four", "one_then_four"),
        lambda v: helps(v, "four_then_one") and is_best(v, "four_then_one"),
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
        MTP,
        "Two future tokens help small models to copy what followed a name before, large ones not",
        "1M to 1B, a plot: up to 30M far better, at 100M equal (figure 7)",
        "python -m benchmarks.science study=induction",
        "science_induction",
        right_answers,
        lambda v: helps_small_models_most(v, 2),
    ),
    Claim(
        MTP,
        "More future tokens help arithmetic of polynomials, in domain and out of it",
        "30M and 100M, a plot: better for every number of operations (figure 8)",
        "python -m benchmarks.science study=polynomial",
        "science_polynomial",
        right_answers,
        lambda v: helps_in_every_test(v, 4),
    ),
    Claim(
        OBJECTIVES,
        "Two future tokens find the way through a star graph where the next one alone guesses",
        "G(3,3), 14M: 34 % of the next token alone, 100 % of two (Zuhri et al. 2025, arXiv "
        "2508.19228)",
        "python -m benchmarks.science study=star_graph",
        "science_star_graph",
        right_answers,
        lambda v: solves_where_baseline_fails(v, 2),
    ),
    Claim(
        OBJECTIVES,
        "A reverse curriculum costs the next token less than the plain sum",
        "1.3B, perplexity of MiniPile: 47 of the next token alone, 57 of the sum, 57 forward, 50 "
        "reverse (Aynetdinov & Akbik 2025, arXiv 2505.22757)",
        "python -m benchmarks.science study=weights 'budgets=[\"parameters\"]' "
        '\'words=["model.dim=64","train.steps=300","train.batch_size=4","train.eval_every=100"]\'',
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
        "python -m benchmarks.joint model=FOLDER heads=runs/smollm2_heads/heads text=FILE "
        "precision=bfloat16 name=joint_smollm2 prompts=12 new_tokens=64 rounds=2 "
        "temperatures=[0.0,0.5,1.0] widths=[1,4] thresholds=[0.1,0.5,0.9] depths=[1,3]",
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
