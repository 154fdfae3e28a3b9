"""Benchmarks are the published ones or refused; prompts, cuts and programs are what they say."""

import gzip
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, tiny

from mtp.evaluate.code import (
    SOURCES,
    SPLITS,
    Benchmark,
    Problem,
    check_references,
    completion_text,
    cut,
    load_benchmark,
    mbpp_problems,
    reference_bits,
    score_by,
)
from mtp.evaluate.sandbox import Limits, Sandbox
from mtp.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece

needs_data = pytest.mark.skipif(not (DATA / "mbpp").is_dir(), reason="needs MTP_TEST_DATA")
COUNTS = {
    "mbpp": {"test": 500, "validation": 90, "train": 374, "prompt": 10, "all": 974},
    "mbpp_sanitized": {"test": 257, "validation": 43, "train": 120, "prompt": 7, "all": 427},
}
FORMS = [(name, form) for name, source in SOURCES.items() for form in source.forms]
HEAD = 'def double(x):\n    """Twice x."""\n'
HUMANEVAL_ROW = {
    "task_id": "HumanEval/0",
    "prompt": HEAD,
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}


def mbpp_row(number):
    name = f"add_{number}"
    first = "zero" if number == 12 else 0  # of its setup code
    return {
        "task_id": number,
        "text": f"Add {number}.",
        "code": f"def {name}(x):\r\n    return x + {number}",
        "test_setup_code": "one = 1\r\nzero = 0" if number == 12 else "",
        "test_list": [f"assert {name}({x}) == {number + i}" for i, x in enumerate([first, 1, 2])],
    }


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: gives whatever parts a test puts into it, or raises."""
    asked = SimpleNamespace(parts={}, error=None, calls=[])

    def load_dataset(name, config, revision):
        asked.calls.append((name, config, revision))
        if asked.error:
            raise asked.error
        return asked.parts

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name, source in SOURCES.items():
        rows = 1 if name == "humaneval" else 6
        monkeypatch.setitem(SOURCES, name, source._replace(rows=rows))
    return asked


@pytest.fixture
def toy(hub):
    def load(name, **words):
        rows = {n: [mbpp_row(n)] for n in (601, 11, 2, 3, 4, 12)}
        hub.parts = {"test": [HUMANEVAL_ROW]} if name == "humaneval" else rows
        return load_benchmark(name, **words)

    return load


class Runner:
    """Runs a program in a fresh interpreter, without any protection."""

    def run_all(self, programs):
        for program in programs:
            done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True)
            yield SimpleNamespace(verdict="failed" if done.returncode else "passed")


# Which problems.


@needs_data
@pytest.mark.parametrize("name", COUNTS)
def test_mbpp_has_its_published_splits_and_says_which(name):
    for split, count in COUNTS[name].items():
        benchmark = load_benchmark(name, split, path=DATA)
        numbers = [int(p.task_id.removeprefix("Mbpp/")) for p in benchmark.problems]
        assert len(numbers) == count and numbers == sorted(set(numbers) & set(SPLITS[split]))
        assert f"split {split}, {count} problems, 3shot form" in benchmark.says


@needs_data
def test_humaneval_has_its_164_problems():
    benchmark = load_benchmark("humaneval", path=DATA)
    tasks = [p.task_id for p in benchmark.problems]
    assert tasks == [f"HumanEval/{i}" for i in range(164)]
    assert "HumanEval, split test, 164 problems, completion form" in benchmark.says


@needs_data
@pytest.mark.parametrize("name", SOURCES)
def test_file_folder_and_hub_give_the_same_problems(name, monkeypatch):
    source = SOURCES[name]
    file = DATA / source.file
    problems = load_benchmark(name, path=file).problems
    assert problems == load_benchmark(name, path=DATA).problems
    assert problems == load_benchmark(name, path=file.parent).problems
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    rows = json.loads(text) if file.suffix == ".json" else list(map(json.loads, text.splitlines()))
    parts = {"test": rows[5:], "train": rows[:5]}
    module = SimpleNamespace(load_dataset=lambda *_, **__: parts)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert {p.task_id: p for p in load_benchmark(name).problems} == {p.task_id: p for p in problems}


@needs_data
def test_line_ends_are_made_plain_and_the_benchmark_says_so():
    full, sanitized = (load_benchmark(name, "all", path=DATA) for name in COUNTS)
    texts = [text for p in full.problems for text in (p.prompt, p.reference, p.tests)]
    assert not any("\r\n" in text for text in texts)
    assert "CRLF made LF in 972 rows" in full.says
    assert "line ends as published" in sanitized.says


def test_the_hub_is_asked_for_a_fixed_revision_and_problems_come_in_order(toy, hub):
    benchmark = toy("mbpp", split="all")
    assert [p.task_id for p in benchmark.problems] == [f"Mbpp/{i}" for i in (2, 3, 4, 11, 12, 601)]
    ((name, config, revision),) = hub.calls
    assert config == "full" and len(revision) == 40
    assert f"{name} at {revision[:12]}" in benchmark.says


# Bad input.


@pytest.mark.parametrize(
    "words, message",
    [
        ({"name": "humanevil"}, "benchmark='humanevil': allowed: humaneval, mbpp, mbpp_sanitized"),
        ({"name": "humaneval", "split": "train"}, "split='train': allowed: test"),
        ({"name": "mbpp", "split": "dev"}, "split='dev': allowed: test, validation, train, prompt"),
        ({"name": "mbpp", "form": "chat"}, "form='chat': allowed: 3shot, docstring"),
        ({"name": "mbpp", "path": "/no/where"}, "MBPP .full. is neither .*/no/where/mbpp/mbpp.js"),
    ],
)
def test_unknown_words_and_missing_files_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        load_benchmark(**words)


@pytest.mark.parametrize("name", SOURCES)
def test_another_file_is_refused_by_its_hash(name, tmp_path):
    file = tmp_path / SOURCES[name].file.split("/")[1]
    file.write_bytes(b"[]")
    with pytest.raises(
        ValueError, match=rf"{file.name}.*sha256 is 4f53.*expected {SOURCES[name][2]}"
    ):
        load_benchmark(name, path=tmp_path)


def test_a_hub_that_does_not_answer_is_one_clear_message(hub):
    hub.error = ConnectionError("no route")
    with pytest.raises(
        ValueError, match="openai_humaneval.*no route.*give path.*HumanEval.jsonl.gz"
    ):
        load_benchmark("humaneval")


def test_other_data_on_the_hub_is_refused(hub):
    hub.parts = {"test": [HUMANEVAL_ROW] * 2}
    with pytest.raises(ValueError, match="has 2 rows, HumanEval has 1"):
        load_benchmark("humaneval")


def test_without_the_package_datasets_one_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install.*or give path"):
        load_benchmark("mbpp")


# Prompts.


def test_mbpp_three_shots_is_the_wording_of_its_authors(toy):
    (problem, _) = toy("mbpp").problems

    def block(n):
        return (
            "You are an expert Python programmer, and here is your task: "
            f"Add {n}. Your code should pass these tests:\n\n"
            + "\n".join(f"assert add_{n}({i}) == {n + i}" for i in range(3))
            + "\n[BEGIN]\n"
        )

    shots = [f"{block(n)}def add_{n}(x):\n    return x + {n}\n[DONE]\n\n" for n in (2, 3, 4)]
    assert problem.prompt == "".join(shots) + block(11)
    assert problem.stops == ("[DONE]",)


def test_mbpp_docstring_shows_one_test_and_stays_in_the_program(toy):
    (problem, _) = toy("mbpp", form="docstring").problems
    assert problem.prompt == '"""\nAdd 11.\nassert add_11(0) == 11\n"""\n'
    assert problem.program("x = 1").startswith(problem.prompt + "x = 1\n")


def test_rows_of_ones_own_in_mbpps_schema_are_problems_too():
    row = {key: mbpp_row(5)[key] for key in ("text", "code", "test_list")} | {"task_id": "own/5"}
    (problem,) = mbpp_problems([row], "3shot", shots=())
    assert problem.task_id == "own/5" and problem.prompt.startswith("You are an expert")
    assert [o.verdict for o in Runner().run_all([problem.program(row["code"])])] == ["passed"]
    with pytest.raises(ValueError, match="form='zeroshot': allowed: 3shot, docstring"):
        mbpp_problems([row], "zeroshot", shots=())


@needs_data
def test_the_sanitized_set_shows_its_own_shots_and_all_tests():
    problems = load_benchmark("mbpp_sanitized", "all", path=DATA).problems
    assert "Write a function to find the shared elements" in problems[-1].prompt
    tests = [p.prompt.rsplit("tests:\n\n", 1)[1].count("\n") - 1 for p in problems]
    assert {min(tests), max(tests)} == {3, 7}  # assertions: each is one line


def test_humaneval_completion_is_the_bare_head(toy):
    (problem,) = toy("humaneval").problems
    assert problem.prompt == problem.prefix == HEAD
    assert problem.stops == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def test_humaneval_asks_in_the_models_own_chat_format(toy):
    question = (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{HEAD}\n```\n"
    )
    opened = f"<|user|>\n{question}\n<|assistant|>\nHere is the completed function:\n```python\n"
    (chat,), (instruct,) = (toy("humaneval", form=f).problems for f in ("chat", "instruct"))
    assert chat.prompt == opened and instruct.prompt == f"{opened}{HEAD}\n"
    (other,) = toy("humaneval", form="chat", template=lambda q: f"[{len(q)}]").problems
    assert other.prompt == f"[{len(question)}]Here is the completed function:\n```python\n"


def test_a_chat_answer_may_leave_out_the_heads_imports_but_not_the_function(toy):
    (problem,) = toy("humaneval", form="chat").problems
    answers = ["def double(x):\n    return x + x\n", "def other(x): ...\n"]
    programs = [problem.program(answer) for answer in answers]
    assert [outcome.verdict for outcome in Runner().run_all(programs)] == ["passed", "failed"]


# Completions.


def test_completions_are_cut_at_the_first_stop_wherever_tokens_end():
    text = "    return x\n\ndef g():\nclass A"
    assert cut(text, ("\nclass", "\ndef")) == "    return x\n"
    assert cut(text, ("[DONE]",)) == text


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Models that were trained as most are, with a dropped first space, and as ours are."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    texts = ["def double(x):\n    return 2 * x\n", "    if x:\n        y = 1\n"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "common"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return {
        "common": SentencePieceTokenizer(folder / "common.model"),
        "ours": train_sentencepiece(texts, folder / "ours.model", vocab_size=290),
        "bytes": ByteTokenizer(),
    }


@pytest.mark.parametrize("kind", ["common", "ours", "bytes"])
def test_no_leading_space_is_lost(kind, pieces):
    tokenizer, body = pieces[kind], "    return 2 * x\n"
    prompt, whole = tokenizer.encode(HEAD), tokenizer.encode(HEAD + body)
    assert whole[: len(prompt)] == prompt
    ids = whole[len(prompt) :]
    assert completion_text(tokenizer, prompt, [*ids, tokenizer.end_id]) == body
    if kind == "common":
        assert tokenizer.decode(ids) == body[1:], "the trap is gone: is the test still needed?"


# References.


@pytest.mark.parametrize("name, form", FORMS)
def test_references_of_toys_pass_and_wrong_ones_are_told(name, form, toy):
    benchmark = toy(name, form=form)
    assert check_references(benchmark, Runner()) == {}
    first, *rest = benchmark.problems
    wrong = Problem(**{**vars(first), "reference": "    return None\n"})
    broken = Benchmark(name, benchmark.says, (wrong, *rest))
    assert check_references(broken, Runner()) == {first.task_id: "failed"}


@needs_data
@pytest.mark.parametrize("name, form", FORMS)
def test_stop_rules_cut_no_reference_but_one(name, form):
    problems = load_benchmark(name, SOURCES[name].splits[-1], form, DATA).problems
    changed = [p.task_id for p in problems if cut(p.reference, p.stops) != p.reference]
    assert changed == (["Mbpp/342"] if (name, form) == ("mbpp", "docstring") else [])


@needs_data
@pytest.mark.parametrize(
    "name, count", [("humaneval", 164), ("mbpp", 974), ("mbpp_sanitized", 427)]
)
def test_all_published_references_pass(name, count):
    benchmark = load_benchmark(name, SOURCES[name].splits[-1], path=DATA)
    assert len(benchmark.problems) == count
    patient = Sandbox(Limits(seconds=100.0), level="weak")  # the machine may be busy
    assert check_references(benchmark, patient) == {}


# Bits.


def toy_benchmark(prompt="p: ", reference="é = 1"):
    return Benchmark("toy", "", (Problem("toy/0", prompt, (), reference, "", ""),))


def test_bits_of_a_model_that_knows_nothing_are_those_of_its_vocabulary():
    def uniform(ids):
        return torch.zeros(*ids.shape, 257)

    coded = reference_bits(toy_benchmark(), ByteTokenizer(), score_by(uniform))["toy/0"]
    assert coded.bytes == 6
    assert coded.bits == pytest.approx(6 * math.log2(257))


def test_a_score_is_the_sum_of_its_parts():
    score = score_by(tiny(vocab_size=257))
    ids = list(b"def f(x): return x")
    assert score(ids[:3], ids[3:]) == pytest.approx(
        sum(score(ids[:i], ids[i : i + 1]) for i in range(3, len(ids)))
    )


def test_a_token_across_the_seam_is_charged_whole():
    class Pairs:
        def encode(self, text):
            return [text[i : i + 2] for i in range(0, len(text), 2)]

    told = []
    reference_bits(toy_benchmark("abc", "de"), Pairs(), lambda *x: told.append(x) or 0.0)
    assert told == [(["ab"], ["cd", "e"])]
