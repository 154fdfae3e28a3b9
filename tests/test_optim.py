"""Optimizers: what decays, how state is kept, and that Muon is what PyTorch calls so."""

import pytest
import torch
from conftest import tiny

from mtp.optim import OPTIMIZERS, Muon, OptimConfig, Optimizer, orthogonal, schedule


@pytest.mark.parametrize("name_", OPTIMIZERS)
def test_matrices_decay_and_norms_do_not(name_):
    model = tiny()
    optimizer = Optimizer(model, OptimConfig(name=name_, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(lr=0.1)
    for name, p in model.named_parameters():
        factor = 1.0 if "norm" in name else 1 - 0.1 * 0.5
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_betas_reach_the_optimizer():
    group = Optimizer(tiny(), OptimConfig(betas=(0.3, 0.4))).parts[0].param_groups[0]
    assert tuple(group["betas"]) == (0.3, 0.4)


def test_warm_up_is_linear_in_steps():
    constant = OptimConfig(warmup_steps=4, final_lr_ratio=1.0)
    assert [schedule(step, 0.0, constant) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize(("done", "factor"), [(0.0, 1.0), (0.5, 0.55), (1.0, 0.1)])
def test_cosine_falls_to_the_final_ratio(done, factor):
    assert schedule(99, done, OptimConfig(warmup_steps=0, final_lr_ratio=0.1)) == pytest.approx(
        factor
    )


def matrices(count, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8), (1, 5)])
def test_orthogonal_keeps_singular_vectors_and_makes_values_near_one(shape):
    x = torch.stack(matrices(3, shape)).double()
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonal(x) @ v.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-8)
    assert 0.6 < values.min() and values.max() < 1.3


def test_orthogonal_takes_zeros():
    assert not orthogonal(torch.zeros(2, 3, 4)).any()


def test_muon_is_pytorchs_but_for_its_rounding_to_bfloat16():
    ours, theirs = (
        [torch.nn.Parameter(x) for shape in ((8, 24), (24, 8)) for x in matrices(2, shape)]
        for _ in range(2)
    )
    steps = [
        Muon(ours, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for seed in range(4):
        for params, optimizer in zip((ours, theirs), steps, strict=True):
            for i, p in enumerate(params):
                p.grad = matrices(1, p.shape, seed=10 * seed + i)[0]
            optimizer.step()
    for p, q, start in zip(
        ours, theirs, [*matrices(2, (8, 24)), *matrices(2, (24, 8))], strict=True
    ):
        moved = (q - start).norm()
        assert (p - q).norm() < 0.02 * moved


def test_muon_takes_the_linear_maps_and_adamw_the_rest():
    model = tiny()
    adamw, muon = Optimizer(model, OptimConfig(name="muon")).parts
    by_muon = {p for group in muon.param_groups for p in group["params"]}
    by_adamw = {p for group in adamw.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if p in by_adamw}
    assert names == {"embedding.weight", "output.0"} | {n for n in names if "norm" in n}
    assert by_muon | by_adamw == set(model.parameters()) and not by_muon & by_adamw


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"needs whole matrices, not a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))], 0.1, 0.0)


# State.


def stepped(model, name="adamw", without=""):
    optimizer = Optimizer(model, OptimConfig(name=name))
    for parameter, p in model.named_parameters():
        if parameter != without:
            p.grad = torch.ones_like(p)
    optimizer.step(lr=0.01)
    return optimizer


@pytest.mark.parametrize("damage", ["misshapen", "half"])
def test_an_optimizer_state_that_does_not_fit_is_refused_by_name(damage):
    model, name = tiny(), "trunk.0.w2.weight"
    state = stepped(model).state_dict()
    if damage == "misshapen":
        state[f"{name}.exp_avg"] = state[f"{name}.exp_avg"].T.contiguous()
    else:
        del state[f"{name}.exp_avg_sq"]
    optimizer = Optimizer(model, OptimConfig())
    with pytest.raises(ValueError, match=f"does not fit the model: {name}"):
        optimizer.load_state_dict(state)


def test_a_state_of_other_parameters_or_another_optimizer_is_refused():
    model = tiny()
    state = stepped(model).state_dict()
    with pytest.raises(ValueError, match="has no parameter 'module.norm.weight'"):
        Optimizer(model, OptimConfig()).load_state_dict({"module.norm.weight.step": torch.ones(())})
    with pytest.raises(ValueError, match="does not fit the model: .* not {'momentum'"):
        Optimizer(model, OptimConfig(name="muon")).load_state_dict(state)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("without", ["", "trunk.0.w2.weight"])
def test_a_restored_optimizer_is_the_saved_one(name, without):
    """Also where a parameter never had a gradient, and so has no state."""
    model = tiny()
    state, optimizer = (
        stepped(model, name, without).state_dict(),
        Optimizer(model, OptimConfig(name)),
    )
    optimizer.load_state_dict(state)
    restored = optimizer.state_dict()
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], t) for name, t in state.items())


def test_a_part_that_was_frozen_meanwhile_needs_no_optimizer_state():
    model = tiny()
    state = stepped(model).state_dict()
    model.trunk.requires_grad_(False)
    optimizer = Optimizer(model, OptimConfig())
    optimizer.load_state_dict(state)
    assert not any(name.startswith("trunk.") for name in optimizer.state_dict())
