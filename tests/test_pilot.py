"""The pilot: what it tries, what it refuses, what it concludes, and that its page says what its
record says.
"""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from conftest import DATA, tiny

import mtp
from benchmarks import pilot as engine
from benchmarks.decoder_ways import LOSSY, SAME_LAW, SAME_TEXT, exact_ways, left_out
from benchmarks.pilot import Case, Cost, PilotConfig, verdict
from benchmarks.pilot_page import at, pilot_markdown, pilot_page
from benchmarks.ways import Setting, contender
from mtp.interop.attach import attach_heads, save_heads
from mtp.interop.llama import load_llama
from mtp.tokenizer import ByteTokenizer

pytest.importorskip("hydra")

from scripts.pilot import main, read_cases  # noqa: E402

STORIES = DATA / "stories260K" / "hf"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROMPTS = [f"abcabcabc{i}" for i in range(10, 26)]
SAMPLED = mtp.Sampling(1.0, top_k=8)
FAST = {"speedup": {"mean": 1.5, "low": 1.2, "high": 1.8}, "kind": SAME_TEXT}


def saved(folder, **shape):
    model = tiny(gain=1.3, vocab_size=257, **{"max_seq_len": 64, **shape}).float()
    return mtp.save(model, folder, ByteTokenizer())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One with four heads, and a draft of another shape."""
    folder = tmp_path_factory.mktemp("models")
    return saved(folder / "model"), saved(folder / "draft", n_layers=2, n_future_tokens=1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "my.jsonl"
    records = [{"prompt": p, "answer": i} for i, p in enumerate(PROMPTS)]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def config_of(models, prompts, out, **words):
    model, draft = models
    said = {"draft": str(draft), "new_tokens": 6, "rounds": 1, "budget": 100.0, "device": "cpu"}
    return PilotConfig(
        **{"model": str(model), "prompts": str(prompts), "out": str(out)} | said | words
    )


@pytest.fixture(scope="module")
def piloted(models, prompts, tmp_path_factory):
    """Sampled, so that all kinds of exactness are there."""
    out = tmp_path_factory.mktemp("out")
    main(config_of(models, prompts, out, sampling=SAMPLED))
    return out


@pytest.fixture(scope="module")
def record(piloted):
    return json.loads((piloted / "pilot.json").read_text())


# What is tried.


def test_every_way_that_fits_is_tried_and_says_how_exact_it_is(record):
    kinds = {name: f["kind"] for name, f in record["values"]["decoders"].items()}
    same = {"plain", "prompt lookup", "Jacobi", "own n-grams", "own heads, chain"}
    assert {n for n, kind in kinds.items() if kind == SAME_TEXT} == same | {
        *("own heads, tree", "draft model"),
    }
    laws = {n for n, kind in kinds.items() if kind == SAME_LAW}
    assert laws == {"own heads, chain, rule block", "draft model, rule block"}
    assert {n for n, kind in kinds.items() if kind == LOSSY} == {
        *("MTAD, own heads", "MTAD, draft model"),
    }
    assert record["values"]["left_out"] == {}


def test_texts_that_are_to_be_the_same_are(record):
    for f in record["values"]["decoders"].values():
        if f["kind"] == SAME_TEXT:
            assert f["identical"] == 1 and f["loss_rise"]["mean"] == 0
        assert f["tokens_per_target_forward"] >= 1
        assert f["seconds_p50"] <= f["seconds_p95"]
        assert f["speedup"]["low"] <= f["speedup"]["mean"] <= f["speedup"]["high"]
        assert f["scored"] == record["values"]["prompts"]["measured"] == 8


def test_thresholds_are_chosen_on_one_half_and_checked_on_the_other(models, prompts, monkeypatch):
    seen = []

    def calibrate(model, requests, others, *_):
        seen.append([bytes(r.prompt).decode() for r in (*requests, *others)])
        assert len(requests) == len(others) == 8
        raise ValueError("none keeps to it")

    monkeypatch.setattr(engine, "calibrate", calibrate)
    config = config_of(models, prompts, "", sampling=SAMPLED)
    cases = read_cases(prompts)
    ready = engine.prepare(config, cases).some(16)
    ways, found, refused = engine.calibrated(ready, config)
    assert seen == [PROMPTS, PROMPTS] and not ways and not found
    assert refused == dict.fromkeys(("MTAD, own heads", "MTAD, draft model"), "none keeps to it")


def test_what_does_not_fit_is_left_out_with_a_reason():
    model = tiny(n_future_tokens=1)
    setting = Setting(model, None, {}, [])
    greedy = mtp.Sampling(0)
    assert left_out(setting, greedy).keys() == {"own heads", "draft model", "joint"}
    assert {*exact_ways(setting, greedy)} == {
        *("plain", "prompt lookup", "Jacobi", "own n-grams"),
    }
    assert "greedy" in left_out(setting, greedy)["joint"]
    assert "another model" in left_out(setting, SAMPLED)["joint"]
    chained = Setting(tiny("sequential"), None, {}, [])
    assert "own heads, tree" not in exact_ways(chained, greedy)
    assert "one chain" in left_out(chained, greedy)["own heads, tree"]


def test_attached_heads_are_tried_as_own_ones_are(models, prompts, tmp_path):
    trunk = models[1]
    heads = save_heads(attach_heads(mtp.load(trunk), 3), tmp_path / "heads")
    words = {"model": str(trunk), "draft": None, "heads": str(heads)}
    ready = engine.prepare(config_of(models, prompts, "", **words), read_cases(prompts))
    ways = exact_ways(ready.setting, mtp.Sampling(0))
    found = {"attached heads, chain": 2, "attached heads, tree": 8}
    request = ready.setting.requests[0]
    plain = contender(ready.setting, ways["plain"])(request, 6).text
    for name, depth in found.items():
        assert contender(ready.setting, ways[name], depth)(request, 6).text == plain


# What is concluded.


@pytest.mark.parametrize(
    ("changed", "go", "words"),
    [
        ({}, True, "surely faster: at least 1.20"),
        ({"speedup": {"mean": 1.2, "low": 1.0, "high": 1.4}}, False, "not surely faster: 1.00"),
        ({"speedup": {"mean": 0.8, "low": 0.7, "high": 0.9}}, False, "slower .* at most 0.90"),
        ({"kind": LOSSY, "loss_rise": {"high": 0.05}}, True, "surely faster"),
        ({"kind": LOSSY, "loss_rise": {"high": 0.06}}, False, "may lose 0.060 nats .* of 0.05"),
        ({"kind": SAME_LAW, "loss_rise": {"high": 0.5}}, True, "surely faster"),
    ],
)
def test_a_way_is_a_go_only_where_it_is_sure(changed, go, words):
    said, reason = verdict(FAST | changed, budget=0.05)
    assert said is go and re.search(words, reason)


def test_an_answer_counts_as_a_word_and_a_completion_by_likeness():
    assert Case("", "42").score("It is 42.") == 1 and Case("", "42").score("It is 142") == 0
    assert Case("", "f(x)").score("y = f(x)") == 1
    assert Case("", completion="a b c d").score("a b") == pytest.approx(2 / 3)
    assert Case("").score("a") is None


def test_as_many_prompts_are_taken_as_fit_in_the_minutes():
    per_text = Cost(
        {"plain": 1.0, "other": 3.0}, {"joint": 2.0}, {"plain": 0, "other": 2, "joint": 7}
    )
    assert per_text(8, 2) == 3 * 2 * 3 + 2 * 7 * 4 + (1 + 3 + 2) * 4 * 2
    config = SimpleNamespace(rounds=2, minutes=per_text(20, 2) / 60)
    assert engine.fitting(per_text, config, 100) in (20, 21)
    assert engine.fitting(per_text, SimpleNamespace(minutes=None), 100) == 100
    with pytest.raises(ValueError, match="minutes=0.1: 16 prompts, the fewest, take about 3.8"):
        engine.fitting(per_text, SimpleNamespace(rounds=2, minutes=0.1), 100)


# What is refused.


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}', "line 2: the prompt is empty"),
        ("a.jsonl", '{"text": "a"}', "line 1: give an object with a text under prompt"),
        ("a.jsonl", "hello", "line 1: no JSON"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_with_its_line(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_cases(tmp_path / name)


def test_plain_lines_are_prompts(tmp_path):
    (tmp_path / "a.txt").write_text('one\n\n{"prompt": "two"}\n')
    assert read_cases(tmp_path / "a.txt") == [Case("one"), Case('{"prompt": "two"}')]


def test_what_cannot_work_is_refused_before_anything_is_decoded(models, prompts, tmp_path):
    """No file, too few prompts, one too long for model or draft, a draft of another tokenizer."""
    cases = read_cases(prompts)

    def refused(words, cases=cases, **changed):
        with pytest.raises((ValueError, OSError), match=words):
            engine.prepare(config_of(models, prompts, tmp_path, **changed), cases)

    with pytest.raises(OSError, match="nothing.jsonl"):
        read_cases(tmp_path / "nothing.jsonl")
    refused("holds 0: give at least 16", cases=[])
    refused("holds 15: give at least 16", cases=cases[:15])
    refused("request 15 needs .* max_seq_len is 64", cases=[*cases[:15], Case("a" * 60)])
    short = saved(tmp_path / "short", max_seq_len=12)
    refused("max_seq_len is 12", draft=str(short))
    refused("nowhere", model=str(tmp_path / "nowhere"))


def test_a_draft_of_another_tokenizer_is_refused_before_weights_are_read(
    models, prompts, monkeypatch
):
    def found(where, special=True):
        return SimpleNamespace(tokenizer=SimpleNamespace(fingerprint=where))

    monkeypatch.setattr(engine, "find_model", found)
    with pytest.raises(ValueError, match="draft=.* has another tokenizer than"):
        engine.prepare(config_of(models, prompts, ""), read_cases(prompts))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": ""}, "model: give"),
        ({"prompts": ""}, "prompts: give"),
        ({"new_tokens": 0}, "new_tokens=0 must be at least 1"),
        ({"minutes": 0.0}, "minutes=0.0 must be above 0"),
        ({"budget": -1.0}, "budget=-1.0 must be at least 0"),
        ({"precision": "fp8"}, "precision='fp8': allowed are float32"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        PilotConfig(**{"model": "a", "prompts": "b"} | words)


# The page.


class Shown(HTMLParser):
    """What a page says: texts by the place of the record that they name, and all others."""

    def __init__(self):
        super().__init__()
        self.open, self.named, self.other, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "rect", "path"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        if any(tag in ("style", "title") for tag, _ in self.open):
            return
        place = [attrs for _, attrs in self.open if "data-from" in attrs]
        (self.named.append((place[-1], text)) if place else self.other.append(text))


@pytest.fixture(scope="module")
def shown(piloted):
    parser = Shown()
    parser.feed((piloted / "pilot.html").read_text(encoding="utf-8"))
    return parser


def test_every_figure_on_the_page_is_one_of_the_record(shown, record):
    places = set()
    for attrs, text in shown.named:
        value = at(record, attrs["data-from"])
        places.add(attrs["data-from"])
        if "value" in attrs:
            assert float(attrs["value"]) == value
        else:
            assert text == str(value)
    stray = [text for text in shown.other if any(c.isdigit() for c in text)]
    assert {text.strip() for text in stray} <= {
        *("latency of a text, p50, s", "latency of a text, p95, s"),
    }
    for name in record["values"]["decoders"]:
        assert f"values/decoders/{name}/speedup/mean" in places
        assert name == "plain" or f"values/decoders/{name}/reason" in places


def test_the_table_has_a_line_for_every_decoder(piloted, record):
    text = (piloted / "pilot.md").read_text(encoding="utf-8")
    assert text == pilot_markdown(record)
    for name, f in record["values"]["decoders"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{f['speedup']['mean']:.2f} (" in line and f"{f['seconds_p95']:.3f}" in line


def test_the_page_stands_alone_and_fits_a_phone(shown, piloted):
    asked = {"src", "href", "srcset", "data"} & {key for _, attrs in shown.tags for key in attrs}
    assert not asked and not {"script", "link", "img"} & {tag for tag, _ in shown.tags}
    text = (piloted / "pilot.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in [
        (tag, attrs) for tag, attrs in shown.tags
    ]


def test_texts_that_rounding_parted_are_not_called_identical(record):
    other = json.loads(json.dumps(record))
    other["values"]["decoders"]["draft model"]["identical"] = 0.5
    assert pilot_page(record).count("but for rounding") == 0
    assert pilot_page(other).count("but for rounding") == 1


def test_names_cannot_break_the_page(record):
    other = json.loads(json.dumps(record))
    other["values"]["model"] = "<b>&"
    assert "&lt;b&gt;&amp;" in pilot_page(other) and "<b>" not in pilot_page(other)


@pytest.mark.parametrize("width", [390, 1200])
def test_a_real_browser_lays_the_page_out_within_its_width(width, piloted, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no browser is installed")
    page = (piloted / "pilot.html").read_text(encoding="utf-8")
    says = "onload = () => parent.postMessage(document.documentElement.scrollWidth, '*')"
    inner = json.dumps(f"{page}<script>{says}</script>").replace("</", "<\\/")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<!doctype html><body><iframe id=f width={width} height=800></iframe><p id=said></p>"
        "<script>onmessage = ({data}) => said.textContent = data;"
        f"f.srcdoc = {inner}</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path}/profile", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    wide = re.search(r'<p id="said">(\d+)', done.stdout)
    assert wide and 0 < int(wide[1]) <= width, done.stderr


# A real model.


@pytest.mark.skipif(not STORIES.is_dir(), reason="MTP_TEST_DATA has no stories260K")
def test_a_real_model_is_piloted_greedily(prompts, tmp_path):
    model = mtp.save(load_llama(STORIES), tmp_path / "stories", ByteTokenizer())
    config = config_of((model, model), prompts, tmp_path / "out")
    main(config)
    values = json.loads((tmp_path / "out" / "pilot.json").read_text())["values"]
    assert all(f["identical"] == 1 for f in values["decoders"].values())
    itself = values["decoders"]["draft model"]
    assert itself["tokens_per_target_forward"] > 2
    assert "joint" in values["left_out"]
