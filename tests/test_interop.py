"""Models of others decode here as they do at home, and go in and out with the same logits."""

from functools import cache

import pytest
import torch

pytest.importorskip("transformers")

from conftest import tiny  # noqa: E402
from test_decode import (  # noqa: E402
    LEADS,
    NEW,
    SAMPLINGS,
    VOCAB,
    Compared,
    Forest,
    Oracle,
    Skipping,
    samples_of_one_prompt,
    some_requests,
    sometimes,
    texts,
    truths,
    wrong,
)
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from mtp.decode.contract import NoDraft, Request  # noqa: E402
from mtp.decode.drafters import DraftModel, OwnHeads, PromptLookup  # noqa: E402
from mtp.decode.loop import generate  # noqa: E402
from mtp.interop.huggingface import CausalLM  # noqa: E402

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "qwen3": SHAPE,
    "mistral": SHAPE | {"sliding_window": None},
    "gemma": SHAPE,
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


def tiny_of(family, attention="sdpa", seed=0, **overrides):
    """A random model whose predictions depend on all that it reads, with no near-ties."""
    config = AutoConfig.for_model(family, **FAMILIES.get(family, SHAPE) | overrides)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.6 if parameter.ndim > 1 else parameter + noise * 0.3)
    return model


@cache
def adapted(family, attention="sdpa", seed=0):
    return CausalLM(tiny_of(family, attention, seed))


@cache
def usual_truths(family, sampling="greedy"):
    return truths(adapted(family), some_requests(stop=False), SAMPLINGS[sampling])


DRAFTERS = {  # name -> (family, requests, their true texts) -> drafter
    "none": lambda family, requests, truth: NoDraft(),
    "lookup": lambda family, requests, truth: PromptLookup(4, shortest=1),
    "model": lambda family, requests, truth: DraftModel(adapted(family, seed=1), 3),
    "itself": lambda family, requests, truth: Skipping(DraftModel(adapted(family), 3)),
    "ours": lambda family, requests, truth: DraftModel(tiny(), 2),
    "forest": lambda family, requests, truth: Forest(requests, truth),
    "half right": lambda family, requests, truth: Oracle(requests, truth, 4, sometimes(wrong)),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_their_own_generate(family, attention):
    model, requests = adapted(family, attention), some_requests(stop=False)
    theirs = []
    for request in requests:
        prompt = torch.tensor([request.prompt])
        mask = torch.ones_like(prompt)
        text = model.model.generate(
            prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False
        )
        theirs.append(text[0, len(request.prompt) :].tolist())
    assert theirs == truths(model, requests) == usual_truths(family)
    assert len({tuple(text) for text in theirs}) > 3  # or the tests below say little
    assert texts(generate(model, requests, batch_size=3)) == theirs
    trees = Forest(requests, theirs)
    assert texts(generate(model, requests, trees, batch_size=3)) == theirs


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_the_autoregressive_text(family, drafter, sampling):
    model, requests, truth = (
        adapted(family),
        some_requests(stop=False),
        usual_truths(family, sampling),
    )
    for count, batch_size in ((2, 1), (7, 3)):
        got = generate(
            model,
            requests[:count],
            DRAFTERS[drafter](family, requests, truth),
            SAMPLINGS[sampling],
            batch_size=batch_size,
        )
        assert texts(got) == truth[:count]


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_other_rules_give_the_greedy_text_too(rule):
    model, requests = adapted("llama"), some_requests(stop=False)
    drafter = DraftModel(adapted("llama", seed=1))
    assert texts(generate(model, requests, drafter, rule=rule)) == usual_truths("llama")


def test_ours_is_drafted_for_by_theirs():
    model, requests = tiny(gain=1.4), some_requests()
    got = generate(model, requests, DraftModel(adapted("gpt2"), 3), batch_size=3)
    assert texts(got) == truths(model, requests)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_its_drafts_are_those_of_a_fresh_copy_that_reads_from_the_start(lead, batch_size):
    """GPT-2, because nothing in it is computed in fp32 whatever the weights."""
    model = CausalLM(tiny_of("gpt2").double())
    requests = [*samples_of_one_prompt(4), *some_requests(stop=False)[:3]]
    truth = truths(model, requests)
    drafter = Compared(LEADS[lead](requests, truth), lambda: DraftModel(model, 3))
    assert texts(generate(model, requests, drafter, batch_size=batch_size)) == truth
    assert drafter.compared > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perfect_draft_model_is_never_refused(family):
    """Stale slots would show here: the text does not depend on them."""
    request = Request([1, 2, 3], max_new_tokens=21)
    got = generate(adapted(family), [request], DraftModel(adapted(family), 3))[0]
    assert got.steps == 5 and got.accepted == [5, 5, 5]


def test_drafts_may_overhang_the_context():
    """Position 64 has no embedding in a GPT-2 of 64 positions; rows with less room reach it."""
    model = adapted("gpt2")
    requests = [Request([1] * 44, 20), Request([2] * 60, 4), Request([3], 3)]
    truth = truths(model, requests)
    got = generate(model, requests, DraftModel(adapted("gpt2", seed=1), 6), batch_size=3)
    assert texts(got) == truth
    with pytest.raises(ValueError, match="max_seq_len is 64"):
        generate(model, [Request([1], 64)])


def test_half_precision_is_served():
    for family in FAMILIES:
        model = CausalLM(tiny_of(family).bfloat16())
        assert len(generate(model, [Request([1, 2], 8)], PromptLookup(3))[0].tokens) == 8


def test_a_sliding_window_serves_until_it_would_drop_slots():
    model = CausalLM(tiny_of("mistral", sliding_window=16))
    for prompt, new in (([1, 2, 3], 12), ([1] * 10, 5)):
        request = Request(prompt, new)
        assert texts(generate(model, [request])) == truths(model, [request])
    with pytest.raises(ValueError, match="MistralForCausalLM has sliding_window=16.*need 17"):
        generate(model, [Request([1, 2, 3], 13)])
    with pytest.raises(ValueError, match="need 20"):
        generate(model, [Request([1, 2, 3], 12)], DraftModel(model, 4))


def test_layers_that_see_everything_have_no_window():
    full = {"layer_types": ["full_attention"] * 2, "sliding_window": 4, "use_sliding_window": True}
    model = CausalLM(tiny_of("qwen2", **full))
    request = Request([1, 2, 3], 12)
    assert texts(generate(model, [request])) == truths(model, [request])


REFUSED = {  # what the message says -> a model
    "MambaForCausalLM.*keeps a state": lambda: tiny_of("mamba", None),
    "T5.*no causal language model": lambda: t5(),
    "Llama.*rope_type='dynamic'": lambda: tiny_of(
        "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "Bloom.*cannot be read by slots": lambda: tiny_of("bloom", "eager", n_head=2),
    "Bloom.*max_position": lambda: tiny_of("bloom", "eager", max_position_embeddings=None),
    "Llama.*attn_implementation='flex_attention'": lambda: tiny_of("llama", "flex_attention"),
    "Lfm2.*layers of the kind conv": lambda: tiny_of("lfm2", layer_types=["conv", "conv"]),
    "Cohere.*does not honour": lambda: tiny_of("cohere"),
    "Llama.*does not honour": lambda: deaf("attention_mask", None),
    "Llama.* does not honour": lambda: deaf("position_ids", torch.arange(3)[None]),
}


def t5():
    from transformers import AutoModelForSeq2SeqLM

    sizes = {"vocab_size": VOCAB, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes, num_heads=2))


def deaf(key, value):
    """A Llama that hears something else where it is told `key` for the second pass."""
    model = tiny_of("llama")

    def instead(module, args, kwargs):
        return args, kwargs | {key: value} if kwargs["input_ids"].shape[1] == 3 else kwargs

    model.base_model.register_forward_pre_hook(instead, with_kwargs=True)
    return model


@pytest.mark.parametrize("says", REFUSED)
def test_models_that_cannot_be_read_by_slots_are_refused_by_name(says):
    with pytest.raises(ValueError, match=says):
        CausalLM(REFUSED[says]())


def test_heads_that_it_does_not_have_cannot_draft():
    with pytest.raises(ValueError, match="no head to draft with"):
        generate(adapted("llama"), [Request([1], 9)], OwnHeads())
