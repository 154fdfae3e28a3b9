"""A trunk that learns with its heads: gradients, what changes, what is saved and comes back."""

import sys

import pytest
import torch

pytest.importorskip("transformers")

from conftest import tiny  # noqa: E402
from test_attach import TRUNKS, N, OwnTexts, attached, settings, small_folder  # noqa: E402
from test_decode import truths  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from mtp import checkpoint  # noqa: E402
from mtp.decode.contract import Request  # noqa: E402
from mtp.decode.drafters import OwnHeads  # noqa: E402
from mtp.decode.loop import generate  # noqa: E402
from mtp.interop.attach import attach_heads, load_heads, save_heads  # noqa: E402
from mtp.interop.draft_loss import DraftLoss  # noqa: E402
from mtp.interop.huggingface import CausalLM  # noqa: E402
from mtp.interop.tuning import save_trunk, tune  # noqa: E402
from mtp.loss import MultiTokenLoss, plain_batch, reference  # noqa: E402
from mtp.tokenizer import (
    ByteTokenizer,  # noqa: E402
    HuggingFaceTokenizer,  # noqa: E402
)
from mtp.train import train  # noqa: E402

BOTH = ["ours", "llama"]
ROWS = torch.randint(13, (4, 10 + N), generator=torch.Generator().manual_seed(3))


def needs(learning):
    if learning == "lora":
        pytest.importorskip("peft")


def learn(model, steps=20):
    train(model, OwnTexts(ROWS), DraftLoss(N, next_token=True), settings(steps, lr=0.003))


@pytest.mark.parametrize("kind", ["residual", "causal"])
@pytest.mark.parametrize("trunk", [*BOTH, "ours with heads", "gpt2"])
def test_gradients_of_the_whole_are_those_of_a_loss_written_plainly(trunk, kind):
    base = TRUNKS[trunk]()
    if not trunk.startswith("ours"):
        base = CausalLM(base.model.double())
    model = attached(base, kind)
    module = model.trunk.module
    tune(model, "all")
    batch = plain_batch(ROWS)
    for objective in (MultiTokenLoss(N), DraftLoss(N, range(13), next_token=True)):
        loss, _ = objective(model, batch, objective.count(batch))
        loss.backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(got) > len(list(model.heads.parameters())) + 5
        model.zero_grad()
        plain = MultiTokenLoss(N, score=reference)(model, batch, objective.count(batch))[0]
        plain.backward()
        torch.testing.assert_close(loss, plain.detach())
        for name, p in model.named_parameters():
            torch.testing.assert_close(got.get(name), p.grad)
        model.zero_grad()
    logits = module(ROWS[:, :-N])
    logits = logits if trunk.startswith("ours") else logits.logits
    head_1 = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ROWS[:, 1 : 1 - N].flatten())
    _, metrics = objective(model, batch, objective.count(batch))
    torch.testing.assert_close(metrics["loss_1"][0] / metrics["loss_1"][1], head_1.detach())


@pytest.mark.parametrize("learning", ["lora", "all"])
@pytest.mark.parametrize("trunk", BOTH)
def test_a_trunk_learns_and_comes_back(trunk, learning, tmp_path):
    needs(learning)
    folder = small_folder(tmp_path / "from")
    tokenizer = HuggingFaceTokenizer(folder) if trunk == "llama" else ByteTokenizer()
    if trunk == "llama":
        base = CausalLM(AutoModelForCausalLM.from_pretrained(folder))
    else:
        base = tiny(n_future_tokens=1, n_layers=2, vocab_size=tokenizer.vocab_size).float()
    model = attach_heads(base, N)
    before = {name: p.clone() for name, p in model.trunk.module.named_parameters()}
    text = base(ROWS)
    settle = tune(model, learning, rank=4)
    torch.testing.assert_close(base(ROWS), text)  # nothing is learned yet
    losses = []
    objective, batch = DraftLoss(N, next_token=True), plain_batch(ROWS)
    for steps in (1, 20):
        learn(model, steps)
        metrics = objective(model, batch, objective.count(batch))[1]
        losses.append([float(total / count) for total, count in metrics.values()])
    assert all(last < first for first, last in zip(*losses, strict=True))
    learned = base(ROWS)
    with pytest.raises(ValueError, match="still learns"):
        save_trunk(model, tmp_path / "trunk", tokenizer)
    settle()
    torch.testing.assert_close(base(ROWS), learned, rtol=1e-4, atol=1e-4)
    after = dict(model.trunk.module.named_parameters())
    assert after.keys() == before.keys()
    changed = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert changed == (before.keys() if learning == "all" else {n for n in before if _is_map(n)})

    saved = save_trunk(model, tmp_path / "trunk", tokenizer)
    heads = save_heads(model, tmp_path / "heads")
    if trunk == "llama":
        again = CausalLM(AutoModelForCausalLM.from_pretrained(saved))
        assert HuggingFaceTokenizer(saved).fingerprint == tokenizer.fingerprint
    else:
        again = checkpoint.load(saved)
    assert torch.equal(again(ROWS), base(ROWS))
    request = [Request([1, 2, 3], 12)]
    old, new = (generate(m, request, OwnHeads()) for m in (model, load_heads(again, heads)))
    assert old == new and [old[0].tokens] == truths(again, request)


def _is_map(name):
    return any(part in name for part in ("proj", "wqkv", "wo", "w13", "w2"))


@pytest.mark.parametrize("learning", ["lora", "all"])
def test_what_learns_is_what_the_optimizer_and_checkpoints_know(learning, tmp_path):
    needs(learning)
    model = attach_heads(TRUNKS["llama"](), N)
    tune(model, learning, rank=2)
    learning_too = [p for p in model.trunk.module.parameters() if p.requires_grad]
    known = [*model.heads.parameters(), *learning_too]
    assert {*map(id, model.parameters())} == {*map(id, known)}
    folder = checkpoint.save(model, tmp_path / "step")
    with torch.no_grad():
        wanted = [p.clone() for p in known]
        for p in known:
            p.zero_()
    checkpoint.load_weights(model, folder)
    assert all(map(torch.equal, known, wanted))


def test_a_frozen_trunk_stays_as_it_is():
    model = attach_heads(TRUNKS["llama"](), N)
    before, output = model.state_dict().keys(), model(ROWS)
    settle = tune(model, "frozen")
    assert model.state_dict().keys() == before
    train(model, OwnTexts(ROWS), MultiTokenLoss(N), settings(3))
    settle()
    assert torch.equal(model(ROWS), output)


def test_what_cannot_learn_is_refused_by_name(monkeypatch):
    model = attach_heads(TRUNKS["llama"](), N)
    with pytest.raises(ValueError, match="'some' is unknown: allowed are frozen, lora, all"):
        tune(model, "some")
    half = attach_heads(CausalLM(TRUNKS["llama"]().model.bfloat16()), N)
    with pytest.raises(ValueError, match=r"wants a trunk of float32, not torch\.bfloat16"):
        tune(half, "all")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[lora\]'"):
        tune(model, "lora")


def test_lora_wants_linear_maps():
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no nn\.Linear"):
        tune(attach_heads(TRUNKS["gpt2"](), N), "lora")
