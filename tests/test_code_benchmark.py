"""The comparison on code, end to end: what it says is what was drawn, once, by whom it says."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import tiny

import mtp
from benchmarks.code import UNINDENTED, CodeConfig, micro_benchmark, run
from benchmarks.code_samples import Drawing, text_of
from benchmarks.record import parse
from benchmarks.subjects import subject
from mtp.decode.contract import Completion
from mtp.evaluate import micro
from mtp.evaluate.code import cut
from mtp.evaluate.samples import SampleFile, read_samples
from mtp.evaluate.sandbox import Sandbox
from mtp.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent


def task(number, name, answer):
    checks = [f"assert {name}() == {answer}"]
    code = f"def {name}():\n    return {answer}"
    words = {"task_id": number, "level": 1 + number // 3, "text": f"Give {answer}."}
    return {**words, "code": code, "test_list": checks}


TASKS = [task(1, "one", 1), task(2, "two", 2), task(3, "three", 3)]
LEARNED = [*TASKS[:2], {**TASKS[2], "code": "def three():\n    return 4"}]
FIRST = "Micro/level 1/1"


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr(micro, "tasks", lambda split: TASKS)


def trained(n, steps):
    """A model of bytes that knows two of the tasks by heart, and the third one wrong."""
    model = tiny(vocab_size=257, n_future_tokens=n, n_layers=2 + n, dim=32, max_seq_len=160).float()
    texts = [micro.prompt(t) + micro.completion(t) for t in LEARNED]
    rows = [[*text.encode(), *[256] * 90][: 90 + n] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss, _ = mtp.mtp_loss(model, torch.tensor(rows))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, n, steps in (("four", 3, 120), ("raw", 1, 0)):
        mtp.save(trained(n, steps), folder / name, ByteTokenizer())
    return folder


@pytest.fixture
def config(models, tmp_path):
    """A comparison of both, in a sandbox that any host grants."""
    return CodeConfig(
        models=f"[{models / 'four'},{models / 'raw'}]",
        **{"temperatures": "[0,0.3]", "n": 2, "ks": "[1,2]", "new_tokens": 30, "sandbox": "weak"},
        **{"exact": True, "device": "cpu", "batch": 4},
        **{"samples": str(tmp_path / "samples"), "name": str(tmp_path / "result")},
    )


def samples_of(config):
    return {file.name: read_samples(file)[1] for file in sorted(config.folder.glob("*.jsonl"))}


def cell(values, label, temperature=0.0):
    (found,) = (
        c for c in values["cells"] if (c["label"], c["temperature"]) == (label, temperature)
    )
    return found


# The whole.


def test_a_comparison_says_what_every_model_solves(config, tmp_path, capsys):
    values = run(config)
    assert [c["label"] for c in values["cells"]] == [
        *["four"] * 2,
        *["four, heads"] * 2,
        *["raw"] * 2,
    ]
    four, drafted, raw = (cell(values, name) for name in ("four", "four, heads", "raw"))
    assert four["pass"][0]["mean"] == drafted["pass"][0]["mean"] == pytest.approx(2 / 3)
    assert four["pass"][0]["low"] < 2 / 3 < four["pass"][0]["high"]
    assert raw["pass"][0]["mean"] == 0 and raw["ran_into_limit"] == 3 and raw["tokens"] == 90
    assert four["verdicts"] == {"passed": 2, "failed": 1} and four["ran_into_limit"] == 0
    assert four["parts"] == {"Micro/level 1": 1.0, "Micro/level 2": 0.0}
    assert "pass@2 needs 2 samples" in four["pass"][1]["missing"]
    assert cell(values, "four", 0.3)["pass"][1]["k"] == 2
    assert four["acceptance_length"] == 1 < drafted["acceptance_length"] <= 3
    assert four["bits_per_byte"] == drafted["bits_per_byte"] < raw["bits_per_byte"]
    (less,) = raw["less_first"]
    assert raw["against"] == "four" and less["mean"] == pytest.approx(-2 / 3)
    assert (less["better"], less["worse"], less["p"]) == (0, 2, 0.5)
    assert [(e["model"], e["temperature"], e["samples"]) for e in values["exact"]] == [
        ("four", 0.0, 3),
        ("four", 0.3, 6),
    ]
    assert all(e["identical"] and not e["apart"] for e in values["exact"])
    assert {(b["label"], b["k"]) for b in values["best"]} == {
        (label, 1) for label in ("four", "four, heads", "raw")
    }
    assert "pass@2 needs 2 samples, a problem gets 1" in capsys.readouterr().err


def test_what_is_written_says_data_and_sandbox_and_holds_every_sample(config, tmp_path):
    pytest.importorskip("matplotlib")
    values = run(config)
    recorded = json.loads((tmp_path / "result.json").read_text())
    assert recorded["values"] == json.loads(json.dumps(values)) and recorded["config"]["n"] == 2
    text = (tmp_path / "result.md").read_text()
    assert "Micro-programs, split test, 3 problems, completion form, sha256" in text
    assert "sandbox weak: " in text and "n = 1 is too few" in text
    assert "| four, heads | 0.3 | 6 of 6 | - |" in text
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    export = config.folder / "export" / "four-none-0.jsonl"
    lines = [json.loads(line) for line in export.read_text().splitlines()]
    assert lines[0] == {"task_id": FIRST, "completion": "    return 1\n"}
    assert sum(map(len, samples_of(config).values())) == 3 * (3 + 6)


def test_a_stopped_comparison_goes_on_to_the_same_table(config, tmp_path, monkeypatch):
    whole = run(config)
    left, append = count(), SampleFile.append

    def stops(self, sample):
        if next(left) == 13:
            raise KeyboardInterrupt
        append(self, sample)

    again = replace(config, name=str(tmp_path / "again"))
    monkeypatch.setattr(SampleFile, "append", stops)
    with pytest.raises(KeyboardInterrupt):
        run(again)
    before = samples_of(again)
    assert sum(map(len, before.values())) == 13
    monkeypatch.setattr(SampleFile, "append", append)
    assert run(again) == whole
    for name, samples in before.items():
        assert samples_of(again)[name][: len(samples)] == samples


def test_more_samples_are_added_to_those_there_are(config):
    one = replace(config, n=1, temperatures="0.3", ks="1", exact=False)
    run(one)
    before = samples_of(one)
    run(replace(one, n=3))
    for name, samples in samples_of(one).items():
        assert samples[:3] == before[name] and len(samples) == 9
        assert len({s.seed for s in samples}) == 9
    assert cell(run(one), "four", 0.3)["verdicts"]["passed"] <= 3


def test_samples_that_differ_are_counted_and_named(config):
    run(config)
    file = config.folder / "four-heads-0.jsonl"
    (ids,) = {s.details["ids"] for s in read_samples(file)[1] if s.task_id == FIRST}
    file.write_text(file.read_text().replace(ids, "0" * 16))
    exact, other = run(config)["exact"]
    assert (exact["same"], exact["identical"], exact["apart"]) == (2, False, [f"{FIRST} 0"])
    assert other["identical"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"new_tokens": 9}, {"precision": "bfloat16"}])
def test_samples_of_another_run_are_refused_and_kept(config, change):
    few = replace(config, temperatures="0", exact=False)
    run(few)
    before = samples_of(few)
    with pytest.raises(ValueError, match=f"another run.*{next(iter(change))}"):
        run(replace(few, **change))
    assert samples_of(few) == before


def test_other_weights_of_the_same_name_are_another_run(config, models, tmp_path):
    few = replace(config, models=str(models / "raw"), exact=False)
    run(few)
    mtp.save(trained(1, 1), tmp_path / "raw", ByteTokenizer())
    with pytest.raises(ValueError, match="another run.*model"):
        run(replace(few, models=str(tmp_path / "raw")))


def test_a_prompt_longer_than_the_context_fails_and_is_named(config, tmp_path):
    length = len(micro.prompt(TASKS[1]))  # the third one's is longer
    mtp.save(tiny(vocab_size=257, max_seq_len=length + 2), tmp_path / "short", ByteTokenizer())
    both = f"{config.models.strip('[]').split(',')[0]},{tmp_path / 'short'}"
    values = run(replace(config, models=both, exact=False, temperatures="0"))
    short = cell(values, "short")
    assert short["prompt_too_long"] == ["Micro/level 2/3"] and short["problems"] == 3
    assert short["verdicts"] == {"failed": 2, "prompt_too_long": 1} and short["tokens"] <= 4
    assert short["bits_per_byte"] is None and short["references_scored"] == 0


def test_a_part_of_the_problems_is_spread_evenly_and_said(config):
    few = replace(config, problems=2, temperatures="0", exact=False)
    values = run(few)
    assert values["benchmark"].endswith("; 2 of these, evenly chosen")
    assert [s.task_id for s in samples_of(few)["raw-none-0.jsonl"]] == [FIRST, "Micro/level 1/2"]
    assert len(samples_of(few)["raw-none-0.jsonl"]) == 2
    assert run(replace(few, first=2, problems=0))["benchmark"].endswith("; the first 2")


def test_a_sandbox_that_fails_ends_the_run_and_judges_nothing(config, monkeypatch):
    failed = type("Outcome", (), {"verdict": "harness_error", "output": "no space"})
    monkeypatch.setattr(Sandbox, "run_all", lambda self, programs: [failed for _ in programs])
    with pytest.raises(OSError, match="the sandbox has stopped working: no space"):
        run(config)
    assert not any(samples_of(config).values())


def test_references_are_run_without_a_model(monkeypatch):
    config = CodeConfig(references=True, sandbox="weak")
    found = run(config)
    assert (found["references"], found["passed"], found["not_passed"]) == (3, 3, {})
    monkeypatch.setattr(micro, "completion", lambda task: "    return 1\n")
    found = run(config)
    assert found["passed"] == 1 and set(found["not_passed"].values()) == {"failed"}


# Words.


def test_a_body_ends_before_the_first_line_without_indent():
    body = "    if x:\n        return 1\n    return 2"
    for rest in ("\ndef f():\n", "\nprint(1)", "\n@x", "\n\n    y", "\n# z", "\n"):
        assert cut(body + rest, UNINDENTED).rstrip("\n") == body


def test_a_completion_is_cut_where_its_stop_begins():
    problem = replace(micro_benchmark("test", None).problems[0], prompt="é: ")
    ids = list(problem.prompt.encode())
    drawing = Drawing(problem, 0, 0, ids, Completion(list(b"    return 1\nd")))
    assert text_of(drawing, ByteTokenizer()) == "    return 1"


def test_quick_is_a_small_slice_beside_the_whole():
    config = parse(CodeConfig, ["models=[a, b]", "quick=true", "n=7", "name=x"])
    assert (config.problems, config.n, config.temperatures, config.ks) == (60, 1, "0", "1")
    assert config.name == "x_quick" and config.places == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"benchmark": "apps"}, "benchmark='apps': allowed: micro, humaneval, mbpp"),
        ({"drafter": "model"}, "drafter='model': allowed: none, heads, lookup"),
        ({"sandbox": "off"}, "sandbox='off': allowed: strong, weak"),
        ({"ks": "[0,1]"}, r"ks='\[0,1\]': allowed: numbers from 1 on"),
        ({"temperatures": "hot"}, "temperatures='hot': allowed: numbers from 0 on"),
        ({"n": 0}, "n=0: must be at least 1"),
        ({"models": "[]"}, r"models='\[\]': give folders"),
        ({"models": "[a,a]"}, "none twice"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        CodeConfig(**{"models": "a", **words})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"form": "chat"}, "form='chat': allowed: completion"),
        ({"benchmark": "humaneval", "path": "/none"}, "path: HumanEval is neither a file"),
        ({"benchmark": "mbpp", "split": "dev"}, "split='dev': allowed: test"),
        ({"models": "/none"}, "/none is no folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_drawn(config, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(replace(config, **words))
    assert not config.folder.exists()


def test_a_checkpoint_without_its_tokenizer_is_refused_first(config, tmp_path):
    mtp.save(tiny(), tmp_path / "mute")
    with pytest.raises(ValueError, match="mute.*allowed are the word 'bytes'"):
        run(replace(config, models=f"{config.models.strip('[]')},{tmp_path / 'mute'}"))
    assert not config.folder.exists()


def test_the_command_runs_by_its_path_and_by_its_name(tmp_path):
    for words in (["benchmarks/code.py"], ["-m", "benchmarks.code"]):
        done = subprocess.run(
            [sys.executable, *words, "models=/none", "sandbox=weak"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("error: /none is no folder") and "\n" not in done.stderr[:-1]


# Models of transformers.


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder with a random Llama and a tokenizer whose texts begin with a sign of its own."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("theirs") / "llama"
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "<s>{{ messages[0].content }}|"
    fast.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        **shape, num_attention_heads=2, vocab_size=258, max_position_embeddings=160
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_folder_of_transformers_is_compared_too(config, theirs):
    both = f"{config.models.strip('[]')},{theirs}"
    values = run(replace(config, models=both, temperatures="0", drafter="lookup"))
    assert cell(values, "llama")["ran_into_limit"] + cell(values, "llama")["verdicts"]["failed"] > 0
    assert cell(values, "llama")["bits_per_byte"] > 0
    assert [e["model"] for e in values["exact"]] == ["four", "raw", "llama"]
    assert all(e["identical"] for e in values["exact"])


def test_their_tokenizers_keep_spaces_and_write_what_begins_a_text_once(theirs):
    plain, chat = subject(str(theirs)), subject(str(theirs), chat=True)
    ids = plain.tokenizer.encode("  x , y")
    assert ids[0] == 0 and plain.tokenizer.decode([*ids, 1]) == "  x , y"
    assert chat.template("Why?") == "<s>Why?|"
    assert chat.tokenizer.encode(chat.template("Why?"))[:2] != [0, 0]
    assert 1 in plain.ends and not plain.heads


def test_a_model_that_cannot_be_asked_or_read_is_refused(theirs, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "mute").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "mute" / name).write_bytes((theirs / name).read_bytes())
    with pytest.raises(ValueError, match="mute holds no tokenizer, such as tokenizer.json"):
        subject(str(tmp_path / "mute"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / name).write_bytes((theirs / name).read_bytes())
    with pytest.raises(ValueError, match="has no chat template"):
        subject(str(tmp_path / "mute"), chat=True)
