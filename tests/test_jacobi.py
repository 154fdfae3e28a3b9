"""Jacobi decoding: its windows are those of the plain iteration, and its branches what was said."""

import pytest
import torch
from conftest import tiny
from test_decode import SAMPLINGS, Scheduled, path_to, some_requests, texts, truths

from mtp.decode.contract import Draft, NoDraft, Place, State
from mtp.decode.drafters import OwnHeads, PromptLookup, make_drafter
from mtp.decode.jacobi import Jacobi
from mtp.decode.loop import Decoding, generate
from mtp.decode.sampling import FILL, TARGET, Sampling, uniform


@pytest.fixture(scope="module")
def model():
    return tiny(gain=1.4)


class Watched(Jacobi):
    """Keeps, by the request's seed: the text's length, how many guesses were asked for, and the
    guesses.
    """

    def begin(self, rows, slots):
        super().begin(rows, slots)
        self.seen = {}

    def propose(self, state, k):
        draft = super().propose(state, k)
        for row, seed in enumerate(state.seed):
            self.seen.setdefault(seed, []).append(
                (state.length[row], k, draft.tokens[row].tolist())
            )
        return draft


@torch.no_grad()
def iterated(model, text, seed, sampling, asked):
    """The windows of plain Jacobi iteration along a text that is known: no cache, no other row.
    asked: for each step the length of what was read before, and how many guesses it makes.
    """
    choices = {}  # by position
    for length, k in asked:
        window = []
        for at in range(length + 1, length + 1 + k):
            u = float(uniform(Place([seed], [at], 1), 1, FILL))
            window.append(choices.get(at, text[int(u * (length + 1))]))
        yield window
        row = torch.tensor([[*text[: length + 1], *window]])
        logits = model(row)[:, length:]
        noise = sampling.noise(Place([seed], [length + 1], k + 1), logits, TARGET)
        said = sampling.scores(logits, noise).argmax(-1)[0].tolist()
        choices.update(enumerate(said, length + 1))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("window", [2, 5, 9])
def test_windows_are_those_of_the_plain_iteration(window, sampling, batch_size, model):
    """Guesses depend on what was guessed before, so a fresh copy that reads the text would make
    others. The promise is: a request's windows are those of the iteration run from its start,
    alone and without a cache, whatever the batch, refilled and moved rows, and skipped or shorter
    steps.
    """
    sampling, requests = SAMPLINGS[sampling], some_requests(stop=False)
    truth, drafter = truths(model, requests, sampling), Watched(window)
    depth = Scheduled((9, 9, 0, 2, 9, 1, 9))
    got = generate(model, requests, drafter, sampling, batch_size=batch_size, depth=depth)
    assert texts(got) == truth
    for request, new in zip(requests, truth, strict=True):
        seen = drafter.seen[request.seed]
        asked = [(length, k) for length, k, _ in seen]
        text = [*request.prompt, *new]
        wanted = list(iterated(model, text, request.seed, sampling, asked))
        assert [guesses for *_, guesses in seen] == wanted and len(wanted) > 2


@pytest.mark.parametrize("pool", [0, 2])
@pytest.mark.parametrize("window", [2, 3, 16, 40])
def test_t_passes_give_at_least_t_tokens_beyond_the_first_and_all_are_right(window, pool, model):
    requests = some_requests(stop=False)
    truth = truths(model, requests, Sampling(1.0))
    decoding = Decoding(model, requests, Jacobi(window, pool), Sampling(1.0), batch_size=3)
    for i, _ in decoding:
        completion = decoding.completions[i]
        assert completion.tokens == truth[i][: len(completion.tokens)]
        assert len(completion.tokens) > completion.steps
    assert texts(decoding.completions) == truth


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_a_choice_that_does_not_depend_on_the_text_stands_once_it_is_made(depth, batch_size, model):
    """At a boundless temperature only the noise of the place counts: a window that was read once is
    right in the next step.
    """
    requests = some_requests(stop=False, max_new_tokens=1 + 3 * (depth + 2))
    drafter = Jacobi(depth + 1)
    for completion in generate(model, requests, drafter, Sampling(1e9), batch_size=batch_size):
        assert completion.steps <= 2 * 3


@pytest.mark.parametrize(
    "make", [lambda: Jacobi(6, pool=3), lambda: Jacobi(5, 2, OwnHeads()), lambda: Jacobi(8)]
)
def test_a_row_alone_is_the_row_in_a_batch(make, model):
    """Guesses and branches too, up to the last steps: they may be shorter alone, and a row that
    moves has forgotten its guesses.
    """
    requests = [*some_requests(stop=False, max_new_tokens=30)]
    for i, request in enumerate(requests):
        request.prompt, request.max_new_tokens = requests[i % 4].prompt, 20 + 3 * i
    together = generate(model, requests, make(), Sampling(1.0), batch_size=3)
    for request, completion in zip(requests, together, strict=True):
        (alone,) = generate(model, [request], make(), Sampling(1.0))
        assert alone.tokens == completion.tokens
        assert alone.heads[:-9] == completion.heads[:-9]


def proposed(text, pool, guesses=(), choices=(), window=4):
    """The draft after a text, its last token pending. guesses and choices: what lies in the slots
    behind it, and what the target said after those.
    """
    row = torch.tensor([[*text, *guesses, *[0] * 20]])
    said = torch.full_like(row, -1)
    said[0, len(text) : len(text) + len(choices)] = torch.tensor(choices)
    state = State(row, [len(text) - 1], [0], None, None, None, said)
    drafter = Jacobi(window, pool)
    drafter.begin(1, row.shape[1])
    drafter.admit(state, 0, None)
    return drafter.propose(state, window - 1)


def branches(draft, depth=3):
    """The guesses along each branch beside the chain."""
    parents = set(draft.parents[0].tolist())
    nodes = range(depth, draft.tokens.shape[1])
    return {path_to(draft, 0, node) for node in nodes if node not in parents}


def test_branches_begin_with_what_followed_and_go_on_with_the_newest():
    text = [5, 1, 2, 9, 5, 3, 4, 5]
    assert branches(proposed(text, pool=2)) == {(3, 4, 5), (1, 2, 9)}
    assert branches(proposed(text, pool=1)) == {(3, 4, 5)}
    assert proposed([5, 1, 2, 9, 4], pool=2).parents is None  # nothing followed: a chain


def test_branches_come_from_guesses_that_did_not_stand():
    """What the target said after a guess, not its neighbour in the window."""
    draft = proposed([1, 2, 7], pool=2, guesses=[7, 6, 8], choices=[6, 11, -1])
    assert branches(draft) == {(6, 11)}


def test_branches_bring_more_guesses_home(model):
    """Of a text that repeats itself. Its windows do not find that out."""
    requests = some_requests(stop=False, max_new_tokens=60)
    steps = [sum(c.steps for c in generate(model, requests, Jacobi(6, pool))) for pool in (0, 1, 4)]
    assert steps[0] > steps[1] > steps[2]


def test_other_drafters_fill_the_first_places(model):
    """Where they offer something: the rest of the window stays what it was."""

    class Ones(NoDraft):
        depth = nodes = 2

        def propose(self, state, k):
            return Draft(torch.tensor([[1, -1]] * len(state.length))[:, :k])

    alone, filled = Watched(5), Watched(5, first=Ones())
    requests = some_requests(stop=False)[:1]
    for drafter in (alone, filled):
        generate(model, requests, drafter)
    (_, _, own), (_, _, got) = (drafter.seen[requests[0].seed][0] for drafter in (alone, filled))
    assert got == [1, *own[1:]]


def test_a_drafter_of_trees_cannot_fill_a_window(model):
    with pytest.raises(ValueError, match="first offers trees"):
        generate(model, some_requests(), Jacobi(first=OwnHeads(tree=7)))


def test_choices_are_kept_only_for_those_who_ask(model):
    decoding = Decoding(model, some_requests(), PromptLookup())
    list(decoding)
    assert decoding.state.choices is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Jacobi(1), "window=1 must be at least 2"),
        (lambda: Jacobi(pool=-1), "pool=-1 must be at least 0"),
        (lambda: make_drafter("jacobi", depth=0), "depth=0 must be at least 1"),
        (lambda: make_drafter("jacobi", first="hope"), "first='hope' .* allowed are text, heads"),
        (lambda: make_drafter("heads", pool=2), "drafter=heads takes no pool=: only jacobi may"),
    ],
)
def test_impossible_windows_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_windows_have_words():
    drafter = make_drafter("jacobi", depth=7, pool=2, first="heads")
    assert (drafter.depth, drafter.pool, type(drafter.first)) == (7, 2, OwnHeads)
