"""Several processes learn what one process learns from the whole batch, however targets are spread,
and what they saved is read by any number of processes.
"""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from conftest import KINDS, tiny
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mtp import checkpoint
from mtp.blocks import recompute_blocks
from mtp.distributed import (
    _slurm,
    from_rank_zero,
    gather_objects,
    rank,
    shard,
    sum_on_host,
    sum_over_ranks,
    world_size,
)
from mtp.loss import Batch, MultiTokenLoss, future_targets
from mtp.objectives import SCHEDULES, SUMMARIES, summary_loss
from mtp.optim import OptimConfig, Optimizer
from mtp.train import TrainConfig, train, validate

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")

N = 4
CPU = torch.device("cpu")


def whole_batch():
    """Four packed rows; the later ones have far fewer targets than the first."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(13, (4, 14), generator=generator)
    doc = torch.zeros(4, 14, dtype=torch.long)
    doc[1, 9:] = 1
    doc[2, 5:] = 1
    doc[3, 6:] = -1
    keep = torch.ones(4, 14, dtype=torch.bool)
    keep[2, :8] = False
    return Batch(row, doc, keep)


def share(batch, number=None):
    """A process's part of the rows."""
    number = rank() if number is None else number
    return Batch(*(x.chunk(max(world_size(), 1))[number] for x in batch))


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def gradients(model, wrapped, loss_fn, batch):
    denominator = sum_over_ranks(loss_fn.count(batch)).clamp(min=1) / world_size()
    loss, metrics = loss_fn(wrapped, batch, denominator)
    loss.backward()
    sums = {name: sum_over_ranks(total.clone()) for name, (total, _) in metrics.items()}
    return {name: whole(p.grad) for name, p in model.named_parameters()} | sums


# How a model is spread: name -> (model -> what is called).


def sharded(how, model, recompute=False):
    if recompute:
        recompute_blocks(model.blocks)
    shard(model, how)
    return model


WRAPS = {
    "ddp": DistributedDataParallel,
    "replicate": partial(sharded, "replicate"),
    "shard": partial(sharded, "shard"),
    "recomputed": partial(sharded, "shard", recompute=True),
    "hybrid": partial(sharded, "hybrid"),
}
OVERRIDES = {
    "": {},
    "tied": {"tie_embeddings": True},
    "replicated": {"unembedding": "replicated"},
}
CASES = [
    *(("ddp", kind, "auto", "") for kind in KINDS),
    *(("ddp", "transformer", "latents", unembedding) for unembedding in OVERRIDES),
    *((wrap, kind, "auto", "") for wrap in ("replicate", "shard") for kind in KINDS),
    *(("shard", "transformer", "auto", unembedding) for unembedding in ("tied", "replicated")),
    ("recomputed", "transformer", "auto", ""),
    ("recomputed", "anticausal", "auto", ""),
    ("recomputed", "sequential", "auto", ""),
]
CASES_OF = {2: CASES, 4: [("hybrid", kind, "auto", "") for kind in KINDS]}


def objectives():
    """A curriculum that runs three of four heads, and a last head that learns a summary."""
    scheduled = MultiTokenLoss(N, schedule=SCHEDULES["reverse"])
    scheduled.at(0.4)
    return {"reverse": scheduled} | {name: summary_loss(name, N, 6) for name in SUMMARIES}


class Once:
    """A source of batches that are split between the processes."""

    def __init__(self, batch, steps):
        self.batches = [share(batch) if world_size() > 1 else batch] * steps

    def __next__(self):
        return self.batches.pop()


TRAINING = TrainConfig(steps=3, log_every=1, optim=OptimConfig(lr=1e-2, warmup_steps=1))


def trained(model, wrapped, batch, log, **more):
    """Weights after three steps, and what was logged."""

    def note(progress):
        log.append({k: v for k, v in progress.metrics.items() if k[:5] in ("loss_", "grad_")})
        log[-1]["tokens"] = progress.tokens

    train(wrapped, Once(batch, 3), MultiTokenLoss(N), TRAINING, hooks=[note], **more)
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


class Collectives(TorchDispatchMode):
    """Counts what processes say to each other."""

    def __init__(self):
        super().__init__()
        self.counts = {"allgather": 0, "reduce_scatter": 0}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for name in self.counts:
            self.counts[name] += str(operation).startswith("c10d") and name in str(operation)
        return operation(*args, **(kwargs or {}))


def talk(batch):
    """Collectives of one step of 3 heads in 7 units: 2 blocks, 3 heads, unembedding, the rest."""
    model = tiny(n_layers=5, n_future_tokens=3)
    shard(model, "shard")
    with Collectives() as collectives:
        gradients(model, model, MultiTokenLoss(3), batch)
    return collectives.counts


def refusal(call):
    try:
        call()
    except Exception as error:  # whatever it is, it is looked at outside
        return f"{type(error).__name__}: {error}"
    return "nothing"


def save_while_training(model, folder):
    def save(progress, optimizer):
        state = checkpoint.TrainingState(progress.counters(), optimizer.state_dict())
        checkpoint.save(model, folder, training=state)

    return save


def work(number, ranks, folder):
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=ranks
    )
    try:
        found, batch = {}, whole_batch()
        for case in CASES_OF[ranks]:
            wrap, kind, cut, unembedding = case
            model = tiny(kind, **OVERRIDES[unembedding])
            loss_fn = MultiTokenLoss(N, cut=cut)
            found[case] = gradients(model, WRAPS[wrap](model), loss_fn, share(batch))
        for wrap in ("ddp", "shard") if ranks == 2 else ("hybrid",):
            model, log = tiny(), []
            wrapped = WRAPS[wrap](model)
            more = {}
            if wrap != "ddp":
                more["save"] = save_while_training(model, f"{folder}/saved")
            found["trained", wrap] = (trained(model, wrapped, batch, log, **more), log)
            found["validated", wrap] = validate(wrapped, [share(batch)], N, 1.5)
        model = WRAPS["shard"](tiny())
        found["trunk cut"] = refusal(
            lambda: gradients(model, model, MultiTokenLoss(N, cut="trunk"), share(batch))
        )
        found["muon"] = refusal(lambda: Optimizer(model, OptimConfig(name="muon")))
        found["bfloat16"] = gradients(
            model := tiny().float(),
            sharded("shard", model, torch.bfloat16),
            MultiTokenLoss(N),
            share(batch),
        )
        for name, loss_fn in objectives().items():
            wrapped = WRAPS["shard"](model := tiny())
            found[name] = gradients(model, wrapped, loss_fn, share(batch))
        found["talk"] = talk(share(batch))
        found["agreed"] = sum_on_host([float(number), 1.0], CPU), gather_objects(number)
        found["zero"] = from_rank_zero(lambda: number), refusal(lambda: from_rank_zero(fail))
        torch.save(found, f"{folder}/{number}.pt")
    finally:
        dist.destroy_process_group()


def fail():
    raise OSError(f"the disk of rank {rank()} is full")


@pytest.fixture(scope="module", params=CASES_OF)
def ranks(request, tmp_path_factory):
    """What each of 2, or 4, processes found, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (request.param, str(folder)), request.param)
    return [torch.load(folder / f"{number}.pt") for number in range(request.param)], folder


def test_processes_have_unevenly_many_targets_in_every_head():
    left, right = (
        future_targets(Batch(*(x.chunk(2)[i] for x in whole_batch())), N)[1].sum((1, 2))
        for i in range(2)
    )
    assert (left > 2 * right).all() and (right > 0).all()


def test_gradients_and_losses_of_several_processes_are_those_of_one(ranks):
    for case in CASES_OF[len(ranks[0])]:
        _, kind, cut, unembedding = case
        model = tiny(kind, **OVERRIDES[unembedding])
        expected = gradients(model, model, MultiTokenLoss(N, cut=cut), whole_batch())
        for found in ranks[0]:
            assert found[case].keys() == expected.keys()
            for name, t in expected.items():
                message = f"{case} {name}"
                torch.testing.assert_close(found[case][name], t, rtol=0, atol=1e-10, msg=message)


def test_sharded_models_learn_other_objectives_like_one(ranks):
    """A head that was not run has no gradient anywhere."""
    for objective, loss_fn in objectives().items():
        model = tiny()
        expected = gradients(model, model, loss_fn, whole_batch())
        idle = [name for name, t in expected.items() if t is None]
        assert bool(idle) == (objective == "reverse")
        for found in ranks[0]:
            assert found[objective].keys() == expected.keys()
            for name, t in expected.items():
                message = f"{objective} {name}"
                torch.testing.assert_close(
                    found[objective][name], t, rtol=0, atol=1e-10, msg=message
                )


def wraps_of(found):
    return [key[1] for key in found[0] if key[0] == "trained"]


def test_several_processes_train_like_one(ranks):
    log = []
    model = tiny()
    weights = trained(model, model, whole_batch(), log)
    for found in ranks[0]:
        for wrap in wraps_of(ranks[0]):
            their_weights, their_log = found["trained", wrap]
            for name, t in weights.items():
                torch.testing.assert_close(their_weights[name], t, rtol=0, atol=1e-10, msg=name)
            for theirs, ours in zip(their_log, log, strict=True):
                assert theirs == pytest.approx(ours, rel=1e-10)


def test_several_processes_validate_like_one(ranks):
    model = tiny()
    trained(model, model, whole_batch(), [])
    expected = validate(model, [whole_batch()], N, 1.5)
    for found in ranks[0]:
        for wrap in wraps_of(ranks[0]):
            assert found["validated", wrap] == pytest.approx(expected, rel=1e-6)


def test_a_step_gathers_and_reduces_no_more_than_it_must(ranks):
    """2 x units - 2 all-gathers at most, one reduce-scatter per unit."""
    for found in ranks[0]:
        assert 0 < found["talk"]["allgather"] <= 12 and found["talk"]["reduce_scatter"] == 7


def test_autocast_rounds_as_it_does_in_one_process(ranks):
    model = tiny().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, model, MultiTokenLoss(N, cut="latents"), whole_batch())
    for found in ranks[0]:
        for name, t in expected.items():
            assert (found["bfloat16"][name] - t).norm() <= 2e-2 * t.norm(), name


def test_what_sharding_makes_silently_wrong_is_refused(ranks):
    for found in ranks[0]:
        assert found["trunk cut"].startswith("RuntimeError: a sharded parameter was reached")
        assert "optim.name='muon' needs whole matrices" in found["muon"]


def test_ranks_agree(ranks):
    count = len(ranks[0])
    for found in ranks[0]:
        assert found["agreed"] == ([sum(range(count)), count], list(range(count)))
        assert found["zero"] == (0, "OSError: the disk of rank 0 is full")


# Checkpoints of several processes.


def test_each_process_writes_its_part_and_nothing_pickled(ranks):
    found, folder = ranks
    files = {str(p.relative_to(folder / "saved")) for p in (folder / "saved").rglob("*.*")}
    assert {f for f in files if "/" not in f and not f.endswith(".shards")} == {
        "config.json",
        "training.json",
    }
    parts = [f for f in files if f.startswith("model.shards/")]
    assert len(parts) == len(found) and all(f.endswith(".safetensors") for f in parts)


def test_one_process_reads_what_several_wrote(ranks):
    found, folder = ranks
    weights, _ = found[0]["trained", wraps_of(found)[-1]]
    model = checkpoint.load(folder / "saved", dtype=torch.float64)
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]), name
    checkpoint.check(folder / "saved")
    state = checkpoint.load_training(folder / "saved", model)
    optimizer = Optimizer(model, OptimConfig())
    optimizer.load_state_dict(state.optimizer)
    assert state.progress["step"] == 3
    assert optimizer.state_dict().keys() == state.optimizer.keys()


def test_gathered_it_is_a_plain_checkpoint(ranks, tmp_path):
    _, folder = ranks
    plain = checkpoint.gather(folder / "saved", tmp_path / "plain")
    assert {path.name for path in plain.iterdir()} == {
        *("config.json", "training.json"),
        *("model.safetensors", "optimizer.safetensors"),
    }
    left, right = (checkpoint.load_training(f).optimizer for f in (folder / "saved", plain))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_damage_to_one_part_is_found(ranks, tmp_path):
    copy = shutil.copytree(ranks[1] / "saved", tmp_path / "copy")
    part = sorted(copy.glob("optimizer.shards/*"))[-1]
    data = bytearray(part.read_bytes())
    data[-3] ^= 1
    part.write_bytes(data)
    with pytest.raises(ValueError, match=f"{part.name} is damaged: it is not what was written"):
        checkpoint.check(copy)


def test_a_part_that_is_missing_is_never_read_as_something_else(ranks, tmp_path):
    """The others would look like a whole of another size, or leave a hole."""
    for number in range(len(ranks[0])):
        copy = shutil.copytree(ranks[1] / "saved", tmp_path / f"copy-{number}")
        part = sorted(copy.glob("model.shards/*"))[number]
        part.unlink()
        with pytest.raises(FileNotFoundError, match=f"{part.name} is missing from the checkpoint"):
            checkpoint.load(copy)


def read(number, count, source, folder):
    """In each of `count` processes: the weights and state of a sharded model, filled from disk."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=count
    )
    try:
        model = tiny(seed=9)
        shard(model, "shard")
        checkpoint.load_weights(model, Path(source))
        state = checkpoint.load_training(source, model).optimizer
        optimizer = Optimizer(model, OptimConfig())
        optimizer.load_state_dict(state)
        weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
        found = weights, {name: whole(t) for name, t in optimizer.state_dict().items()}
        torch.save(found, f"{folder}/{number}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("form", ["shards", "plain"])
def test_another_number_of_processes_reads_either_form(ranks, form, tmp_path):
    _, folder = ranks
    source = folder / "saved"
    if form == "plain":
        source = checkpoint.gather(source, tmp_path / "plain")
    multiprocessing.spawn(read, (3, str(source), str(tmp_path)), 3)
    expected = checkpoint.load(source, dtype=torch.float64)
    state = checkpoint.load_training(source).optimizer
    assert {t.dtype for name, t in state.items() if "exp" in name} == {torch.float64}
    for number in range(3):
        weights, found = torch.load(tmp_path / f"{number}.pt")
        assert all(torch.equal(weights[name], p) for name, p in expected.named_parameters())
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], t) for name, t in state.items())


# One process, and who starts several.


def test_without_a_process_group_there_is_one_process():
    x = torch.ones(2)
    assert (rank(), world_size()) == (0, 1)
    assert sum_over_ranks(x) is x
    assert sum_on_host([2.0], CPU) == [2.0] and gather_objects(7) == [7]
    assert from_rank_zero(lambda: 5) == 5


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-05,9]", "gpu03"), ("a1,b2", "a1"), ("host", "host"), ("n[7]", "n7")],
)
def test_slurms_variables_become_torchs(nodes, first):
    env = {
        **{"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"},
        **{"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
        "SLURM_JOB_ID": "123456",
    }
    found = _slurm(env)
    assert found["MASTER_ADDR"] == first and 20000 <= int(found["MASTER_PORT"]) < 40000
    assert {k: found[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    }


def test_slurms_uneven_tasks_and_the_users_own_address_are_taken():
    env = {
        **{"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        **{"SLURM_STEP_NODELIST": "a,b", "SLURM_STEP_TASKS_PER_NODE": "2,1"},
        **{"SLURM_JOB_ID": "1", "MASTER_ADDR": "mine", "MASTER_PORT": "7"},
    }
    found = _slurm(env)
    assert found["LOCAL_WORLD_SIZE"] == "2"
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("mine", "7")


def test_machines_with_unlike_numbers_of_processes_cannot_be_hybrid(monkeypatch):
    monkeypatch.setattr("mtp.distributed.world_size", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="sharding='hybrid' .* but 3 are no multiple of the 2"):
        shard(tiny(), "hybrid")
    with pytest.raises(ValueError, match="sharding='x' is unknown: allowed are replicate, shard"):
        shard(tiny(), "x")


@pytest.mark.parametrize("env", [{}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}])
def test_a_shell_inside_an_allocation_is_no_step_of_several_tasks(env):
    assert _slurm(env) == {}
