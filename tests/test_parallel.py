"""Two processes learn what one process learns from the whole batch, however targets are spread."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from conftest import tiny
from torch.nn.parallel import DistributedDataParallel

from mtp.distributed import rank, sum_over_ranks, world_size
from mtp.loss import Batch, MultiTokenLoss, future_targets
from mtp.optim import OptimConfig
from mtp.train import TrainConfig, train

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")

N, RANKS = 4, 2
CASES = [("transformer", "trunk"), ("transformer", "latents"), ("causal", "latents")]


def whole_batch():
    """Four packed rows; the second process's two have far fewer targets than the first's."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(13, (4, 14), generator=generator)
    doc = torch.zeros(4, 14, dtype=torch.long)
    doc[1, 9:] = 1
    doc[2, 5:] = 1
    doc[3, 6:] = -1
    keep = torch.ones(4, 14, dtype=torch.bool)
    keep[2, :8] = False
    return Batch(row, doc, keep)


def share(batch, number):
    return Batch(*(x.chunk(RANKS)[number] for x in batch))


def gradients(model, wrapped, loss_fn, batch):
    denominator = sum_over_ranks(loss_fn.count(batch)).clamp(min=1) / world_size()
    loss, metrics = loss_fn(wrapped, batch, denominator)
    loss.backward()
    sums = {name: sum_over_ranks(total.clone()) for name, (total, _) in metrics.items()}
    return {name: p.grad for name, p in model.named_parameters()} | sums


class Once:
    """A source of batches that are split between the processes."""

    def __init__(self, batch, steps):
        self.batches = [share(batch, rank()) if world_size() > 1 else batch] * steps

    def __next__(self):
        return self.batches.pop()


def trained(model, wrapped, batch, log):
    """Weights after three steps, and what was logged."""
    config = TrainConfig(steps=3, log_every=1, optim=OptimConfig(lr=1e-2, warmup_steps=1))

    def note(progress):
        log.append({k: v for k, v in progress.metrics.items() if k[:5] in ("loss_", "grad_")})
        log[-1]["tokens"] = progress.tokens

    train(wrapped, Once(batch, 3), MultiTokenLoss(N), config, hooks=[note])
    return {name: p.detach() for name, p in model.named_parameters()}


def work(number, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=RANKS
    )
    try:
        results, batch = {}, whole_batch()
        for kind, cut in CASES:
            model = tiny(kind)
            wrapped = DistributedDataParallel(model)
            loss_fn = MultiTokenLoss(N, cut=cut)
            results[kind, cut] = gradients(model, wrapped, loss_fn, share(batch, number))
        model, log = tiny(), []
        weights = trained(model, DistributedDataParallel(model), batch, log)
        torch.save((results, weights, log), f"{folder}/{number}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), RANKS)
    return [torch.load(folder / f"{number}.pt") for number in range(RANKS)]


def test_the_processes_have_unevenly_many_targets_in_every_head():
    left, right = (future_targets(share(whole_batch(), i), N)[1].sum((1, 2)) for i in range(RANKS))
    assert (left > 2 * right).all() and (right > 0).all()


@pytest.mark.parametrize(("kind", "cut"), CASES)
def test_gradients_and_losses_of_two_processes_are_those_of_one(kind, cut, ranks):
    model = tiny(kind)
    expected = gradients(model, model, MultiTokenLoss(N, cut=cut), whole_batch())
    for results, _, _ in ranks:
        assert results[kind, cut].keys() == expected.keys()
        for name, t in expected.items():
            torch.testing.assert_close(results[kind, cut][name], t, rtol=0, atol=1e-10, msg=name)


def test_two_processes_train_like_one(ranks):
    log = []
    model = tiny()
    weights = trained(model, model, whole_batch(), log)
    for _, their_weights, their_log in ranks:
        for name, t in weights.items():
            torch.testing.assert_close(their_weights[name], t, rtol=0, atol=1e-10, msg=name)
        for theirs, ours in zip(their_log, log, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-10)


def test_without_a_process_group_there_is_one_process():
    x = torch.ones(2)
    assert (rank(), world_size()) == (0, 1)
    assert sum_over_ranks(x) is x
