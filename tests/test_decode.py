"""One loop, many drafters: the text is the target's own, whatever is drafted, batched or rejected.

A new drafter is one line in DRAFTERS. The truth is `naive`: no loop of the library, no cache.
"""

import copy
import doctest
import itertools
import math
import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import BLOCK_KINDS, KINDS, tiny

import mtp.decode.contract
import mtp.decode.loop
from mtp.decode.beam import best_tree
from mtp.decode.contract import (
    Completion,
    Draft,
    NoDraft,
    Place,
    Request,
    State,
    cut_at,
    stop_at,
    stop_at_text,
)
from mtp.decode.depth import AdaptiveDepth
from mtp.decode.drafters import (
    BeamHeads,
    BeamModel,
    DraftModel,
    OwnHeads,
    PromptLookup,
    make_drafter,
)
from mtp.decode.jacobi import Jacobi
from mtp.decode.loop import Decoding, generate
from mtp.decode.sampling import RULES, TARGET, Sampling
from mtp.testing import assert_law, law_of_texts

VOCAB, END, NEW, N = 13, 3, 12, 4
GREEDY = Sampling()
SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": Sampling(1.0),
    "top-k": Sampling(0.7, top_k=5),
}


CHAINS_ONLY = ("sequential",)  # kinds whose heads read the guesses of those before


@cache
def target(kind, device):
    layers = {"identity": 2} | dict.fromkeys(BLOCK_KINDS, 5)  # larger than what drafts for it
    return tiny(kind, n_layers=layers.get(kind, 1), gain=1.4).to(device)


def rescanned(text, k, longest=3, shortest=1):
    """What PromptLookup is to guess, found without an index: k tokens, or none."""
    for n in range(longest, shortest - 1, -1):
        for at in range(len(text) - 1, n - 1, -1):
            if text[at - n : at] == text[-n:]:
                return (text[at:] * k)[:k]
    return []


def some_prompts(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [torch.randint(VOCAB, (size,), generator=generator).tolist() for size in lengths]


def some_requests(stop=True, **overrides):
    """Seven prompts of uneven length, each with its own seed."""
    end = stop_at(END) if stop else None
    requests = [Request(prompt, NEW, 1000 + i, end) for i, prompt in enumerate(some_prompts())]
    return [replace(request, **overrides) for request in requests]


@torch.no_grad()
def naive(model, request, sampling):
    """The new tokens: the whole text is read anew for each of them."""
    text, new = list(request.prompt), []
    device = model.embedding.weight.device
    while len(new) < request.max_new_tokens:
        logits = model(torch.tensor([text], device=device))[:, -1:]
        noise = sampling.noise(Place([request.seed], [len(text)], 1), logits, TARGET)
        new.append(int(sampling.scores(logits, noise).argmax()))
        text.append(new[-1])
        if request.stop and request.stop(new):
            break
    return new


def truths(model, requests, sampling=GREEDY):
    return [naive(model, request, sampling) for request in requests]


@cache
def usual_truths(kind, sampling, device):
    return truths(target(kind, device), some_requests(), SAMPLINGS[sampling])


def texts(completions):
    return [completion.tokens for completion in completions]


class Oracle:
    """Knows what is to come by the request's seed. spoil(true token) -> what it says instead."""

    needs_memo = False

    def __init__(self, requests, truth, depth=3, spoil=lambda token: token):
        self.depth = self.nodes = depth
        self.spoil = spoil
        self.known = {r.seed: [*r.prompt, *new] for r, new in zip(requests, truth, strict=True)}

    def attach(self, model):
        pass

    def begin(self, rows, slots):
        pass

    def admit(self, state, row, source):
        pass

    def propose(self, state, k):
        rows = []
        for seed, length in zip(state.seed, state.length, strict=True):
            coming = [self.spoil(token) for token in self.known.get(seed, [])[length + 1 :][:k]]
            rows.append(coming + [-1] * (k - len(coming)))
        return Draft(torch.tensor(rows, device=state.text.device))


def wrong(token):
    return (token + 1) % VOCAB


def sometimes(change, seed=0, rate=0.3):
    generator = torch.Generator().manual_seed(seed)
    return lambda token: change(token) if torch.rand((), generator=generator) < rate else token


class Skipping:
    """Asks its drafter for fewer guesses than it might, or for none."""

    needs_memo = True

    def __init__(self, inner, plan=(3, 0, 0, 1, 2, 0, 3, 1, 0, 0, 0, 2)):
        self.inner, self.plan = inner, itertools.cycle(plan)

    def attach(self, model):
        self.inner.attach(model)
        self.depth, self.nodes = self.inner.depth, self.inner.nodes

    def begin(self, rows, slots):
        self.inner.begin(rows, slots)

    depth = nodes = 0

    def admit(self, state, row, source):
        self.inner.admit(state, row, source)

    def propose(self, state, k):
        k = min(k, next(self.plan))
        return self.inner.propose(state, k) if k else Draft(state.text[:, :0])


class Forest(Oracle):
    """Random trees, another one for each row and step, that hold some of what is to come."""

    def __init__(self, requests, truth, depth=4, nodes=9, right=0.7):
        super().__init__(requests, truth, depth)
        self.nodes, self.right = nodes, right
        self.random = torch.Generator().manual_seed(0)

    def propose(self, state, k):
        def below(n):
            return int(torch.randint(n, (), generator=self.random))

        tokens, parents = [], []
        for seed, length in zip(state.seed, state.length, strict=True):
            coming, depths, row, parent = self.known.get(seed, [])[length + 1 :], [], [], []
            for node in range(self.nodes):
                above = below(node + 1) - 1
                if above >= 0 and depths[above] == k:
                    above = -1
                depths.append(depths[above] + 1 if above >= 0 else 1)
                good = torch.rand((), generator=self.random) < self.right
                row.append(
                    coming[depths[-1] - 1]
                    if good and depths[-1] <= len(coming)
                    else below(VOCAB + 1) - 1
                )
                parent.append(above)
            tokens.append(row)
            parents.append(parent)
        device = state.text.device
        return Draft(
            torch.tensor(tokens, device=device), parents=torch.tensor(parents, device=device)
        )


@cache
def another(seed=0, gain=1.4, **overrides):
    """A model to draft with: of seed 0 somewhat like the targets, else unlike them."""
    model = tiny(seed=seed, gain=gain, **overrides)
    if seed == 0:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise * 0.1)
    return model.to(os.environ.get("MTP_TEST_DEVICE", "cpu"))


def small():
    """Smaller than every target."""
    return another(kind="linear", n_layers=1, n_future_tokens=1)


FEW = (11, 0, 3, 7, 5)  # tokens that heads are allowed to guess

DRAFTERS = {  # name -> (requests, their true texts) -> drafter
    "none": lambda requests, truth: NoDraft(),
    "heads": lambda requests, truth: OwnHeads(),
    "one head": lambda requests, truth: OwnHeads(1),
    "two heads": lambda requests, truth: OwnHeads(2),
    "skipping": lambda requests, truth: Skipping(OwnHeads()),
    "tree": lambda requests, truth: OwnHeads(tree=7),
    "small tree": lambda requests, truth: OwnHeads(2, tree=2),
    "skipping tree": lambda requests, truth: Skipping(OwnHeads(tree=7)),
    "few tokens": lambda requests, truth: OwnHeads(vocabulary=FEW),
    "tree of few tokens": lambda requests, truth: OwnHeads(tree=7, vocabulary=FEW),
    "model": lambda requests, truth: DraftModel(another()),
    "beam": lambda requests, truth: BeamModel(small(), 3, 2),
    "whole beam": lambda requests, truth: BeamModel(small(), 3, 3, whole=True),
    "skipping beam": lambda requests, truth: Skipping(BeamModel(small(), whole=True)),
    "beam of heads": lambda requests, truth: BeamHeads(whole=True),
    "unlike model": lambda requests, truth: DraftModel(another(seed=9, n_layers=4), depth=2),
    "skipping model": lambda requests, truth: Skipping(DraftModel(another())),
    "lookup": lambda requests, truth: PromptLookup(),
    "skipping lookup": lambda requests, truth: Skipping(PromptLookup(4)),
    "jacobi": lambda requests, truth: Jacobi(),
    "small jacobi": lambda requests, truth: Jacobi(2),
    "jacobi with pool": lambda requests, truth: Jacobi(6, pool=3),
    "jacobi with heads": lambda requests, truth: Jacobi(6, first=OwnHeads()),
    "jacobi with all": lambda requests, truth: Jacobi(6, pool=2, first=PromptLookup(3)),
    "skipping jacobi": lambda requests, truth: Skipping(Jacobi(5, pool=2)),
    "forest": lambda requests, truth: Forest(requests, truth),
    "oracle": lambda requests, truth: Oracle(requests, truth, 5),
    "hopeless": lambda requests, truth: Oracle(requests, truth, 3, wrong),
    "half right": lambda requests, truth: Oracle(requests, truth, 4, sometimes(wrong)),
    "gaps": lambda requests, truth: Oracle(requests, truth, 4, sometimes(lambda token: -1)),
}


# of heads
TREES = ("tree", "small tree", "skipping tree", "tree of few tokens", "beam of heads")


def pairs(drafters):
    """Drafters and the kinds that they draft for."""
    every = itertools.product(drafters, KINDS)
    return [(d, kind) for d, kind in every if d not in TREES or kind not in CHAINS_ONLY]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("drafter", "kind"), pairs(DRAFTERS))
def test_text_is_the_autoregressive_text(drafter, kind, sampling, device):
    requests, truth = some_requests(), usual_truths(kind, sampling, device)
    for count, batch_size in ((2, 1), (7, 3)):
        got = generate(
            target(kind, device),
            requests[:count],
            DRAFTERS[drafter](requests, truth),
            SAMPLINGS[sampling],
            batch_size=batch_size,
        )
        assert texts(got) == truth[:count]


class Scheduled:
    """A depth policy that does not listen; it keeps what it is told."""

    def __init__(self, plan=(3, 0, 0, 1, 2, 0, 3, 1, 0, 0, 0, 2)):
        self.plan, self.told = itertools.cycle(plan), []

    def choose(self, most):
        self.chosen = min(most, next(self.plan))
        return self.chosen

    def observe(self, k, accepted, seconds):
        assert k == self.chosen
        self.told.append((k, list(accepted), seconds))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("drafter", "kind"), pairs(["heads", "tree", "forest", "half right"]))
@pytest.mark.parametrize("policy", [Scheduled, AdaptiveDepth])
def test_text_does_not_depend_on_the_depth_of_its_steps(policy, drafter, kind, sampling, device):
    requests, truth = some_requests(), usual_truths(kind, sampling, device)
    model, drafter = target(kind, device), DRAFTERS[drafter](requests, truth)
    depth, sampling = policy(), SAMPLINGS[sampling]  # one policy for both, as a server might
    for count, batch_size in ((2, 1), (7, 3)):
        got = generate(
            model, requests[:count], drafter, sampling, batch_size=batch_size, depth=depth
        )
        assert texts(got) == truth[:count]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_depth_policy_is_told_what_happened(batch_size, device):
    """Of all rows that there are: seven requests leave fewer than three in the end."""
    model, requests = target("transformer", device), some_requests()
    drafter = Oracle(requests, truths(model, requests), 3, sometimes(wrong))
    depth = Scheduled()
    got = generate(model, requests, drafter, batch_size=batch_size, depth=depth)
    judged = [(k, a) for k, accepted, _ in depth.told for a in accepted]
    assert len(judged) == sum(completion.steps for completion in got)
    assert all(a <= k for k, a in judged) and any(k == 0 for k, _ in judged)
    for j in range(3):
        stood = sum(sum(completion.accepted[j : j + 1]) for completion in got)
        told = sum(a > j for _, a in judged)  # also of guesses that a row had no room for
        assert told >= stood > 0 and (told == stood or batch_size > 1)
    sizes = {len(accepted) for _, accepted, _ in depth.told}
    assert sizes == ({1} if batch_size == 1 else {1, 2, 3})
    assert all(seconds > 0 for *_, seconds in depth.told)


def test_a_step_of_depth_zero_does_not_ask_the_drafter(device, monkeypatch):
    monkeypatch.setattr(OwnHeads, "propose", lambda *_: pytest.fail("it was asked"))
    generate(target("causal", device), some_requests(), OwnHeads(), depth=Scheduled([0]))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_truths_end_early_late_and_at_once_so_that_the_tests_above_say_something(sampling, device):
    lengths = {len(new) for kind in KINDS for new in usual_truths(kind, sampling, device)}
    assert NEW in lengths and len(lengths) > 3
    ends = [new[-1] == END for kind in KINDS for new in usual_truths(kind, sampling, device)]
    assert any(ends) and not all(ends)


@pytest.mark.parametrize("drafter", ["heads", "skipping"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_rule_gives_the_greedy_text_at_temperature_zero(kind, drafter, device):
    requests, truth = some_requests(), usual_truths(kind, "greedy", device)
    drafter = DRAFTERS[drafter](requests, truth)
    got = generate(target(kind, device), requests, drafter, batch_size=3, rule="exact")
    assert texts(got) == truth


@pytest.mark.parametrize("unembedding", [{"unembedding": "replicated"}, {"tie_embeddings": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_the_same_with_other_unembeddings(kind, unembedding, device):
    model, requests = tiny(kind, gain=1.4, **unembedding).to(device), some_requests()[:3]
    assert texts(generate(model, requests, OwnHeads(), batch_size=3)) == truths(model, requests)


def test_a_drafter_can_be_used_again_and_for_another_model(device):
    drafter, requests = OwnHeads(), some_requests()
    for kind in ("transformer", "linear", "transformer"):
        got = generate(target(kind, device), requests, drafter, batch_size=3)
        assert texts(got) == usual_truths(kind, "greedy", device)


class Compared:
    """Lets `lead` guess, and asks `inner` and a fresh copy of it for their logits on the side.
    plan: how many guesses' logits.
    """

    needs_memo = True

    def __init__(self, lead, fresh, plan=(9, 1, 0, 0, 0, 2, 0, 1, 1, 9)):
        self.lead, self.fresh, self.inner = lead, fresh, fresh()
        self.depth, self.nodes = lead.depth, lead.nodes
        self.plan, self.compared = itertools.cycle(plan), 0

    def attach(self, model):
        self.model = model
        self.inner.attach(model)

    def begin(self, rows, slots):
        self.sizes = rows, slots
        self.inner.begin(rows, slots)

    def admit(self, state, row, source):
        self.inner.admit(state, row, source)

    def propose(self, state, k):
        if most := next(self.plan):
            fresh = self.fresh()
            fresh.attach(self.model)
            fresh.begin(*self.sizes)
            depth = min(most, fresh.depth)
            got, wanted = (logits_of(x, state, depth) for x in (self.inner, fresh))
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
            self.compared += 1
        return self.lead.propose(state, k)


def logits_of(drafter, state, depth):
    """What it would draw so many guesses from, (B, K, V)."""
    seen = []

    def draw(logits, ahead=0):
        seen.append(logits)
        return Draft(logits.argmax(-1))

    drafter.propose(replace(state, draw=draw), depth)
    return torch.cat(seen, 1)


COMPARED = {
    "heads": OwnHeads,
    "one head": lambda: OwnHeads(1),
    "two heads": lambda: OwnHeads(2),
    "model": lambda: DraftModel(another(), depth=3),
}


LEADS = {
    "chains": lambda requests, truth: Oracle(requests, truth, 4, sometimes(wrong)),
    "trees": lambda requests, truth: Forest(requests, truth, right=0.4),
}


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(
    ("drafter", "batch_size"), [("heads", 1), ("model", 1), *((name, 3) for name in COMPARED)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_proposals_are_those_of_a_fresh_copy_that_reads_from_the_start(
    kind, drafter, batch_size, lead, device
):
    """Stale caches never change the text, only the acceptance: nothing else would notice them.
    Before a comparison come steps of all lengths, skipped ones, rows that are refilled or move,
    copied prompts.
    """
    requests = [*samples_of_one_prompt(4), *some_requests(stop=False)[:3]]
    truth = truths(target(kind, device), requests, Sampling(1.0))
    drafter = Compared(LEADS[lead](requests, truth), COMPARED[drafter])
    got = generate(target(kind, device), requests, drafter, Sampling(1.0), batch_size=batch_size)
    assert texts(got) == truth and drafter.compared > 3


@pytest.mark.parametrize("sizes", [(3, 1), (2, 2), (5, 3)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_lookups_are_those_of_a_search_through_the_whole_text(batch_size, sizes, device):
    """Rows that are refilled or move, samples of one prompt, skipped steps."""
    offered = []

    class Watched(PromptLookup):
        def propose(self, state, k):
            draft = super().propose(state, k)
            for row, length in enumerate(state.length):
                text = state.text[row, : length + 1].tolist()
                wanted = rescanned(text, k, *sizes)
                got = draft.tokens[row].tolist()
                assert got in ([wanted] if wanted else [[], [-1] * k])
                offered.append(bool(wanted))
            return draft

    prompts = [prompt + [1] for prompt in some_prompts()]
    requests = [
        *samples_of_one_prompt(4),
        *(Request(prompt, 20, seed) for seed, prompt in enumerate(prompts)),
    ]
    drafter = Skipping(Watched(3, *sizes))
    generate(target("linear", device), requests, drafter, Sampling(1.0), batch_size=batch_size)
    assert any(offered) and not all(offered)


@pytest.mark.parametrize(
    ("text", "guesses"),
    [
        ([5, 1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1]),
        ([1, 2, 9, 1, 2, 8, 1, 2], [8, 1, 2, 8]),  # the most recent; what ends is repeated
        ([7, 1, 2, 9, 3, 1, 2, 8, 7, 1, 2], [9, 3, 1, 2]),  # the longest before the most recent
        ([6, 4, 4, 4], [4, 4, 4, 4]),
        ([1, 2, 3, 4], []),
    ],
)
def test_lookup_offers_what_followed(text, guesses, device):
    drafter = PromptLookup()
    drafter.begin(1, len(text) + 12)
    state = State(torch.tensor([text], device=device), [len(text) - 1], [0], None, None, None)
    assert drafter.propose(state, 4).tokens.tolist() == [guesses]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_model_equal_to_the_target_is_right_every_time(kind, sampling, rule, device):
    model, requests = target(kind, device), some_requests(stop=False)
    drafter, sampling = DraftModel(model, 3), SAMPLINGS[sampling]
    for completion in generate(model, requests, drafter, sampling, batch_size=3, rule=rule):
        assert completion.steps == 3 and NEW == 1 + 3 * 4 - 1
        assert completion.accepted == completion.drafted


def test_a_draft_model_reads_a_shared_prompt_once_and_long_ones_alone(device, monkeypatch):
    draft, reads = another(seed=2), []
    read = draft.read
    monkeypatch.setattr(draft, "read", lambda x, *rest: reads.append(x.shape) or read(x, *rest))
    requests = [*samples_of_one_prompt(4), Request([3] * 40, 6), *samples_of_one_prompt(2)]
    generate(target("linear", device), requests, DraftModel(draft, 3), batch_size=3)
    assert reads.count((1, 9)) == reads.count((1, 40)) == 1
    assert max(width for rows, width in reads if rows > 1) <= 4


@pytest.mark.parametrize("vocabulary", [None, FEW])
@pytest.mark.parametrize("unembedding", ["shared", "replicated"])
@pytest.mark.parametrize("kind", KINDS)
def test_guesses_are_those_of_the_models_plain_forward(kind, unembedding, vocabulary, device):
    """Rows that are read, copied and refilled; each head through its own unembedding; tokens that
    are not to be guessed have no chance.
    """
    model = tiny(kind, unembedding=unembedding, gain=1.4).to(device)
    others = sorted(set(range(VOCAB)) - set(vocabulary or range(VOCAB)))
    seen = []

    class Watched(OwnHeads):
        def propose(self, state, k):
            logits = logits_of(super(), state, self.depth)
            for text, length, got in zip(state.text, state.length, logits, strict=True):
                text = torch.cat([text[: length + 1], got.argmax(-1)])
                wanted = model(text[None], return_all_heads=True)[0, length - 1, 1:]
                wanted[:, others] = -torch.inf
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
                seen.append(length)
            return super().propose(state, k)

    requests = [*samples_of_one_prompt(4), *some_requests(stop=False)[:2]]
    generate(model, requests, Watched(vocabulary=vocabulary), Sampling(1.0), batch_size=3)
    assert len(set(seen)) > 5


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_an_oracle_yields_all_its_guesses_and_one_token_more_per_step(sampling, depth, device):
    model, steps = target("transformer", device), 4
    requests = some_requests(stop=False, max_new_tokens=1 + steps * (depth + 1))
    truth = truths(model, requests, SAMPLINGS[sampling])
    drafter = Oracle(requests, truth, depth)
    for completion in generate(
        model, requests, drafter, SAMPLINGS[sampling], batch_size=len(requests)
    ):
        assert completion.steps == steps and completion.mean_acceptance_length == depth + 1
        assert completion.drafted == completion.accepted == [steps] * depth
        assert completion.heads == [1, *(list(range(2, depth + 2)) + [1]) * steps]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_tree_of_all_paths_holds_the_text_whatever_the_heads_think(sampling, device):
    model, requests = target("linear", device), some_requests(stop=False, max_new_tokens=10)
    every = OwnHeads(2, tree=VOCAB + VOCAB**2)
    for completion in generate(model, requests, every, SAMPLINGS[sampling], batch_size=3):
        assert completion.mean_acceptance_length == 3 and completion.drafted == [3, 3]


@pytest.mark.parametrize("nodes", [1, 2, 5, 12, 40])
def test_the_best_tree_holds_the_most_probable_beginnings_of_paths(nodes):
    scores = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draft, probs = best_tree(scores, nodes), scores.softmax(-1)
    for b in range(2):
        paths = [path for depth in (1, 2, 3) for path in itertools.product(range(4), repeat=depth)]
        paths.sort(key=lambda path: -math.prod(float(probs[b, i, x]) for i, x in enumerate(path)))
        assert {path_to(draft, b, node) for node in range(nodes)} == set(paths[:nodes])


def path_to(draft, b, node):
    """The guesses from the pending token to this one; a parent comes before its child."""
    parent = int(draft.parents[b, node])
    assert parent < node
    return (*(path_to(draft, b, parent) if parent >= 0 else ()), int(draft.tokens[b, node]))


def test_trees_of_certain_heads_are_chains():
    scores = torch.full((1, 3, 5), -torch.inf)
    scores[0, range(3), [4, 0, 2]] = 0.0
    assert path_to(best_tree(scores, 3), 0, 2) == (4, 0, 2)


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_rules_for_chains_refuse_trees(rule, device):
    with pytest.raises(ValueError, match=f"rule={rule} takes chains of guesses: trees need"):
        generate(target("linear", device), [OK], OwnHeads(tree=4), rule=rule)


def test_heads_that_read_guesses_refuse_trees(device):
    with pytest.raises(ValueError, match="tree=4 needs heads that guess without each other"):
        generate(target("sequential", device), [OK], OwnHeads(tree=4))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_hopeless_draft_yields_one_token_per_step(sampling, device):
    model, requests = target("transformer", device), some_requests(stop=False)
    truth = truths(model, requests, SAMPLINGS[sampling])
    drafter = Oracle(requests, truth, 3, wrong)
    for completion in generate(model, requests, drafter, SAMPLINGS[sampling], batch_size=3):
        assert completion.steps == NEW - 1 and completion.mean_acceptance_length == 1
        assert completion.accepted == [0, 0, 0] and completion.heads == [1] * NEW


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_is_the_row_in_a_batch(kind, device):
    """Guesses too, up to the last step, which may be shorter alone."""
    model, requests = target(kind, device), some_requests(stop=False)
    together = generate(model, requests, OwnHeads(), Sampling(1.0), batch_size=3)
    for request, completion in zip(requests, together, strict=True):
        (alone,) = generate(model, [request], OwnHeads(), Sampling(1.0))
        assert alone.tokens == completion.tokens
        assert alone.heads[: 1 - N] == completion.heads[: 1 - N]


def test_completions_do_not_depend_on_the_order_of_the_requests(device):
    model, requests = target("transformer", device), some_requests()
    forward = generate(model, requests, OwnHeads(), Sampling(1.0), batch_size=3)
    backward = generate(model, requests[::-1], OwnHeads(), Sampling(1.0), batch_size=3)
    assert texts(forward) == texts(backward)[::-1]


def samples_of_one_prompt(count=6):
    return [
        Request([4, 8, 1, 1, 9, 12, 0, 7, 5], 5 + i % 3, seed)
        for seed, i in enumerate(range(count))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_one_prompt_are_those_decoded_one_by_one(kind, device):
    model, requests = target(kind, device), samples_of_one_prompt()
    got = texts(generate(model, requests, OwnHeads(), Sampling(1.0), batch_size=3))
    assert got == truths(model, requests, Sampling(1.0))
    assert len(set(map(tuple, got))) > 1


@pytest.mark.parametrize("batch_size", [3, 6])
def test_a_prompt_that_many_samples_share_is_read_once(batch_size, device, monkeypatch):
    model, requests, widths = target("transformer", device), samples_of_one_prompt(), []
    read = model.read
    monkeypatch.setattr(model, "read", lambda x, *rest: widths.append(x.shape[1]) or read(x, *rest))
    generate(model, requests, OwnHeads(), Sampling(1.0), batch_size=batch_size)
    assert widths.count(len(requests[0].prompt)) == 1 and max(widths[1:]) <= N


@pytest.mark.parametrize("kind_of", [tuple, torch.tensor, lambda ids: torch.tensor(ids).numpy()])
def test_prompts_may_be_any_row_of_ids(kind_of, device, monkeypatch):
    model, requests, widths = target("transformer", device), samples_of_one_prompt(), []
    given = [replace(request, prompt=kind_of(request.prompt)) for request in requests]
    wanted, read = truths(model, requests), model.read
    monkeypatch.setattr(model, "read", lambda x, *rest: widths.append(x.shape[1]) or read(x, *rest))
    assert texts(generate(model, [*given, *requests], OwnHeads(), batch_size=3)) == wanted * 2
    assert widths.count(len(requests[0].prompt)) == 1


def next_law(model, sampling):
    """Text -> the law of its next token."""

    @torch.no_grad()
    def probs(text):
        device = model.embedding.weight.device
        return sampling.probs(model(torch.tensor([text], device=device))[0, -1])

    return probs


SMALL = {"dim": 8, "n_layers": 4, "n_future_tokens": 3}
GUESSERS = {
    "heads": OwnHeads,
    "few tokens": lambda: OwnHeads(vocabulary=[2, 0]),
    "model": lambda: DraftModel(another(seed=3, vocab_size=4)),
    "lookup": PromptLookup,
    "jacobi": lambda: Jacobi(4),
    "jacobi with heads": lambda: Jacobi(4, first=OwnHeads(1)),
}


@pytest.mark.parametrize("drafter", GUESSERS)
@pytest.mark.parametrize("rule", ["match", "exact", "block"])  # joint must fail: test_joint.py
def test_decoded_texts_follow_the_models_law(rule, drafter, device):
    """All 4^3 texts by enumeration, warped as the sampling says, against many seeds."""
    model = tiny(vocab_size=4, **SMALL).to(device)
    prompt, sampling, draws = [3, 0, 2, 1, 2], Sampling(0.8, top_k=3), 1500
    requests = [Request(prompt, 3, seed) for seed in range(draws)]
    got = generate(model, requests, GUESSERS[drafter](), sampling, batch_size=250, rule=rule)
    law = law_of_texts(next_law(model, sampling), prompt, 3)
    assert_law(lambda seed: got[seed].tokens, law, draws)
    assert sum(completion.accepted[0] for completion in got) > draws / 20  # guesses took part


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_the_law_holds_across_steps_that_guess_the_same_places_anew(rule, device):
    """A verdict may look at guesses beyond those that stand: their noise must not come again. All
    3^5 texts; more tokens are asked for, so that every step that decides them has full drafts. The
    draft is surer than the target, so that much is refused.
    """
    model = tiny(vocab_size=3, seed=1, gain=1.8, **SMALL).to(device)
    drafter = DraftModel(another(seed=21, gain=2.5, n_layers=4, vocab_size=3), depth=3)
    sampling, draws = Sampling(1.0), 4000
    requests = [Request([1, 2], 9, seed) for seed in range(draws)]
    got = generate(model, requests, drafter, sampling, batch_size=500, rule=rule)
    law = law_of_texts(next_law(model, sampling), [1, 2], 5)
    assert_law(lambda seed: got[seed].tokens[:5], law, draws)


@pytest.mark.parametrize("drafter", ["none", "heads", "oracle"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 10])
def test_new_tokens_are_exactly_as_many_as_asked_for(batch_size, drafter, device):
    sizes = [1, 8, 2, 5, 3, 1, 4]
    requests = [
        replace(request, max_new_tokens=size)
        for request, size in zip(some_requests(stop=False), sizes, strict=True)
    ]
    longer = [replace(request, max_new_tokens=NEW) for request in requests]
    truth = truths(target("causal", device), longer)
    drafter = DRAFTERS[drafter](longer, truth)
    got = texts(generate(target("causal", device), requests, drafter, batch_size=batch_size))
    assert got == [new[:size] for new, size in zip(truth, sizes, strict=True)]


def test_ended_rows_wait_without_running_out_of_slots(device):
    """The longest text ends first, by more accepted guesses than it takes; another goes on."""
    model = target("transformer", device)
    requests = [Request([1] * 20, 2, seed=1), Request([1], 20, seed=2)]
    longer = [replace(request, max_new_tokens=30) for request in requests]
    truth = truths(model, longer)
    got = generate(model, requests, Oracle(longer, truth, 5), batch_size=2)
    assert texts(got) == [truth[0][:2], truth[1][:20]]


def test_texts_end_with_the_first_stop_token_inside_a_draft(device):
    model, request = target("transformer", device), Request([7, 2], 12, seed=1)
    truth = naive(model, request, Sampling(1.0))
    for i, end in enumerate(truth):
        ended = replace(request, stop=stop_at(end))
        (got,) = generate(model, [ended], Oracle([request], [truth], 11), Sampling(1.0))
        assert got.tokens == truth[: truth.index(end) + 1] and len(got.tokens) <= i + 1


def test_stop_sees_all_new_tokens(device):
    requests = [replace(r, stop=lambda new: len(new) == 5) for r in some_requests()]
    got = generate(target("transformer", device), requests, OwnHeads(), batch_size=3)
    assert [len(completion.tokens) for completion in got] == [5] * len(requests)


class Letters:
    """Token 3 is "d"; token 0 stands for no text."""

    @staticmethod
    def decode(ids):
        return "".join("abcdefghijklm"[i] for i in ids if i)


@pytest.mark.parametrize("drafter", ["none", "oracle", "tree"])
def test_texts_end_with_the_first_stop_string_wherever_it_lies(drafter, device):
    model, requests = target("transformer", device), some_requests(stop=False)
    truth = truths(model, requests, Sampling(1.0))
    for request, new in zip(requests, truth, strict=True):
        text = Letters.decode(new)
        for at in range(len(text) - 1):
            wanted = text[at : at + 3]
            stopping = replace(request, stop=stop_at_text(Letters, "zzz", wanted))
            drafting = DRAFTERS[drafter](requests, truth)
            (got,) = generate(model, [stopping], drafting, Sampling(1.0))
            ended = Letters.decode(got.tokens)
            assert got.tokens == new[: len(got.tokens)]
            assert ended.endswith(wanted) and text.find(wanted) == len(ended) - len(wanted)
            assert cut_at(ended, wanted) == text[: text.find(wanted)]


def test_tokens_that_are_no_text_do_not_hide_a_stop_string():
    stop = stop_at_text(Letters, "bc")
    assert stop([4, 1, *[0] * 40, 2]) and not stop([1, *[0] * 40, 3])


@pytest.mark.parametrize("ends", [("mat",), (["mat"],), (1, "b")])
def test_end_tokens_are_ids(ends):
    with pytest.raises(ValueError, match="give token ids; strings go to stop_at_text"):
        stop_at(*ends)


@pytest.mark.parametrize("strings", [(), ("",), ("a", "")])
def test_stop_strings_may_not_be_empty(strings):
    with pytest.raises(ValueError, match="give at least one, and none of them empty"):
        stop_at_text(Letters, *strings)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafter", ["none", "heads", "tree", "forest"])
def test_logprobs_are_those_of_the_models_own_law(drafter, rule, device):
    if rule != "match" and drafter in ("tree", "forest"):
        return  # refused, as tested above
    model, requests, sampling = target("causal", device), some_requests(), Sampling(0.7, top_k=5)
    drafting = DRAFTERS[drafter](requests, truths(model, requests, sampling))
    got = generate(model, requests, drafting, sampling, batch_size=3, rule=rule, logprobs=True)
    for request, completion in zip(requests, got, strict=True):
        row = torch.tensor([[*request.prompt, *completion.tokens]], device=device)
        with torch.no_grad():
            law = model(row)[0, len(request.prompt) - 1 : -1].log_softmax(-1)
        wanted = law.gather(1, row[0, len(request.prompt) :, None])[:, 0]
        got_logprobs = torch.tensor(completion.logprobs, device=device, dtype=torch.float64)
        torch.testing.assert_close(got_logprobs, wanted, rtol=0, atol=1e-5)


def test_logprobs_are_not_made_unasked(device):
    (got,) = generate(target("linear", device), some_requests()[:1])
    assert got.logprobs == []


@pytest.mark.parametrize("drafter", ["none", "heads", "oracle"])
def test_pieces_come_as_they_are_decided_and_make_up_the_texts(drafter, device):
    model, requests = target("transformer", device), some_requests()
    drafting = DRAFTERS[drafter](requests, usual_truths("transformer", "greedy", device))
    decoding = Decoding(model, requests, drafting, batch_size=3)
    told: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    for i, tokens in decoding:
        told[i] += tokens
        assert tokens and told[i] == decoding.completions[i].tokens
        assert not all(told.values()) or i >= 2  # the last are not waited for
    assert list(told.values()) == usual_truths("transformer", "greedy", device)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_counts_add_up(drafter, device):
    model, requests = target("residual", device), some_requests(stop=False)
    drafter = DRAFTERS[drafter](requests, truths(model, requests, Sampling(1.0)))
    for completion in generate(model, requests, drafter, Sampling(1.0), batch_size=1):
        assert len(completion.tokens) == len(completion.heads) == NEW
        assert NEW == 1 + completion.steps + sum(completion.accepted)
        assert completion.mean_acceptance_length == pytest.approx((NEW - 1) / completion.steps)
        assert sum(head > 1 for head in completion.heads) == sum(completion.accepted)
        marks = [completion.heads.count(depth + 2) for depth in range(len(completion.accepted))]
        assert marks == completion.accepted
        offered = zip(completion.accepted, completion.drafted, strict=True)
        assert all(taken <= given <= completion.steps for taken, given in offered)


@pytest.mark.parametrize("drafter", ["heads", "tree", "lookup", "jacobi with pool", "oracle"])
def test_guesses_that_only_other_rows_have_room_for_are_not_counted(drafter, device):
    """As if each row were alone: no row takes more tokens per step than it got."""
    model, longer = target("transformer", device), some_requests(stop=False, max_new_tokens=30)
    drafter = DRAFTERS[drafter](longer, truths(model, longer))
    requests = [replace(request, max_new_tokens=2 + 3 * i) for i, request in enumerate(longer)]
    for completion in generate(model, requests, drafter, batch_size=len(requests)):
        assert len(completion.tokens) == 1 + completion.steps + sum(completion.accepted)
        offered = zip(completion.accepted, completion.drafted, strict=True)
        assert all(taken <= given <= completion.steps for taken, given in offered)


def test_a_guess_of_nothing_is_not_counted_as_drafted(device):
    model, requests = target("transformer", device), some_requests(stop=False)
    drafter = Oracle(requests, truths(model, requests), 3, lambda token: -1)
    for completion in generate(model, requests, drafter, batch_size=3):
        assert sum(completion.drafted) == 0


def test_a_completion_without_steps_has_acceptance_length_one():
    assert Completion().mean_acceptance_length == 1


@pytest.mark.parametrize("drafter", ["none", "heads", "jacobi with all", "oracle"])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_may_fill_the_context_to_the_last_token(kind, drafter, device):
    model = tiny(kind, max_seq_len=14, gain=1.4).to(device)
    requests = [
        replace(r, max_new_tokens=14 - len(r.prompt)) for r in some_requests(stop=False)[:3]
    ]
    truth = truths(model, requests)
    beyond = [new + [1] * 9 for new in truth]  # guesses hang over the end
    got = generate(model, requests, DRAFTERS[drafter](requests, beyond), batch_size=3)
    assert texts(got) == truth


@pytest.mark.parametrize(
    "drafter", ["none", "heads", "tree", "model", "lookup", "jacobi with pool"]
)
def test_no_requests_give_no_completions(drafter, device):
    model, drafting = target("transformer", device), DRAFTERS[drafter]([], [])
    assert generate(model, [], drafting) == list(Decoding(model, [], drafting)) == []


def test_decoding_leaves_no_gradients_and_no_modes_behind(device):
    model = target("transformer", device)
    generate(model, some_requests()[:1], OwnHeads())
    assert torch.is_grad_enabled() and model(torch.tensor([[1]], device=device)).requires_grad


def test_autocast_around_a_decoder_changes_nothing(device):
    """The caches have one type, so a training loop's autocast must not reach them."""
    model = copy.deepcopy(target("transformer", device)).float()
    requests = some_requests()[:2]
    plain = texts(generate(model, requests, OwnHeads()))
    with torch.autocast(device.type, torch.bfloat16):
        assert texts(generate(model, requests, OwnHeads())) == plain


def test_a_decoding_in_progress_leaves_its_users_autocast_alone(device):
    """Between two steps, and when it is abandoned after the user's own autocast has ended."""
    pieces = iter(Decoding(target("linear", device), some_requests()))
    with torch.autocast(device.type, torch.bfloat16):
        next(pieces)
        assert torch.is_autocast_enabled(device.type)
    assert not torch.is_autocast_enabled(device.type)
    del pieces
    assert not torch.is_autocast_enabled(device.type)


def test_a_decoding_goes_on_where_it_was_left(device):
    requests = some_requests()
    decoding = Decoding(target("transformer", device), requests, batch_size=3)
    most = NEW * len(requests)
    told = [piece for _ in range(most) for piece in itertools.islice(decoding, 1)]
    got = [[x for i, tokens in told if i == j for x in tokens] for j in range(len(requests))]
    assert got == usual_truths("transformer", "greedy", device)


OK = Request([1, 2], 4)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([], 4), "request 1 has an empty prompt"),
        (Request([1, VOCAB], 4), "request 1 has token ids outside 0..12"),
        (Request([-1], 4), "request 1 has token ids outside 0..12"),
        (Request([1], 4, seed=2**63), "request 1 has seed=9223372036854775808: allowed are 0"),
        (Request([1], 4, seed=-1), "request 1 has seed=-1: allowed are 0"),
        (Request([1], 0), "request 1 has max_new_tokens=0: it must be at least 1"),
        (Request([1] * 90, 7), "needs 90 prompt tokens . 7 new ones, .* max_seq_len is 96"),
    ],
)
def test_impossible_requests_are_refused_by_number(request_, words, device):
    with pytest.raises(ValueError, match=words):
        generate(target("linear", device), [OK, request_])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rule": "hope"}, "rule='hope' is unknown: allowed are match, exact, block"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"drafter": OwnHeads(4)}, "depth=4 exceeds the model's 3 extra heads"),
        ({"drafter": OwnHeads(vocabulary=[0, VOCAB])}, "vocabulary has token ids outside 0..12"),
        ({"drafter": OwnHeads(vocabulary=[-1, 2])}, "vocabulary has token ids outside 0..12"),
        (
            {"drafter": DraftModel(tiny(vocab_size=7))},
            "the draft model has vocab_size=7, the target 13: they must be equal",
        ),
        (
            {"drafter": DraftModel(tiny(max_seq_len=5))},
            "texts of up to 6 tokens exceed the draft model's max_seq_len=5",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(arguments, words, device):
    with pytest.raises(ValueError, match=words):
        generate(target("linear", device), [OK], **arguments)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: make_drafter("hope"),
            "drafter='hope' is unknown: allowed are none, heads, model, lookup, jacobi",
        ),
        (lambda: make_drafter("model"), "drafter=model needs draft="),
        (
            lambda: make_drafter("heads", draft=another()),
            "drafter=heads takes no draft=: only model",
        ),
        (lambda: make_drafter("lookup", tree=3), "drafter=lookup takes no tree=: only heads may"),
        (
            lambda: make_drafter("none", depth=3),
            "takes no depth=: only heads, model, lookup, jacobi, beam may",
        ),
        (lambda: OwnHeads(0), "depth=0 must be at least 1"),
        (lambda: OwnHeads(tree=0), "tree=0 must be at least 1"),
        (lambda: DraftModel(another(), 0), "depth=0 must be at least 1"),
        (lambda: PromptLookup(0), "depth=0 must be at least 1"),
        (lambda: PromptLookup(longest=2, shortest=3), "shortest=3 .* at most longest=2"),
        (lambda: PromptLookup(shortest=0), "shortest=0 must be at least 1"),
        (lambda: OwnHeads(vocabulary=[1, 2, 1]), "vocabulary names a token twice"),
        (lambda: OwnHeads(vocabulary=[]), "vocabulary .* at least one"),
        (lambda: OwnHeads(vocabulary=[[1, 2]]), r"vocabulary has shape \(1, 2\)"),
        (lambda: OwnHeads(vocabulary=[0.5]), "vocabulary .* type torch.float32"),
    ],
)
def test_impossible_drafters_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", ["none", "heads", "lookup", "jacobi"])
def test_drafters_have_words(name, device):
    assert len(generate(target("linear", device), [OK], make_drafter(name))) == 1
    draft = make_drafter("model", depth=2, draft=another())
    assert (draft.depth, make_drafter("lookup", depth=7).depth) == (2, 7)


def test_a_tree_of_nothing_is_refused():
    with pytest.raises(ValueError, match="tree=0 must be at least 1"):
        OwnHeads(tree=0)


def test_a_model_without_extra_heads_cannot_draft(device):
    with pytest.raises(ValueError, match="n_future_tokens=1 and no head to draft with"):
        generate(tiny(n_future_tokens=1).to(device), [OK], OwnHeads())


def test_caches_that_do_not_fit_are_refused_before_they_are_made(device, monkeypatch):
    model = target("transformer", device)
    monkeypatch.setattr(mtp.decode.loop, "_free_memory", lambda device: 1000)
    monkeypatch.setattr(model, "new_cache", lambda *sizes: pytest.fail("a cache was made"))
    with pytest.raises(ValueError, match="batch_size=2 .* GiB are free: lower batch_size"):
        generate(model, [OK] * 5, OwnHeads(), batch_size=2)


@pytest.mark.parametrize("free", [None, 2**30])
def test_caches_that_fit_are_made(free, device, monkeypatch):
    monkeypatch.setattr(mtp.decode.loop, "_free_memory", lambda device: free)
    assert len(generate(target("transformer", device), [OK], OwnHeads())[0].tokens) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_cache_bytes_are_those_of_the_caches_and_the_memo(kind, device, monkeypatch):
    model, made = target(kind, device), []
    new_cache = model.new_cache

    def counted(layers, rows, slots):
        made.append((new_cache(layers, rows, slots), rows, slots))
        return made[-1][0]

    monkeypatch.setattr(model, "new_cache", counted)
    generate(model, [OK, OK], OwnHeads())
    _, rows, slots = made[0]
    memo = rows * slots * model.memo_dim * 8
    taken = sum(x.numel() * x.element_size() for cache, *_ in made for x in (cache.k, cache.v))
    assert mtp.decode.loop.cache_bytes(model, rows, slots) == taken + memo


def test_docstring_examples_run():
    result = doctest.testmod(mtp.decode.contract)
    assert result.attempted > 0 and result.failed == 0
