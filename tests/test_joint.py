"""Joint decoding: paths that are drafted together, and the rule that judges them by the joint
probability. What it does is stated here in plain Python, over dictionaries and products.
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from conftest import tiny

from mtp.decode.beam import Beams
from mtp.decode.contract import Draft, Place, Request, stop_at
from mtp.decode.drafters import BeamHeads, BeamModel, DraftModel, OwnHeads, make_drafter
from mtp.decode.joint import Calibrated, block_law, calibrate, nll
from mtp.decode.loop import generate
from mtp.decode.sampling import Joint, Sampling, make_rule
from mtp.testing import assert_law, law_of_texts, p_value

VOCAB, END, NEW = 13, 3, 12
SAMPLED, CUT = Sampling(1.0), Sampling(0.8, top_k=6, top_p=0.9)


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def target(device):
    return tiny("linear", n_layers=2, gain=1.4).to(device)


def auxiliary(device, **overrides):
    return tiny("linear", n_layers=1, seed=4, n_future_tokens=1, **overrides).to(device)


DRAFTERS = {
    "chain": lambda device: DraftModel(auxiliary(device), 3),
    "beam": lambda device: BeamModel(auxiliary(device), 3, 3),
    "whole beam": lambda device: BeamModel(auxiliary(device), 3, 3, whole=True),
    "beam of heads": lambda device: BeamHeads(),
    "whole beam of heads": lambda device: BeamHeads(2, 3, whole=True),
    "chain of heads": lambda device: OwnHeads(),
}


def some_requests(**changed):
    generator = torch.Generator().manual_seed(0)
    sizes = [NEW, 1, 5, 2, NEW, 7, 3]
    return [
        Request(
            torch.randint(VOCAB, (2 + i,), generator=generator).tolist(),
            **({"max_new_tokens": size, "seed": 50 + i} | changed),
        )
        for i, size in enumerate(sizes)
    ]


def joint(model, requests, drafter, sampling=SAMPLED, **more):
    return generate(model, requests, drafter, sampling, rule="joint", **more)


def texts(completions):
    return [completion.tokens for completion in completions]


# The rule.


def path_to(parents, node):
    return [] if node < 0 else [*path_to(parents, parents[node]), node]


def plain_verdict(law, tokens, parents, logq, threshold):
    """law[column][token] of one row -> the nodes that stand, in order."""
    p, q, best_q = {}, {}, {}
    for node in range(len(tokens)):
        path = path_to(parents, node)
        if any(tokens[x] < 0 for x in path):
            continue
        p[node] = math.prod(law[parents[x] + 1][tokens[x]] for x in path)
        q[node] = math.prod(math.exp(logq[x]) for x in path)
        best_q[len(path)] = max(q[node], best_q.get(len(path), 0.0))
    passing = [x for x in p if p[x] > threshold * best_q[len(path_to(parents, x))]]
    best = max(passing, key=lambda x: (len(path_to(parents, x)), p[x]), default=-1)
    assert best < 0 or p[best] > threshold * q[best]
    return path_to(parents, best)


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("threshold", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(0.7, top_k=3), Sampling()])
def test_the_rule_is_its_plain_statement(sampling, threshold, shape, device):
    rows, nodes, V = 60, 7, 4
    generator = torch.Generator().manual_seed(1)
    logits = random(rows, 1 + nodes, V, seed=2).to(device)
    tokens = torch.randint(-1 if shape == "tree" else 0, V, (rows, nodes), generator=generator)
    parents = torch.arange(-1, nodes - 1).repeat(rows, 1)
    if shape == "tree":
        parents = (torch.rand(rows, nodes, generator=generator) * torch.arange(1, nodes + 1)).long()
        parents -= 1
    logq = torch.where(tokens < 0, -math.inf, torch.rand(rows, nodes, generator=generator).log())
    draft = Draft(
        tokens.to(device),
        parents=parents.to(device) if shape == "tree" else None,
        logq=logq.double().to(device),
    )
    verdict = Joint(sampling, threshold)(logits, draft, Place(range(rows), [5] * rows, 1 + nodes))
    law = sampling.probs(logits).tolist()
    assert verdict.path is not None
    for b in range(rows):
        path = plain_verdict(
            law[b], *(x[b].tolist() for x in (tokens, parents, logq.double())), threshold
        )
        assert int(verdict.accepted[b]) == len(path)
        stands = (verdict.path[b].nonzero().flatten()[1:] - 1).cpu()  # twins are equally good
        assert torch.equal(tokens[b, stands], tokens[b, path])
        assert law[b][path[-1] + 1 if path else 0][int(verdict.next[b])] > 0
    assert len(verdict.accepted.unique()) > (1 if sampling.temperature else 0)


def test_a_ratio_that_recovers_late_takes_the_tokens_before_with_it(device):
    law = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.5, 0.5]], device=device).double()
    logq = torch.tensor([[0.5, 0.4, 0.3]], device=device).double().log()
    draft = Draft(torch.zeros(1, 3, dtype=torch.long, device=device), logq=logq)
    assert 0.1 / 0.5 < 0.09 / 0.2 < 0.5 < 0.081 / 0.06  # the joint ratios
    verdict = Joint(SAMPLED, 0.5)(law.log()[None], draft, Place([0], [0], 4))
    assert verdict.accepted.tolist() == [3]


def test_the_token_after_what_stands_is_drawn_from_the_targets_law(device):
    draws, V = 3000, 5
    logits = random(1, 3, V, seed=3).to(device).expand(draws, 3, V)
    draft = Draft(torch.ones(draws, 2, dtype=torch.long, device=device), logq=None)
    verdict = Joint(SAMPLED, 1e-9)(logits, draft, Place(range(draws), [4] * draws, 3))
    assert (verdict.accepted == 2).all()
    law = SAMPLED.probs(logits[0, 2]).cpu()
    assert p_value(verdict.next.bincount(minlength=V).cpu(), law) > 1e-4


# Beams.


def plain_beams(laws, luck, width):
    """The definition, with weights / sum of weights at each depth. laws(path) -> probabilities;
    luck[depth][beam][token] decides as noise of Gumbel's does. -> paths and weights by depth.
    """
    beams, depths = [((), 1.0)], []
    for noise in luck:
        grown = {
            (w, token): (path, weight * p)
            for w, (path, weight) in enumerate(beams)
            for token, p in enumerate(laws(path))
            if p > 0
        }
        at = sorted(grown, key=lambda x: -(math.log(grown[x][1]) + float(noise[x])))[:width]
        total = sum(grown[x][1] for x in at)
        beams = [((*grown[x][0], x[1]), grown[x][1] / total) for x in at]
        depths.append(beams)
    return depths


@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_beams_are_those_of_the_definition_and_keep_the_log_probabilities_of_their_paths(width):
    """Beams that switch parents too. Some tokens have no probability: with four beams some of them
    stay empty at first.
    """
    V, depth = 5, 4
    table = random(20, V, seed=4).softmax(-1)
    table[:, 1:3] = 0.0
    table /= table.sum(-1, keepdim=True)

    def law(path):
        return table[hash(path) % 20].tolist()

    beams, paths, luck = Beams(width), [()], []
    for d in range(depth):
        weight = torch.tensor([law(path) for path in paths]).double().log()[None]
        luck.append(random(len(paths), V, seed=10 + d))
        beams.grow(weight, luck[-1][None])
        parents, tokens = beams.parents[-1][0].tolist(), beams.tokens[-1][0].tolist()
        paths = [(*paths[w], t) for w, t in zip(parents, tokens, strict=True)]
        wanted = plain_beams(law, luck, width)[-1]
        alive = [path for path in paths if min(path) >= 0]
        assert alive == [path for path, _ in wanted]
        weights = beams.joint[-1][0].softmax(-1).tolist()[: len(alive)]
        assert weights == pytest.approx([weight for _, weight in wanted])
    draft = beams.tree()
    logs = [sum(math.log(law(p[:i])[t]) for i, t in enumerate(p)) for p in alive]
    for w, logp in enumerate(logs):
        path = path_to(draft.parents[0].tolist(), (depth - 1) * width + w)
        assert draft.tokens[0, path].tolist() == list(alive[w])
        assert float(draft.logq[0, path].sum()) == pytest.approx(logp)
    best = max(range(len(alive)), key=logs.__getitem__)
    assert beams.best().tokens[0].tolist() == list(alive[best])
    assert float(beams.best().logq.sum()) == pytest.approx(logs[best])


def test_stochastic_beams_are_drawn_without_replacement_from_their_weights(device):
    draws, V = 4000, 4
    logits = random(1, 1, V, seed=5).to(device).expand(draws, 1, V)
    beams = Beams(2)
    beams.grow(*Joint(SAMPLED).branches(logits, Place(range(draws), [3] * draws, 2), 0))
    b = SAMPLED.probs(logits[0, 0]).tolist()
    law = {
        (i, j): b[i] * b[j] / (1 - b[i]) for i, j in itertools.product(range(V), repeat=2) if i != j
    }
    came = Counter(map(tuple, beams.tokens[0].tolist()))
    assert set(came) <= set(law)  # no beam is there twice
    assert p_value(torch.tensor([came[x] for x in law]), torch.tensor([*law.values()])) > 1e-4


def of_transformers(device):
    transformers = pytest.importorskip("transformers")
    from mtp.interop.huggingface import CausalLM

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=96, n_embd=8, n_layer=1, n_head=2
    )
    model = transformers.GPT2LMHeadModel(config).to(device, torch.double)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return CausalLM(model)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("sampling", [SAMPLED, CUT])
@pytest.mark.parametrize("make", [auxiliary, of_transformers])
def test_drafts_hold_the_auxiliary_models_own_law(make, sampling, whole, device):
    """Against its plain forward over the whole text and each path: rows that are copied, refilled
    and moved, caches that grow as trees and are read over.
    """
    model, seen = make(device), []

    class Watched(BeamModel):
        def propose(self, state, k):
            draft = super().propose(state, k)
            parents = torch.arange(-1, k - 1)[None] if draft.parents is None else draft.parents
            for b, length in enumerate(state.length):
                text = state.text[b, : length + 1].tolist()
                above = parents[min(b, len(parents) - 1)].tolist()
                for node, token in enumerate(draft.tokens[b].tolist()):
                    *path, _ = path_to(above, node)
                    behind = torch.tensor([text + draft.tokens[b, path].tolist()], device=device)
                    with torch.no_grad():
                        wanted = sampling.probs(model(behind)[0, -1])[token].log()
                    torch.testing.assert_close(draft.logq[b, node], wanted, rtol=0, atol=1e-9)
                    seen.append(len(path))
            return draft

    same = [Request([1, 2, 3], 9, seed) for seed in range(3)]
    joint(target(device), [*same, *some_requests()], Watched(model, 3, 3, whole), sampling)
    assert Counter(seen)[2] > 20


# The loop.


@pytest.mark.parametrize("sampling", [SAMPLED, CUT])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_row_alone_is_the_row_in_a_batch(drafter, sampling, device):
    model, requests = target(device), some_requests(stop=stop_at(END))
    drafter = DRAFTERS[drafter](device)
    together = joint(model, requests, drafter, sampling, batch_size=3, threshold=0.1)
    for request, completion in zip(requests, together, strict=True):
        (alone,) = joint(model, [request], drafter, sampling, threshold=0.1)
        assert alone.tokens == completion.tokens and alone.heads == completion.heads
    assert sum(sum(completion.accepted) for completion in together) > 3
    for request, completion in zip(requests, together, strict=True):
        *before, last = completion.tokens
        assert END not in before
        assert last == END or len(completion.tokens) == request.max_new_tokens


class Fixed:
    """Always the same tokens, without a law."""

    needs_memo = False

    def __init__(self, *tokens):
        self.tokens, self.depth = torch.tensor(tokens), len(tokens)
        self.nodes = self.depth

    def attach(self, model): ...

    def begin(self, rows, slots): ...

    def admit(self, state, row, source): ...

    def propose(self, state, k):
        return Draft(self.tokens.to(state.text.device).expand(len(state.length), -1)[:, :k])


@pytest.mark.parametrize("place", range(4))
def test_an_end_token_anywhere_in_a_block_ends_the_text(place, device):
    block = [5, 6, 7, 8]
    block[place] = END
    requests = some_requests(max_new_tokens=30, stop=stop_at(END))
    for completion in joint(target(device), requests, Fixed(*block), threshold=1e-300):
        first, *rest = completion.tokens
        assert first == END or rest == block[: place + 1]


def test_drafts_that_never_stand_leave_the_targets_own_text(device):
    """Of equal noise: token for token."""
    model, requests = target(device), some_requests()
    refused = joint(model, requests, Fixed(1, 2, 3), threshold=1.0)
    assert texts(refused) == texts(generate(model, requests, sampling=SAMPLED))
    assert all(sum(completion.accepted) == 0 for completion in refused)


@pytest.mark.parametrize("width", [1, 4])
def test_the_lowest_thresholds_accept_all_that_the_target_can_say(width, device):
    drafter = BeamModel(auxiliary(device), 3, width)
    for completion in joint(target(device), some_requests(), drafter, threshold=1e-300):
        assert completion.accepted == completion.drafted


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_that_drafts_for_itself_is_accepted_whole(whole, device):
    model = target(device)
    for completion in joint(model, some_requests(), BeamModel(model, 3, 3, whole), threshold=0.99):
        assert completion.accepted == completion.drafted


@pytest.mark.parametrize("threshold", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_greedy_target_writes_its_greedy_text(drafter, threshold, device):
    model, requests = target(device), some_requests()
    got = joint(model, requests, DRAFTERS[drafter](device), Sampling(), threshold=threshold)
    assert texts(got) == texts(generate(model, requests))


@pytest.mark.parametrize("drafter", ["beam", "whole beam", "beam of heads"])
def test_the_exactness_test_fails_for_joint_decoding(drafter, device):
    """It is lossy, and the check that the exact rules pass says so."""
    model = tiny("linear", n_layers=2, gain=1.4, vocab_size=4).to(device)
    drafter = {
        "beam": lambda: BeamModel(auxiliary(device, vocab_size=4), 2, 2),
        "whole beam": lambda: BeamModel(auxiliary(device, vocab_size=4), 2, 2, whole=True),
        "beam of heads": lambda: BeamHeads(2, 2),
    }[drafter]()
    requests = [Request([1, 2, 3], 3, seed) for seed in range(1000)]
    got = joint(model, requests, drafter, batch_size=250)
    law = law_of_texts(token_law(model), [1, 2, 3], 3)
    with pytest.raises(AssertionError, match="do not follow the law"):
        assert_law(lambda seed: got[seed].tokens, law, 1000)
    assert make_rule("joint", SAMPLED).lossy and not make_rule("block", SAMPLED).lossy


# The ideal, and how near it one may come.


def token_law(model, sampling=SAMPLED):
    @torch.no_grad()
    def law(text):
        device = model.embedding.weight.device
        return sampling.probs(model(torch.tensor([text], device=device))[0, -1])

    return law


def few_words(device, **changed):
    return tiny("linear", n_layers=2, gain=1.4, vocab_size=5, **changed).to(device)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_law_of_blocks_is_the_tempered_product_of_those_of_tokens(temperature, device):
    model = few_words(device)
    law = law_of_texts(token_law(model), [1, 2, 4], 3)
    total = math.fsum(p ** (1 / temperature) for p in law.values())
    got = block_law(model, [1, 2, 4], 3, temperature)
    assert got == pytest.approx({x: p ** (1 / temperature) / total for x, p in law.items()})
    best = max(law, key=law.__getitem__)
    assert next(iter(got)) == best and block_law(model, [1, 2, 4], 3, 0) == {best: 1.0}


def test_the_best_block_is_no_less_probable_than_the_greedy_one_and_sometimes_more(device):
    """And a beam that is wide enough finds it, and a narrow one never a better one."""
    model, more = few_words(device), 0
    for text in itertools.product(range(5), repeat=2):
        law = block_law(model, text, 3)
        greedy = tuple(generate(model, [Request(text, 3)])[0].tokens)
        (best,) = block_law(model, text, 3, 0)
        (narrow,) = block_law(model, text, 3, 0, width=2)
        assert law[greedy] <= law[best] + 1e-12 and law[narrow] <= law[best] + 1e-12
        assert block_law(model, text, 3, 0, width=25) == {best: 1.0}
        assert block_law(model, text, 3, 0, width=1) == {greedy: 1.0}
        more += law[greedy] < law[best] - 1e-9
    assert more


def test_enumerations_that_are_too_large_are_refused(device):
    with pytest.raises(ValueError, match=r"width=None enumerates 13 \*\* 6 blocks"):
        block_law(target(device), [1], 6)
    assert len(block_law(target(device), [1], 6, width=7)) == 7


def accepted_gap(model, auxiliary, width, threshold):
    """Mean of log p(best block) - log p(accepted block), per token, over many first steps."""
    gaps = []
    for text in itertools.product(range(5), repeat=2):
        drafter = BeamModel(auxiliary, 3, width)
        requests = [Request(text, 8, seed) for seed in range(4)]
        for completion in joint(model, requests, drafter, threshold=threshold):
            first, *rest = completion.tokens
            size = completion.heads[1:].index(1)
            if size:
                law = block_law(model, [*text, first], size)
                best, own = next(iter(law.values())), law[tuple(rest[:size])]
                assert own <= best + 1e-12
                gaps.append(math.log(best / own) / size)
    return sum(gaps) / len(gaps)


def test_wider_beams_come_nearer_to_the_best_block(device):
    """Within what the threshold promises: a model that drafts for itself is always accepted."""
    model = few_words(device)
    gaps = [accepted_gap(model, model, width, 0.5) for width in (1, 2, 5)]
    assert gaps[0] > gaps[1] > gaps[2] >= 0 and gaps[2] < gaps[0] / 2


def texts_to_try(count, first):
    return [Request([seed % 5, seed // 5 % 5], 16, seed) for seed in range(first, first + count)]


def calibrated(model, budget, drafters, **more):
    few, others = texts_to_try(40, 0), texts_to_try(40, 1000)
    return calibrate(model, few, others, drafters, SAMPLED, budget, batch_size=20, **more)


def test_calibration_takes_the_most_tokens_per_pass_within_the_budget_and_checks_it(device):
    """A wide budget takes the lowest threshold; a narrow one a slower pair, or none."""
    model = few_words(device)
    drafters = [BeamModel(auxiliary(device, vocab_size=5, gain=0.5), 3, 1)]
    ask = {"thresholds": (0.001, 0.9)}
    wide, narrow = (calibrated(model, budget, drafters, **ask) for budget in (9.0, 0.55))
    assert (wide.threshold, narrow.threshold) == (0.001, 0.9)
    assert wide.found.pace > narrow.found.pace > 1 and wide.found.mean > narrow.found.mean
    assert wide.kept and narrow.kept
    with pytest.raises(ValueError, match="budget=-5: of 2 pairs none keeps to it for sure"):
        calibrated(model, -5, drafters, **ask)


def test_calibration_measures_what_it_says(device):
    """Against texts that are decoded here, and with a loss of the user's own."""
    model, drafter = few_words(device), BeamModel(auxiliary(device, vocab_size=5), 2, 3)

    def zeros(request, completion):
        assert completion.logprobs and completion.tokens
        return completion.tokens.count(0) / len(completion.tokens)

    for loss in (nll, zeros):
        got = calibrated(model, 9.0, [drafter], thresholds=(0.4,), loss=loss)
        for requests, rise in (
            (texts_to_try(40, 0), got.found),
            (texts_to_try(40, 1000), got.checked),
        ):
            plain = generate(model, requests, sampling=SAMPLED, logprobs=True)
            other = joint(model, requests, drafter, threshold=0.4, logprobs=True)
            means = [sum(map(loss, requests, texts)) / 40 for texts in (plain, other)]
            assert rise.mean == pytest.approx(means[1] - means[0])
            steps = sum(completion.steps for completion in other)
            assert rise.pace == pytest.approx(1 + sum(sum(c.accepted) for c in other) / steps)
            assert rise.error > 0
    broken = Calibrated(drafter, 0.4, got.checked.mean - 1e-9, got.found, got.checked)
    assert not broken.kept


def test_a_calibration_needs_texts(device):
    with pytest.raises(ValueError, match="needs two texts"):
        calibrate(few_words(device), texts_to_try(1, 0), texts_to_try(9, 1), [], SAMPLED, 0.1)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"threshold": 0.0}, r"threshold=0.0 must lie in \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold=1.5 must lie in \(0, 1\]"),
        ({"threshold": math.nan}, r"threshold=nan must lie in \(0, 1\]"),
        ({"rule": "exact", "threshold": 0.5}, "rule=exact takes no threshold=: only joint"),
        ({"drafter": OwnHeads(tree=4)}, "rule=joint takes chains and beams"),
        ({"drafter": BeamModel(tiny(vocab_size=7))}, "vocab_size=7, the target 13"),
        ({"drafter": BeamHeads(width=14)}, "width=14 exceeds vocab_size=13"),
        ({"drafter": BeamHeads(), "rule": "block"}, "rule=block takes chains"),
    ],
)
def test_impossible_settings_are_refused_by_name(arguments, words, device):
    with pytest.raises(ValueError, match=words):
        generate(target(device), some_requests(), **({"rule": "joint"} | arguments))


def test_beams_of_heads_that_read_guesses_are_refused(device):
    with pytest.raises(ValueError, match="beams need heads that guess without each other"):
        generate(tiny("sequential"), some_requests(), BeamHeads())


def test_a_wider_beam_than_the_vocabulary_is_refused(device):
    with pytest.raises(ValueError, match="width=14 exceeds vocab_size=13"):
        joint(target(device), some_requests(), BeamModel(auxiliary(device), width=14))


def test_a_larger_auxiliary_model_is_used_but_its_cost_is_said(device):
    large = tiny(n_layers=8).to(device)
    with pytest.warns(UserWarning, match=r"has [\d.]+ times the target's parameters"):
        (done,) = joint(target(device), some_requests()[:1], BeamModel(large, 2, 2))
    assert len(done.tokens) == NEW


def test_beams_have_a_word(device):
    drafter = make_drafter("beam", draft=auxiliary(device), depth=2, width=3, whole=True)
    assert isinstance(drafter, BeamModel) and drafter.nodes == 6
    assert isinstance(make_drafter("beam", width=2), BeamHeads)
    with pytest.raises(ValueError, match="width=0 must be at least 1"):
        make_drafter("beam", width=0)
