"""Heads learn the same from states on disk as from a trunk that runs, within a stated budget."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from test_attach import KINDS, TRUNKS, N, attached, settings  # noqa: E402

from mtp.data import Batches, Corpus  # noqa: E402
from mtp.interop.attach import attach_heads  # noqa: E402
from mtp.interop.draft_loss import DraftLoss  # noqa: E402
from mtp.interop.states import INDEX, STATES, StateBatches, write_states  # noqa: E402
from mtp.loss import MultiTokenLoss, future_targets  # noqa: E402
from mtp.train import train, validate  # noqa: E402

T, ROWS, PLENTY = 8, 10, 2**30
ROW_BYTES = T * 16 * 2


def some_corpus(seed=0, vocab_size=13):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(vocab_size, size=T * ROWS - 2).astype(np.uint16)
    ends = np.array([20, 33, len(tokens)])
    keep = rng.random(len(tokens)) < 0.9
    return Corpus(tokens, ends, keep, len(tokens), f"seed {seed}")


CORPUS = some_corpus()


def base_of(trunk):
    base = TRUNKS[trunk]()
    return base.float() if trunk == "ours" else base


def learned(model, batch, objective):
    loss, metrics = objective(model, batch, objective.count(batch))
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    return loss.detach(), metrics, gradients


@pytest.mark.parametrize("objective", [MultiTokenLoss(N), DraftLoss(N, [1, 5, 2])])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", ["ours", "llama"])
def test_losses_and_gradients_are_those_of_a_trunk_that_runs(
    trunk, kind, objective, tmp_path, monkeypatch
):
    model = attached(base_of(trunk), kind)
    folder = write_states(tmp_path / "states", model, CORPUS, T, PLENTY, "float32", batch_size=4)
    stored, run = StateBatches(folder, model, CORPUS, T, 4), Batches(CORPUS, T, N, 4)
    wanted = [learned(model, next(run), objective) for _ in range(4)]  # more than one epoch
    monkeypatch.setattr(model.trunk.model, "read", None)
    for truth in wanted:
        torch.testing.assert_close(learned(model, next(stored), objective), truth, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_states_are_exact_up_to_their_rounding(kind, tmp_path):
    model, objective = attached(base_of("llama"), kind, 0.1), MultiTokenLoss(N)
    folder = write_states(tmp_path / "states", model, CORPUS, T, PLENTY)
    batch, plain = next(StateBatches(folder, model, CORPUS, T, 4)), next(Batches(CORPUS, T, N, 4))
    states = model.states(plain.row[:, :-N])
    assert batch.states.dtype == torch.bfloat16
    assert torch.equal(batch.states, states.bfloat16()) and torch.equal(batch.row, plain.row)
    loss, truth = (learned(model, b, objective)[0] for b in (batch, plain))
    torch.testing.assert_close(loss, truth, rtol=2**-8, atol=0)
    assert loss != truth


def test_states_of_a_half_precision_trunk_are_exact(tmp_path):
    base = base_of("llama")
    base.model.bfloat16()
    model = attach_heads(base, N).float()
    folder = write_states(tmp_path / "states", model, CORPUS, T, PLENTY, batch_size=4)
    batch, plain = next(StateBatches(folder, model, CORPUS, T, 4)), next(Batches(CORPUS, T, N, 4))
    assert torch.equal(batch.states, model.states(plain.row[:, :-N]))
    losses = [validate(model, [b], N, 1.0) for b in (batch, plain)]
    assert losses[0] == losses[1]


def test_one_folder_trains_heads_of_every_kind_and_number(tmp_path, monkeypatch):
    base = base_of("llama")
    folder = write_states(tmp_path / "states", attach_heads(base, N), CORPUS, T, PLENTY)
    monkeypatch.setattr(base, "read", None)
    for kind, n in (("residual", 2), ("transformer", 3), ("causal", N)):
        model = attach_heads(base, n, kind)
        losses = []
        train(
            model,
            StateBatches(folder, model, CORPUS, T, 5, seed=3),
            DraftLoss(n),
            settings(30),
            hooks=[lambda progress, losses=losses: losses.append(progress.metrics)],
        )
        assert losses[-1][f"loss_{n}"] < losses[0][f"loss_{n}"]
        assert "loss_1" not in losses[0]


def test_a_budget_leaves_out_rows_evenly_and_says_so(tmp_path, caplog):
    model = attach_heads(base_of("llama"), N)
    with caplog.at_level(logging.INFO, "mtp"):
        folder = write_states(tmp_path / "states", model, CORPUS, T, 5 * ROW_BYTES + 1)
    assert "5 of 10 rows have states" in caplog.text and "left out" in caplog.text
    assert (folder / STATES).stat().st_size == 5 * ROW_BYTES
    batches = StateBatches(folder, model, CORPUS, T, 1, epochs=1)
    ordered = Batches(CORPUS, T, N, 1, epochs=1, shuffle=False)
    every = {tuple(batch.row[0].tolist()): number for number, batch in enumerate(ordered)}
    found = []
    for batch in batches:
        found.append(every[tuple(batch.row[0].tolist())])
        assert torch.equal(batch.states, model.states(batch.row[:, :-N]).bfloat16())
    assert sorted(found) == [0, 2, 4, 6, 8] != found


def test_what_does_not_fit_is_refused_before_the_trunk_runs(tmp_path, monkeypatch):
    model = attach_heads(base_of("llama"), N)
    monkeypatch.setattr(model.trunk.model, "read", None)
    with pytest.raises(ValueError, match=f"budget=100: the states of one row take {ROW_BYTES}"):
        write_states(tmp_path / "states", model, CORPUS, T, 100)
    with pytest.raises(ValueError, match="dtype='int8' is unknown: allowed are bfloat16, float32"):
        write_states(tmp_path / "states", model, CORPUS, T, PLENTY, "int8")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="are free: give a smaller budget"):
        write_states(tmp_path / "states", model, CORPUS, T, PLENTY)
    assert not (tmp_path / "states").exists()


class Interrupted:
    """Ends after some batches, as a signal ends a program."""

    def __init__(self, model, allowed):
        self.model, self.allowed, self.read = model, allowed, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def states(self, tokens):
        if self.read == self.allowed:
            raise KeyboardInterrupt
        self.read += 1
        return self.model.states(tokens)


def test_an_interrupted_folder_is_absent_and_goes_on(tmp_path):
    model = attach_heads(base_of("llama"), N)
    whole = write_states(tmp_path / "whole", model, CORPUS, T, PLENTY, batch_size=3)
    folder = tmp_path / "states"
    with pytest.raises(KeyboardInterrupt):
        write_states(folder, Interrupted(model, 2), CORPUS, T, PLENTY, batch_size=3)
    assert not folder.exists()
    with (tmp_path / ".states.partial" / STATES).open("ab") as file:
        file.write(b"half a row")
    second = Interrupted(model, 2)
    write_states(folder, second, CORPUS, T, PLENTY, batch_size=3)
    assert second.read == 2  # 6 of 10 rows were there
    for name in (INDEX, STATES):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "states"}
    with pytest.raises(FileExistsError):
        write_states(folder, model, CORPUS, T, PLENTY)


def test_what_another_trunk_began_is_not_mixed_in(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        other = Interrupted(attach_heads(base_of("gpt2"), N), 1)
        write_states(tmp_path / "states", other, CORPUS, T, PLENTY, batch_size=3)
    model = attach_heads(base_of("llama"), N)
    folder = write_states(tmp_path / "states", model, CORPUS, T, PLENTY, batch_size=3)
    for batch in StateBatches(folder, model, CORPUS, T, 2, epochs=1):
        real = batch.doc[:, 0] >= 0
        torch.testing.assert_close(
            batch.states[real].float(), model.states(batch.row[:, :-N])[real], rtol=2**-8, atol=1e-3
        )


def test_batches_go_on_where_they_stopped(tmp_path):
    model = attach_heads(base_of("llama"), N)
    folder = write_states(tmp_path / "states", model, CORPUS, T, PLENTY)
    first = StateBatches(folder, model, CORPUS, T, 4, seed=5)
    for _ in range(3):
        next(first)
    second = StateBatches(folder, model, CORPUS, T, 4, seed=5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    one, other = next(first), next(second)
    assert torch.equal(one.row, other.row) and torch.equal(one.states, other.states)
    fewer = write_states(tmp_path / "fewer", model, CORPUS, T, 5 * ROW_BYTES)
    with pytest.raises(ValueError, match="its rows is 10, not 5"):
        StateBatches(fewer, model, CORPUS, T, 4, seed=5).load_state_dict(first.state_dict())


def test_states_of_others_and_damaged_ones_are_refused_by_name(tmp_path):
    model = attach_heads(base_of("llama"), N)
    with pytest.raises(FileNotFoundError, match=r"states\.json is missing"):
        StateBatches(tmp_path, model, CORPUS, T, 4)
    folder = write_states(tmp_path / "states", model, CORPUS, T, PLENTY)
    with pytest.raises(ValueError, match=r"states\.json: trunk=.*Llama.*here.*GPT2"):
        StateBatches(folder, attach_heads(base_of("gpt2"), N), CORPUS, T, 4)
    with pytest.raises(ValueError, match="corpus=seed 0, here seed 1"):
        StateBatches(folder, model, some_corpus(1), T, 4)
    with pytest.raises(ValueError, match="seq_len=8, here 9"):
        StateBatches(folder, model, CORPUS, T + 1, 4)
    with (folder / STATES).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"states\.bin is damaged"):
        StateBatches(folder, model, CORPUS, T, 4)
    (folder / INDEX).write_text("{}")
    with pytest.raises(ValueError, match=r"states\.json is damaged"):
        StateBatches(folder, model, CORPUS, T, 4)


@pytest.mark.parametrize("next_token", [False, True])
@pytest.mark.parametrize("vocabulary", [None, [7, 1, 5]])
def test_the_loss_of_heads_is_what_it_says(vocabulary, next_token):
    """Written plainly: logits of the allowed ids alone, targets outside them left out."""
    model, objective = attached("ours", "causal"), DraftLoss(N, vocabulary, next_token)
    batch = next(Batches(CORPUS, T, N, 4))
    loss, metrics, gradients = learned(model, batch, objective)
    targets, valid = future_targets(batch, N)
    latents = []
    model(batch.row, score=lambda fns, inputs, weights, params: latents.extend(inputs))
    plain = 0
    for i in range(0 if next_token else 1, N):
        logits = latents[i] @ model.output.weights[0].detach().T
        if vocabulary is not None and i > 0:
            outside = [token for token in range(13) if token not in vocabulary]
            logits[..., outside] = -torch.inf
            valid[i] &= torch.isin(targets[i], torch.tensor(vocabulary))
        nll = -logits.log_softmax(-1).gather(-1, targets[i][..., None])[..., 0][valid[i].clone()]
        assert metrics[f"loss_{i + 1}"][1] == len(nll) > 0
        torch.testing.assert_close(metrics[f"loss_{i + 1}"][0], nll.sum().detach())
        plain = plain + nll.sum() / len(nll)
    assert ("loss_1" in metrics) == next_token
    torch.testing.assert_close(loss, plain.detach())
    plain.backward()
    torch.testing.assert_close(gradients, [p.grad for p in model.parameters()])


def test_a_loss_of_heads_wants_heads():
    with pytest.raises(ValueError, match="n_future_tokens=1 must be at least 2"):
        DraftLoss(1)
