"""The benchmark of drafts: acceptance is that of the laws, a draft that is its target loses
nothing, and a toy run records all of it.
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import a_run, tiny

import mtp
from benchmarks import drafts
from benchmarks.drafts import DraftsConfig, agreement, drift
from benchmarks.ways import PROBED, Setting


def a_setting(draft, law):
    target = tiny(gain=1.5)
    requests = [mtp.Request([3, 1, 4, 1 + i], 8, i) for i in range(PROBED + 2)]
    setting = Setting(target, draft or target, {}, requests)
    return setting, [mtp.generate(target, [r], sampling=law)[0].tokens for r in setting.measured]


def test_acceptance_and_divergence_are_those_of_the_laws():
    law = mtp.Sampling(0.8, top_k=5)
    setting, texts = a_setting(tiny(seed=1, gain=1.5), law)
    kept, nats = [], []
    for request, text in zip(setting.measured, texts, strict=True):
        for at, _ in enumerate(text):
            known = torch.tensor([[*request.prompt, *text[:at]]])
            with torch.no_grad():
                p, q = (m(known)[0, -1].double() for m in (setting.target, setting.draft))
            kept.append(sum(map(min, law.probs(p).tolist(), law.probs(q).tolist())))
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            nats.append((p.exp() * (p - q)).sum().item())
    found = agreement(setting, law, texts)
    assert 0.01 < found["acceptance"] < 0.99
    assert found["acceptance"] == pytest.approx(sum(kept) / len(kept), abs=1e-5)
    assert found["kl"] == pytest.approx(sum(nats) / len(nats), abs=1e-4)


def test_a_target_is_its_own_best_draft():
    setting, texts = a_setting(None, mtp.Sampling(1.0))
    assert agreement(setting, mtp.Sampling(1.0), texts) == pytest.approx(
        {"acceptance": 1, "kl": 0}, abs=1e-6
    )


def test_drift_is_against_the_first_domain():
    def of(*kept):
        return {"drafts": dict(zip("ab", ({"acceptance": x} for x in kept), strict=True))}

    found = drift({"own": of(0.8, 0.5), "verse": of(0.4, 0.5)})
    assert found == {"a": {"verse": 0.5}, "b": {"verse": 1.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("target", 0), ("small", 1), ("same", 0)):
        a_run(folder / name, seed=seed, gain=1.5)
    (folder / "own.txt").write_text("one and two and three are six. " * 40)
    (folder / "verse.txt").write_text("So long lives this, and this gives life. " * 40)
    return folder


def toy(folder, **words):
    texts = {name: str(folder / f"{name}.txt") for name in ("own", "verse")}
    few = {
        "prompts": 2,
        "prompt_tokens": 8,
        "new_tokens": 6,
        "rounds": 1,
        "depths": [2],
        "width": 2,
    }
    models = [str(folder / name) for name in ("small", "same")]
    config = DraftsConfig(str(folder / "target"), models, texts, device="cpu", **few)
    return replace(config, name=str(folder / "found"), **words)


def test_all_drafts_are_measured_on_all_domains(folder, capsys):
    line = json.loads(json.dumps(drafts.run(toy(folder))))
    kept = json.loads((folder / "found.json").read_text())["values"]
    assert (folder / "found.png").stat().st_size > 0
    small, same = (str(folder / name) for name in ("small", "same"))
    for name in ("own", "verse"):
        found = kept["domains"][name]["drafts"]
        assert found[same]["acceptance"] == pytest.approx(1, abs=1e-6)
        assert found[small]["acceptance"] < 0.9
        assert found[same]["exact"]["tokens_per_target_forward"] > 2
    assert line["drift"][same]["verse"] == pytest.approx(1, abs=1e-6)
    assert set(line["best"]) == {"own", "verse"}
    assert "verse, small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"drafts": []}, r"drafts=\[\]: give one at least"),
        ({"texts": {}}, r"texts=\{\}: give one at least"),
        ({"threshold": 2.0}, "threshold=2.0"),
        ({"depths": [0]}, r"depths=\[0\]: all must be at least 1"),
    ],
)
def test_words_that_mean_nothing_are_refused(folder, words, message):
    with pytest.raises(ValueError, match=message):
        toy(folder, **words)
