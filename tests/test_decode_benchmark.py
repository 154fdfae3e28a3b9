"""The benchmark that decodes side by side: its figures add up, its peers read the same weights."""

import doctest
import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny

import benchmarks.decode
import benchmarks.draft_vocabulary
import benchmarks.texts
import mtp
from benchmarks.bare import logits_in_passes
from benchmarks.contenders import BARE, Decoded, figures, heads
from benchmarks.decode import (
    DecodeConfig,
    bandwidth_limit,
    compare,
    disturbances,
    run,
    sampled_apart,
    summary,
)
from benchmarks.peers import Peer, checked, llama_weights
from benchmarks.record import parse
from benchmarks.texts import Judge, movement, on_text, path_length, rows_of
from benchmarks.timing import Turns, take_turns
from benchmarks.ways import PLAIN
from mtp.decode.beam import best_tree
from mtp.decode.contract import Draft, Request
from mtp.decode.drafters import OwnHeads
from mtp.decode.loop import generate
from mtp.records import Document
from mtp.tokenizer import ByteTokenizer

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [6, 2, 9, 5, 1, 4, 1, 3], [5, 3, 5, 8, 9, 7, 9, 3]]
KEYS = {
    *("identical", "acceptance_length_text", "heads_speedup", "verify_cost", "efficiency"),
    *("efficiency_b8", "ours_ar_over_transformers_ar", "ours_ar_over_bare_loop"),
    "speedup_by_batch",
}
TOY = DecodeConfig(prompts=2, prompt_tokens=8, new_tokens=6, rounds=2, pairs=2, batch="1,2")


def model(**overrides):
    return tiny(gain=2.0, **overrides).float()


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Benchmarks choose their number of threads; tests leave them no choice."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)


# Peers.


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_kv_heads": None, "unembedding": "replicated"},
        {"rope_theta": 500.0, "norm_eps": 1e-2, "hidden_dim": 24},
        {"n_layers": 1, "n_future_tokens": 1, "tie_embeddings": True},
    ],
    ids=str,
)
def test_transformers_reads_our_weights_and_writes_our_text(overrides):
    pytest.importorskip("transformers")
    ours = model(**overrides)
    peer = Peer(checked(ours))
    assert peer(PROMPTS, 12) == [
        c.tokens for c in generate(ours, [Request(p, 12) for p in PROMPTS])
    ]
    assert peer.passes == 12


def test_transformers_drafts_save_passes_and_keep_the_text():
    pytest.importorskip("transformers")
    ours = model()
    plain = Peer(checked(ours))(PROMPTS[:1], 24)
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": checked(ours)}):
        peer = Peer(checked(ours), **options)
        assert peer(PROMPTS[:1], 24) == plain and peer.passes < 24


def test_logits_are_compared_before_anything_is_timed(monkeypatch):
    pytest.importorskip("transformers")

    def swapped(ours):
        weights = llama_weights(ours)
        gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
        return weights | {gate: weights[up], up: weights[gate]}

    monkeypatch.setattr("benchmarks.peers.llama_weights", swapped)
    with pytest.raises(ValueError, match="logits of transformers differ by"):
        checked(model())


def test_other_kinds_of_heads_are_no_llama():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="head='linear' is no layer of a Llama"):
        checked(tiny("linear").float())


def test_rounding_to_bfloat16_leaves_positions_exact():
    pytest.importorskip("transformers")
    peer = checked(model().to(torch.bfloat16))
    assert peer.dtype == torch.bfloat16
    assert peer.model.rotary_emb.inv_freq.dtype == torch.float32


# Texts.


def test_the_examples_hold():
    assert doctest.testmod(benchmarks.texts, extraglobs={"torch": torch}).failed == 0


def test_a_path_ends_where_the_tree_has_no_such_child():
    #        5     6          two roots; 7 below 6, 5 below 7
    draft = Draft(torch.tensor([[5, 6, 7, 5]]), parents=torch.tensor([[-1, -1, 1, 2]]))
    wanted = {(5, 7, 5): 1, (6, 7, 5): 3, (7, 7, 5): 0, (6, 5, 5): 1}
    for path, length in wanted.items():
        assert path_length(draft, torch.tensor([path])).tolist() == [length]


@torch.inference_mode()
def test_acceptance_on_text_counts_guesses_that_head_1_makes_later_itself():
    """At every position that has n - 1 more after it, by walking."""
    ours, nodes = model(vocab_size=3), 6  # so few that heads agree by chance
    row = torch.randint(3, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = ours(torch.tensor([row]), return_all_heads=True)[0]
    best = logits.argmax(-1).tolist()
    chains, paths = [], []
    for t in range(len(row) - 3):
        wanted = [best[t + j][0] for j in (1, 2, 3)]
        prefixes = [wanted[:d] for d in (1, 2, 3)]
        chains.append([best[t][1 : d + 1] == prefixes[d - 1] for d in (1, 2, 3)])
        known = tree_paths(best_tree(logits[t : t + 1, 1:], nodes))
        paths.append([prefix in known for prefix in prefixes])
    found = on_text(ours, [row], nodes)
    for shares, walked in ((found.chain, chains), (found.tree, paths)):
        counts = torch.tensor(walked).float().mean(0)
        assert 0 < counts[1] < 1 and shares == pytest.approx(counts.tolist())
    assert sum(found.tree) > sum(found.chain)


@torch.inference_mode()
def test_acceptance_on_text_of_a_few_tokens_counts_guesses_among_them():
    ours, ids = model(vocab_size=5), torch.tensor([3, 0, 1])
    row = torch.randint(5, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = ours(torch.tensor([row]), return_all_heads=True)[0]
    own, guesses = logits[:, 0].argmax(-1), ids[logits[:, 1:, ids].argmax(-1)]
    stands = [[guesses[t, j] == own[t + j + 1] for j in range(3)] for t in range(len(row) - 3)]
    counts = torch.tensor(stands).float().cumprod(1).mean(0)
    assert on_text(ours, [row], 1, ids).chain == pytest.approx(counts.tolist())
    assert counts[0] > 0 and on_text(ours, [row], 1).chain != pytest.approx(counts.tolist())
    assert on_text(ours, [row], 1, torch.arange(5)) == on_text(ours, [row], 1)


def tree_paths(draft):
    paths = []
    for token, parent in zip(draft.tokens[0].tolist(), draft.parents[0].tolist(), strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    return paths


def test_texts_are_judged_by_the_model_where_they_part():
    ours, prompts = model(), PROMPTS[:2]
    texts = [c.tokens for c in generate(ours, [Request(p, 8) for p in prompts])]
    other = [texts[0], [*texts[1][:3], (texts[1][3] + 1) % 13, *texts[1][4:]]]
    for near, ties in ((0.0, 0), (1e9, 1)):
        judge = Judge(ours, prompts, near)
        assert judge(texts) == {"same_texts": 2, "near_ties": 0, "other_texts": 0}
        assert judge(other) == {"same_texts": 1, "near_ties": ties, "other_texts": 1 - ties}
    logits = ours(torch.tensor([[*prompts[1], *texts[1][:3]]]))[0, -1]
    best, second = logits.topk(2).values.tolist()
    judge = Judge(ours, prompts, best - second + 1e-4)
    judge(texts)
    assert judge(other)["near_ties"] == 1


@pytest.mark.parametrize("width", [1, 3])
def test_passes_of_any_width_say_what_one_pass_over_all_says(width):
    model, tokens = tiny(), torch.randint(0, 13, (1, 17))
    with torch.inference_mode():
        found = logits_in_passes(model, tokens, 5, width)
        torch.testing.assert_close(found, model(tokens)[0, 5:], rtol=0, atol=1e-12)


def test_rounding_alone_moves_logits_by_what_a_type_allows():
    model, prompts = tiny(), [[1, 2, 3], [4, 5, 6]]
    texts = [[i % 13 for i in range(30)], [i * i % 13 for i in range(30)]]
    exact = movement(model.double(), prompts, texts, 3)
    assert exact < 1e-9 < 1e-4 < movement(model.bfloat16(), prompts, texts, 3) < 1


def test_rows_come_from_all_documents_and_cross_none():
    documents = [Document(((name * 25, True),)) for name in "abc"]
    rows = rows_of(documents, ByteTokenizer(), count=3, length=10)
    assert [bytes(row) for row in rows] == [b"a" * 10, b"b" * 10, b"c" * 10]
    with pytest.raises(ValueError, match="7 rows of 10 tokens were asked for: there are 6"):
        rows_of(documents, ByteTokenizer(), count=7, length=10)


# Figures.


def test_every_contender_takes_a_turn_on_every_batch_in_moving_order():
    calls = []

    def contender(name):
        return lambda prompts, new: calls.append(name) or Decoded([[0]], 1, [], [])

    found = {name: contender(name) for name in "abc"}
    turns = take_turns(found, PROMPTS[:2], 4, rounds=2)
    assert ["".join(calls[i : i + 3]) for i in range(0, 12, 3)] == ["abc", "bca", "acb", "bac"]
    assert all([len(rounds) for rounds in turns.took[name]] == [2, 2] for name in "abc")


def test_figures_add_up():
    """Two batches of two rows; times are medians over rounds, lengths are of all passes."""
    took = {PLAIN: [[4.0, 9.0, 4.0], [2.0, 2.0, 2.0]], "x": [[2.0, 2.0, 3.0], [1.0, 1.0, 8.0]]}
    done = Decoded([[1, 2, 3], [4, 5, 6]], 2, [2, 1], [1, 1])
    turns = Turns(took, {PLAIN: [done] * 2, "x": [done, done._replace(accepted=[2, 0])]})
    f = figures(turns, "x", 2)
    assert f["tokens_per_second"] == 12 / 3 and f["speedup"] == 6 / 3
    assert f["acceptance_length"] == 1 + 4 / 4 and f["acceptance"] == [3 / 4, 1 / 2]
    assert f["step_seconds"] == 3 / (4 / 2)
    assert f["rounds_apart"] == (0.5 + 7) / 2
    low, high = f["speedup_iqr"]
    assert 0.25 < low < 2 <= high < 4.5


def test_what_disturbs_is_said():
    found = {1: {"a": {"rounds_apart": 0.02}, "b": {"rounds_apart": 0.3}}}
    assert disturbances(0.1, found) == ["b at batch 1: its rounds lie 30% apart"]
    assert disturbances(0.9, {1: {}}) == ["the load was 0.90 at the start"]


@pytest.fixture
def alone(monkeypatch):
    """Without transformers, which take their time to import."""
    monkeypatch.setattr("benchmarks.decode.peers", lambda model, draft: {})


def test_all_contenders_write_one_text_at_every_batch_size(alone):
    ours = model()
    found = compare(ours, PROMPTS[:2], TOY, model(), None)
    for of_all in found.values():
        own = ["1 head", "2 heads", "3 heads", "adaptive", "tree of 16", "prompt lookup"]
        assert list(of_all) == [PLAIN, *own, "draft model", BARE]
        for f in of_all.values():
            assert (f["same_texts"], f["near_ties"], f["other_texts"]) == (2, 0, 0)
            assert f["tokens_per_second"] > 0
        deepest = of_all[heads(3)]
        efficiency = deepest["speedup"] * deepest["verify_cost"] / deepest["acceptance_length"]
        assert deepest["efficiency"] == pytest.approx(efficiency)
    values = summary(found, 3)
    assert KEYS <= values.keys() and values["identical"]
    assert values["speedup_by_batch"].keys() == {1, 2} and values["efficiency_b8"] is None
    for key in ("other_texts", "near_ties", "sampled_apart"):
        found[2]["2 heads"][key] = 1
        assert not summary(found, 3)["identical"]
        found[2]["2 heads"][key] = 0


def test_texts_that_are_sampled_otherwise_are_counted():
    ours, words = model(), {"plain": {}, "heads": {"drafter": OwnHeads()}}
    assert sampled_apart(ours, words, 2, PROMPTS, 9) == {"plain": 0, "heads": 0}
    wrong = {"other law": {"drafter": OwnHeads(), "rule": "exact"}}
    assert sampled_apart(ours, wrong, 2, PROMPTS, 9)["other law"] > 0


def test_the_ideal_step_is_as_wide_as_the_real_one(monkeypatch, alone):
    asked = []
    monkeypatch.setattr(
        "benchmarks.decode.verify_cost",
        lambda model, cached, pairs, rows, width, heads: (
            asked.append((cached, rows, width, heads)) or 1.0
        ),
    )
    compare(model(), PROMPTS[:2], replace(TOY, batch="2"), None, None)
    assert asked == [(11, 2, 2, 2), (11, 2, 3, 3), (11, 2, 4, 4), (11, 2, 17, 4)]


def test_a_plain_step_is_held_against_the_bandwidth(monkeypatch):
    monkeypatch.setattr("benchmarks.decode.copy_bandwidth", lambda device: 1e6)
    ours = tiny(n_future_tokens=2).float()
    unused = [ours.embedding, ours.heads.heads[1]]
    read = sum(p.nbytes for p in ours.parameters())
    read -= sum(p.nbytes for part in unused for p in part.parameters())
    limit = bandwidth_limit(ours, {1: {PLAIN: {"step_seconds": 0.5}}})
    assert limit["bytes_read"] == read
    assert limit["of_limit"] == {1: pytest.approx(read / 1e6 / 0.5)}


# The whole.


@pytest.fixture
def trained(tmp_path):
    """A run directory, as training leaves it, of a model that was not trained."""
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text(f"line {i} of many\n" * 20)
    data = {"source": "folder", "path": str(tmp_path / "text"), "pattern": "*.txt"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(
        json.dumps({"data": data | {"val_path": str(tmp_path / "text")}})
    )
    mtp.save(
        model(vocab_size=257), tmp_path / "run" / "checkpoints" / "step-00000001", ByteTokenizer()
    )
    return tmp_path / "run"


def test_the_last_line_has_the_figures_of_a_trained_model(trained, tmp_path, capsys):
    pytest.importorskip("transformers")
    config = replace(
        TOY, model=str(trained), draft=str(trained), texts=4, name=str(tmp_path / "out")
    )
    values = json.loads(json.dumps(run(config)))
    assert KEYS <= values.keys() and values["identical"]
    assert values["acceptance_length_text"] >= 1 and values["ours_ar_over_transformers_ar"] > 0
    recorded = json.loads((tmp_path / "out.json").read_text())["values"]
    assert recorded["heads_speedup"] == values["heads_speedup"]
    first, second = recorded["batches"]["1"], recorded["batches"]["2"]
    assert [name for name in first if name not in second] == [
        "transformers, prompt lookup",
        "transformers, draft model",
    ]
    assert all(f["same_texts"] == 2 for f in first.values())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "batch 2" in capsys.readouterr().out


def test_random_weights_of_a_shape_in_bfloat16_without_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.contenders.find_spec", lambda name: None)
    monkeypatch.setattr("benchmarks.decode.shape", lambda name: model().config)
    config = replace(TOY, model="toy", precision="bfloat16", name=str(tmp_path / "out"))
    values = run(config)
    assert values["acceptance_length_text"] is values["ours_ar_over_transformers_ar"] is None
    assert values["bandwidth"]["of_limit"].keys() == {1, 2}
    assert "transformers is not installed: its decoding is left out" in capsys.readouterr().err


def test_a_model_that_cannot_be_compared_is_refused(trained, monkeypatch):
    shapes = {"single": tiny(n_future_tokens=1), "linear": tiny("linear"), "small": tiny()}
    monkeypatch.setattr("benchmarks.decode.shape", lambda name: shapes[name].config)
    for name in ("single", "linear"):
        with pytest.raises(ValueError, match=f"model='{name}': the bare loop reads two or more"):
            run(replace(TOY, model=name))
    with pytest.raises(ValueError, match="has another vocabulary than the model"):
        run(replace(TOY, model="small", draft=str(trained)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8': allowed are float32, bfloat16"),
        ({"batch": "1,x"}, "batch='1,x': allowed are numbers from 1 on"),
        ({"batch": "0"}, "batch='0'"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**words)


# Fewer tokens to guess.


def test_vocabularies_take_turns_forth_and_back(monkeypatch):
    turns = []

    def clock(call):
        call()
        decoder = getattr(call, "__self__", None)
        if decoder is None:
            return 2.0  # a proposal, within a step
        some = decoder.drafter.vocabulary
        turns.append(13 if some is None else len(some))
        return 5.0

    monkeypatch.setattr("benchmarks.draft_vocabulary.seconds", clock)
    rounds = benchmarks.draft_vocabulary.take_turns(model(), [4, 2], PROMPTS, mtp.Sampling(), 3)
    assert turns[-9:] == [13, 4, 2, 2, 4, 13, 13, 4, 2]
    assert rounds == [dict.fromkeys((13, 4, 2), (2.0, 5.0))] * 3


def test_times_are_compared_within_a_round():
    full, some = [(4.0, 10.0), (2.0, 8.0), (4.0, 8.0)], [(1.0, 7.0), (1.0, 7.0), (3.0, 8.0)]
    rounds = [{9: a, 3: b} for a, b in zip(full, some, strict=True)]
    f = benchmarks.draft_vocabulary.figures(rounds, 3, 9)
    assert f["drafting_ratio"] == 0.5 and f["drafting_ratio_iqr"] == [0.25, 0.75]
    assert f["step_ratio"] == 7 / 8 and f["share_of_step"] == 1 / 7
    assert (f["drafting_seconds"], f["step_seconds"]) == (1.0, 7.0)


def test_a_draft_vocabulary_is_timed_on_a_shape_and_judged_on_a_run(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("benchmarks.draft_vocabulary.shape", lambda name: model().config)
    words = [f"model={trained}", "sizes=9,2", "batch=1,2", "rounds=2", "texts=4", "tokens=15"]
    words += [f"name={tmp_path / 'out'}", "device=cpu"]
    config = parse(benchmarks.draft_vocabulary.VocabularyConfig, words)
    values = json.loads(json.dumps(benchmarks.draft_vocabulary.run(config)))
    recorded = json.loads((tmp_path / "out.json").read_text())["values"]
    assert recorded["acceptance"].keys() == {"257", "9", "2"}
    for name in ("greedy", "sampled"):
        of_sizes = recorded["times"][f"batch 2, {name}"]
        assert all(0 < f["share_of_step"] < 1 for f in of_sizes.values())
        assert of_sizes["13"]["drafting_ratio"] == 1 and of_sizes.keys() == {"13", "9", "2"}
    assert values["acceptance_length_full"] == recorded["acceptance"]["257"]["acceptance_length"]
    assert values["drafting_ratio"] == recorded["times"]["batch 1, greedy"]["9"]["drafting_ratio"]
    assert values["acceptance_length_full"] >= 1
    # Of the first 13 bytes of a line, all that have two more behind them, 3 are lone spaces.
    spaces = recorded["acceptance"]["2"]
    assert (spaces["coverage"], spaces["oracle"]) == pytest.approx((3 / 13, 1 + 3 / 13))
    assert recorded["acceptance"]["257"]["oracle"] == 4
    assert 3 / 13 < values["coverage"] < 1 and 1 + 3 / 13 < values["oracle"] < 4
    assert "drafting_ratio_iqr" in capsys.readouterr().out
