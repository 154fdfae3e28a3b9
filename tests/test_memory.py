"""Memory of a training step: the count is right, and it does not grow with the number of heads."""

from dataclasses import asdict, replace
from functools import cache

import pytest
import torch

from benchmarks import train_memory
from benchmarks.pictures import memory_panels
from benchmarks.record import ROOT
from benchmarks.shapes import SMALL, shape
from benchmarks.train_memory import (
    WAYS,
    LiveBytes,
    MemoryConfig,
    count_step,
    figures,
    measure,
    table,
    with_heads,
)
from mtp.loss import MultiTokenLoss, plain_batch, sequential
from mtp.model import ModelConfig, Transformer

SEQUENTIAL = [way for way in WAYS if "reference" not in way]
TINY = ModelConfig(
    dim=32, n_layers=3, n_heads=2, n_future_tokens=2, vocab_size=2048, multiple_of=8, max_seq_len=64
)

# The count.


def test_what_is_freed_no_longer_counts():
    with LiveBytes() as live:
        a = torch.zeros(100)
        b = a + 1
        assert live.now == 800
        del a
        assert live.now == 400
        c = b.double()
        assert live.now == live.peak == 1200
        del b, c
    assert (live.now, live.peak, live.largest) == (0, 1200, 800)


def test_views_and_work_in_place_take_nothing():
    before = torch.zeros(100)
    with LiveBytes() as live:
        before.view(10, 10)[::2].T.mul_(2)
        made = torch.ones(10)
        part = made[3:]
        del made
        assert live.now == live.peak == 40  # part holds all of it
        del part
    assert live.now == 0


def test_what_is_kept_for_backward_counts_until_backward():
    x = torch.zeros(100, requires_grad=True)
    x.grad = torch.zeros(100)
    with LiveBytes() as live:
        loss = x.exp().sum()
        assert live.now == 404  # exp keeps its result, though no name holds it
        loss.backward()
        assert live.now == 4
        # the gradient of exp beside what it is made of, 1 and the expanded 1
    assert live.peak == 808


def allocated(config, way):
    """The peak of the CPU's allocator, from its own log."""
    torch.manual_seed(0)
    step = train_memory._prepare(Transformer(config), WAYS[way], rows=2)
    step()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert now == 0
    return peak


@pytest.mark.parametrize("way", WAYS)
def test_the_count_without_memory_is_what_the_allocator_hands_out(way):
    unseen = 0
    if WAYS[way].recompute_heads:  # the state of the random numbers at each head's start
        unseen = TINY.n_future_tokens * torch.get_rng_state().nbytes
    assert 0 <= allocated(TINY, way) - count_step(TINY, way, rows=2).peak <= unseen


def test_large_shapes_are_counted_without_their_memory():
    config = with_heads(shape("13b"), 4)
    parameters = 13e9
    assert (
        0.5 * parameters < count_step(config, "trunk", dtype=torch.bfloat16).peak < 4 * parameters
    )


# The promise.


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    """Nor is any gradient, in this shape."""
    config = replace(TINY, vocab_size=2**15, max_seq_len=1024)
    chunk = 2**23 // config.vocab_size
    assert config.max_seq_len > chunk > config.dim
    for way in SEQUENTIAL:
        assert count_step(config, way).largest == 4 * chunk * config.vocab_size, way
    assert count_step(config, "reference").largest == 4 * config.max_seq_len * config.vocab_size


def leaf(*size):
    x = torch.zeros(size, requires_grad=True)
    x.grad = torch.zeros(size)
    return x


def test_one_chunk_of_logits_is_alive_at_a_time():
    vocab, chunk = 4096, 64
    x, weight = leaf(1, 4 * chunk, 4), leaf(vocab, 4)
    targets = torch.zeros(2, 1, 4 * chunk, dtype=torch.long)
    with LiveBytes() as live:
        sequential([torch.sin] * 2, [x], [weight], targets, torch.ones(targets.shape), chunk=chunk)
    assert live.peak < 1.2 * 4 * chunk * vocab


def test_backward_makes_one_gradient_after_another():
    """What is stored is scaled, given out and freed tensor by tensor, not all of it at once."""
    x, weights = leaf(1, 8, 64), [leaf(512, 64) for _ in range(4)]
    targets = torch.zeros(4, 1, 8, dtype=torch.long)
    with LiveBytes() as live:
        loss, _ = sequential([torch.sin] * 4, [x], weights, targets, torch.ones(targets.shape))
        stored = live.peak = live.now
        loss.backward()
    assert stored > sum(w.nbytes for w in weights)
    assert live.peak < stored + 1.5 * weights[0].nbytes


@cache
def peak(n, whole_trunk, way):
    return count_step(with_heads(SMALL, n, whole_trunk), way).peak


def test_the_figures_of_the_trunk_cut():
    """8 layers, 2048 positions, D = 512, V = 32768, fp32, heads not recomputed."""
    found = figures(peak)
    assert found["sequential_over_reference_n4"] <= 0.30
    assert found["peak_n4_over_n1"] <= 1.00
    assert found["peak_n8_over_n1"] <= 1.00
    assert found["peak_n8_over_n1_whole_trunk"] <= 1.15


def test_the_latents_cut_with_recomputed_heads_meets_the_same_bars():
    """The one for sharded models."""
    way = "latents+recompute"
    assert peak(4, False, way) <= 0.30 * peak(4, False, "reference")
    assert peak(8, False, way) <= 1.00 * peak(1, False, way)
    assert peak(8, True, way) <= 1.15 * peak(1, False, way)


def test_the_default_objective_is_the_trunk_cut_that_was_measured():
    model, n = Transformer(TINY), TINY.n_future_tokens
    batch = plain_batch(torch.zeros(1, 8 + n, dtype=torch.long))

    def peak_of(cut):
        loss_fn = MultiTokenLoss(n, cut=cut)
        with LiveBytes() as live:
            loss_fn(model, batch, loss_fn.count(batch))
        return live.peak

    assert peak_of("auto") == peak_of("trunk") != peak_of("latents")


# The benchmark.


def test_shapes_are_those_of_the_configs():
    yaml = pytest.importorskip("yaml")
    files = list((ROOT / "configs" / "model").glob("*.yaml"))
    assert files
    for path in files:
        assert asdict(shape(path.stem)) == asdict(ModelConfig(**yaml.safe_load(path.read_text())))


def test_equal_parameters_or_an_equal_trunk():
    def sizes(n, whole_trunk):
        config = with_heads(SMALL, n, whole_trunk)
        with torch.device("meta"):
            model = Transformer(config)
        return sum(p.numel() for p in model.parameters()), config.trunk_layers

    (one, trunk), (equal, _), (_, kept) = sizes(1, False), sizes(8, False), sizes(8, True)
    assert one == equal and trunk == kept


@pytest.fixture
def cases(monkeypatch):
    """Both dtypes of two small cases, as if on a GPU that only the first of them fits."""
    monkeypatch.setattr(train_memory, "CASES", [(1, False), (2, True)])
    monkeypatch.setattr(train_memory, "shape", lambda name: TINY)
    monkeypatch.setattr(train_memory, "_fits", lambda config, dtype, counted: dtype.itemsize == 2)
    monkeypatch.setattr(train_memory, "allocated_bytes", lambda *step: 3 * 2**30)
    return {dtype: list(measure("small", dtype, 1)) for dtype in ("bfloat16", "float32")}


def test_a_gpus_own_figures_stand_below_what_was_counted(cases):
    assert all(c["counted"] >= c["largest_tensor"] > 0 for c in cases["bfloat16"])
    head, *lines = table(cases["bfloat16"]).splitlines()
    assert head.split() == ["n", *WAYS]
    assert [line.split()[0] for line in lines] == ["1", "allocated", "2", "allocated"]
    assert lines[1].split()[1:] == ["3.000"] * len(WAYS)
    assert "allocated" not in table(cases["float32"])


def test_the_plot_is_a_picture(cases, tmp_path):
    pytest.importorskip("matplotlib")
    memory_panels(cases["bfloat16"] + cases["float32"], tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"shapes": "small,7b"}, "shape '7b' is unknown: allowed are small, 20m, "),
        ({"dtypes": "float16"}, "dtypes='float16' is unknown: allowed are float32, bfloat16"),
    ],
)
def test_unknown_shapes_and_types_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**words)
