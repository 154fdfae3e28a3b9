"""Sound heads pass, and every way of being broken is named."""

import copy
from functools import cache

import pytest
import torch
from conftest import KINDS, tiny

from mtp.decode.contract import Verdict
from mtp.decode.drafters import OwnHeads
from mtp.decode.health import health
from mtp.decode.sampling import RULES, Match
from mtp.loss import mtp_loss
from mtp.model import ModelConfig, Transformer

VOCAB, N = 12, 4


def circle(start, length):
    """A text in which every token has one successor, and no two tokens ahead are the same."""
    return [(start + 5 * i) % VOCAB for i in range(length)]


@cache
def trained(kind):
    """A model that has learnt the circle: every head knows its token."""
    shape = {"dim": 16, "n_layers": 5, "n_heads": 2, "multiple_of": 8, "max_seq_len": 64}
    if kind == "identity":  # on one set of logits all heads would be copies
        shape |= {"unembedding": "replicated"}
    config = ModelConfig(**shape, vocab_size=VOCAB, n_future_tokens=N, head=kind)
    model = Transformer(config, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = torch.tensor([circle(start, 24) for start in range(VOCAB)])
    for _ in range(80):
        loss, _ = mtp_loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


PROMPTS = [circle(start, 3 + start) for start in range(5)]
TEXTS = [circle(start, 30) for start in range(4)]


def found(model, texts=TEXTS):
    return health(model, PROMPTS, texts, new_tokens=24).findings


@pytest.mark.parametrize("texts", [TEXTS, None], ids=["given", "decoded"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_model_is_sound(kind, texts):
    seen = health(trained(kind), PROMPTS, texts, new_tokens=24)
    assert seen.findings == []
    assert seen.hits.shape == (N, N + 1) and (seen.hits.diagonal() > 0.8).all()
    assert (seen.expected > 0.6).all()
    torch.testing.assert_close(seen.decoded, seen.expected)


def broken(change, kind="transformer"):
    model = copy.deepcopy(trained(kind))
    with torch.no_grad():
        change(model.heads.heads)
    return model


def swap(heads):
    heads[1], heads[3] = heads[3], heads[1]


def shift(heads):
    """As if trained on targets that are off by one; the last head is not to blame."""
    for i in range(N - 1):
        heads[i] = heads[i + 1]


def duplicate(heads):
    heads[3].load_state_dict(heads[1].state_dict())


def test_heads_in_the_wrong_order_are_named():
    second, fourth = found(broken(swap))
    assert second.startswith(
        "head 2 predicts the token 4 ahead (100%) better than its own, 2 ahead"
    )
    assert fourth.startswith(
        "head 4 predicts the token 2 ahead (100%) better than its own, 4 ahead"
    )
    assert second.endswith("wrong order") and fourth.endswith("wrong order")


def test_heads_that_look_one_token_too_far_are_named():
    said = found(broken(shift))
    for i in range(1, N):
        assert any(f"head {i} predicts the token {i + 1} ahead" in x for x in said)


@pytest.mark.parametrize("kind", ["transformer", "linear"])
def test_an_untrained_head_is_named(kind):
    model = broken(lambda heads: heads[2].apply(noise), kind)
    (said,) = found(model)
    assert said.startswith("head 3 ") and "it is untrained" in said


def noise(module):
    for parameter in module.parameters(recurse=False):
        if parameter.ndim > 1:
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )


def test_a_copied_head_is_named():
    assert found(broken(duplicate)) == ["head 4 predicts the same as head 2: it is a copy"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_model_is_not_sound(kind):
    assert any("head 1" in said for said in found(tiny(kind, seed=1, vocab_size=VOCAB)))


class Forgetful(OwnHeads):
    """Reads the newest token alone, so that what was accepted before it is never read."""

    def propose(self, state, k):
        for reader in self.readers:
            reader.seen = [length - 1 for length in state.length]
        return super().propose(state, k)


STALE = "a cache of the heads is stale"


def test_a_stale_cache_of_the_heads_is_found(monkeypatch):
    """In random models, whose heads look at all of the text."""
    model = tiny(vocab_size=VOCAB, gain=1.4)
    assert not any("cache" in said for said in found(model))
    monkeypatch.setattr("mtp.decode.health.OwnHeads", Forgetful)
    assert any(STALE in said for said in found(model))


class Trusting(Match):
    def __call__(self, logits, draft, place):
        following = super().__call__(logits, draft, place).next
        return Verdict(torch.full_like(following, draft.tokens.shape[1]), following)


def test_tokens_that_are_not_head_ones_own_are_found(monkeypatch):
    monkeypatch.setitem(RULES, "match", Trusting)
    assert any("not head 1's choice" in said for said in found(tiny(vocab_size=VOCAB)))


def test_texts_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="a text of 5 tokens is too short for 4 heads"):
        found(trained("linear"), [circle(0, 5)])
    with pytest.raises(ValueError, match="4 new tokens are too few to judge 4 heads by"):
        health(trained("linear"), PROMPTS, TEXTS, new_tokens=4)


def test_a_model_without_extra_heads_has_none_to_check():
    with pytest.raises(ValueError, match="n_future_tokens=1 and no head to draft with"):
        found(tiny(n_future_tokens=1))
