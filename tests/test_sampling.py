"""How tokens are chosen, and that each rule keeps what it promises about the target's law."""

import itertools

import pytest
import torch

import mtp.decode.sampling
from mtp.decode.contract import Draft, Place
from mtp.decode.sampling import ACCEPT, GUESS, RULES, TARGET, Match, Sampling, uniform
from mtp.testing import p_value

# Statistical tests have fixed seeds, so they always pass or always fail. FALSE_ALARM is how often
# a correct library would fail one of them if its seeds or hash were chosen anew.
FALSE_ALARM = 1e-4
DRAWS = 20_000


def normal(*shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def chosen(sampling, logits, seed, first):
    """What the target itself chooses, with noise of its own."""
    noise = sampling.noise(Place(seed, first, logits.shape[1]), logits, TARGET)
    return sampling.scores(logits, noise).argmax(-1)


def test_noise_belongs_to_the_position_whoever_asks(device):
    whole = uniform(Place([7], [5], 4), 9, TARGET, device)
    for i in range(4):
        alone = uniform(Place([3, 7], [100, 5 + i], 1), 9, TARGET, device)
        assert torch.equal(alone[1, 0], whole[0, i])


def test_noise_of_a_token_does_not_depend_on_the_size_of_the_vocabulary(device):
    small, large = (uniform(Place([7], [5], 2), width, TARGET, device) for width in (3, 9))
    assert torch.equal(small, large[..., :3])


@pytest.mark.parametrize("other", [(8, 5, TARGET), (7, 6, TARGET), (7, 5, GUESS), (7, 5, ACCEPT)])
def test_noise_differs_between_seeds_positions_and_purposes(other, device):
    seed, position, purpose = other
    first = uniform(Place([7], [5], 1), 9, TARGET, device)
    second = uniform(Place([seed], [position], 1), 9, purpose, device)
    assert not (first == second).any()


def test_noise_never_reaches_zero_or_one(monkeypatch):
    for bits in (0, -1):
        monkeypatch.setattr(mtp.decode.sampling, "_mix", lambda x, bits=bits: x * 0 + bits)
        assert 0 < uniform(Place([1], [0], 1), 1, TARGET) < 1


def many_numbers(device):
    """Noise of all combinations, (seed, position, token, purpose)."""
    place = Place(range(30), [0] * 30, 40)
    return torch.stack([uniform(place, 20, purpose, device) for purpose in range(3)], -1)


def test_noise_is_uniform(device):
    u = many_numbers(device)
    counts = (u * 64).long().flatten().bincount(minlength=64).cpu()
    assert p_value(counts, torch.full((64,), 1 / 64)) > FALSE_ALARM


@pytest.mark.parametrize("dim", range(4))
def test_neighbours_in_every_direction_are_uncorrelated(dim, device):
    """The correlation of N independent pairs has standard deviation N^-1/2: 5 of them, 6e-7."""
    u = (many_numbers(device) - 0.5) * 12**0.5
    size = u.shape[dim] - 1
    product = u.narrow(dim, 0, size) * u.narrow(dim, 1, size)
    assert abs(product.mean()) < 5 * product.numel() ** -0.5


def plain_law(logits, temperature, top_k, top_p):
    """One row of logits -> probabilities, by sorting a list. Assumes no ties at top_p's border."""
    weights = [float(torch.exp(x / temperature)) for x in logits]
    if top_k:
        least = sorted(weights, reverse=True)[top_k - 1]
        weights = [w if w >= least else 0.0 for w in weights]
    mass, kept = 0.0, set()
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        if weights[i] and mass < top_p * sum(weights):
            kept.add(i)
        mass += weights[i]
    weights = [w if i in kept else 0.0 for i, w in enumerate(weights)]
    return torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (3, 1.0), (9, 1.0), (0, 0.5), (0, 0.95), (4, 0.7)]
)
def test_law_is_cut_as_a_plain_loop_cuts_it(temperature, top_k, top_p, device):
    logits = normal(20, 6, device=device)
    law = Sampling(temperature, top_k, top_p).probs(logits).cpu()
    wanted = [plain_law(x, temperature, min(top_k, 6), top_p) for x in logits.cpu()]
    torch.testing.assert_close(law, torch.stack(wanted))


def test_ties_at_the_kth_logit_all_stay(device):
    law = Sampling(1.0, top_k=2).probs(torch.tensor([[1.0, 0.0, 1.0, 2.0, 1.0]], device=device))
    assert (law > 0).tolist() == [[True, False, True, True, True]]


def test_ties_at_the_border_of_top_p_keep_the_smallest_set(device):
    law = Sampling(1.0, top_p=0.6).probs(torch.zeros(1, 4, device=device))
    assert (law > 0).sum() == 3


@pytest.mark.parametrize("top_p", [1e-9, 0.1])
def test_top_p_keeps_at_least_the_most_likely_token(top_p, device):
    logits = normal(5, 6, device=device)
    law = Sampling(1.0, top_p=top_p).probs(logits * 10)
    assert torch.equal(law.argmax(-1), logits.argmax(-1)) and law.max(-1).values.min() > 0.99


def test_greedy_law_is_one_hot(device):
    logits = normal(5, 3, 6, device=device)
    law = Sampling().probs(logits)
    assert torch.equal(law, (logits == logits.amax(-1, keepdim=True)).double())
    assert torch.equal(chosen(Sampling(), logits, range(5), [0] * 5), law.argmax(-1))


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.3, 5, 0.8)])
def test_chosen_tokens_follow_the_law(sampling, device):
    logits = normal(6, device=device)
    law = sampling.probs(logits).cpu()
    tokens = chosen(sampling, logits.expand(DRAWS, 1, 6), range(DRAWS), [3] * DRAWS)
    assert p_value(tokens.flatten().bincount(minlength=6).cpu(), law) > FALSE_ALARM


def verdicts(rule, target, draft_logits, device):
    """One step for DRAWS seeds: target (1 + K, V), draft_logits (K, V) -> guesses, verdict."""
    place = Place(range(DRAWS), [3] * DRAWS, len(target))
    draft = rule.draw(draft_logits.expand(DRAWS, *draft_logits.shape), place)
    return draft, rule(target.expand(DRAWS, *target.shape), draft, place)


def emitted(draft, verdict):
    """What comes first: the guess if it stands, else the rule's own token."""
    return torch.where(verdict.accepted > 0, draft.tokens[:, 0], verdict.next)


LOSSLESS = [word for word, rule in RULES.items() if not rule(Sampling()).lossy]
LAWS = [Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.0, top_p=0.8)]


@pytest.mark.parametrize("rule", LOSSLESS)
@pytest.mark.parametrize("sampling", LAWS)
@pytest.mark.parametrize("seed", range(3))
def test_first_token_follows_the_targets_law(rule, sampling, seed, device):
    target, guess = (
        normal(2, 6, device=device, seed=seed),
        normal(1, 6, device=device, seed=seed + 9),
    )
    counts = emitted(*verdicts(RULES[rule](sampling), target, guess, device)).bincount(minlength=6)
    assert p_value(counts.cpu(), sampling.probs(target[0]).cpu()) > FALSE_ALARM


@pytest.mark.parametrize("rule", RULES)
def test_token_after_an_accepted_guess_follows_its_own_law_whatever_the_guess(rule, device):
    sampling = Sampling(1.0)
    target = normal(2, 4, device=device) * 0.7
    draft, verdict = verdicts(RULES[rule](sampling), target, target[:1] * 0.5, device)
    stands = verdict.accepted == 1
    pairs = (draft.tokens[:, 0] * 4 + verdict.next)[stands].bincount(minlength=16).view(4, 4).cpu()
    law = sampling.probs(target[1]).cpu()
    rows = pairs[pairs.sum(1) > 0]  # joint refuses some guesses always
    assert len(rows) > 2 and all(p_value(row, law) > FALSE_ALARM for row in rows)


@pytest.mark.parametrize("sampling", LAWS)
def test_exact_accepts_guesses_at_the_rate_of_the_theorem(sampling, device):
    """sum min(p, q) (Leviathan et al. 2023, corollary 3.6) within 4 standard deviations, 6e-5."""
    target, guess = normal(2, 6, device=device), normal(1, 6, device=device, seed=9)
    p, q = sampling.probs(target[0]), sampling.probs(guess[0])
    rate = float(torch.minimum(p, q).sum())
    _, verdict = verdicts(RULES["exact"](sampling), target, guess, device)
    tolerance = 4 * (rate * (1 - rate) / DRAWS) ** 0.5
    assert float(verdict.accepted.double().mean()) == pytest.approx(rate, abs=tolerance)


@pytest.mark.parametrize("seed", range(5))
def test_exact_rule_in_closed_form_is_the_targets_law(seed, device, monkeypatch):
    """Integrates the rule over its own uniform number on a grid, token by token; then the theorem:
    q(x) P(x stands) + P(nothing stands) residual(x) = p(x). The grid of M points is 1/M fine."""
    grid, V = 4000, 6
    sampling = Sampling(1.0, top_k=5)
    target, guess = (
        normal(2, V, device=device, seed=seed),
        normal(1, V, device=device, seed=seed + 9),
    )
    p, q = sampling.probs(target[0]), sampling.probs(guess[0])
    points = (torch.arange(grid, device=device).double() + 0.5) / grid

    def stratified(place, width, purpose, device):
        return points.view(grid, 1, 1).expand(grid, place.count, width)

    monkeypatch.setattr(mtp.decode.sampling, "uniform", stratified)
    stands = torch.zeros_like(p)
    for x in range(V):
        draft = Draft(torch.full((grid, 1), x, device=device), q.expand(grid, 1, V))
        place = Place([0] * grid, [0] * grid, 2)
        verdict = RULES["exact"](sampling)(target.expand(grid, 2, V), draft, place)
        stands[x] = verdict.accepted.double().mean()
    residual = (p - q).clamp(min=0)
    law = q * stands + (1 - (q * stands).sum()) * residual / residual.sum()
    torch.testing.assert_close(law, p, rtol=0, atol=2 / grid)


@pytest.mark.parametrize("rule", ["exact", "block"])
@pytest.mark.parametrize("guess", [-1, 2])
def test_law_is_kept_for_guesses_that_were_not_drawn(guess, rule, device):
    sampling, target = Sampling(1.0), normal(2, 6, device=device)
    draft = Draft(torch.full((DRAWS, 1), guess, device=device))
    place = Place(range(DRAWS), [3] * DRAWS, 2)
    verdict = RULES[rule](sampling)(target.expand(DRAWS, 2, 6), draft, place)
    counts = emitted(draft, verdict).bincount(minlength=6)
    assert p_value(counts.cpu(), sampling.probs(target[0]).cpu()) > FALSE_ALARM


@pytest.mark.parametrize("rule", RULES)
def test_guesses_that_the_target_forbids_never_stand(rule, device):
    target = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]], device=device)
    guess = torch.tensor([[0.0, 0.0, 9.0]], device=device)
    draft, verdict = verdicts(RULES[rule](Sampling(1.0)), target, guess, device)
    assert not verdict.accepted[draft.tokens[:, 0] == 2].any()
    assert (emitted(draft, verdict) != 2).all()


@pytest.mark.parametrize("rule", RULES)
def test_greedy_guesses_stand_up_to_the_first_that_is_not_the_argmax(rule, device):
    logits = normal(1, 4, 5, device=device)
    best = logits.argmax(-1)[0].tolist()
    rows = list(itertools.product(*([best[i], (best[i] + 1) % 5, -1] for i in range(3))))
    draft = Draft(torch.tensor(rows, device=device))
    place = Place([0] * len(rows), [0] * len(rows), 4)
    verdict = RULES[rule](Sampling())(logits.expand(len(rows), 4, 5), draft, place)
    wanted = [next((i for i in range(3) if row[i] != best[i]), 3) for row in rows]
    assert verdict.accepted.tolist() == wanted
    assert verdict.next.tolist() == [best[i] for i in wanted]


@pytest.mark.parametrize("sampling", [Sampling(), *LAWS])
def test_match_lets_the_target_choose_every_token(sampling, device):
    logits, rows = normal(40, 4, 3, device=device), 40
    tokens = torch.randint(3, (rows, 3), generator=torch.Generator().manual_seed(0)).to(device)
    choice = chosen(sampling, logits, range(rows), range(rows))
    verdict = Match(sampling)(logits, Draft(tokens), Place(range(rows), range(rows), 4))
    for b in range(rows):
        accepted = next((i for i in range(3) if tokens[b, i] != choice[b, i]), 3)
        assert verdict.accepted[b] == accepted
        assert verdict.next[b] == choice[b, accepted]


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_of_nothing_leaves_the_target_alone(rule, device):
    sampling, logits = Sampling(1.0), normal(8, 1, 6, device=device)
    nothing = Draft(torch.zeros(8, 0, dtype=torch.long, device=device))
    verdict = RULES[rule](sampling)(logits, nothing, Place(range(8), [4] * 8, 1))
    assert not verdict.accepted.any()
    assert torch.equal(verdict.next, chosen(sampling, logits, range(8), [4] * 8)[:, 0])


def test_match_draws_with_the_noise_of_each_place_whoever_was_there_before(device):
    """The noise it keeps between drawing and judging is of that place alone."""
    sampling, logits = Sampling(1.0), normal(2, 3, 6, device=device)
    rule = Match(sampling)
    for seed, first in [((1, 2), (5, 9)), ((1, 3), (5, 9)), ((1, 3), (6, 9)), ((1, 2), (5, 9))]:
        place = Place(seed, first, 4)
        draft = rule.draw(logits, place)
        assert torch.equal(draft.tokens, chosen(sampling, logits, seed, first))
        judged = torch.cat([logits, logits[:, :1]], 1)
        verdict = rule(judged, draft, place)
        assert verdict.accepted.tolist() == [3, 3]
        assert torch.equal(verdict.next, chosen(sampling, judged, seed, first)[:, -1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"top_k": -2}, "top_k=-2 must be at least 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**settings)
