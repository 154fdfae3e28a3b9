"""The benchmark of joint decoding: its ways sample from one law, what they cost is counted, and a
toy run records all of it.
"""

import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import a_run, tiny

import mtp
from benchmarks import energy, joint
from benchmarks.beam_search import beam_search
from benchmarks.figures import costs, losses
from benchmarks.figures import energy as energy_figures
from benchmarks.joint_ways import JointConfig, prepare, ways
from benchmarks.tasks import TASKS, Problem
from benchmarks.ways import PROBED, Setting, Spent, Way, contender, fastest_depth
from mtp.decode.joint import block_law
from mtp.tokenizer import ByteTokenizer

PROMPT = [3, 1, 4, 1, 5]
FAMILIES = ("exact", "beam search", "joint")
KEYS = {
    *("front", "best_exact", "best_mtad_at_no_worse_quality", "tokens_per_target_forward_ratio"),
    *("tokens_per_second_ratio", "above_exact_curve", "energy_measured"),
}


# Beam search.


@pytest.mark.parametrize("cut", [mtp.Sampling(1.0), mtp.Sampling(0.7, top_k=3)], ids=str)
def test_a_beam_that_holds_everything_finds_the_most_probable_text(cut):
    """By enumeration; token 1 ends a text."""
    model, new = tiny(gain=1.5, vocab_size=4), 4

    def walk(known, prompt, text, mass):
        law = cut.probs(model(torch.tensor([[*prompt, *text]]))[0, -1]).tolist()
        for token, p in enumerate(law):
            more = (*text, token)
            if token == 1 or len(more) == new:
                known[more] = mass * p
            else:
                walk(known, prompt, more, mass * p)

    for prompt in ([3, 2], [2, 2], [0, 3, 0], [0, 2]):
        known: dict[tuple[int, ...], float] = {}
        with torch.inference_mode():
            walk(known, prompt, (), 1.0)
        request = mtp.Request(prompt, new, stop=mtp.stop_at(1))
        best = max(known, key=lambda text: known[text])
        assert beam_search(model, request, 4**3, cut) == list(best)


@pytest.mark.parametrize("width", [1, 4])
def test_beam_search_is_that_of_the_block_law(width):
    """One of them has a cache, whose rows change places here, the other reads everything anew."""
    model = tiny(seed=1, vocab_size=5)
    for first in range(5):
        prompt = [first, 3, 1, 4, 1, 0]
        law = block_law(model, prompt, 8, temperature=0, width=width)
        found = beam_search(model, mtp.Request(prompt, 8), width, mtp.Sampling(1.0))
        assert tuple(found) == next(iter(law))


# Energy and work.


@pytest.fixture
def nvml(monkeypatch):
    """A GPU that draws 300 W by a clock of its own."""
    clock, asked = [0.0], []

    class Error(Exception):
        pass

    def energy_of(handle):
        asked.append(handle)
        return int(clock[0] * 300 * 1000)  # millijoules

    fake = SimpleNamespace(
        NVMLError=Error,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=energy_of,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda number: SimpleNamespace(uuid=f"of-{number}")
    )
    return SimpleNamespace(module=fake, clock=clock, asked=asked)


def test_joules_are_read_off_the_gpu_that_is_used(nvml, monkeypatch):
    counter = energy.energy_counter(torch.device("cuda", 1))
    nvml.clock[0] = 2.0
    assert counter() == 600 and {*nvml.asked} == {"GPU-of-1"}
    assert energy.energy_counter(torch.device("cuda"))() == 600
    monkeypatch.setattr("time.sleep", lambda s: nvml.clock.__setitem__(0, nvml.clock[0] + s))
    monkeypatch.setattr("time.perf_counter", lambda: nvml.clock[0])
    assert energy.idle_watts(counter) == pytest.approx(300)


def test_without_a_counter_nothing_is_measured(nvml, monkeypatch):
    assert energy.energy_counter(torch.device("cpu")) is None

    def refuses(handle):
        raise nvml.module.NVMLError

    nvml.module.nvmlDeviceGetTotalEnergyConsumption = refuses
    assert energy.energy_counter(torch.device("cuda")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.energy_counter(torch.device("cuda")) is None


@pytest.mark.parametrize("overrides", [{}, {"tie_embeddings": True}, {"unembedding": "replicated"}])
def test_parameters_are_those_that_multiply(overrides):
    model = tiny(**overrides)
    parts = [*model.trunk, model.heads.heads[0], model.norm]
    used = sum(p.numel() for part in parts for p in part.parameters())
    assert energy.parameters_of_pass(model) == used + model.output.weights[0].numel()
    head = sum(p.numel() for p in model.heads.heads[1].parameters())
    assert energy.parameters_of_head(model) == head + model.output.weights[0].numel()


def test_a_causal_lm_of_transformers_is_read_and_counted_too():
    transformers = pytest.importorskip("transformers")
    from mtp.interop.huggingface import CausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 13}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, tie_word_embeddings=False, max_position_embeddings=64
    )
    model = CausalLM(transformers.LlamaForCausalLM(config).double())
    whole = sum(p.numel() for p in model.model.parameters())
    assert energy.parameters_of_pass(model) == whole - 13 * 16
    law = block_law(model, PROMPT, 5, temperature=0, width=2)
    with energy.counted(model) as work:
        found = beam_search(model, mtp.Request(PROMPT, 5), 2, mtp.Sampling(1.0))
    assert tuple(found) == next(iter(law))
    assert (work.passes, work.positions) == (5, len(PROMPT) + 4 * 2)


# Ways.

TOY = JointConfig(temperatures=[0.0, 1.0], widths=[1, 2], thresholds=[0.5], depths=[2])


def a_setting(**words):
    target, draft = tiny(gain=1.5), tiny(n_layers=1, n_future_tokens=1, seed=4)
    parameters = {"target": 1000, "draft": 100, "head": 10}
    requests = [mtp.Request([*PROMPT, i], 12, i) for i in range(PROBED + 2)]
    return replace(Setting(target, draft, parameters, requests), **words)


def test_every_way_samples_from_one_law():
    found = ways(a_setting(), TOY)
    for name, way in found.items():
        law = way.words["sampling"]
        assert (law.top_k, law.top_p) == (TOY.top_k, TOY.top_p)
        assert law.temperature == (0 if "T 0" in name else 1)
    families = {family: [n for n, w in found.items() if w.family == family] for family in FAMILIES}
    assert len(families["exact"]) == 2 * (1 + 2 * 3)
    assert families["beam search"] == ["beam search, width 1", "beam search, width 2"]
    assert families["joint"] == [
        *("MTAD, width 1, 0.5", "MTAD of heads, width 1, 0.5"),
        *("MTAD, width 2, 0.5", "MMTAD, width 2, 0.5", "MTAD of heads, width 2, 0.5"),
    ]


def test_what_there_is_not_makes_no_way():
    alone = ways(a_setting(draft=None), TOY)
    assert not [name for name in alone if "draft model" in name or name.startswith(("MTAD,", "MM"))]
    headless = ways(a_setting(target=tiny(n_future_tokens=1)), TOY)
    assert not [name for name in headless if "heads" in name]
    in_turn = ways(a_setting(target=tiny("sequential")), TOY)
    assert [name for name in in_turn if "heads" in name and name.startswith("MTAD")] == []


def test_exact_ways_write_the_text_of_plain_decoding_where_they_must():
    setting = a_setting()
    found = {
        name: contender(setting, way, 2)(setting.measured[0], 12).text
        for name, way in ways(setting, TOY).items()
        if way.family == "exact"
    }
    assert all(text == found["plain, T 0"] for name, text in found.items() if "T 0" in name)
    matches = [text for name, text in found.items() if "match, T 1" in name]
    assert matches == [found["plain, T 1"]] * 2
    assert len(found["plain, T 1"]) == 12 != found["plain, T 0"]


def test_passes_and_positions_are_counted():
    setting = a_setting()
    request, found = setting.measured[0], ways(setting, TOY)
    prompt = len(request.prompt)

    def spent(name):
        done = contender(setting, found[name], 2)(request, 12)
        return done, done.passes - 1  # but for the prompt's

    done, steps = spent("plain, T 1")
    assert (steps, done.positions) == (11, prompt + 11)
    assert (done.guess_passes, done.guess_positions) == (0, 0)
    done, steps = spent("MTAD, width 2, 0.5")
    assert done.positions == prompt + 3 * steps
    assert done.guess_passes == 1 + 2 * steps  # the prompt, and a token deep each
    done, steps = spent("MMTAD, width 2, 0.5")
    assert done.positions == prompt + 5 * steps
    done, steps = spent("MTAD of heads, width 2, 0.5")
    assert done.guess_passes == 1 + steps and done.guess_positions >= 2 * (prompt + steps)
    done, steps = spent("beam search, width 2")
    assert done.positions == prompt + 2 * steps and steps <= 11
    assert "read" not in vars(setting.target) and "guess" not in vars(setting.target)


def test_costs_are_per_new_token_and_leave_out_the_prompts_pass():
    setting, law = a_setting(), {"sampling": mtp.Sampling()}
    done = [Spent([1] * 5, 3, 20, 4, 30, 6.0), Spent([1] * 3, 2, 10, 2, 10, 2.0)]
    found = costs(setting, Way("joint", law, guesses=(setting.draft, "read")), done)
    assert found["tokens_per_target_forward"] == 6 / 3
    assert found["target_forwards_per_token"] == 5 / 8 and found["guesses_per_token"] == 6 / 8
    assert found["operations_per_token"] == 2 * (1000 * 30 + 100 * 40) / 8
    by_heads = costs(setting, Way("joint", law, guesses=(setting.target, "guess")), done)
    assert by_heads["operations_per_token"] == 2 * (1000 * 30 + 10 * 40) / 8
    assert costs(setting, Way("exact", law), done)["operations_per_token"] == 2 * 1000 * 30 / 8
    took = [[9.0, 0.5], [9.0, 1.5]]
    assert energy_figures(done, took, None) == {}
    assert energy_figures(done, took, 2.0) == {
        "joules_per_token": 1.0,
        "joules_per_token_above_idle": 0.5,
    }


def test_a_text_is_charged_with_the_joules_it_took():
    meter = itertools.accumulate(itertools.count(1.0))  # 1, 3, 6, 10
    setting = a_setting(counter=lambda: next(meter))
    plain = ways(setting, TOY)["plain, T 0"]
    assert [contender(setting, plain)(r, 2).joules for r in setting.measured] == [2.0, 4.0]


def test_the_depth_that_was_fastest_before_is_taken(monkeypatch):
    now, seen = [0.0], []

    def fake(setting, way, depth):
        def decoder(request, new):
            now[0] += {2: 3.0, 4: 1.0, 8: 2.0}[depth]
            seen.append(request)
            return SimpleNamespace(tokens=new)

        return decoder

    monkeypatch.setattr("benchmarks.ways.contender", fake)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    setting = a_setting()
    way = ways(setting, replace(TOY, depths=[2, 4, 8]))["MTAD, width 2, 0.5"]
    assert fastest_depth(setting, way, 12) == 4
    assert not any(request in setting.measured for request in seen)
    assert fastest_depth(setting, ways(setting, TOY)["plain, T 0"], 12) is None


# The whole.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs, as training leaves them, of models that were not trained."""
    where = tmp_path_factory.mktemp("joint")
    (where / "text.txt").write_text("a line of many\n" * 40)
    for name, heads in (("target", 3), ("draft", 1)):
        a_run(where / name, where / "text.txt", max_seq_len=1024, n_future_tokens=heads)
    return where


def toy(folder, **words):
    given = {"model": str(folder / "target"), "draft": str(folder / "draft"), "device": "cpu"}
    sizes = {"prompts": 2, "prompt_tokens": 8, "new_tokens": 6, "rounds": 1}
    return replace(TOY, **(given | sizes | words))


def test_the_last_line_answers_and_all_is_recorded(folder, capsys):
    line = json.loads(json.dumps(joint.run(toy(folder, task="sql", name=str(folder / "found")))))
    assert line.keys() == KEYS and line["energy_measured"] is False
    values = json.loads((folder / "found.json").read_text())["values"]
    assert line.items() <= values.items()
    assert {f["family"] for f in values["points"].values()} == {"exact", "beam search", "joint"}
    plain = values["points"]["plain, T 1"]
    assert plain["tokens_per_target_forward"] == 1 and plain["operations_per_token"] > 0
    assert plain["score"] == 0 and len(plain["distinct"]) == 4
    assert plain["seconds_p50"] <= plain["seconds_p95"] and "joules_per_token" not in plain
    match = values["points"]["own heads, match, T 1"]
    assert match["perplexity"] == plain["perplexity"]
    joint_points = [n for n, f in values["points"].items() if f["family"] == "joint"]
    for measure in ("perplexity", "score"):
        assert [*values[measure]["over_curve"]] == joint_points
    best = values["points"][line["best_exact"]["name"]]
    assert best["tokens_per_second"] == max(
        f["tokens_per_second"] for f in values["points"].values() if f["family"] == "exact"
    )
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "above the exact curve" in shown and "[V]" in shown and values["answers"][0] in shown


def test_random_weights_and_held_out_text_will_do_too(folder, monkeypatch):
    few = {"temperatures": [0.0], "widths": [2], "name": str(folder / "few"), "prompts": 1}
    held_out = joint.run(toy(folder, **few))
    assert held_out["best_exact"]["perplexity"] > 1 and "score" not in held_out["best_exact"]
    monkeypatch.setattr("benchmarks.ways.shape", lambda name: tiny().config)
    joint.run(toy(folder, **few, model="toy", draft="toy"))
    assert json.loads((folder / "few.json").read_text())["values"]["random_weights"] is True


def test_a_file_of_text_gives_prompts(folder):
    setting = prepare(toy(folder, text=str(folder / "text.txt")), torch.device("cpu"))
    assert all(bytes(r.prompt) in b"a line of many\n" * 2 for r in setting.requests)
    assert len({r.seed for r in setting.requests}) == len(setting.requests) == PROBED + 2


def test_quick_is_written_beside_the_whole():
    whole, quick = JointConfig(), JointConfig(quick=True)
    assert quick.prompts < whole.prompts and quick.name != whole.name
    assert {*quick.widths} < {*whole.widths} and {*quick.temperatures} <= {*whole.temperatures}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8': allowed are float32, bfloat16"),
        ({"task": "chess"}, "task='chess': allowed are text, sql, docstrings"),
        ({"temperature": 0.0}, "temperature=0.0: joint ways want more"),
        ({"temperatures": [-1.0]}, "temperature=-1.0 must be at least 0"),
        ({"thresholds": [0.5, 2.0]}, "threshold=2.0 must lie in"),
        ({"widths": []}, "widths=.*: give one at least"),
        ({"depths": [0]}, "depths=.*: all must be at least 1"),
        ({"prompts": 0}, "prompts=0: must be at least 1"),
        ({"prompt_tokens": 0}, "prompt_tokens=0: must be at least 1"),
        ({"new_tokens": -1}, "new_tokens=-1: must be at least 1"),
        ({"rounds": 0}, "rounds=0: must be at least 1"),
        ({"task": "sql", "text": "a"}, "text='a': only task=text reads it, not task=sql"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        JointConfig(**words)


def test_models_that_do_not_fit_are_refused(folder, monkeypatch):
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="has no heads that can draft: give draft="):
        prepare(toy(folder, model=str(folder / "draft"), draft=""), device)
    monkeypatch.setattr("benchmarks.ways.shape", lambda name: tiny("sequential").config)
    with pytest.raises(ValueError, match="has heads that read each other's .*: give draft="):
        prepare(toy(folder, model="toy", draft=""), device)
    with pytest.raises(ValueError, match="draft='toy' has another tokenizer than"):
        prepare(toy(folder, draft="toy"), device)
    with pytest.raises(ValueError, match="model='toy' has random weights: task=sql wants"):
        prepare(toy(folder, model="toy", draft="toy", task="sql"), device)
    with pytest.raises(ValueError, match="model='toy' has random weights: text='a' wants"):
        prepare(toy(folder, model="toy", draft="toy", text="a"), device)


def test_a_task_with_fewer_problems_is_refused(folder, monkeypatch):
    monkeypatch.setitem(TASKS, "sql", lambda *_, **words: iter(SHARED))
    with pytest.raises(ValueError, match="prompts=2: task=sql has 2 held-out problems, 3 of which"):
        prepare(toy(folder, task="sql"), torch.device("cpu"))


SHARED = [Problem("a prompt", text, lambda answer, text=text: answer == text) for text in "xy"]


def test_problems_that_share_a_prompt_have_scores_of_their_own():
    requests = [mtp.Request([1], 1)] * (PROBED + 2)
    setting = a_setting(requests=requests, tokenizer=ByteTokenizer(), problems=SHARED)
    setting = replace(setting, target=tiny(vocab_size=257))
    found = losses(setting, {"one": [[ord("x")], [ord("x")]], "other": [[ord("x")], [ord("y")]]})
    assert {name: list(lacking) for name, lacking in found["score"].items()} == {
        "one": [0, 1],
        "other": [0, 0],
    }
