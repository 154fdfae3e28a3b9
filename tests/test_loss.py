"""Multi-token losses: the sequential routine gives the plain loss and all its gradients."""

import doctest
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mtp.loss
from mtp.loss import (
    Batch,
    MultiTokenLoss,
    agreements,
    future_targets,
    mtp_loss,
    plain_batch,
    predictions,
    reference,
    sequential,
)

N, VOCAB = 3, 13
UNEMBEDDINGS = {
    "shared": {},
    "replicated": {"unembedding": "replicated"},
    "tied": {"tie_embeddings": True},
}
CASES = [
    (kind, cut)
    for kind in KINDS
    for cut in ("auto", "trunk", "latents")
    if cut != "trunk" or kind in ("transformer", "linear", "residual", "identity")
]


def small(kind, device, **overrides):
    return tiny(kind, n_future_tokens=N, n_layers=N + 1, **overrides).to(device)


def packed(device, seed=0, rows=2, length=8):
    """Rows of several documents, some tokens no targets, the second row padded at its end."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length + N)
    doc = (torch.rand(shape, generator=generator) < 0.15).cumsum(1)
    doc[1, -5:] = -1
    row = torch.randint(VOCAB, shape, generator=generator)
    return Batch(row, doc, torch.rand(shape, generator=generator) < 0.8).to(device)


def scale_of(batch, head_weights=(1.0, 1.0, 1.0)):
    valid = future_targets(batch, N)[1]
    return (
        valid
        * torch.tensor(head_weights, device=valid.device, dtype=torch.float64)[:, None, None]
        / 11
    )


def run(model, batch, score, cut, scale=None):
    targets = future_targets(batch, N)[0]
    scale = scale_of(batch) if scale is None else scale
    return model(batch.row, score=lambda f, x, w, p: score(f, x, w, targets, scale, p), cut=cut)


def gradients(model):
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def learn(model, *arguments, factor=1.0):
    """-> loss, nll, gradients of every parameter."""
    model.zero_grad()
    loss, nll = run(model, *arguments)
    (loss * factor).backward()
    return loss.detach(), nll, gradients(model)


def assert_same(got, wanted, atol=1e-10):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("unembedding", UNEMBEDDINGS)
@pytest.mark.parametrize(("kind", "cut"), CASES)
def test_sequential_gives_the_reference_loss_and_every_gradient(kind, cut, unembedding, device):
    model, batch = small(kind, device, **UNEMBEDDINGS[unembedding]), packed(device)
    scale = scale_of(batch, (1.0, 0.3, 2.5))
    assert 0 < (scale > 0).sum() < scale.numel()
    truth = learn(model, batch, reference, "latents", scale)
    assert all(g is not None for g in truth[2].values())
    assert_same(learn(model, batch, sequential, cut, scale), truth)


@pytest.mark.parametrize(("kind", "cut"), CASES)
def test_scaled_and_accumulated_gradients_add_up(kind, cut, device):
    model = small(kind, device)

    def accumulated(score, cut):
        model.zero_grad()
        for factor, seed in ((0.25, 1), (-2.0, 2)):
            (run(model, packed(device, seed), score, cut)[0] * factor).backward()
        return gradients(model)

    assert_same(accumulated(sequential, cut), accumulated(reference, "latents"))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("cut", ["trunk", "latents"])
def test_chunks_of_any_size_give_the_same(chunk, cut, device):
    model, batch = small("transformer", device), packed(device)
    truth = learn(model, batch, reference, "latents")
    assert_same(learn(model, batch, partial(sequential, chunk=chunk), cut), truth)


@pytest.mark.parametrize("cut", ["trunk", "latents"])
def test_the_loss_may_be_divided_in_place_and_gone_through_twice(cut, device):
    model, batch = small("transformer", device), packed(device)
    truth = learn(model, batch, reference, "latents")[2]
    model.zero_grad()
    loss, _ = run(model, batch, sequential, cut)
    loss /= 2
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(gradients(model), truth)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_checkpointed_heads(kind, device):
    """Another way to free logits: recompute head, unembedding and cross-entropy in backward."""

    def checkpointed(fns, inputs, weights, targets, scale, params):
        def one_head(x, i):
            logits = F.linear(fns[i](x), weights[i % len(weights)]).flatten(0, 1)
            return (
                F.cross_entropy(logits, targets[i].flatten(), reduction="none") * scale[i].flatten()
            ).sum()

        losses = [
            checkpoint(one_head, inputs[i % len(inputs)], i, use_reentrant=False) for i in range(N)
        ]
        return torch.stack(losses).sum(), None

    model, batch = small(kind, device), packed(device)
    loss, _, truth = learn(model, batch, checkpointed, "auto")
    got, _, grads = learn(model, batch, sequential, "auto")
    assert_same((got, grads), (loss, truth))


def leaf(*shape, device, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device).requires_grad_()


def test_gradcheck_of_the_trunk_cut(device):
    targets = torch.arange(12, device=device).view(2, 2, 3) % 5
    scale = leaf(2, 2, 3, device=device).detach().abs()

    def loss(z, w, u, a, b):
        fns = [lambda x: torch.tanh(x @ a), lambda x: x + torch.sin(x @ b)]
        return sequential(fns, [z], [w, u], targets, scale, (a, b), chunk=4)[0]

    shapes = [(2, 3, 4), (5, 4), (5, 4), (4, 4), (4, 4)]
    assert torch.autograd.gradcheck(
        loss, [leaf(*s, device=device, seed=i) for i, s in enumerate(shapes)]
    )


def test_gradcheck_of_the_latents_cut(device):
    targets = torch.arange(12, device=device).view(2, 2, 3) % 5
    scale = leaf(2, 2, 3, device=device).detach().abs()

    def loss(x, y, w):
        return sequential([lambda latent: latent] * 2, [x, y], [w], targets, scale, chunk=4)[0]

    shapes = [(2, 3, 4), (2, 3, 4), (5, 4)]
    assert torch.autograd.gradcheck(
        loss, [leaf(*s, device=device, seed=i) for i, s in enumerate(shapes)]
    )


def documents_of(size, device):
    """Documents of `size` tokens: heads beyond size - 1 have no target."""
    row = torch.arange(22, device=device).view(2, 11) % VOCAB
    return plain_batch(row)._replace(doc=(torch.arange(11, device=device) // size).expand(2, 11))


@pytest.mark.parametrize(("kind", "cut"), CASES)
def test_a_head_without_targets_counts_zero_and_disturbs_nothing(kind, cut, device):
    model, batch = small(kind, device), documents_of(2, device)
    loss_fn = MultiTokenLoss(N, cut=cut)
    count = loss_fn.count(batch)
    assert count[0] > 0 and count[1:].tolist() == [0, 0]
    loss, metrics = loss_fn(model, batch, count.clamp(min=1))
    loss.backward()
    assert metrics["loss_1"][0] > 0
    assert [(float(s), int(c)) for s, c in (metrics["loss_2"], metrics["loss_3"])] == [
        (0, 0),
        (0, 0),
    ]
    got = gradients(model)
    plain_loss, _, truth = learn(
        model, batch, reference, "latents", future_targets(batch, N)[1] / float(count[0])
    )
    assert_same(
        (loss.detach(), got), (plain_loss, truth), atol=1e-6
    )  # the objective's weights are fp32


def test_a_head_without_targets_gets_finite_zero_gradients(device):
    model, batch = small("transformer", device), documents_of(2, device)
    _, _, grads = learn(model, batch, sequential, "trunk")
    assert all(
        not g.any()
        for name, g in grads.items()
        if name.startswith(("heads.heads.1", "heads.heads.2"))
    )
    assert all(g.any() for name, g in grads.items() if name.startswith("heads.heads.0"))


@pytest.mark.parametrize(("kind", "cut"), CASES)
def test_rows_without_any_target_give_zero(kind, cut, device):
    model, batch = small(kind, device), documents_of(1, device)
    loss_fn = MultiTokenLoss(N, cut=cut)
    loss, _ = loss_fn(model, batch, loss_fn.count(batch).clamp(min=1))
    loss.backward()
    assert loss == 0
    assert all(p.grad.isfinite().all() and not p.grad.any() for p in model.parameters())


FROZEN = {
    "trunk": ("embedding", "trunk"),
    "unembedding": ("output",),
    "all but the unembedding": ("embedding", "trunk", "heads", "norm"),
    "all but the heads": ("embedding", "trunk", "norm", "output"),
    "all but the last head": (
        "embedding",
        "trunk",
        "norm",
        "output",
        "heads.heads.0",
        "heads.heads.1",
    ),
    "all but the embedding": ("trunk", "heads", "norm", "output"),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize(("kind", "cut"), CASES)
def test_frozen_parameters_get_no_gradient_and_the_others_stay_right(kind, cut, frozen, device):
    model, batch = small(kind, device), packed(device)
    truth = learn(model, batch, reference, "latents")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN[frozen]))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        pytest.skip("heads without parameters have nothing to learn")
    got = learn(model, batch, sequential, cut)
    wanted = {name: None if name.startswith(FROZEN[frozen]) else g for name, g in truth[2].items()}
    assert_same(got, (*truth[:2], wanted))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_without_gradients_is_the_same_number(kind, mode, device):
    model, batch = small(kind, device), packed(device)
    truth = run(model, batch, reference, "latents")
    with mode():
        got = run(model, batch, sequential, "auto")
    assert not got[0].requires_grad
    assert_same(got, (truth[0].detach(), truth[1]))


@pytest.mark.parametrize(
    ("kind", "cut"), [("transformer", "trunk"), ("linear", "trunk"), ("causal", "latents")]
)
def test_bf16_autocast_is_as_close_to_fp32_as_plain_autograd(kind, cut, device):
    model = small(kind, device, dim=32, vocab_size=64).float()
    batch = packed(device, length=16)
    truth = learn(model, batch, reference, "latents", scale_of(batch).float())[2]

    def error(score, cut):
        with torch.autocast(device.type, torch.bfloat16):
            grads = learn(model, batch, score, cut, scale_of(batch).float())[2]
        return sum(float((grads[k] - truth[k]).norm() ** 2) for k in truth) ** 0.5

    assert 0 < error(sequential, cut) <= 1.5 * error(reference, "latents")


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        self.numel = max([self.numel, *(t.numel() for t in results if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("independent", [True, False])
def test_no_tensor_is_larger_than_one_chunk_of_logits(independent, device):
    rows, length, width, vocab, chunk = 2, 16, 4, 512, 5
    weight = leaf(vocab, width, device=device)
    inputs = [
        leaf(rows, length, width, device=device, seed=i) for i in range(1 if independent else N)
    ]
    targets = torch.zeros(N, rows, length, dtype=torch.long, device=device)

    def largest(score):
        with Largest() as mode:
            score(
                [lambda x: x * 1.0] * N,
                inputs,
                [weight],
                targets,
                torch.ones_like(targets).double(),
            )[0].backward()
        return mode.numel

    assert largest(partial(sequential, chunk=chunk)) == chunk * vocab
    assert largest(reference) >= rows * length * vocab


def test_chunks_suit_a_cpus_cache_and_an_accelerators_products():
    on_cpu, elsewhere = (
        mtp.loss.chunk_size(torch.empty(2**15, 1, device=d)) for d in ("cpu", "meta")
    )
    assert on_cpu * 2**15 * 4 <= 2**25  # bytes of logits
    assert elsewhere >= 2000  # positions


def test_future_targets_are_what_a_loop_over_positions_says():
    for seed in range(5):
        batch = packed("cpu", seed)
        targets, valid = future_targets(batch, N)
        rows, width = batch.row.shape
        assert targets.shape == valid.shape == (N, rows, width - N)
        for i, b, t in torch.cartesian_prod(*map(torch.arange, targets.shape)).tolist():
            ahead = t + 1 + i
            assert targets[i, b, t] == batch.row[b, ahead]
            same_document = batch.doc[b, ahead] == batch.doc[b, t] and batch.doc[b, t] != -1
            assert valid[i, b, t] == bool(same_document and batch.keep[b, ahead])


def test_count_is_the_number_of_valid_targets_per_head():
    batch = packed("cpu")
    assert MultiTokenLoss(N).count(batch).tolist() == [
        int(v.sum()) for v in future_targets(batch, N)[1]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_objective_is_the_weighted_sum_of_mean_cross_entropies(kind, device):
    model, batch, head_weights = small(kind, device), packed(device), [0.5, 0.25, 2.0]
    objective = MultiTokenLoss(N, head_weights)
    loss, metrics = objective(model, batch, objective.count(batch))
    logits = model(batch.row, return_all_heads=True)[:, :-N]
    targets, valid = future_targets(batch, N)
    means = torch.stack(
        [F.cross_entropy(logits[:, :, i][valid[i]], targets[i][valid[i]]) for i in range(N)]
    )
    torch.testing.assert_close(
        loss, (means * means.new_tensor(head_weights)).sum(), rtol=1e-6, atol=1e-6
    )
    assert_same(torch.stack([s / c for s, c in metrics.values()]), means)


@pytest.mark.parametrize("kind", KINDS)
def test_mtp_loss_is_the_sum_of_the_heads_means(kind, device):
    model, row = small(kind, device), packed(device).row
    loss, means = mtp_loss(model, row)
    logits = model(row, return_all_heads=True)[:, :-N]
    wanted = [
        F.cross_entropy(
            logits[:, :, i].flatten(0, 1), row[:, i + 1 :][:, : logits.shape[1]].flatten()
        )
        for i in range(N)
    ]
    assert_same(means, torch.stack(wanted).detach())
    torch.testing.assert_close(loss, sum(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unembedding", UNEMBEDDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_every_heads_nll_and_argmax(kind, unembedding, device):
    model, batch = small(kind, device, **UNEMBEDDINGS[unembedding]), packed(device)
    targets = future_targets(batch, N)[0]
    nll, best = model(batch.row, score=lambda f, x, w, p: predictions(f, x, w, targets, p))
    logits = model(batch.row, return_all_heads=True)[:, :-N].permute(2, 0, 1, 3)
    assert torch.equal(best, logits.argmax(-1))
    wanted = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(nll.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_agreements_are_what_a_loop_over_heads_and_positions_says(n):
    generator = torch.Generator().manual_seed(n)
    best = torch.randint(2, (n, 3, 11), generator=generator)  # two tokens: about half agree
    valid = torch.rand(n, 3, 11, generator=generator) < 0.7
    agree, usable = agreements(best, valid)
    span = 11 - n + 1
    assert agree.shape == (n - 1, 3, span) and agree.dtype == torch.bool
    for b, t in torch.cartesian_prod(torch.arange(3), torch.arange(span)).tolist():
        own = [bool(best[j, b, t] == best[0, b, t + j]) for j in range(1, n)]
        assert agree[:, b, t].tolist() == own
        assert usable[b, t] == valid[n - 1, b, t]


def test_docstring_examples_run():
    result = doctest.testmod(mtp.loss)
    assert result.attempted > 0 and result.failed == 0


def test_unknown_cut_is_refused_by_the_objective_and_by_the_model(device):
    for call in (
        lambda: MultiTokenLoss(N, cut="middle"),
        lambda: run(small("linear", device), packed(device), reference, "middle"),
    ):
        with pytest.raises(
            ValueError, match="cut='middle' is unknown: allowed are auto, trunk, latents"
        ):
            call()


def test_wrong_number_of_head_weights_is_refused():
    with pytest.raises(ValueError, match="head_weights has 2 numbers for n_future_tokens=3"):
        MultiTokenLoss(N, [1.0, 1.0])


def test_row_too_short_for_its_heads_is_refused():
    with pytest.raises(
        ValueError,
        match="a row of 3 tokens is too short for n_future_tokens=3: it needs at least 4",
    ):
        future_targets(plain_batch(torch.zeros(1, N, dtype=torch.long)), N)


def test_positions_too_few_to_score_chains_are_refused():
    with pytest.raises(ValueError, match="rows of 2 positions are too short to score 3 heads"):
        agreements(torch.zeros(3, 1, 2, dtype=torch.long), torch.ones(3, 1, 2, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["causal", "anticausal", "sequential"])
def test_trunk_cut_is_refused_where_heads_read_each_other(kind, device):
    with pytest.raises(ValueError, match=f"cut='trunk' needs .* head='{kind}': use 'latents'"):
        run(small(kind, device), packed(device), sequential, "trunk")


@pytest.mark.parametrize("place", ["weights", "params"])
def test_sharded_parameters_are_refused(place):
    class DTensor(torch.Tensor):
        pass

    plain = torch.zeros(5, 4)
    tensors = {"weights": [plain], "params": [], place: [plain.as_subclass(DTensor)]}
    targets = torch.zeros(1, 1, 3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="sharded parameter .* use cut='latents'"):
        sequential(
            [lambda x: x],
            [torch.zeros(1, 3, 4)],
            tensors["weights"],
            targets,
            targets,
            tensors["params"],
        )
