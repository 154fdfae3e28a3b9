"""Objectives beside the plain sum: schedules of head weights, and heads that learn a summary."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, tiny

import mtp.objectives
from mtp.loss import Batch, MultiTokenLoss, future_targets, plain_batch, sequential
from mtp.objectives import SCHEDULES, SUMMARIES, bag, order, summarised, summary_targets
from mtp.optim import OptimConfig
from mtp.train import TrainConfig, train

N, VOCAB, WINDOW = 3, 13, 5


def packed(seed=0, rows=2, length=12):
    """Rows of several documents, some tokens no targets, the second row padded at its end."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length + N)
    doc = (torch.rand(shape, generator=generator) < 0.15).cumsum(1)
    doc[1, -5:] = -1
    row = torch.randint(VOCAB, shape, generator=generator)
    return Batch(row, doc, torch.rand(shape, generator=generator) < 0.8)


def small(kind, **overrides):
    return tiny(kind, n_future_tokens=N, n_layers=N + 1, **overrides)


def learned(model, objective, batch):
    """-> loss, metrics, gradients by name."""
    model.zero_grad()
    loss, metrics = objective(model, batch, objective.count(batch))
    loss.backward()
    return loss.detach(), metrics, {name: p.grad for name, p in model.named_parameters()}


# Schedules.


def test_docstring_examples_run():
    result = doctest.testmod(mtp.objectives)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("n", [1, 2, 4])
def test_heads_come_and_go_in_equal_parts_and_the_next_token_always_counts(n):
    """The middle of every part; `forward` and `reverse` mirror each other."""
    middles = [(part + 0.5) / n for part in range(n)]
    forward, reverse, annealed = (
        [SCHEDULES[name](done, n) for done in middles]
        for name in ("forward", "reverse", "annealed")
    )
    assert [sum(factors) for factors in forward] == list(range(1, n + 1))
    assert reverse == forward[::-1]
    assert [sum(factors) for factors in annealed] == [k - 0.5 for k in range(n, 1, -1)] + [1.0]
    for schedule in SCHEDULES.values():
        for done in (0.0, 0.25, 0.5, 0.999, 1.0):
            factors = schedule(done, n)
            assert len(factors) == n and factors[0] == 1 and factors == sorted(factors)[::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_do_not_count_are_not_run_and_change_nothing(kind):
    """The loss and gradients of the heads that do are those of zero weights."""
    model, batch = small(kind), packed()
    weights = [1.0, 0.5, 0.25]
    scheduled = MultiTokenLoss(N, weights, schedule=SCHEDULES["forward"])
    scheduled.at(0.4)
    loss, metrics, grads = learned(model, scheduled, batch)
    plain = MultiTokenLoss(N, [1.0, 0.5, 0.0])
    wanted, _, truth = learned(model, plain, batch)
    assert list(metrics) == ["loss_1", "loss_2"]
    torch.testing.assert_close(loss, wanted)
    for name, g in grads.items():
        assert not truth[name].any() if g is None else torch.allclose(g, truth[name]), name
    if kind in ("transformer", "linear", "residual", "causal", "sequential"):
        last = [g for name, g in grads.items() if name.startswith(f"heads.heads.{N - 1}")]
        assert last and all(g is None for g in last)


class Rows:
    """Endless rows of counting tokens."""

    def __next__(self):
        return plain_batch((torch.arange(12) % VOCAB)[None].repeat(2, 1))

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


def test_training_says_before_every_step_what_is_done():
    """A loop of its own that hears nothing stays where the schedule begins."""
    objective = MultiTokenLoss(N, schedule=SCHEDULES["reverse"])
    seen = []
    model = small("transformer").float()
    config = TrainConfig(steps=6, log_every=1, optim=OptimConfig(lr=1e-3))
    train(
        model,
        Rows(),
        objective,
        config,
        hooks=[lambda p: seen.append(sum(key.startswith("loss_") for key in p.metrics))],
    )
    assert seen == [3, 3, 2, 2, 1, 1]


# Several targets on one set of logits.


def test_identity_heads_put_several_targets_on_one_set_of_logits():
    """One softmax, of which each target's weight takes its share."""
    model, batch, weights = small("identity"), packed(), [1.0, 0.5, 0.25]
    assert not list(model.heads.parameters())
    loss, _, grads = learned(model, MultiTokenLoss(N, weights), batch)
    targets, valid = future_targets(batch, N)
    model.zero_grad()
    logp = model(batch.row[:, :-N]).log_softmax(-1)
    nll = -logp.gather(-1, targets.permute(1, 2, 0)).permute(2, 0, 1)
    scale = torch.tensor(weights)[:, None, None] / valid.sum((1, 2))[:, None, None]
    wanted = (nll * valid * scale).sum()
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-6, atol=1e-6)


# Summaries.


def test_windows_are_what_a_loop_over_positions_says():
    for seed in range(5):
        batch = packed(seed)
        row, doc, keep = batch
        targets, valid = summary_targets(WINDOW)(batch, N)
        plain, plain_valid = future_targets(batch, N)
        assert torch.equal(targets[: N - 1], plain[: N - 1])
        assert torch.equal(valid[: N - 1], plain_valid[: N - 1])
        width = row.shape[1]
        assert targets.shape == (N - 1 + WINDOW, len(row), width - N)
        assert valid.shape == (N, len(row), width - N)
        for b, t in torch.cartesian_prod(torch.arange(len(row)), torch.arange(width - N)).tolist():
            window = []
            for ahead in range(t + 1, t + 1 + WINDOW):
                here = ahead < width and doc[b, t] >= 0 and doc[b, ahead] == doc[b, t]
                window.append(int(row[b, ahead]) if here and keep[b, ahead] else -1)
            assert targets[N - 1 :, b, t].tolist() == window
            cut = t + WINDOW >= width and doc[b, t] == doc[b, -1]
            assert valid[N - 1, b, t] == (max(window) >= 0 and not cut)


def test_a_window_shorter_than_the_heads_reach_is_one_too():
    targets, valid = summary_targets(2)(packed(), N)
    assert targets.shape[0] == N - 1 + 2 and valid.shape[0] == N


def test_order_is_the_cross_entropy_with_nearness():
    """Window 7 7 2 - 7: token 7 is nearest, 2 two places behind it, the others never."""
    logits = torch.randn(1, 9, dtype=torch.float64)
    window = torch.tensor([[7], [7], [2], [-1], [7]])
    near, later = torch.tensor([5.0, 3.0], dtype=torch.float64).softmax(0)
    logp = logits.log_softmax(-1)[0]
    torch.testing.assert_close(order(logits, window)[0], -(near * logp[7] + later * logp[2]))


def test_bag_is_the_cross_entropy_of_every_token_being_there():
    logits = torch.randn(1, 9, dtype=torch.float64)
    p = logits.sigmoid()[0]
    there = torch.tensor([v in (7, 2) for v in range(9)])
    wanted = -(p[there].log().sum() + (1 - p[~there]).log().sum())
    window = torch.tensor([[7], [7], [2], [-1], [7]])
    torch.testing.assert_close(bag(logits, window)[0], wanted)


@pytest.mark.parametrize("name", SUMMARIES)
def test_an_empty_window_disturbs_nothing(name):
    logits = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    SUMMARIES[name](logits, torch.full((3, 2), -1)).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("unembedding", ["shared", "replicated"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SUMMARIES)
def test_summaries_give_the_plain_loss_and_every_gradient(name, kind, unembedding, chunk):
    """Against full logits and autograd; the loss may be scaled."""
    model, batch, summary = small(kind, unembedding=unembedding), packed(), SUMMARIES[name]
    weights = [1.0, 0.5, 0.25]
    objective = MultiTokenLoss(
        N, weights, score=summarised(summary, chunk), targets=summary_targets(WINDOW)
    )
    model.zero_grad()
    loss, metrics = objective(model, batch, objective.count(batch))
    (loss * -0.5).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    targets, valid = summary_targets(WINDOW)(batch, N)

    def plain(fns, inputs, unembeddings, params):
        logits = [
            F.linear(fn(inputs[i % len(inputs)]), unembeddings[i % len(unembeddings)])
            for i, fn in enumerate(fns)
        ]
        losses = [F.cross_entropy(logits[i].mT, targets[i], reduction="none") for i in range(N - 1)]
        window = targets[N - 1 :].flatten(1)
        last = summary(logits[-1].flatten(0, 1), window).view_as(losses[0])
        return [(x * v).sum() / v.sum() for x, v in zip([*losses, last], valid, strict=True)]

    model.zero_grad()
    means = model(batch.row, score=plain)
    wanted = sum(w * m for w, m in zip(weights, means, strict=True))
    (wanted * -0.5).backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6, check_dtype=False)
    got = torch.stack([total / count for total, count in metrics.values()])
    torch.testing.assert_close(got, torch.stack(means).detach(), rtol=1e-6, atol=1e-6)
    for n, p in model.named_parameters():
        torch.testing.assert_close(grads[n], p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SUMMARIES)
def test_gradcheck_of_a_summary(name):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(-1, 5, (1 + WINDOW, 2, 3), generator=generator)
    targets[0].clamp_(min=0)
    scale = torch.rand(2, 2, 3, generator=generator, dtype=torch.float64)
    shapes = [(2, 3, 4), (5, 4), (5, 4), (4, 4), (4, 4)]
    leaves = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]

    def loss(z, w, u, a, b):
        fns = [lambda x: torch.tanh(x @ a), lambda x: x + torch.sin(x @ b)]
        score = summarised(SUMMARIES[name], chunk=4)
        return score(fns, [z], [w, u], targets, scale, (a, b))[0]

    assert torch.autograd.gradcheck(loss, leaves)


def test_a_summary_without_gradients_is_the_same_number():
    model, batch = small("transformer"), packed()
    objective = MultiTokenLoss(N, score=summarised(order), targets=summary_targets(WINDOW))
    loss, _, _ = learned(model, objective, batch)
    with torch.no_grad():
        bare, _ = objective(model, batch, objective.count(batch))
    assert not bare.requires_grad
    torch.testing.assert_close(bare, loss)


def test_next_tokens_are_learned_as_by_the_plain_sum():
    """Of heads 1..n-1, whatever the last one learns: a summary of weight zero is the proof."""
    model, batch = small("transformer"), packed()
    weights = [1.0, 0.5, 0.0]
    objective = MultiTokenLoss(N, weights, score=summarised(bag), targets=summary_targets(WINDOW))
    plain = MultiTokenLoss(N, weights, score=sequential)
    loss, _, grads = learned(model, objective, batch)
    wanted, _, truth = learned(model, plain, batch)
    torch.testing.assert_close(loss, wanted)
    for name, g in grads.items():
        torch.testing.assert_close(g, truth[name], rtol=1e-6, atol=1e-9)
