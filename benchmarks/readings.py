"""What records say of the claims in `benchmarks.claims`: in words, and yes or no."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Values = Mapping[str, Any]
ATTACHED_WAYS = ("frozen", "joint", "own text")  # of `benchmarks.retrofit`
INFORMATION = {"H(X given Y)": "x_given_y_2", "I(X;Y)": "shared_2", "H(Y given X)": "y_given_x_2"}


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


def by_place(v: Values, budget: str = "parameters") -> dict[str, dict[Any, Values]]:
    """A study's lines at one budget: arm -> line for every place of its axes, "" without any."""
    found: dict[str, dict[Any, Values]] = {}
    for line in v["table"]:
        if line["place"]["budget"] == budget:
            found.setdefault(_axes(line), {})[line["arm"]] = line
    return found


def _axes(line: Values) -> str:
    """ "dim 32" of model.dim = 32."""
    place = line["place"].items()
    return ", ".join(f"{k.rpartition('.')[2]} {x}" for k, x in place if k != "budget")


def over_baseline(*arms: Any, budget: str = "parameters") -> Callable[[Values], str]:
    def ours(v: Values) -> str:
        said = []
        for place, lines in by_place(v, budget).items():
            parts = [f"{arm} {signed(lines[arm]['difference'])}" for arm in arms]
            said.append(f"{place}: " * bool(place) + ", ".join(parts))
        first = next(iter(by_place(v, budget).values()))
        return f"bits per byte over {next(iter(first))}, equal {budget}: {'; '.join(said)}"

    return ours


def right_answers(v: Values) -> str:
    """A study's shares of answers, in every place of its table."""
    said: dict[str, list[str]] = {}
    for line in v["table"]:
        key = ", ".join(filter(None, [_axes(line), f"equal {line['place']['budget']}"]))
        share = " to ".join(f"{100 * line[end]:.0f}" for end in ("low", "high"))
        shown = f"n = {line['arm']} {100 * line['mean']:.0f} % ({share})"
        said.setdefault(key, []).append(shown)
    parts = [f"{place}: {', '.join(arms)}" for place, arms in said.items()]
    return f"right answers, {v['study']['seeds']} seeds: {'; '.join(parts)}"


def solves_where_baseline_fails(v: Values, arm: Any) -> bool:
    """Nine of ten in every place, and the baseline half in none."""
    bad = [line["high"] < 0.5 for line in v["table"] if line["arm"] == 1]
    good = [line["low"] > 0.9 for line in v["table"] if line["arm"] == arm]
    return all(bad + good)


def helps_small_models_most(v: Values, arm: Any) -> bool:
    smallest, *_, largest = (line["difference"] for line in v["table"] if line["arm"] == arm)
    return smallest["low"] > 0 and largest["mean"] < smallest["mean"]


def helps_in_every_test(v: Values, arm: Any) -> bool:
    def means(of: Any) -> list[float]:
        lines = (line for line in v["table"] if line["arm"] == of)
        return [test["mean"] for line in lines for test in line["tests"].values()]

    return all(more > one for more, one in zip(means(arm), means(1), strict=True))


def signed(difference: Values) -> str:
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def costs_less_than(v: Values, arm: Any, other: Any) -> bool:
    return all(
        lines[arm]["difference"]["high"] < lines[other]["difference"]["low"]
        for lines in by_place(v).values()
    )


def shrinks(v: Values, arm: Any) -> bool:
    smallest, *_, largest = (lines[arm]["difference"] for lines in by_place(v).values())
    return largest["high"] < smallest["low"]


def helps(v: Values, arm: Any, budget: str = "parameters") -> bool:
    """At the last place of its axes, such as the largest width."""
    *_, last = by_place(v, budget).values()
    return last[arm]["verdict"] == "better"


def is_best(v: Values, arm: Any) -> bool:
    *_, last = by_place(v).values()
    return last[arm]["mean"] == min(line["mean"] for line in last.values())


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
