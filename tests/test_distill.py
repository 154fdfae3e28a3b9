"""A draft learns what its target says: the loss by its definition, the texts, whole runs."""

import copy
import json
import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import tiny
from test_run import interrupted, metrics, same_checkpoints

import mtp
from mtp import checkpoint, distill
from mtp.consistency.on_policy import OnPolicy
from mtp.decode.contract import Request, stop_at
from mtp.decode.loop import generate
from mtp.decode.sampling import Sampling
from mtp.distill import (
    DistillConfig,
    DistillLoss,
    OwnTexts,
    TaughtBatches,
    beginnings,
    check_draft,
    evaluator,
    load_target,
    make_texts,
)
from mtp.documents import DataConfig, iter_documents
from mtp.encoding import prompt_of
from mtp.model import ModelConfig
from mtp.optim import OptimConfig
from mtp.run import RunConfig, run
from mtp.tokenizer import ByteTokenizer
from mtp.train import TrainConfig

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 1], [2, 7, 7]]
NEW, END = 6, 0


def own_texts(target, group=2, rows=3, prompts="any"):
    source = OnPolicy(target, PROMPTS, 1, NEW, 5, stop_at(END), Sampling())
    return OwnTexts(source, rows, group, {"prompts": prompts})


def taught(target, **options):
    return TaughtBatches(target, {"target": "any"}, own_texts(target, **options))


def small(**options):
    """A draft of another width than the target's."""
    return tiny(**{"dim": 8, "n_layers": 2, "n_future_tokens": 1, "seed": 7} | options)


def responses(target, count):
    """What the target writes, by the decoding loop."""
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    requests = [Request(text, NEW, 5 + i, stop_at(END)) for i, text in enumerate(texts)]
    done = generate(target, requests, None, Sampling())
    return [(text, c.tokens) for text, c in zip(texts, done, strict=True)]


def laws(target, draft, count):
    """(p, q) before each token that the target wrote, one pass over a text each."""
    for prompt, response in responses(target, count):
        text = torch.tensor([prompt + response])
        p, q = (model(text).softmax(-1)[0, len(prompt) - 1 : -1] for model in (target, draft))
        yield from zip(p.detach(), q, strict=True)


# The loss.


def test_loss_and_gradients_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr("mtp.divergence.chunk_size", lambda weight: 4)
    target, draft, loss_fn = tiny(gain=2.0), small(), DistillLoss()
    batch = next(taught(target))
    loss, found = loss_fn(draft, batch, loss_fn.count(batch))
    wanted = torch.stack([(p * (p / q).log()).sum() for p, q in laws(target, draft, 3)])
    assert int(loss_fn.count(batch)) == int(found["loss_kl"][1]) == len(wanted) > 4
    assert loss.item() == pytest.approx(wanted.mean().item(), rel=1e-12)
    assert found["loss_kl"][0].item() == pytest.approx(wanted.sum().item(), rel=1e-12)
    pairs = (torch.autograd.grad(x, [*draft.parameters()]) for x in (loss, wanted.mean()))
    for ours, plain in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def test_the_target_learns_nothing():
    target, loss_fn = tiny(), DistillLoss()
    draft, batch = small(), next(taught(target))
    assert not batch.latent.requires_grad and not batch.weight.requires_grad
    loss_fn(draft, batch, loss_fn.count(batch))[0].backward()
    assert all(p.grad is not None for p in draft.parameters())
    assert all(p.grad is None for p in target.parameters())


def test_nothing_is_left_to_learn_for_the_target_itself():
    target, loss_fn = tiny(n_future_tokens=1), DistillLoss()
    draft, batch = copy.deepcopy(target), next(taught(target))
    loss, _ = loss_fn(draft, batch, loss_fn.count(batch))
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert all(p.grad.abs().max() < 1e-14 for p in draft.parameters())


def test_a_draft_is_measured_by_the_definitions_and_on_the_same_texts_each_time(monkeypatch):
    monkeypatch.setattr("mtp.distill.chunk_size", lambda weight: 4)
    target, draft = tiny(gain=2.0), small(gain=2.0)
    measure, pairs = evaluator(taught(target), 2), [*laws(target, draft, 6)]
    found = measure(draft)
    wanted = {
        "val_kl": [(p * (p / q).log()).sum() for p, q in pairs],
        "val_acceptance": [torch.minimum(p, q).sum() for p, q in pairs],
        "val_agreement": [(p.argmax() == q.argmax()).double() for p, q in pairs],
    }
    assert found == pytest.approx({k: torch.stack(x).mean().item() for k, x in wanted.items()})
    assert 0 < found["val_agreement"] < 1 and measure(draft) == found


# Texts.


@pytest.mark.parametrize("group", [1, 2, 7])
def test_texts_are_the_targets_own_whichever_are_made_together(group):
    target = tiny(gain=2.0)
    wanted, found = responses(target, 6), []
    for batch in islice(iter(own_texts(target, group).__next__, None), 2):
        for row, doc, keep in zip(*batch, strict=True):
            text = row[doc == 0]
            assert not keep[doc != 0].any() and not row[doc != 0].any()
            found.append((text[~keep[doc == 0]].tolist(), text[keep[doc == 0]].tolist()))
    assert found == wanted
    assert {len(response) for _, response in wanted} > {NEW}  # some end early, and are padded


@pytest.mark.parametrize("read", [0, 1, 3])
def test_texts_go_on_where_their_state_says(read):
    target = tiny(gain=2.0)
    source, again = taught(target), taught(target)
    for _ in range(read):
        next(source)
    again.load_state_dict(json.loads(json.dumps(source.state_dict())))
    for _ in range(3):
        one, other = next(source), next(again)
        assert torch.equal(one.row, other.row) and torch.equal(one.latent, other.latent)


def test_a_state_of_another_target_or_other_prompts_is_refused():
    target = tiny()
    state = taught(target).state_dict()
    with pytest.raises(ValueError, match="its target is any, not other"):
        TaughtBatches(target, {"target": "other"}, own_texts(target)).load_state_dict(state)
    with pytest.raises(ValueError, match="its prompts is any, not other"):
        taught(target, prompts="other").load_state_dict(state)


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": "abcabc " * 9}) + "\n")
    records = [{"text": "abc" * 9}, {"text": "xyz, " * 7}, {"prompt": "a?", "completion": "b"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "train.jsonl").write_text(lines)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("train", "held_out")]
    return DataConfig("jsonl", files[0], val_path=files[1], seq_len=12)


def test_prompts_are_questions_and_beginnings_of_every_piece_of_text(texts):
    tokenizer = ByteTokenizer()
    long, _, question = iter_documents(texts, False)
    ids = tokenizer.encode("abc" * 9)
    assert beginnings(long, tokenizer, 4, 12) == [ids[0:4], ids[12:16], ids[24:27]]
    assert beginnings(question, tokenizer, 4, 12) == [prompt_of(question, tokenizer)]


def test_ranks_share_the_prompts(texts, monkeypatch):
    config, model = DistillConfig("x", prompt_tokens=4), tiny(vocab_size=257)
    given = config, texts, ByteTokenizer(), model, 2, False
    whole, parts = make_texts(*given), []
    monkeypatch.setattr(distill, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distill, "rank", lambda rank=rank: rank)
        parts.append(make_texts(*given))
    prompts = [[r.prompt for r in source.source.requests] for source in (whole, *parts)]
    assert prompts[0][::2] == prompts[1] and prompts[0][1::2] == prompts[2]
    assert whole.state_dict() == parts[0].state_dict() == parts[1].state_dict()


# Runs.


@pytest.fixture
def config(texts, tmp_path):
    """A target of more tokens than its tokenizer has, and a run of a draft."""
    target = tiny(vocab_size=260, gain=2.0).float()
    checkpoint.save(target, tmp_path / "target", ByteTokenizer())
    shape = ModelConfig(dim=8, n_layers=2, n_heads=2, n_future_tokens=1, multiple_of=8)
    training = TrainConfig(
        steps=6, batch_size=2, log_every=1, eval_batches=2, optim=OptimConfig(lr=1e-2)
    )
    return RunConfig(
        str(tmp_path / "run"),
        objective="distill",
        device="cpu",
        sample_every=0,
        model=shape,
        data=texts,
        distill=DistillConfig(str(tmp_path / "target"), prompt_tokens=4, batch_size=7),
        train=training,
    )


def test_a_run_leaves_a_draft_that_drafts_for_its_target(config):
    config.train = replace(config.train, steps=30, optim=OptimConfig(lr=5e-2, warmup_steps=1))
    run(config)
    lines = metrics(config)
    values = [line["loss_kl"] for line in lines]
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    assert 0 < lines[-1]["val_acceptance"] < 1 and lines[-1]["val_kl"] > 0
    target, draft = mtp.load(config.distill.target), mtp.load(config.run_dir)
    assert draft.config == replace(config.model, vocab_size=260)
    fingerprints = {
        mtp.load_tokenizer(x).fingerprint for x in (config.distill.target, config.run_dir)
    }
    assert len(fingerprints) == 1
    request = [Request([1, 2, 3], 10)]
    plain, drafted = (generate(target, request, d)[0] for d in (None, mtp.DraftModel(draft)))
    assert plain.tokens == drafted.tokens


def test_a_target_of_its_own_draft_is_measured_as_equal(config, tmp_path):
    model = tiny(vocab_size=257, gain=2.0, n_future_tokens=1).float()
    checkpoint.save(model, tmp_path / "same", ByteTokenizer())
    same = str(tmp_path / "same")
    config = replace(
        config, model=ModelConfig(), init_from=same, distill=replace(config.distill, target=same)
    )
    config.train.steps = 1
    run(config)
    (line,) = metrics(config)
    assert abs(line["loss_kl"]) < 1e-5


@pytest.mark.parametrize("text", ["target", "data"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(text, config):
    config.distill = replace(config.distill, text=text)
    config.train = replace(config.train, save_every=2, eval_every=2)
    whole = replace(config, run_dir=f"{config.run_dir}-whole")
    run(whole)
    interrupted(config, 2)
    run(replace(config, resume="true"))
    same_checkpoints(config, whole)
    assert metrics(config) == metrics(whole)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("distill", {"temperature": 0.5}, "its temperature is 1.0, not 0.5"),
        ("distill", {"text": "data"}, "its text is target, not data"),
        ("data", {"seq_len": 11}, "its seq_len is 12, not 11"),
    ],
)
def test_a_run_does_not_go_on_with_texts_of_another_kind(part, changes, words, config, tmp_path):
    """Of questions, which stay the same prompts whatever the length of what follows."""
    lines = '{"prompt": "a?", "completion": "bcdefghijk"}\n' * 4
    (tmp_path / "questions.jsonl").write_text(lines)
    path = str(tmp_path / "questions.jsonl")
    config.data = DataConfig("jsonl", path, val_path=path, seq_len=12)
    config.train = replace(config.train, steps=1)
    run(config)
    config.train = replace(config.train, steps=2)
    changed = {part: replace(getattr(config, part), **changes)}
    with pytest.raises(ValueError, match=f"state of other data: {words}"):
        run(replace(config, resume="true", **changed))
    assert run(replace(config, resume="true")).step == 2


def test_a_target_in_bfloat16_is_constant_and_packed_where_that_is_possible(config):
    target = load_target(replace(config.distill, precision="bfloat16"), torch.device("cpu"))
    assert not any(p.requires_grad for p in target.parameters()) and not target.training
    assert {p.dtype for p in target.parameters()} == {torch.bfloat16}
    config.distill = replace(config.distill, precision="bfloat16")
    config.train.steps = 2
    run(config)
    assert checkpoint.load_training(config.run_dir).progress["step"] == 2


def test_a_larger_draft_is_trained_but_its_cost_is_said(config, caplog):
    config.model, config.dry_run = replace(config.model, dim=64), True
    caplog.set_level(logging.INFO)
    run(config)
    assert "times the target's parameters: each token that it guesses costs" in caplog.text
    config.model = replace(config.model, dim=8)
    caplog.clear()
    run(config)
    assert "times the target's" not in caplog.text


def test_a_draft_of_another_tokenizer_or_vocabulary_is_refused(config, tmp_path):
    class Other(ByteTokenizer):
        fingerprint = "other"

    with pytest.raises(ValueError, match="260 and other: they must be the same"):
        check_draft(config.distill, config.data, Other(), replace(config.model, vocab_size=260))
    folder = checkpoint.save(
        tiny(vocab_size=257, n_future_tokens=1), tmp_path / "other", ByteTokenizer()
    )
    with pytest.raises(ValueError, match="vocab_size=260 .* the draft 257"):
        run(replace(config, model=ModelConfig(), init_from=str(folder)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": DistillConfig()}, "distill.target: give the run or checkpoint"),
        ({"data": DataConfig(tokenizer="x")}, "data.tokenizer: not together with distill.target"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes, words, config):
    with pytest.raises(ValueError, match=words):
        replace(config, **changes)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("model", {"n_future_tokens": 2}, "model.n_future_tokens=2: a draft learns the next token"),
        ("model", {"max_seq_len": 8}, "data.seq_len=12 exceeds max_seq_len=8 of draft or target"),
        ("data", {"seq_len": 97}, "data.seq_len=97 exceeds max_seq_len=96 of draft or target"),
        ("distill", {"prompt_tokens": 12}, "distill.prompt_tokens=12 leaves no token of data.seq"),
        ("distill", {"target": "nowhere"}, "nowhere is no checkpoint"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(part, changes, words, config):
    config = replace(config, **{part: replace(getattr(config, part), **changes)})
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run(config)
    assert not Path(config.run_dir).exists()


def test_questions_that_are_all_too_long_are_refused(config, tmp_path):
    (tmp_path / "long.jsonl").write_text('{"prompt": "a long question", "completion": "b"}\n' * 2)
    config.data = DataConfig("jsonl", str(tmp_path / "long.jsonl"), val_fraction=0, seq_len=12)
    with pytest.raises(ValueError, match="of 2 prompts none has distill.prompt_tokens=4 or less"):
        run(config)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"text": "x"}, "distill.text='x': allowed are target, data"),
        ({"precision": "x"}, "distill.precision='x': allowed are float32, bfloat16"),
        ({"prompt_tokens": 0}, "distill.prompt_tokens=0 must be at least 1"),
        ({"batch_size": 0}, "distill.batch_size=0 must be at least 1"),
        ({"temperature": -0.5}, "distill.temperature=-0.5 must be at least 0"),
        ({"temperature": float("inf")}, "distill.temperature=inf must be at least 0, and finite"),
    ],
)
def test_impossible_values_are_refused_by_key_and_value(values, words):
    with pytest.raises(ValueError, match=words):
        DistillConfig(**values)
