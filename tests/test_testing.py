"""The exactness kit: it passes what is exact, ours and other people's, and fails what is not."""

import re
from functools import cache

import pytest
import torch
from conftest import tiny

import mtp.decode.sampling
from mtp.decode.contract import Place, Request, Verdict
from mtp.decode.drafters import OwnHeads
from mtp.decode.loop import generate
from mtp.decode.sampling import GUESS, RULES, TARGET, Match, Sampling
from mtp.testing import assert_law, assert_lossless, law_of_texts, p_value

PROMPTS = [[5, 4, 3, 2, 1], [3], [7, 7], [1, 2]]
DRAWS = 1500


@cache
def model():
    return tiny(gain=1.4)


@cache
def small():
    """Few tokens, so that all texts can be enumerated."""
    return tiny(vocab_size=4, dim=8, n_layers=4, n_future_tokens=3)


@torch.no_grad()
def logits(text):
    return model()(torch.tensor([text]))[0]


def decoder(drafter=None, sampling=None, rule="match", new=16):
    def decode(prompt):
        request = Request(prompt, new, seed=5)
        return generate(model(), [request], drafter, sampling, rule=rule)[0].tokens

    return decode


# assert_lossless.


@pytest.mark.parametrize("drafter", [None, OwnHeads(), OwnHeads(tree=5)])
def test_our_greedy_texts_are_lossless(drafter):
    seen = assert_lossless(decoder(drafter), logits, PROMPTS)
    assert seen.tokens == 16 * len(PROMPTS) and seen.near_ties == 0 == seen.widest


@pytest.mark.parametrize("drafter", [None, OwnHeads()])
def test_sampled_texts_are_lossless_given_their_noise(drafter):
    sampling = Sampling(0.8, top_k=6)

    def scores(text):
        got = logits(text)[None]
        noise = sampling.noise(Place([5], [1], len(text)), got, TARGET)
        return sampling.scores(got, noise)[0]

    seen = assert_lossless(decoder(drafter, sampling), scores, PROMPTS)
    assert seen.tokens == 16 * len(PROMPTS)
    with pytest.raises(AssertionError, match="the reference's choice is"):
        assert_lossless(decoder(drafter, sampling), logits, PROMPTS)


class Trusting(Match):
    """Takes every guess: the bug that text equality is there to find."""

    def __call__(self, logits, draft, place):
        verdict = super().__call__(logits, draft, place)
        every = torch.full_like(verdict.accepted, draft.tokens.shape[1])
        return Verdict(every, logits[:, -1].argmax(-1))


def test_a_guess_that_is_taken_though_it_is_wrong_is_found(monkeypatch):
    monkeypatch.setitem(RULES, "trusting", Trusting)
    with pytest.raises(AssertionError) as caught:
        assert_lossless(decoder(OwnHeads(), rule="trusting"), logits, PROMPTS)
    place = re.match(
        r"prompt (\d+), new token (\d+) \(position (\d+)\): (\d+) came", str(caught.value)
    )
    prompt, new, position, token = map(int, place.groups())
    text = PROMPTS[prompt] + decoder(OwnHeads(), rule="trusting")(PROMPTS[prompt])
    assert position == len(PROMPTS[prompt]) + new and text[position] == token
    assert logits(text)[position - 1].argmax() != token


def spoiled(change):
    """Our decoder, and a change to what it gives for the last of the prompts."""

    def decode(prompt):
        new = decoder()(prompt)
        return change(new) if prompt == PROMPTS[-1] else new

    return decode


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda new: [*new[:7], 12 - new[7], *new[8:]], "prompt 3, new token 7 .position 9.: "),
        (lambda new: new[1:], "prompt 3, new token"),
        (lambda new: [*PROMPTS[-1], *new], "prompt 3, new token"),
        (lambda new: [*new[:9], 13], "new token 9 .position 11.: 13 is not in the vocabulary"),
        (lambda new: [], "prompt 3: nothing was decoded"),
    ],
)
def test_texts_that_are_not_the_references_are_refused_by_their_place(change, words):
    with pytest.raises(AssertionError, match=words):
        assert_lossless(spoiled(change), logits, PROMPTS)


def two_that_nearly_tie(text):
    return torch.tensor([[0.0, 3.0, 3.5, -torch.inf]]).expand(len(text), 4)


def test_near_ties_are_allowed_up_to_their_bound_and_counted():
    def decode(prompt):
        return [2, 1, 2, 1, 1]

    seen = assert_lossless(decode, two_that_nearly_tie, [[0], [1]], near_tie=0.5)
    assert (seen.tokens, seen.near_ties, seen.widest) == (10, 6, 0.5)
    with pytest.raises(AssertionError, match="1 came, .* choice is 2, better by 0.5; .* 0.4 apart"):
        assert_lossless(decode, two_that_nearly_tie, [[0]], near_tie=0.4)


def test_equals_are_no_error():
    seen = assert_lossless(lambda prompt: [1, 0], lambda text: torch.zeros(len(text), 2), [[0]])
    assert seen.near_ties == 1 and seen.widest == 0


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_token_without_a_finite_score_is_no_near_tie(bad):
    with pytest.raises(AssertionError, match="new token 0"):
        assert_lossless(
            lambda prompt: [1], lambda text: torch.tensor([[0.0, bad]]), [[0]], near_tie=9.0
        )


# assert_law.

LAW_SAMPLING = Sampling(0.8, top_k=3)


@cache
def small_law():
    def probs(text):
        with torch.no_grad():
            return LAW_SAMPLING.probs(small()(torch.tensor([text]))[0, -1])

    return law_of_texts(probs, [1, 2], 3)


def sampler(rule, sampling=LAW_SAMPLING, drafter=None):
    """All draws in batches: one text after the other would take ten times as long."""
    requests = [Request([1, 2], 3, seed) for seed in range(DRAWS)]
    got = generate(small(), requests, drafter, sampling, batch_size=250, rule=rule)
    return lambda seed: got[seed].tokens


def test_the_law_of_texts_is_the_product_of_its_steps():
    def probs(text):
        return torch.tensor([0.25, 0.75]) if text[-1] else torch.tensor([1.0, 0.0])

    assert law_of_texts(probs, [1], 2) == {
        **{(0, 0): 0.25, (0, 1): 0.0},
        **{(1, 0): 0.1875, (1, 1): 0.5625},
    }


@pytest.mark.parametrize(
    "rule", [word for word, rule in RULES.items() if not rule(Sampling()).lossy]
)
def test_our_rules_keep_the_law(rule):
    assert assert_law(sampler(rule, drafter=OwnHeads()), small_law(), DRAWS) > 1e-4


def test_another_temperature_is_found():
    with pytest.raises(AssertionError, match="do not follow the law"):
        assert_law(sampler("match", Sampling(1.1, top_k=3)), small_law(), DRAWS)


def test_what_the_law_forbids_fails_at_once():
    with pytest.raises(AssertionError, match=r"\(.*\) came up \d+ times; it never should"):
        assert_law(sampler("match", Sampling(0.8)), small_law(), DRAWS)


class OneNoisePerStep(Sampling):
    """Off by one: all tokens that a step decides see the noise of its first."""

    def noise(self, place, like, purpose):
        noise = super().noise(place, like, purpose)
        return noise[:, :1].expand_as(noise)


def test_noise_that_is_used_for_two_places_is_found():
    with pytest.raises(AssertionError, match="do not follow the law"):
        assert_law(sampler("match", OneNoisePerStep(0.8, top_k=3), OwnHeads()), small_law(), DRAWS)


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_noise_that_a_trial_shares_with_its_guess_is_found(rule, monkeypatch):
    """A guess is likelier where its noise is large, so its trial needs noise of its own."""
    monkeypatch.setattr(mtp.decode.sampling, "ACCEPT", GUESS)
    with pytest.raises(AssertionError, match="do not follow the law"):
        assert_law(sampler(rule, drafter=OwnHeads()), small_law(), DRAWS)


def test_a_law_has_to_add_up_to_one():
    with pytest.raises(ValueError, match="add up to 0.75, which must be 1"):
        assert_law(lambda seed: (0,), {(0,): 0.5, (1,): 0.25})


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="9 draws are too few"):
        assert_law(lambda seed: (seed % 2,), {(0,): 0.5, (1,): 0.5}, draws=9)


def test_a_certain_outcome_is_a_law_too():
    assert assert_law(lambda seed: (3,), {(3,): 1.0, (2,): 0.0}, draws=1) == 1


@pytest.mark.parametrize("outcomes", [4, 60])
def test_p_values_of_a_correct_sampler_are_uniform(outcomes):
    """Most of the 60 outcomes are rare and share a class."""
    law = torch.arange(1.0, outcomes + 1).double().pow(-1.5)
    random = torch.Generator().manual_seed(0)
    p = torch.tensor(
        [
            p_value(
                torch.multinomial(law, 500, True, generator=random).bincount(minlength=outcomes),
                law,
            )
            for _ in range(1000)
        ]
    )
    tenths = (p * 10).long().clamp(max=9).bincount(minlength=10)
    assert p_value(tenths, torch.ones(10)) > 1e-4


# Other people's decoders.

VOCAB = 11


@cache
def llama(seed, vocab=VOCAB):
    """A random model that is sure of itself: no near-ties."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.LlamaConfig(vocab_size=vocab, **shape, **heads, **ends)
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12 if parameter.ndim > 1 else 1)
    return model


ASSISTED = {
    "plain": lambda vocab: {},
    "assistant_model": lambda vocab: {"assistant_model": llama(1, vocab)},
    "prompt_lookup": lambda vocab: {"prompt_lookup_num_tokens": 3},
}


def theirs(name, prompt, new, vocab=VOCAB, **options):
    ids = torch.tensor([prompt])
    options |= {"max_new_tokens": new, "attention_mask": torch.ones_like(ids)}
    out = llama(0, vocab).generate(ids, **options, **ASSISTED[name](vocab))
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def llama_logits(text, vocab=VOCAB):
    return llama(0, vocab)(torch.tensor([text])).logits[0]


@pytest.mark.parametrize("name", ASSISTED)
def test_transformers_greedy_texts_are_lossless(name):
    prompts = [[1, 2, 3, 1, 2], [4], [5, 5, 5, 9]]
    seen = assert_lossless(
        lambda prompt: theirs(name, prompt, 20, do_sample=False), llama_logits, prompts
    )
    assert seen.tokens == 20 * len(prompts)


@pytest.mark.parametrize("name", ASSISTED)
def test_transformers_sampled_texts_follow_the_law(name):
    prompt, new, draws = [1, 0, 1], 3, 200
    law = law_of_texts(lambda text: (llama_logits(text, 3)[-1] / 1.5).softmax(-1), prompt, new)

    def sample(seed):
        torch.manual_seed(seed)
        return theirs(name, prompt, new, 3, do_sample=True, temperature=1.5, top_k=0)

    assert_law(sample, law, draws)
