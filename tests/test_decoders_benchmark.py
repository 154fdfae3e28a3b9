"""The benchmark of all decoders: every one has its row, texts that are to be the same are, and what
cannot be compared is refused.
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import a_run, tiny

import mtp
from benchmarks import decoders
from benchmarks.decoder_ways import LOSSY, SAME_LAW, SAME_TEXT, exact_ways
from benchmarks.decoders import OWN_TEXT, DecodersConfig, acceptance_on_text, prepare, run
from benchmarks.decoders_report import COLOURS, decoders_markdown
from benchmarks.tasks import TASKS, Problem
from benchmarks.texts import draft_on_text
from mtp.interop.attach import attach_heads, save_heads
from mtp.tokenizer import train_sentencepiece

TOY = DecodersConfig(
    prompts=3, prompt_tokens=8, new_tokens=5, rounds=1, batch=2, device="cpu", top_k=4
)
SAME = {
    *("plain", "prompt lookup", "Jacobi", "own n-grams", "draft model"),
    *("own heads, chain", "own heads, tree"),
    *("heads of attached, chain", "heads of attached, tree"),
}
LAW = {f"{name}, rule block" for name in SAME if name.endswith("chain") or name == "draft model"}
JOINT = {
    *("MTAD, own heads", "MTAD, heads of attached", "MTAD, draft model", "MMTAD, draft model"),
}
CONSISTENCY = {"consistency model, plain", "consistency model, Jacobi"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs, as training leaves them, of models that were not trained."""
    where = tmp_path_factory.mktemp("decoders")
    (where / "text.txt").write_text("a line of many\n" * 40)
    for name, shape in {
        "target": {},
        "draft": {"n_future_tokens": 1},
        "consistency": {"seed": 1},
    }.items():
        a_run(where / name, where / "text.txt", gain=1.5, **{"n_future_tokens": 3} | shape)
    save_heads(attach_heads(mtp.load(where / "target"), 3), where / "attached")
    return where


@pytest.fixture(scope="module")
def toy(folder):
    words = {
        "model": str(folder / "target"),
        "draft": str(folder / "draft"),
        "consistency": str(folder / "consistency"),
        "heads": str(folder / "attached"),
        "name": str(folder / "out"),
    }
    return replace(TOY, **words)


@pytest.fixture(scope="module")
def recorded(toy, folder):
    line = run(toy)
    kept = json.loads((folder / "out.json").read_text())
    assert line.items() <= kept["values"].items()
    return kept


def test_every_decoder_has_its_row_and_says_how_exact_it_is(recorded):
    rows = recorded["values"]["rows"]
    kinds = {kind: {n for n, f in rows.items() if f["kind"] == kind} for kind in COLOURS}
    assert kinds == {SAME_TEXT: SAME, SAME_LAW: LAW, LOSSY: JOINT, OWN_TEXT: CONSISTENCY}
    assert next(iter(rows)) == "plain" and recorded["values"]["left_out"] == {}


def test_exact_decoders_write_plain_text_in_batches_of_any_size(recorded):
    values = recorded["values"]
    for f in values["rows"].values():
        if f["kind"] in (SAME_TEXT, OWN_TEXT):
            assert f["identical"] == f["batched"]["identical"] == 1
    assert values["identical"] and values["decoders"] == len(values["rows"])
    other = values["rows"]["consistency model, plain"]
    assert other["loss_rise"]["mean"] > 0  # its text is its own, judged by the model


def test_figures_are_there_and_in_order(recorded):
    rows = recorded["values"]["rows"]
    for name, f in rows.items():
        speed = f["speedup"]
        assert 0 < speed["low"] <= speed["mean"] <= speed["high"]
        assert f["seconds_p50"] <= f["seconds_p95"] and f["acceptance_length"] >= 1
        assert rows["plain"]["memory_bytes"] <= f["memory_bytes"] < f["batched"]["memory_bytes"]
        foreseen = ("heads" in name or name.startswith("draft")) and name not in JOINT
        assert (f["acceptance_length_text"] is not None) == foreseen
    assert rows["draft model"]["memory_bytes"] > rows["prompt lookup"]["memory_bytes"]
    assert rows["plain"]["speedup"]["mean"] == rows["plain"]["batched"]["speedup"] == 1


def test_the_table_has_a_line_for_every_decoder_and_there_is_a_picture(recorded, folder):
    text = (folder / "out.md").read_text()
    assert text == decoders_markdown(recorded)
    for name, f in recorded["values"]["rows"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{f['speedup']['mean']:.2f} (" in line and f"| {f['kind']} |" in line
    pytest.importorskip("matplotlib")
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_answers_of_a_task_are_scored_and_foreseen_from_the_prompt_on(toy, folder, monkeypatch):
    """A score that every answer gets, and rows that are the right answers."""

    def problems(held_out, conditions):
        return iter([Problem(f"ask {i}?", "answer", lambda text: 0.5) for i in range(9)])

    monkeypatch.setitem(TASKS, "sql", problems)
    words = {"task": "sql", "draft": "", "heads": "", "consistency": "", "temperature": 0.0}
    run(replace(toy, **words, name=str(folder / "task")))
    values = json.loads((folder / "task.json").read_text())["values"]
    assert {f["score"]["mean"] for f in values["rows"].values()} == {0.5}
    missing = {"draft model", "joint", "consistency model", "attached heads"}
    assert values["left_out"].keys() == missing
    assert "score 0.500" in (folder / "task.md").read_text()
    found, _ = prepare(replace(toy, **words))
    rows, begins = decoders.held_out(replace(toy, **words), found["plain"].setting)
    assert [bytes(row[at:]) for row, at in zip(rows, begins, strict=True)] == [b"answe"] * 3


@torch.inference_mode()
def test_a_draft_stands_on_text_as_far_as_it_chooses_what_the_model_chooses():
    """By walking."""
    model, draft, begin = tiny(vocab_size=3), tiny(vocab_size=3, seed=1), 4
    row = torch.randint(3, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    own, guess = (m(torch.tensor([row]))[0].argmax(-1).tolist() for m in (model, draft))
    stands = [
        [all(own[t + i] == guess[t + i] for i in range(1, d + 1)) for d in (1, 2)]
        for t in range(begin, len(row) - 2)
    ]
    counts = torch.tensor(stands).double().mean(0)
    assert 0 < counts[1] < counts[0] < 1
    found = draft_on_text(model, draft, [row], 2, [begin])
    assert found == pytest.approx(counts.tolist())


def test_models_of_another_tokenizer_are_refused(toy, folder, tmp_path):
    pytest.importorskip("sentencepiece")
    tokenizer = train_sentencepiece(["some other words\n"] * 60, tmp_path / "other.model", 280)
    other = str(a_run(tmp_path / "other", tokenizer=tokenizer, vocab_size=280))
    for key in ("draft", "consistency"):
        with pytest.raises(ValueError, match=f"{key}=.* has another tokenizer than the model"):
            prepare(replace(toy, **{key: other}))


def test_heads_of_another_trunk_are_refused(toy, tmp_path):
    heads = attach_heads(tiny(vocab_size=257, seed=5).float(), 2)
    with pytest.raises(ValueError, match="the heads belong to another trunk"):
        prepare(replace(toy, heads=str(save_heads(heads, tmp_path / "heads"))))


def test_attached_heads_stand_in_for_those_that_a_model_lacks(toy, folder, tmp_path):
    model = folder / "draft"
    heads = save_heads(attach_heads(mtp.load(model), 3), tmp_path / "mine" / "heads")
    words = {"model": str(model), "heads": str(heads), "draft": "", "consistency": ""}
    found, missing = prepare(replace(toy, **words))
    assert "MTAD, heads of mine" in found and "joint" not in missing


def test_heads_of_every_row_guess_the_vocabulary_alone(toy, tmp_path):
    file = tmp_path / "frequent.json"
    file.write_text("[256, 10, 97]")
    (whole, _), (found, _) = prepare(toy), prepare(replace(toy, vocabulary=str(file)))
    drafters = [e.way.drafter(2) for name, e in found.items() if "heads" in name]
    assert [drafter.vocabulary.tolist() for drafter in drafters] == [[256, 10, 97]] * 8
    row, chain = [97] * 9, found["own heads, chain"]
    chosen = {*mtp.load(toy.model)(torch.tensor([row]))[0].argmax(-1).tolist()}
    for ids, stands in ((range(257), None), ({*range(257)} - chosen, 1.0)):
        of_ids = chain._replace(setting=replace(chain.setting, vocabulary=sorted(ids)))
        way = exact_ways(of_ids.setting, toy.sampling)["own heads, chain"]
        wanted = acceptance_on_text(of_ids._replace(way=way), 2, [row], [0])
        assert wanted == (stands or acceptance_on_text(whole["own heads, chain"], 2, [row], [0]))
    file.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="frequent.json holds no list of token ids"):
        prepare(replace(toy, vocabulary=str(file)))


def test_a_model_that_is_neither_a_folder_nor_a_shape_is_refused(toy):
    with pytest.raises(ValueError, match="'nowhere' is no folder, and shape 'nowhere' is unknown"):
        prepare(replace(toy, model="nowhere"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"batch": 1}, "batch=1: must be at least 2"),
        ({"heads": "a/x,b/x"}, "heads='a/x,b/x': folders of one name"),
        ({"task": "poems"}, "task='poems': allowed are text, sql"),
        ({"text": "a.txt", "task": "sql"}, "only task=text reads it"),
        ({"precision": "fp8"}, "precision='fp8': allowed are float32"),
        ({"threshold": 2.0}, "threshold=2"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"prompts": 0}, "prompts=0: must be at least 1"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        DecodersConfig(**words)
