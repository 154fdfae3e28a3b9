"""Blocks that are compiled or run again in backward give the same gradients."""

import pytest
import torch
from conftest import KINDS, tiny

from mtp.blocks import compile_blocks, recompute_blocks
from mtp.loss import mtp_loss
from mtp.train import TrainConfig, prepare


def gradients(model):
    row = torch.randint(13, (2, 16), generator=torch.Generator().manual_seed(0))
    mtp_loss(model, row)[0].backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("message", ["no C++ compiler\nmany more lines", ""])
def test_without_a_working_compiler_there_is_a_warning(message, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", broken)
    model = tiny()
    assert not compile_blocks(model.blocks, torch.device("cpu"))
    assert all(torch.equal(g, gradients(tiny())[name]) for name, g in gradients(model).items())
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "torch.compile does not work here" in record.message
    assert "\n" not in record.message


def test_every_block_is_compiled_where_a_compiler_works(monkeypatch):
    compiled = []

    def identity(callable_, *args, **kwargs):
        compiled.append(callable_)
        return callable_

    monkeypatch.setattr(torch, "compile", identity)
    model = tiny()
    prepare(model, TrainConfig(compile=True))
    assert [call.__self__ for call in compiled if hasattr(call, "__self__")] == model.blocks
    assert all(torch.equal(g, gradients(tiny())[name]) for name, g in gradients(model).items())


@pytest.mark.parametrize("which", ["heads", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_give_the_same_gradients_and_names(kind, which):
    model, untouched = tiny(kind), tiny(kind)
    prepare(model, TrainConfig(recompute=which))
    expected = gradients(untouched)
    found = gradients(model)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(("which", "times"), [("none", (1, 1)), ("heads", (1, 2)), ("all", (2, 2))])
def test_blocks_run_again_where_asked(which, times):
    """Trunk and heads, by how often their feed-forward layers run in a step."""
    model, ran = tiny("causal"), []
    prepare(model, TrainConfig(recompute=which))
    for name, block in (("trunk", model.trunk[0]), ("head", model.heads.heads[0])):
        block.w13.register_forward_hook(lambda *_, name=name: ran.append(name))
    gradients(model)
    assert (ran.count("trunk"), ran.count("head")) == times


def test_recomputed_blocks_keep_less():
    def kept(model):
        saved = []
        pack = lambda t: saved.append(t.untyped_storage().nbytes()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.ones(2, 12, dtype=torch.long)).sum()
        return sum(saved)

    recomputed = tiny()
    recompute_blocks(recomputed.blocks)
    assert kept(recomputed) < 0.5 * kept(tiny())
