"""Packed matrices: the same model up to rounding, whatever it is asked for, and a copy."""

import pytest
import torch
from conftest import KINDS, tiny

from mtp import OwnHeads, Request, Sampling, generate, mtp_loss
from mtp.packed import PackedLinear, can_pack

pytestmark = pytest.mark.skipif(
    not can_pack(torch.float32, "cpu"), reason="no kernel for packed matrices here"
)
OTHERS = [{}, {"unembedding": "replicated"}, {"tie_embeddings": True}, {"n_kv_heads": 1}]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5, 7), (2, 0, 7)])
def test_a_packed_linear_is_the_linear(shape, bias):
    linear, x = torch.nn.Linear(7, 11, bias=bias), torch.randn(shape)
    got = PackedLinear(linear.weight, linear.bias)(x)
    assert not got.requires_grad
    torch.testing.assert_close(got, linear(x).detach())


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model_says_and_decodes_the_same(kind, other):
    model = tiny(kind, gain=1.4, **other).float()
    packed, tokens = model.packed(), torch.arange(12)[None] % model.config.vocab_size
    with torch.inference_mode():
        heads = [m(tokens, return_all_heads=True) for m in (model, packed)]
    torch.testing.assert_close(*heads, atol=1e-4, rtol=1e-4)
    requests = [Request([1, 2, 3], 20, seed) for seed in range(3)]
    vocabulary = range(0, model.config.vocab_size, 2)
    tree = None if model.reads_ahead else 6
    for drafter in (None, OwnHeads(), OwnHeads(vocabulary=vocabulary), OwnHeads(tree=tree)):
        plain, fast = (
            generate(m, requests, drafter, Sampling(1.0), batch_size=2) for m in (model, packed)
        )
        assert [c.tokens for c in plain] == [c.tokens for c in fast]
        assert [c.accepted for c in plain] == [c.accepted for c in fast]


def test_packing_leaves_the_model_as_it_was_and_trainable():
    model = tiny("transformer").float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    packed = model.packed()
    assert packed.packed() is packed
    assert packed.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert not any(p.requires_grad for p in packed.parameters())
    loss, _ = mtp_loss(model, torch.zeros(1, 8 + model.config.n_future_tokens, dtype=torch.long))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_cannot_be_packed_stays_as_it_is():
    model = tiny("transformer").double()
    assert model.packed() is model
