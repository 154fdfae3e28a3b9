"""What heads ask of a trunk: gradients of each loss alone, the paper's identity, a choice that all
hangs on.
"""

import json
from math import log

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

from benchmarks.alignment import (
    AlignmentConfig,
    Losses,
    choices,
    cosines,
    decomposition,
    gradients,
    information,
    losses,
    run,
    terms,
)
from benchmarks.readings import of_choices, of_information
from benchmarks.record import parse
from mtp import checkpoint
from mtp.documents import DataConfig
from mtp.loss import Batch, future_targets
from mtp.run import RunConfig, TrainConfig
from mtp.run import run as train
from mtp.tokenizer import ByteTokenizer


def packed_batch():
    """Two documents in a row, padding, and tokens that are no targets."""
    row = torch.randint(13, (2, 20), generator=torch.Generator().manual_seed(0))
    doc = torch.tensor([[0] * 9 + [1] * 11, [2] * 17 + [-1] * 3])
    keep = torch.ones_like(row, dtype=torch.bool)
    keep[0, 3:6] = False
    return Batch(row, doc, keep)


@pytest.mark.parametrize("sizes", [{}, {"unembedding": "replicated"}, {"tie_embeddings": True}])
@pytest.mark.parametrize("kind", ["transformer", "linear", "residual"])
def test_each_gradient_is_that_of_the_heads_loss_alone(kind, sizes):
    """By autograd through the whole model, in fp64."""
    model, batch = tiny(kind, gain=2.0, **sizes), packed_batch()
    n = model.config.n_future_tokens
    targets, valid = future_targets(batch, n)
    at_output = []
    hook = model.trunk[-1].register_forward_hook(lambda *call: at_output.append(call[-1]))
    logits = model(batch.row[:, :-n], return_all_heads=True)
    hook.remove()
    found = list(gradients(model, batch))
    assert len(found) == n
    for i, (output, over) in enumerate(found):
        loss = F.cross_entropy(logits[:, :, i][valid[i]], targets[i][valid[i]])
        alone = torch.autograd.grad(
            loss, [at_output[0], *model.trunk.parameters()], retain_graph=True
        )
        assert output.any() and over.any()
        torch.testing.assert_close(output, alone[0], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(
            over, torch.cat([g.flatten() for g in alone[1:]]), rtol=1e-10, atol=1e-14
        )


def test_cosines_are_with_head_1():
    model, batch = tiny(gain=2.0), packed_batch()
    (first, first_over), _, (third, third_over), _ = gradients(model, batch)
    found = cosines(model, batch)
    wanted = (first * third).sum() / first.norm() / third.norm()
    assert found["output_3"] == pytest.approx(wanted.item())
    over = first_over @ third_over / first_over.norm() / third_over.norm()
    assert found["parameters_3"] == pytest.approx(over.item())
    assert found.keys() == {f"{where}_{i}" for where in ("output", "parameters") for i in (2, 3, 4)}


def test_losses_are_those_of_the_heads_in_bits():
    model, batch = tiny(gain=2.0), packed_batch()
    n = model.config.n_future_tokens
    targets, valid = future_targets(batch, n)
    logp = model(batch.row[:, :-n], return_all_heads=True).log_softmax(-1)
    found = losses(model, batch)
    for i in range(n):
        wanted = -logp[:, :, i].gather(-1, targets[i][..., None])[..., 0] / log(2)
        torch.testing.assert_close(found.nll[i], wanted)
    entropy = torch.distributions.Categorical(logits=logp[:, :, 0]).entropy() / log(2)
    torch.testing.assert_close(found.entropy, entropy)
    assert torch.equal(found.valid, valid)


def test_the_decomposition_holds_for_every_law_and_every_model_of_it():
    """Lemma L.3 by enumeration: p the law of two tokens, q a model's joint law."""
    generator = torch.Generator().manual_seed(0)
    p, q = (
        torch.rand(3, 4, generator=generator, dtype=torch.float64).pow(3) + 1e-3 for _ in range(2)
    )
    p, q = p / p.sum(), q / q.sum()
    q_x, q_y = q.sum(1, keepdim=True), q.sum(0, keepdim=True)
    for law in (p, q):  # of another one, and of itself
        x, y, y_given_x = (
            -(law * other.log()).sum().item() for other in (q_x + 0 * q, q_y + 0 * q, q / q_x)
        )
        found = decomposition(x, y, y_given_x)
        to_product, to_joint = ((law * (law / other).log()).sum() for other in (q_x * q_y, q))
        assert found["shared"] == pytest.approx((to_product - to_joint).item(), abs=1e-12)
        assert found["x_given_y"] == pytest.approx(-(law * (q / q_y).log()).sum().item())
        parts = [found[key] for key in ("x_given_y", "shared", "shared", "y_given_x")]
        assert sum(parts) == pytest.approx(x + y)
        assert sum(parts) - found["shared"] == pytest.approx(x + y_given_x)
        assert found["share_two"] == pytest.approx(2 * found["shared"] / (x + y))
    assert found["shared"] > 0  # the mutual information of q itself


def losses_of_a_choice(n, consequential):
    """A row of tokens that are known from before it, but one of a bit at index 10, which others
    hang on, or do not: head i at t guesses token t + i.
    """
    length, at = 20, 10
    nll, entropy = torch.zeros(n, 1, length), torch.zeros(1, length)
    for i in range(1, n + 1):
        for t in range(length):
            behind = t + i > at if consequential else False
            nll[i - 1, 0, t] = float(t < at and (t + i == at or behind))
    entropy[0, at - 1] = 1.0
    return Losses(nll, entropy, torch.ones_like(nll, dtype=torch.bool))


@pytest.mark.parametrize("n", [2, 4])
def test_a_choice_has_all_terms_across_it_and_another_token_only_its_own(n):
    """Appendix L.3: n (n + 1) / 2 terms against n."""
    for consequential, total in ((True, n * (n + 1) / 2), (False, n)):
        found = terms(losses_of_a_choice(n, consequential))
        fork = found.unsure == 1
        assert fork.sum() == 1 and found.first[fork].item() == 1 and found.own[fork].item() == n
        assert (found.own + found.later)[fork].item() == total
        said = choices(found, 1.0)
        assert said["terms_forks"] == total / n and said["loss_next"] == 1
        assert said["forks"] == pytest.approx(1 / (20 - n))
        shared = information(found)["shared_2"] * (20 - n)
        assert shared == pytest.approx(float(consequential))


def test_terms_are_those_across_each_token_within_targets_of_one_document():
    """Written out, token by token."""
    model, batch = tiny(gain=2.0), packed_batch()
    n, length = 4, 16
    _, valid = future_targets(batch, n)
    of = losses(model, batch)
    own, later, apart = [], [], []
    for b in range(2):

        def loss(head, position, b=b):
            return of.nll[head - 1, b, position]

        for s in range(n, length):
            across = [(i, t) for i in range(1, n + 1) for t in range(s - n, s) if t + i >= s]
            behind = [(j, s) for j in range(1, n)]
            if not all(valid[i - 1, b, t] for i, t in across + behind):
                continue
            own += [sum(loss(s - t, t) for t in range(s - n, s))]
            pairs = [(i, t) for i, t in across if t + i > s]
            later += [sum(loss(i, t) - loss(t + i - s, s) for i, t in pairs)]
            apart += [[[loss(i, s - 1), loss(i - 1, s)] for i in range(2, n + 1)]]
            assert len(across) == n * (n + 1) / 2
    found = terms(of)
    assert len(found.own) == len(own) > 0
    torch.testing.assert_close(found.own, torch.stack(own))
    torch.testing.assert_close(found.later, torch.stack(later))
    torch.testing.assert_close(found.apart, torch.tensor(apart).double().permute(1, 2, 0))


def test_where_all_or_no_tokens_are_forks_the_threshold_is_refused():
    found = terms(losses_of_a_choice(2, True))
    with pytest.raises(SystemExit, match=r"bits=2.0: .* entropy is 0.00 to 1.00 bits"):
        choices(found, 2.0)


# The command.


@pytest.fixture
def made(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_text(f"{i}: a tale of {i * i} heads on {i + 3} trunks. " * 8)
    data = DataConfig("folder", str(texts), "*.txt", holdout=["6.txt", "7.txt"], seq_len=32)

    def trained(**sizes):
        config = RunConfig(
            run_dir=str(tmp_path / "run"),
            sample_every=0,
            data=data,
            train=TrainConfig(steps=3, batch_size=2, eval_batches=1),
        )
        shape = {"dim": 16, "n_layers": 3, "n_heads": 2, "n_future_tokens": 2, "multiple_of": 8}
        vars(config.model).update(shape | sizes)
        train(config)
        return config.run_dir

    return trained


def test_the_command_writes_its_record_and_picture(made, tmp_path):
    pytest.importorskip("matplotlib")
    words = [f"checkpoint={made()}", "batches=3", "batch_size=2", "bits=7.2"]
    values = run(parse(AlignmentConfig, [*words, f"name={tmp_path / 'found'}"]))
    assert json.loads(json.dumps(values)) == values
    recorded = json.loads((tmp_path / "found.json").read_text())["values"]
    assert "I(X;Y)" in of_information(recorded) and "n = 2" in of_choices(recorded)
    assert recorded == values and (tmp_path / "found.png").stat().st_size
    assert values["gradients"].keys() == {"output_2", "parameters_2"}
    for part in ("gradients", "choices", "information"):
        assert all(x["low"] <= x["mean"] <= x["high"] for x in values[part].values())
    with pytest.raises(SystemExit, match=r"batches=99 of batch_size=4: held out are \d+ rows"):
        run(AlignmentConfig(str(tmp_path / "run"), batches=99))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"n_future_tokens": 1}, "n_future_tokens=1, head=transformer: wanted are at least 2"),
        ({"head": "causal"}, "of transformer, linear, residual"),
        ({"n_layers": 2}, "all its blocks are heads"),
    ],
)
def test_a_checkpoint_that_cannot_be_asked_is_refused(made, sizes, message):
    with pytest.raises(SystemExit, match=message):
        run(AlignmentConfig(made(**sizes)))


def test_a_checkpoint_without_its_run_is_refused(tmp_path):
    checkpoint.save(tiny(vocab_size=257).float(), tmp_path / "a" / "b" / "model", ByteTokenizer())
    with pytest.raises(ValueError, match="tells the data"):
        run(AlignmentConfig(str(tmp_path / "a" / "b" / "model")))


@pytest.mark.parametrize("word", ["batches=1", "batch_size=0", "bits=0"])
def test_bad_words_are_refused(word):
    with pytest.raises(SystemExit, match=word.split("=")[0]):
        parse(AlignmentConfig, ["checkpoint=x", word])
