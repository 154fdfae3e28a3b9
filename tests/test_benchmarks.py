"""The benchmarks' own tools: an honest baseline, records that can be read, pictures."""

import json
import re
import sys
from dataclasses import dataclass, field

import pytest
import torch
from conftest import tiny

from benchmarks.bare import (
    Columns,
    bare_loop,
    empty_caches,
    next_latent,
    plain_steps_against_bare,
    ragged,
    verify_cost,
)
from benchmarks.demo_decode import DecodeConfig, held_out_prompts, measure, repetition
from benchmarks.pictures import COLOURS, drawn, heads_page, loss_curve
from benchmarks.record import launch, parse, record
from benchmarks.timing import fastest_threads, ratio, spread
from mtp.decode.contract import Completion, Request
from mtp.decode.loop import generate
from mtp.records import Document
from mtp.tokenizer import ByteTokenizer

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


# The baseline.


@torch.inference_mode()
def bare_text(model, prompt, new):
    return [token for (token,) in bare_loop(model, [prompt], new)]


@pytest.mark.parametrize(
    "overrides",
    [{}, {"n_kv_heads": None}, {"unembedding": "replicated"}, {"n_future_tokens": 1}],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 8])
def test_the_bare_loop_writes_the_greedy_text(overrides, length):
    model = tiny(gain=2.0, **overrides)
    prompt = PROMPT[:length]
    assert bare_text(model, prompt, 40) == generate(model, [Request(prompt, 40)])[0].tokens


def test_the_bare_loop_writes_the_greedy_texts_of_a_batch():
    model, prompts = tiny(gain=2.0), [PROMPT, PROMPT[::-1]]
    with torch.inference_mode():
        texts = list(map(list, zip(*bare_loop(model, prompts, 20), strict=True)))
    assert texts == [c.tokens for c in generate(model, [Request(p, 20) for p in prompts])]


@torch.inference_mode()
def test_verified_rows_of_different_lengths_see_their_own_text_only():
    """Row 1 is verified a slot earlier than row 0."""
    model, tokens = tiny(), torch.tensor([PROMPT, PROMPT[::-1]])
    caches = empty_caches(model, model.next_layers, 2, 8)
    rotation = model.rotary(torch.arange(8))
    next_latent(model, tokens, caches, Columns((slice(None), slice(0, 8)), 8, rotation))
    columns, text = torch.tensor([[10, 11], [12, 10]]), tokens.clone()
    found, _ = next_latent(model, columns, caches, ragged(model, 6, rows=2, width=2))
    for row, start in enumerate((6, 5)):
        text[row, start : start + 2] = columns[row]
        logits = model(text[row : row + 1, : start + 2])[:, start:]
        assert torch.allclose(model.logits(found[row]), logits[0])


def test_the_bare_loop_reads_one_token_per_step(monkeypatch):
    """A slow baseline would flatter every speedup."""
    widths = []
    model = tiny()
    model.embedding.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape))
    bare_text(model, PROMPT, 5)
    assert widths == [(1, len(PROMPT)), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_our_steps_and_the_bare_loops_take_turns_over_one_text(monkeypatch):
    model = tiny(gain=2.0)
    pairs, same = plain_steps_against_bare(model, PROMPT, 6)
    assert len(pairs) == 5 and min(pairs) > 0 and same
    monkeypatch.setattr("benchmarks.bare.bare_loop", lambda model, prompts, new: iter([[0]] * new))
    assert not plain_steps_against_bare(model, PROMPT, 6)[1]


@pytest.mark.parametrize("case", [{}, {"rows": 3}, {"width": 7}, {"width": 2, "heads": 2}], ids=str)
def test_a_verifying_step_has_a_cost(case):
    assert verify_cost(tiny().float(), cached=8, repeats=3, **case) > 0


def test_ratios_compare_two_calls_in_turns(monkeypatch):
    now, calls = [0.0], []

    def call(name, seconds):
        now[0] += seconds
        calls.append(name)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    found = ratio(lambda: call("a", 3.0), lambda: call("b", 2.0), repeats=4)
    assert found == 1.5
    assert "".join(calls) == "abab" + "baab" * 2


@pytest.mark.parametrize(("one", "all_of_them", "chosen"), [(1.0, 2.0, 1), (2.0, 1.0, 3)])
def test_the_faster_number_of_threads_is_chosen(one, all_of_them, chosen, monkeypatch):
    """Busy in every call but the last, as when something else ran meanwhile."""
    now, busy = [0.0], iter([9.0, 9.0, 0.0] * 2)

    def call():
        now[0] += (one if torch.get_num_threads() == 1 else all_of_them) + next(busy)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("benchmarks.timing.ALL_THREADS", 3)
    assert fastest_threads(call) == chosen


# Figures.


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [
        ([1, 2, 3, 4], 2, 0.0),
        ([1, 2, 1, 2, 1], 2, 0.5),  # 12 21 12 21
        ([7, 7, 7, 7, 7], 1, 0.8),
        ([7] * 20, 16, 0.8),  # five equal 16-grams
        ([1, 2], 16, 0.0),
    ],
)
def test_repetition_is_the_share_of_ngrams_seen_before(tokens, n, share):
    assert repetition(tokens, n) == pytest.approx(share)


def test_spread_is_the_quartiles():
    assert spread([5.0]) == [5.0, 5.0]
    assert spread([1.0, 2.0, 3.0]) == [1.0, 3.0]


def test_measured_figures_add_up_to_what_was_decoded():
    model = tiny(gain=2.0, max_seq_len=64).float()
    config = DecodeConfig(
        prompts=2, prompt_tokens=8, new_tokens=12, bare_tokens=12, temperature=0.0
    )
    reported = []
    figures, done = measure(model, [PROMPT, PROMPT[::-1]], config, reported.append)
    assert reported == done and [d.prompt for d in done] == [PROMPT, PROMPT[::-1]]
    assert figures["identical"] and figures["prompts"] == 2
    for d in done:
        assert d.plain.tokens == d.drafted.tokens == bare_text(model, d.prompt, 12)
    steps = sum(d.drafted.steps for d in done)
    accepted = sum(sum(d.drafted.accepted) for d in done)
    assert figures["mean_acceptance_length"] == 1 + accepted / steps
    assert len(figures["acceptance"]) == 3
    json.dumps(figures)


def test_another_text_is_never_called_identical(monkeypatch):
    model = tiny().float()
    monkeypatch.setattr("benchmarks.bare.bare_loop", lambda model, prompts, new: iter([[0]] * new))
    config = DecodeConfig(prompt_tokens=8, new_tokens=4, bare_tokens=4)
    assert not measure(model, [PROMPT], config)[0]["identical"]


def test_prompts_start_at_a_line_in_the_middle_of_a_document():
    texts = [f"{name}{name}{name}\n" * 40 for name in "abc"]
    documents = [Document(((text, True),)) for text in [*texts, "short"]]
    prompts = held_out_prompts(documents, ByteTokenizer(), count=2, length=6)
    assert [bytes(p) for p in prompts] == [b"aaa\naa", b"bbb\nbb"]
    with pytest.raises(ValueError, match="4 prompts were asked for, but only 3 documents"):
        held_out_prompts(documents, ByteTokenizer(), count=4, length=6)


# Words and records.


@dataclass
class Config:
    name: str = "x"
    count: int = 1
    rate: float = 0.5
    long: bool = False
    rates: list[float] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count}:\nmust be at least 1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Config()),
        (["name=7", "count=3"], Config(name="7", count=3)),
        (["rate=1", "long=true"], Config(rate=1.0, long=True)),
        (["rate=1e-3", "long=True", "name=a=b"], Config(name="a=b", rate=1e-3, long=True)),
        (["rates=[1,0.5]", 'texts={"a":"b"}'], Config(rates=[1.0, 0.5], texts={"a": "b"})),
    ],
)
def test_words_become_the_dataclass(words, expected):
    found = parse(Config, words)
    assert found == expected
    assert all(isinstance(rate, float) for rate in (found.rate, *found.rates))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cuont=3", "error: 'cuont=3': give key=value, keys are name, count, rate, long"),
        ("count", "error: 'count': give key=value"),
        ("count=three", "error: count='three' is no value of type int"),
        ("count=1.5", "error: count='1.5' is no value of type"),
        ("rate=fast", "error: rate='fast' is no value of type"),
        ("rate=null", "error: rate='null' is no value of type"),
        ("long=3", "error: long='3' is no value of type"),
        ("rates=1", "error: rates='1' is no value of type list[float]"),
        ('rates=[1,"a"]', """error: rates='[1,"a"]' is no value of type list[float]"""),
        ('texts={"a":1}', """error: texts='{"a":1}' is no value of type dict[str, str]"""),
    ],
)
def test_wrong_words_are_refused_in_one_line(word, message):
    with pytest.raises(SystemExit) as caught:
        parse(Config, [word])
    assert str(caught.value.code).startswith(message)
    assert "\n" not in str(caught.value.code)


def test_a_benchmark_ends_with_its_line_or_with_what_was_wrong_in_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "count=2"])
    launch(Config, lambda config: {"count": config.count})
    assert capsys.readouterr().out == '{"count": 2}\n'

    def fail(config):
        raise FileNotFoundError("runs/x is missing")

    with pytest.raises(SystemExit, match="^error: runs/x is missing$"):
        launch(Config, fail)

    def interrupted(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="^so far$"):
        launch(Config, interrupted, "so far")
    monkeypatch.setattr(sys, "argv", ["x", "count=0"])
    with pytest.raises(SystemExit, match="^error: count=0: must be at least 1$"):
        launch(Config, fail)


def test_a_benchmark_without_matplotlib_ends_without_a_picture(capsys):
    def draw(*what):
        asked.extend(what)
        raise ImportError

    asked: list[int] = []
    drawn(draw, 1, 2)
    assert asked == [1, 2] and "matplotlib is not installed" in capsys.readouterr().err


def test_a_record_holds_values_and_circumstances(tmp_path):
    path = record("speed", {"speedup": 1.5, "iqr": [1, 2]}, Config(count=3), tmp_path / "new")
    entry = json.loads(path.read_text())
    assert path == tmp_path / "new" / "speed.json"
    assert entry["values"] == {"speedup": 1.5, "iqr": [1, 2]}
    assert entry["config"] == vars(Config(count=3))
    assert {"name", "command", "commit", "date", "hardware", "threads", "torch"} <= entry.keys()
    assert entry["command"].startswith("python ") and entry["hardware"] and entry["commit"]
    assert [file.name for file in path.parent.iterdir()] == ["speed.json"]


def test_a_new_record_replaces_the_old(tmp_path):
    record("speed", {"speedup": 1.5, "old": True}, folder=tmp_path)
    path = record("speed", {"speedup": 2.5}, folder=tmp_path)
    assert json.loads(path.read_text())["values"] == {"speedup": 2.5}


# Pictures.


def page(tmp_path, completions, sentence="How it went", show=lambda token: f"<{token}>"):
    path = tmp_path / "heads.html"
    heads_page("Title & more", sentence, completions, show, path)
    return path.read_text(encoding="utf-8")


def test_the_page_shows_every_token_on_its_heads_colour_in_order(tmp_path):
    completion = Completion(tokens=[11, 12, 13, 14], heads=[1, 2, 3, 1], steps=2)
    blocks = page(tmp_path, [("prompt", completion)]).split("<pre>")[1]
    marks = re.findall(r'background:(#\w+)[^>]*title="head (\d)">([^<]*)<', blocks)
    assert marks == [
        (COLOURS[0], "1", "&lt;11&gt;"),
        (COLOURS[1], "2", "&lt;12&gt;"),
        (COLOURS[2], "3", "&lt;13&gt;"),
        (COLOURS[0], "1", "&lt;14&gt;"),
    ]


def test_the_page_escapes_what_is_written_into_it(tmp_path):
    completion = Completion(tokens=[0], heads=[1], steps=1)
    text = page(tmp_path, [("<b>&", completion)], "a < b", lambda token: "<script>")
    assert "&lt;b&gt;&amp;" in text and "a &lt; b" in text and "Title &amp; more" in text
    assert "<script>" not in text and "<b>" not in text


def test_the_page_counts_tokens_and_steps(tmp_path):
    completion = Completion([1, 2, 3], [1, 2, 1], steps=2, drafted=[2], accepted=[1])
    assert "3 tokens in 2 steps, 1.50 per step" in page(tmp_path, [("p", completion)])


def test_heads_beyond_the_colours_share_the_last(tmp_path):
    completion = Completion(tokens=[1, 2], heads=[1, 30], steps=1)
    assert f'{COLOURS[-1]};color:#fff" title="head 30"' in page(tmp_path, [("p", completion)])


@pytest.mark.parametrize("validated", [True, False])
def test_the_loss_curve_is_a_picture(validated, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"tokens": 1000 * i, "loss_1": 3.0 / i, "loss_2": 4.0 / i} for i in range(1, 5)]
    if validated:
        rows[-1] |= {"val_loss_1": 1.0, "val_loss_2": 2.0}
    loss_curve(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
