"""Consistency training: one packed pass is the windows one by one, and the trainer runs it."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, tiny

from mtp.blocks import compile_blocks
from mtp.consistency import packing
from mtp.consistency.loss import DIVERGENCES, ConsistencyConfig, ConsistencyLoss
from mtp.consistency.packing import TrajectoryBatches, _pack, scored
from mtp.consistency.trajectories import Trajectory
from mtp.divergence import distil

VOCAB, WINDOW = 13, 4


def trajectory(prompt=5, windows=3, states=(4, 1, 2), length=None, seed=0):
    """Random states that, like Jacobi's, are right from the left on: state s in s tokens."""
    random = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(VOCAB, (count,), generator=random).tolist()

    def window(count):
        fixed = ids(WINDOW)
        return [fixed[:s] + ids(WINDOW - s) for s in range(count - 1)] + [fixed]

    made = [window(states[w % len(states)]) for w in range(windows)]
    return Trajectory(ids(prompt), made, windows * WINDOW if length is None else length)


def one_batch(trajectories, kind="global", **more):
    return next(TrajectoryBatches(trajectories, len(trajectories), 500, 96, kind, **more))


@pytest.fixture
def packed(monkeypatch):
    """What each response that is packed is packed with."""
    seen = []
    monkeypatch.setattr(packing, "_pack", lambda *args: seen.append(args) or _pack(*args))
    return seen


def naive_divergence(name, student, teacher, label):
    if name == "hard":
        return F.cross_entropy(student, label)
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = (p + q) / 2
    return {
        "forward_kl": (p * (p / q).log()).sum(),
        "reverse_kl": (q * (q / p).log()).sum(),
        "jsd": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
    }[name]


def naive(model, one, chosen, kind, divergence):
    """Sums and counts of both terms, window by window and position by position."""
    text, terms, predicted = list(one.prompt), [], []
    end = len(one.prompt) + one.length
    for states, some in zip(one.windows, chosen, strict=True):
        fixed, start = states[-1], len(text)
        for j in some:
            student = model(torch.tensor([text + states[j]]))[0]
            with torch.no_grad():
                other = fixed if kind == "global" else states[j + 1]
                teacher = model(torch.tensor([text + other]))[0]
            wrong = [a != b for a, b in zip(states[j], fixed, strict=True)]
            for i in range(WINDOW - 1):
                if any(wrong[: i + 2]) and start + i + 1 < end:
                    at, label = start + i, torch.tensor(fixed[i + 1])
                    terms.append(naive_divergence(divergence, student[at], teacher[at], label))
        text += fixed
    logits = model(torch.tensor([text]))[0]
    for at in range(max(len(one.prompt), 1), end):
        predicted.append(F.cross_entropy(logits[at - 1], torch.tensor(text[at])))
    return terms, predicted


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


KINDS_OF_LOSS = [(kind, name) for kind in ("global", "local") for name in DIVERGENCES]


@pytest.mark.parametrize("states", [1, 2])
@pytest.mark.parametrize(("kind", "divergence"), KINDS_OF_LOSS)
def test_a_packed_pass_is_the_windows_one_by_one(kind, divergence, states, packed):
    """Of ragged responses: an end within a window, a prompt of one token, one-state windows, and
    less states than are asked for.
    """
    given = [trajectory(length=10), trajectory(1, 2, (3, 3), seed=1), trajectory(9, 1, seed=2)]
    batch, loss_fn = one_batch(given, kind, states=states), ConsistencyLoss(divergence)
    model = tiny(gain=2.0)
    terms, predicted = [], []
    for one, chosen, _ in packed:
        found = naive(model, one, chosen, kind, divergence)
        terms, predicted = terms + found[0], predicted + found[1]
    assert len(packed) == 3 and len(terms) > 5
    expected = sum(terms) / len(terms) + 10 * sum(predicted) / len(predicted)
    expected.backward()
    wanted = gradients(model)
    count = loss_fn.count(batch)
    loss, metrics = loss_fn(model, batch, count)
    loss.backward()
    assert count.tolist() == [len(terms), len(predicted)]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    for name, grad in gradients(model).items():
        if wanted[name] is None:
            assert grad is None, name
        else:
            torch.testing.assert_close(grad, wanted[name], rtol=0, atol=1e-10, msg=name)
    total, number = metrics["loss_consistency"]
    torch.testing.assert_close(total / number, sum(terms) / len(terms), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_first_head_learns(kind):
    model, batch, loss_fn = tiny(kind), one_batch([trajectory()]), ConsistencyLoss()
    loss_fn(model, batch, loss_fn.count(batch))[0].backward()
    unread = {name for name, grad in gradients(model).items() if grad is None}
    all_or_none = ("anticausal", "identity")  # are read by the first head, or have no parameters
    later = set() if kind in all_or_none else {f"heads.heads.{i}" for i in range(1, 4)}
    assert {name[: len("heads.heads.0")] for name in unread} == later


def test_a_pass_reads_at_most_a_third_of_the_tokens_of_the_windows_one_by_one():
    one, read = trajectory(16, 8, states=(3,)), []
    model = tiny()
    model.embedding.register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    naive(model, one, [[0]] * 8, "global", "jsd")
    batch, loss_fn = one_batch([one]), ConsistencyLoss()
    loss_fn(model, batch, loss_fn.count(batch))
    assert read[-1] <= sum(read[:-1]) / 3


@pytest.mark.parametrize("divergence", DIVERGENCES.keys() - {"hard"})
def test_at_the_fixed_point_nothing_is_left_to_learn(divergence):
    """All but the last token are right: what predicts it has read the same as the teacher."""
    random = trajectory(windows=1)
    fixed = random.windows[0][-1]
    near = fixed[:-1] + [(fixed[-1] + 1) % VOCAB]
    batch = one_batch([replace(random, windows=[[near, fixed]])])
    loss_fn, model = ConsistencyLoss(divergence, ar_weight=0), tiny(gain=2.0)
    loss, _ = loss_fn(model, batch, loss_fn.count(batch))
    loss.backward()
    assert len(batch.student) == 1 and abs(loss.item()) < 1e-12
    assert all(grad is None or grad.abs().max() < 1e-12 for grad in gradients(model).values())


@pytest.mark.parametrize("kind", ["global", "local"])
def test_the_teacher_learns_nothing(kind):
    batch, loss_fn = one_batch([trajectory()], kind), ConsistencyLoss(ar_weight=0)
    latent = torch.randn(1, batch.branch.shape[1], 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn(VOCAB, 8, dtype=torch.double)

    class Given(torch.nn.Linear):
        def forward(self, row, score, **more):
            return score([lambda x: x], [latent], [weight], ())

    loss_fn(Given(1, 1).double(), batch, loss_fn.count(batch))[0].backward()
    reached = latent.grad[0].abs().sum(-1).nonzero().flatten()
    assert reached.tolist() == batch.student.tolist()
    assert not set(batch.teacher.tolist()) & set(reached.tolist())


@pytest.mark.parametrize("name", DIVERGENCES.keys() - {"hard"})
def test_chunks_do_not_change_a_divergence(name):
    student, teacher, weight = (torch.randn(size, 8).double() for size in (7, 7, VOCAB))
    found = []
    for chunk in (1, 3, 100):
        ends = student.clone().requires_grad_(), weight.clone().requires_grad_()
        scale = torch.tensor(0.3).double()
        loss, value = distil(DIVERGENCES[name], ends[0], teacher, ends[1], scale, chunk)
        found.append((loss.detach(), value, *torch.autograd.grad(2 * loss, ends)))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=0, atol=1e-12)


def test_places_are_scored_from_the_first_wrong_token_to_the_end_of_window_or_response():
    fixed = [5, 6, 7, 8]
    assert [*scored([9, 6, 7, 8], fixed, 9)] == [0, 1, 2]  # nothing in the window predicts slot 0
    assert [*scored([5, 9, 7, 8], fixed, 9)] == [0, 1, 2]
    assert [*scored([5, 6, 9, 8], fixed, 9)] == [1, 2]
    assert [*scored([5, 9, 9, 9], fixed, 3)] == [0, 1]
    assert [*scored([5, 6, 7, 9], fixed, 3)] == [*scored(fixed, fixed, 9)] == []


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler asks for it
def test_compiled_blocks_take_packed_rows():
    batch, loss_fn = one_batch([trajectory()]), ConsistencyLoss()
    model, compiled = tiny(), tiny()
    if not compile_blocks(compiled.blocks, torch.device("cpu")):
        pytest.skip("no compiler")
    one, other = (loss_fn(m, batch, loss_fn.count(batch))[0] for m in (model, compiled))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_wrong_choice_is_named_with_what_is_allowed():
    with pytest.raises(ValueError, match="divergence='x' is unknown: allowed are forward_kl, rev"):
        ConsistencyLoss("x")
    with pytest.raises(ValueError, match="ar_weight=-1 must be at least 0"):
        ConsistencyLoss(ar_weight=-1)
    with pytest.raises(ValueError, match="kind='x' is unknown: allowed are global, local"):
        ConsistencyConfig(kind="x")
    with pytest.raises(ValueError, match="consistency.refresh_every=-1 must be at least 0"):
        ConsistencyConfig(refresh_every=-1)
    with pytest.raises(ValueError, match="divergence='hard', the fixed point's tokens, is for 'gl"):
        ConsistencyConfig(kind="local", divergence="hard")


# Batches.

SOME = [trajectory(seed=seed, windows=2) for seed in range(5)]


def batches(trajectories=SOME, size=2, **more):
    return TrajectoryBatches(trajectories, size, 500, 96, **more)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_epochs_read_every_response_once_and_draw_every_state_but_the_fixed_point(packed):
    for _ in islice(batches(size=5), 60):
        pass
    for start in range(0, 300, 5):
        assert sorted(map(id, SOME)) == sorted(id(args[0]) for args in packed[start : start + 5])
    draws = [args[1] for args in packed]
    assert not any(one[1] for one in draws)  # a window of one state
    counts = [[one[0] for one in draws].count([j]) for j in range(3)]
    assert sum(counts) == 300 and min(counts) > 70


def test_a_resumed_source_goes_on_exactly():
    whole = list(islice(batches(), 7))
    source = batches()
    _ = [next(source) for _ in range(3)]
    again = batches()
    again.load_state_dict(source.state_dict())
    assert all(same(*pair) for pair in zip(islice(again, 4), whole[3:], strict=True))
    with pytest.raises(ValueError, match="state of other data: its trajectories"):
        batches(SOME[1:]).load_state_dict(source.state_dict())


def test_ranks_share_each_global_batch():
    whole = next(batches(size=4))
    parts = [next(batches(size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert torch.equal(torch.cat([part.row for part in parts]), whole.row)


def test_what_does_not_fit_is_skipped_and_counted():
    long, far = trajectory(windows=9), trajectory(prompt=40)
    source = TrajectoryBatches([*SOME, long, far], 1, 64, 50)
    assert len(source) == 5
    assert source.skipped == {"responses that are too long": 2, "windows of one state": 5}
    with pytest.raises(ValueError, match="trajectories: of 1 none fits in rows of 64 columns"):
        TrajectoryBatches([long], 1, 64, 96)


class Given:
    """A source of new trajectories: those that are given, then no more."""

    def __init__(self, trajectories):
        self.trajectories, self.drawn = trajectories, 0

    def draw(self, count):
        self.drawn += count
        return self.trajectories[self.drawn - count : self.drawn]


NEW = [trajectory(seed=10 + i, windows=1) for i in range(9)]


def test_new_trajectories_take_the_places_of_the_oldest_and_are_part_of_the_state():
    source = batches(refresh=Given(NEW))
    for _ in range(4):
        next(source)
    assert source.refreshed == 8
    again = batches(refresh=Given(NEW))
    again.load_state_dict(json.loads(json.dumps(source.state_dict())))
    for _ in range(3):  # the last is new, then there are no more
        assert same(next(again), next(source))
    assert again.refreshed == source.refreshed == 9


def test_a_state_that_does_not_speak_of_refreshing_goes_on_with_it():
    source = batches()
    next(source)
    state = source.state_dict()
    del state["drawn"]
    again = batches(refresh=Given(NEW))
    again.load_state_dict(state)
    next(again)
    assert again.refreshed == 2


@pytest.mark.parametrize(
    ("every", "refreshed"), [(1, [1, 3, 5, 7]), (2, [0, 1, 1, 3]), (4, [0, 0, 0, 1])]
)
def test_new_trajectories_come_every_so_many_batches_and_only_those_that_fit(every, refreshed):
    source = batches(refresh=Given([trajectory(windows=99), *NEW]), refresh_every=every)
    assert [source.refreshed for _ in zip(range(4), source, strict=False)] == refreshed


def test_augmentation_is_another_in_each_epoch_and_part_of_what_a_source_is(packed):
    for augment in (False, True):
        _ = [*islice(batches(size=5, augment=augment), 6)]
    plain, changed = packed[:30], packed[30:]
    for (one, chosen, _), (other, again, _) in zip(plain, changed, strict=True):
        assert chosen == again and one.response == other.response
    first = [other for other, *_ in changed if other.response == SOME[0].response]
    assert len({str(one) for one in first}) > 1
    with pytest.raises(ValueError, match="state of other data: its augment is True, not None"):
        batches().load_state_dict(batches(augment=True).state_dict())
