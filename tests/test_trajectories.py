"""Trajectories are those of the plain algorithm, and their fixed points the model's own text.

The truth is `plain`: one window, whole, read anew for every state, without a cache.
"""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import KINDS, tiny
from test_decode import GREEDY, NEW, SAMPLINGS, VOCAB, some_requests, target, truths

from mtp.consistency.on_policy import OnPolicy
from mtp.consistency.trajectories import Collection, Trajectory, augmented
from mtp.decode.contract import Place, Request, stop_at
from mtp.decode.loop import generate
from mtp.decode.sampling import TARGET

WINDOWS = (1, 3, 5, 16)


@torch.no_grad()
def plain_states(model, context, first_guess, seed, sampling):
    """All states of a window, by the definition."""
    states = [first_guess]
    device = model.embedding.weight.device
    while True:
        text = torch.tensor([context + states[-1]], device=device)
        logits = model(text)[:, len(context) - 1 : -1]
        noise = sampling.noise(Place([seed], [len(context)], len(first_guess)), logits, TARGET)
        following = sampling.scores(logits, noise).argmax(-1)[0].tolist()
        if following == states[-1]:
            return states
        states.append(following)


def assert_plain(model, trajectory, request, sampling=GREEDY):
    """Each window's states are the plain ones; the last window's up to where its text is right."""
    context, left = list(request.prompt), trajectory.length
    for states in trajectory.windows:
        assert set(states[0]) <= {*context}
        wanted = plain_states(model, context, states[0], request.seed, sampling)
        counted = min(left, len(states[0]))
        last = next(i for i, s in enumerate(wanted) if s[:counted] == wanted[-1][:counted])
        assert states == wanted[: last + 1]
        context, left = context + states[-1], left - counted
    assert left == 0


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_plain_algorithm_and_the_text_is_the_models(
    kind, sampling, window, device
):
    model, requests, sampling = target(kind, device), some_requests(), SAMPLINGS[sampling]
    collected = list(Collection(model, requests, window, 3, sampling))
    assert [t.prompt for t in collected] == [r.prompt for r in requests]
    assert [t.response for t in collected] == truths(model, requests, sampling)
    for trajectory, request in zip(collected, requests, strict=True):
        assert_plain(model, trajectory, request, sampling)


def test_the_text_is_that_of_generate(device):
    model, requests = target("transformer", device), some_requests()
    texts = [completion.tokens for completion in generate(model, requests)]
    assert [t.response for t in Collection(model, requests, 5)] == texts


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_trajectory_does_not_depend_on_the_batch(batch_size, device):
    model, requests = target("transformer", device), some_requests()
    alone = [t for r in requests for t in Collection(model, [r], 4)]
    assert list(Collection(model, requests, 4, batch_size)) == alone


def test_first_guesses_depend_on_the_seed_and_the_window(device):
    model, request = target("transformer", device), Request([1, 2, 4, 5, 6, 7], 32, seed=1)
    (one,), (same,), (other,) = (
        Collection(model, [replace(request, seed=seed)], 16) for seed in (1, 1, 2)
    )
    assert one == same and one.response == other.response
    first, second = (states[0] for states in one.windows)
    assert first != second and first != other.windows[0][0]
    assert len({*first}) > 3


def test_a_window_costs_no_more_passes_than_tokens_and_none_to_see_that_it_is_done(device):
    model, requests = target("transformer", device), some_requests(stop=False)[:1]
    collection = Collection(model, requests, 4)
    (trajectory,) = collection
    found = sum(len(states) - 1 for states in trajectory.windows)
    assert found <= collection.passes <= NEW
    assert collection.columns < 4 * collection.passes  # settled tokens are not read again


class Unsteady:
    """A target that says something else in every pass, as one does whose rounding is not fixed."""

    def __init__(self, model):
        self.model, self.generator = model, torch.Generator().manual_seed(0)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def logits(self, latent):
        return torch.rand(*latent.shape[:-1], VOCAB, generator=self.generator)


def test_a_window_ends_after_n_passes_whatever_the_model_says():
    model = Unsteady(target("transformer", torch.device("cpu")))
    collection = Collection(model, [Request([1, 2], 24)], 8)
    (trajectory,) = collection
    assert trajectory.length == 24 and collection.passes <= 24
    assert all(len(states) <= 1 + 8 for states in trajectory.windows)


class Constant(Unsteady):
    """A target that always says the same token."""

    def logits(self, latent):
        return torch.nn.functional.one_hot(torch.full(latent.shape[:-1], 1), VOCAB).double()


def test_a_first_guess_that_is_right_is_the_only_state():
    collection = Collection(
        Constant(target("transformer", torch.device("cpu"))), [Request([1], 6)], 3
    )
    assert list(collection) == [Trajectory([1], [[[1, 1, 1]], [[1, 1, 1]]], 6)]
    assert collection.passes == 2


def test_nothing_is_read_after_the_end_token():
    model = Constant(target("transformer", torch.device("cpu")))
    (trajectory,) = Collection(model, [Request([2, 3], 64, stop=stop_at(1))], 8)
    assert trajectory.length == 1 and trajectory.response == [1]
    assert len(trajectory.windows) == 1 and len(trajectory.windows[0]) == 2


@pytest.mark.parametrize(
    "requests, window, batch_size, message",
    [
        ([Request([1], 4)], 0, 1, "window=0 must be at least 1"),
        ([Request([1], 4)], 4, 0, "batch_size=0 must be at least 1"),
        ([Request([], 4)], 4, 1, "request 0 has an empty prompt"),
        ([Request([1], 4), Request([VOCAB], 4)], 4, 1, "request 1 has token ids outside"),
        ([Request([1] * 90, 1)], 7, 1, "needs 90 prompt tokens . 7 new ones"),
    ],
)
def test_what_cannot_be_collected_is_refused_before_any_pass(requests, window, batch_size, message):
    model = target("transformer", torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        Collection(model, requests, window, batch_size)


def test_no_requests_have_no_trajectories():
    assert list(Collection(target("transformer", torch.device("cpu")), [])) == []


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_model_of_transformers_is_collected_as_it_is(sampling):
    transformers = pytest.importorskip("transformers")
    from mtp.interop.huggingface import CausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=64)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    model, requests, sampling = CausalLM(theirs), some_requests(), SAMPLINGS[sampling]
    collected = list(Collection(model, requests, 5, 3, sampling))
    assert [t.response for t in collected] == [
        c.tokens for c in generate(model, requests, sampling=sampling)
    ]
    for trajectory, request in zip(collected, requests, strict=True):
        assert_plain(model, trajectory, request, sampling)


def test_a_packed_copy_has_the_same_trajectories():
    model = tiny(n_layers=5, gain=1.4).float()
    requests = some_requests()
    assert list(Collection(model.packed(), requests, 5)) == list(Collection(model, requests, 5))


PROMPTS = [[1, 2, 4], [5], [6, 7]]


def on_policy(model, **options):
    return OnPolicy(model, PROMPTS, 4, 8, seed=10, **options)


def test_on_policy_trajectories_are_the_models_own_as_it_is_then(device):
    model = copy.deepcopy(target("transformer", device))
    source = on_policy(model)
    requests = [Request(PROMPTS[i % 3], 8, seed=10 + i) for i in range(6)]
    before = list(Collection(model, requests[:2], 4))
    assert source.draw(2) == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype).to(device))
    after = list(Collection(model, requests[2:], 4))
    assert source.draw(4) == after
    assert before[0].response != next(iter(Collection(model, requests[:1], 4))).response


def test_training_goes_on_after_on_policy_trajectories(device):
    model = copy.deepcopy(target("transformer", device))
    on_policy(model).draw(2)
    model(torch.tensor([[1, 2, 3]], device=device)).sum().backward()
    assert all(p.grad is not None for p in model.trunk.parameters())


def test_an_on_policy_source_goes_on_where_its_count_says(device):
    model = target("transformer", device)
    source, again = on_policy(model), on_policy(model)
    source.draw(5)
    again.drawn = source.drawn
    assert again.draw(4) == source.draw(4)


def test_what_is_not_worth_keeping_is_left_out_and_not_made_up_for(device):
    model = target("transformer", device)
    every = on_policy(model).draw(6)
    some = on_policy(model, keep=lambda trajectory: trajectory.prompt != PROMPTS[1]).draw(6)
    assert some == [trajectory for trajectory in every if trajectory.prompt != PROMPTS[1]]
    assert len(some) == 4


@pytest.mark.parametrize(
    "prompts, window, message",
    [
        ([], 4, "no prompts"),
        ([[1], [2] * 90], 4, "request 1 needs 90 prompt tokens"),
        ([[1]], 0, "window=0 must be at least 1"),
    ],
)
def test_prompts_are_refused_before_training(prompts, window, message):
    with pytest.raises(ValueError, match=message):
        OnPolicy(target("transformer", torch.device("cpu")), prompts, window, 8)


FINAL = [1, 2, 3, 4, 5, 6]
ALL_WRONG = [[9] * 6, [8] * 6, [1, 7, 7, 7, 7, 7], FINAL]


def put_right(before, after, final=FINAL):
    """Where a token was changed, which is to that of the fixed point."""
    changed = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    assert all(after[i] == final[i] for i in changed)
    return changed


def test_augmentation_puts_up_to_half_of_the_wrong_tokens_right_but_never_the_first():
    given = Trajectory([1], [ALL_WRONG, [[1, 9, 3, 4, 9, 9], [1, 2, 9, 9, 9, 9], FINAL]], 12)
    counts, places = set(), set()
    for seed in range(200):
        (zero, one, *last), (partly, *rest) = augmented(given, seed).windows
        assert last == ALL_WRONG[2:] and rest == given.windows[1][1:]
        changed = put_right(ALL_WRONG[0], zero)
        counts.add(len(changed))
        places |= {*changed}
        assert 1 <= len(put_right(ALL_WRONG[1], one)) <= 3
        assert put_right(given.windows[1][0], partly) in ([4], [5])  # 3 wrong: one draw of two
    assert counts == {1, 2, 3} and places == {1, 2, 3, 4, 5}
    assert given.windows[0] is ALL_WRONG and ALL_WRONG[0] == [9] * 6


def test_augmentation_depends_on_the_seed_alone_and_leaves_the_end_alone():
    given = Trajectory([1], [ALL_WRONG, ALL_WRONG], 9)
    assert augmented(given, 3) == augmented(given, 3)
    assert len({str(augmented(given, seed)) for seed in range(20)}) > 10
    for seed in range(100):
        _, second = augmented(given, seed).windows
        assert put_right(ALL_WRONG[0], second[0]) in ([1], [2])  # 3 of its tokens count


def test_states_with_nothing_to_put_right_stay():
    windows = [[[1, 2, 3, 4, 5, 9], [1, 2, 3, 4, 5, 8], FINAL], [FINAL], [[9] * 6, FINAL]]
    given = Trajectory([1], windows, 18)
    assert augmented(given, 0) == given
