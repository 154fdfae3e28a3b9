"""Consistency training: one packed pass is the windows one by one, and the trainer runs it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

from mtp.consistency import (
    DIVERGENCES,
    ConsistencyLoss,
    TrajectoryBatches,
    _pack,
)
from mtp.trajectories import Trajectory

VOCAB, WINDOW = 13, 4


def trajectory(prompt=5, windows=3, states=(4, 1, 2), length=None, seed=0):
    """Random states that, like Jacobi's, are right from the left on: state s in its first s tokens."""
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
    for states, j in zip(one.windows, chosen, strict=True):
        fixed, start = states[-1], len(text)
        if j is not None:
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


@pytest.mark.parametrize(("kind", "divergence"), KINDS_OF_LOSS)
def test_a_packed_pass_is_the_windows_one_by_one(kind, divergence, monkeypatch):
    """Of ragged responses: an end within a window, a prompt of one token, one-state windows."""
    given = [trajectory(length=10), trajectory(1, 2, (3, 3), seed=1), trajectory(9, 1, seed=2)]
    packed = []
    monkeypatch.setattr("mtp.consistency._pack", lambda *args: packed.append(args) or _pack(*args))
    batch, loss_fn = one_batch(given, kind), ConsistencyLoss(divergence)
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
    total, number = metrics["consistency"]
    torch.testing.assert_close(total / number, sum(terms) / len(terms), rtol=0, atol=1e-10)
