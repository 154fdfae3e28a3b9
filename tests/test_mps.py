"""Apple's GPUs: found, and asked for no fp64, which they lack. Where there is none, the second is
tested on the CPU, by what the code asks of a device.
"""

from functools import wraps

import pytest
import torch
from conftest import tiny
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mtp import BeamHeads, BeamModel, DraftModel, OwnHeads, PromptLookup, Request, Sampling
from mtp.decode import loop
from mtp.decode.loop import generate
from mtp.loss import MultiTokenLoss, plain_batch
from mtp.run import find_device
from mtp.train import TrainConfig, train

HERE = torch.backends.mps.is_available()
REQUESTS = [Request([1, 2, 3, 1, 2], 8, seed=5), Request([4], 8, seed=6)]


class NoFp64(TorchDispatchMode):
    """As on such a device, nothing becomes fp64: laws that the host made may be put together."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = [x.dtype == torch.float64 for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                assert read and all(read), f"{func} makes fp64"
        return result


class Unwatched:
    """A rule on the host, where fp64 is allowed."""

    def __init__(self, rule):
        self.lossy = rule.lossy
        for name in ("scores", "branches", "draw"):
            setattr(self, name, self.outside(getattr(rule, name)))
        self.judge = self.outside(rule)

    @staticmethod
    def outside(call):
        @wraps(call, updated=())
        def outside_of_modes(*args):
            with _disable_current_modes():
                return call(*args)

        return outside_of_modes

    def __call__(self, *args):
        return self.judge(*args)


class Rows:
    """One batch again and again."""

    def __next__(self):
        return plain_batch(torch.arange(24).view(2, 12) % 13)


@pytest.fixture
def without_fp64(monkeypatch):
    make_rule = loop.make_rule
    monkeypatch.setattr(loop, "make_rule", lambda *words: Unwatched(make_rule(*words)))
    monkeypatch.setattr(loop, "lacks_fp64", lambda device: True)


@pytest.mark.parametrize(
    ("cuda", "mps", "found"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_prefers_cuda_then_mps(cuda, mps, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device("auto") == torch.device(found)


@pytest.mark.skipif(HERE, reason="has an Apple GPU")
def test_mps_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="device='mps' does not work here .* auto, cpu, cuda, mps"):
        find_device("mps")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_asks_for_no_fp64(optimizer):
    model, config = tiny().float(), TrainConfig(steps=2, log_every=1)
    config.optim.name = optimizer
    with NoFp64():
        assert train(model, Rows(), MultiTokenLoss(4), config).step == 2


DRAFTS = {
    "none": (lambda: None, ("match", "exact", "joint")),
    "heads": (OwnHeads, ("match", "exact", "block", "joint")),
    "tree": (lambda: OwnHeads(tree=6), ("match",)),
    "model": (lambda: DraftModel(tiny(seed=3).float()), ("match", "exact")),
    "lookup": (PromptLookup, ("match", "exact")),
    "beam of heads": (BeamHeads, ("match", "joint")),
    "beam": (lambda: BeamModel(tiny(seed=3).float(), whole=True), ("match", "joint")),
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("words", DRAFTS)
def test_decoding_asks_for_no_fp64_and_writes_the_same(words, temperature, without_fp64):
    make, rules = DRAFTS[words]
    model, sampling = tiny(gain=3.0).float(), Sampling(temperature)
    for rule in rules:
        drafter = make()
        with NoFp64():
            there = generate(model, REQUESTS, drafter, sampling, rule=rule)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "lacks_fp64", lambda device: False)
            here = generate(model, REQUESTS, make(), sampling, rule=rule)
        assert [x.tokens for x in there] == [x.tokens for x in here], rule


@pytest.mark.skipif(not HERE, reason="has no Apple GPU")
def test_a_model_trains_on_an_apple_gpu_and_writes_what_the_cpu_does():
    model = tiny(gain=3.0).float().to("mps")
    assert train(model, Rows(), MultiTokenLoss(4), TrainConfig(steps=2, log_every=1)).step == 2
    there = generate(model, REQUESTS, OwnHeads())
    here = generate(model.to("cpu"), REQUESTS, OwnHeads())
    assert [x.tokens for x in there] == [x.tokens for x in here]
    sampled = generate(model.to("mps"), REQUESTS, OwnHeads(), Sampling(0.8))
    assert [len(x.tokens) for x in sampled] == [8, 8]
