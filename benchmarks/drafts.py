"""What does a draft's size buy, and what does text of another domain cost it?

    python -m benchmarks.drafts model=runs/bytes8 drafts='[runs/draft_0.5m,runs/draft_2m]' \
      texts='{"own": "", "verse": "FILE"}'

Drafts of one target (`experiment=distill_draft`) on the texts of several domains, by name: a file,
or "" for the run's own held-out text. Of each draft, `cost` is its seconds for a token, alone, in
those of the target; `acceptance` the mean of sum_v min(p, q) over the target's own text, the share
of its guesses that rejection sampling keeps (Leviathan et al. 2023), and `kl` KL(target || draft)
there, in nats. Decoding comes twice, each way at the depth of `depths` that was fastest on texts
before: exact (rejection sampling) and joint (MTAD, lossy: `width`, `threshold`). `speed` is over
plain decoding, with a 95 % bootstrap interval over prompts. Laws are those of `temperature`,
`top_k`, `top_p`, for KL and perplexity of temperature 1 alone.

All take turns in one process, at batch 1; a text's time is its median over rounds, its prompt
included. `drift` is the acceptance of each draft on each domain over that on the first. The last
line is JSON.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtp
from benchmarks.figures import LEVEL, measured
from benchmarks.figures import figures as way_figures
from benchmarks.joint_measures import against, perplexity
from benchmarks.joint_pictures import draft_panels
from benchmarks.joint_ways import EXACT, JOINT, JointConfig, prepare
from benchmarks.pictures import drawn
from benchmarks.record import launch, quicken, record
from benchmarks.ways import PLAIN, Setting, Way, race
from mtp.decode.drafters import BeamModel, DraftModel
from mtp.divergence import forward_kl
from mtp.run import find_device

QUICK: dict[str, Any] = {"depths": [4], "prompts": 6, "new_tokens": 64, "rounds": 2}


@dataclass
class DraftsConfig:
    """precision: of all models. quick: the direction in minutes, in a file of its own."""

    model: str = "runs/bytes8"
    drafts: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=lambda: {"own": ""})
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    width: int = 4
    threshold: float = 0.3
    depths: list[int] = field(default_factory=lambda: [2, 4, 8])
    precision: str = "float32"
    prompts: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 128
    rounds: int = 3
    device: str = "auto"
    quick: bool = False
    name: str = "drafts"

    def __post_init__(self) -> None:
        quicken(self, QUICK)
        for key in ("drafts", "texts"):
            if not getattr(self, key):
                raise ValueError(f"{key}={getattr(self, key)}: give one at least")
        self.setting(self.drafts[0], "")  # refuses what cannot be

    def setting(self, draft: str, text: str) -> JointConfig:
        """What `benchmarks.joint` would be asked for one draft and one domain."""
        shared = set(vars(self)) & set(vars(JointConfig())) - {"quick", "name"}
        words: dict[str, Any] = {key: getattr(self, key) for key in shared}
        more: dict[str, Any] = {"widths": [self.width], "thresholds": [self.threshold]}
        return JointConfig(**words, **more, draft=draft, text=text)


def ways(config: DraftsConfig, setting: Setting, sampling: mtp.Sampling) -> dict[str, Way]:
    """Of one draft."""
    law: dict[str, Any] = {"sampling": sampling}
    words: dict[str, Any] = {
        "depths": tuple(config.depths),
        "guesses": (setting.draft, "read"),
    }
    joint = law | {"rule": "joint", "threshold": config.threshold}
    beams = partial(BeamModel, setting.draft, width=config.width)
    return {
        "exact": Way(EXACT, law | {"rule": "exact"}, partial(DraftModel, setting.draft), **words),
        "joint": Way(JOINT, joint, beams, **words),
    }


@torch.inference_mode()
def agreement(
    setting: Setting, sampling: mtp.Sampling, texts: Iterable[list[int]]
) -> dict[str, float]:
    """How near the draft's laws are to the target's, over the new tokens of the target's texts."""
    shared, divergence = list[Tensor](), list[Tensor]()
    for request, text in zip(setting.measured, texts, strict=True):
        row = torch.tensor([[*request.prompt, *text]])
        new = slice(len(request.prompt) - 1, -1)
        p, q = (
            model(row.to(model.embedding.weight.device))[0, new].double()
            for model in (setting.target, setting.draft)
        )
        divergence.append(forward_kl(q, p))
        shared.append(torch.minimum(sampling.probs(p), sampling.probs(q)).sum(-1))
    return {
        "acceptance": torch.cat(shared).mean().item(),
        "kl": torch.cat(divergence).mean().item(),
    }


def domain(config: DraftsConfig, text: str) -> dict[str, Any]:
    """Draft -> its figures on this text."""
    asked = {draft: config.setting(draft, text) for draft in config.drafts}
    device = find_device(config.device)
    settings = {draft: prepare(one, device) for draft, one in asked.items()}
    sampling = asked[config.drafts[0]].sampling(config.temperature)
    first, plain = settings[config.drafts[0]], Way(EXACT, {"sampling": sampling})
    of_all = {PLAIN: (first, plain)}
    for draft, setting in settings.items():
        of_all[f"{draft}, alone"] = replace(setting, target=setting.draft), plain
        for kind, way in ways(config, setting, sampling).items():
            of_all[f"{draft}, {kind}"] = setting, way
    turns, depths = race(of_all, config.new_tokens, config.rounds)
    found = measured(first, turns)[0]["perplexity"]  # the target is the same in all settings
    base = found[PLAIN]

    def decoding(draft: str, kind: str) -> dict[str, Any]:
        name = f"{draft}, {kind}"
        return {
            "depth": depths[name],
            "speed": against(found[name], base, LEVEL).speed._asdict(),
            **way_figures(*of_all[name], found[name], turns, name, None),
        }

    def figures(draft: str, setting: Setting) -> dict[str, Any]:
        return {
            **agreement(setting, sampling, [spent.text for spent in turns.done[PLAIN]]),
            "cost": found[f"{draft}, alone"].point[1] / base.point[1],
            "parameters": setting.parameters["draft"],
            **{kind: decoding(draft, kind) for kind in ("exact", "joint")},
        }

    return {
        "plain_perplexity": perplexity(base),
        "target_parameters": first.parameters["target"],
        "drafts": {draft: figures(draft, setting) for draft, setting in settings.items()},
    }


def drift(domains: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Draft -> domain -> its acceptance there over that on the first."""
    first, *others = domains
    return {
        draft: {
            name: domains[name]["drafts"][draft]["acceptance"] / here["acceptance"]
            for name in others
        }
        for draft, here in domains[first]["drafts"].items()
    }


def table(domains: Mapping[str, Any]) -> str:
    lines = [
        f"{'':>32} parameters  cost acceptance    KL | exact: depth tokens/forward speed"
        f"{'':>14} | joint: depth tokens/forward speed{'':>14} perplexity (plain)"
    ]
    for name, of_domain in domains.items():
        for draft, f in of_domain["drafts"].items():
            cells = [
                f"{f[kind]['depth']:12} {f[kind]['tokens_per_target_forward']:14.2f} "
                "{mean:5.2f} ({low:.2f} to {high:.2f})".format(**f[kind]["speed"])
                for kind in ("exact", "joint")
            ]
            lines.append(
                f"{f'{name}, {Path(draft).name}':>32} {f['parameters']:10,} {f['cost']:5.2f} "
                f"{f['acceptance']:10.3f} {f['kl']:5.2f} | "
                + " | ".join(cells)
                + f" {f['joint']['perplexity']:10.2f} ({of_domain['plain_perplexity']:.2f})"
            )
    return "\n".join(lines)


def run(config: DraftsConfig) -> dict[str, Any]:
    load = os.getloadavg()[0]
    if find_device(config.device).type == "cpu":
        torch.set_num_threads(1)
    domains = {name: domain(config, text) for name, text in config.texts.items()}
    print(table(domains))
    line = {
        "best": {name: best(of_domain["drafts"]) for name, of_domain in domains.items()},
        "drift": drift(domains),
    }
    path = record(config.name, line | {"domains": domains, "load_before": round(load, 2)}, config)
    drawn(draft_panels, domains, path.with_suffix(".png"))
    return line


def best(drafts: Mapping[str, Any]) -> dict[str, Any]:
    """Rule -> the draft that was fastest under it."""

    def fastest(kind: str) -> str:
        return max(drafts, key=lambda draft: drafts[draft][kind]["speed"]["mean"])

    return {
        kind: {"draft": fastest(kind), **drafts[fastest(kind)][kind]["speed"]}
        for kind in ("exact", "joint")
    }


if __name__ == "__main__":
    launch(DraftsConfig, run)
