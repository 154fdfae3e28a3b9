"""Models of others decode here as they do at home, and go in and out with the same logits."""

import json
import os
import pickle
from functools import cache, wraps
from inspect import signature

import pytest
import torch

pytest.importorskip("transformers")

from conftest import DATA, tiny  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
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
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig  # noqa: E402

from mtp.decode.contract import NoDraft, Request  # noqa: E402
from mtp.decode.drafters import DraftModel, OwnHeads, PromptLookup  # noqa: E402
from mtp.decode.jacobi import Jacobi  # noqa: E402
from mtp.decode.loop import generate  # noqa: E402
from mtp.interop.huggingface import CausalLM  # noqa: E402
from mtp.interop.llama import (  # noqa: E402
    FIXED,
    HARMLESS,
    INDEX,
    OPTIONAL_SIZES,
    OTHERWISE_READ,
    SIZES,
    WEIGHTS,
    load_llama,
    save_llama,
)
from mtp.model import Transformer  # noqa: E402

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


def tiny_of(family, attention="sdpa", seed=0, spread=0.6, **overrides):
    """A random model whose predictions depend on all that it reads, with no near-ties."""
    config = AutoConfig.for_model(family, **FAMILIES.get(family, SHAPE) | overrides)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * spread if parameter.ndim > 1 else parameter + noise * 0.3)
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
    "jacobi": lambda family, requests, truth: Jacobi(5, pool=2),
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_copy_writes_the_same_text(family):
    requests, packed = some_requests(stop=False), adapted(family).packed()
    assert texts(generate(packed, requests, batch_size=3)) == usual_truths(family)


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_other_rules_give_the_greedy_text_too(rule):
    model, requests = adapted("llama"), some_requests(stop=False)
    drafter = DraftModel(adapted("llama", seed=1))
    assert texts(generate(model, requests, drafter, rule=rule)) == usual_truths("llama")


CACHE_WORDS = ("past_key_values", "cache")  # before transformers 5.24, and since


@pytest.mark.parametrize("word", CACHE_WORDS)
def test_a_cache_goes_in_by_the_name_that_the_model_has_for_it(word):
    model = tiny_of("llama")
    theirs = model.base_model.forward
    own = next(key for key in CACHE_WORDS if key in signature(theirs).parameters)
    given = {
        "past_key_values": lambda past_key_values=None, **more: (past_key_values, more),
        "cache": lambda cache=None, **more: (cache, more),
    }[word]

    @wraps(given)  # its signature too
    def forward(**words):
        cache, more = given(**words)
        return theirs(**more | {own: cache})

    model.base_model.forward = forward
    found = generate(CausalLM(model), some_requests(stop=False))
    assert texts(found) == usual_truths("llama")


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


# The Llama family, in and out.

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMAS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "own keys for all heads": {"num_key_value_heads": 2},
    "other numbers": {"rms_norm_eps": 1e-2, "num_hidden_layers": 1, "vocab_size": 20},
    "other base": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "llama 3": {"rope_parameters": LLAMA3},
}
TOKENS = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))


def folder_of(where, **overrides):
    """A tiny Llama as transformers saves it, and its logits, of which the largest is about 4."""
    model = tiny_of("llama", spread=0.3, **overrides)
    model.save_pretrained(where)
    with torch.no_grad():
        return where, model(TOKENS).logits


@torch.no_grad()
def assert_same(logits, model):
    got = model(TOKENS) if isinstance(model, Transformer) else model(TOKENS).logits
    torch.testing.assert_close(got, logits, rtol=0, atol=1e-5)


def edited(folder, file, **changes):
    """None removes a key."""
    stored = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in stored.items() if v is not None}))
    return folder


@pytest.mark.parametrize("kind", LLAMAS)
def test_a_llama_goes_in_and_out_with_its_logits(kind, tmp_path):
    folder, logits = folder_of(tmp_path / "theirs", **LLAMAS[kind])
    assert_same(logits, ours := load_llama(folder))
    again = save_llama(ours, tmp_path / "ours")
    assert_same(logits, AutoModelForCausalLM.from_pretrained(again))
    assert_same(logits, load_llama(again))
    theirs, out = load_file(folder / WEIGHTS), load_file(again / WEIGHTS)
    assert theirs.keys() == out.keys() and all(torch.equal(theirs[k], out[k]) for k in out)


@pytest.mark.parametrize("rope", [{"rope_theta": 100.0}, {"rope_theta": 500.0, "llama3": True}])
def test_configs_of_older_releases_mean_the_same(rope, tmp_path):
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"} if "llama3" in rope else None
    now = {"rope_type": "default", "rope_theta": 100.0} if scaling is None else LLAMA3
    folder, logits = folder_of(tmp_path / "theirs", rope_parameters=now)
    old = {"rope_parameters": None, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    assert_same(logits, load_llama(edited(folder, "config.json", **old)))


def test_scaled_positions_differ_from_plain_ones(tmp_path):
    """Or the tests of Llama 3 would say nothing."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    _, plain = folder_of(tmp_path / "plain", rope_parameters=rope)
    _, scaled = folder_of(tmp_path / "scaled", rope_parameters=LLAMA3)
    assert (plain - scaled).abs().max() > 0.1


def test_a_sharded_llama_is_read(tmp_path):
    model = tiny_of("llama", spread=0.3)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 2
    with torch.no_grad():
        assert_same(model(TOKENS).logits, load_llama(tmp_path / "sharded"))


@pytest.mark.parametrize("kind", ["transformer", "causal", "residual"])
def test_heads_come_fresh_and_stay_behind(kind, tmp_path):
    folder, logits = folder_of(tmp_path / "theirs")
    model = load_llama(folder, n_future_tokens=3, head=kind)
    assert model.extra_heads == 2
    assert_same(logits, model)
    request = Request([1, 2, 3], 12)
    assert texts(generate(model, [request], OwnHeads())) == texts(generate(model, [request]))
    save_llama(model, tmp_path / "ours")
    assert_same(logits, AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))


@pytest.mark.parametrize("kind", ["linear", "anticausal"])
def test_heads_that_the_next_token_needs_are_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=f"head='{kind}' is no layer of a Llama"):
        save_llama(tiny(kind), tmp_path / "out")
    with pytest.raises(ValueError, match=f"head='{kind}' is no layer of a Llama"):
        load_llama(tmp_path, head=kind)
    assert not [*tmp_path.iterdir()]


def test_a_real_llama_has_its_logits_here():
    folder = DATA / "stories260K" / "hf"
    if not folder.is_dir():
        pytest.skip("MTP_TEST_DATA has no stories260K")
    tokens = torch.randint(512, (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        apart = (load_llama(folder)(tokens) - theirs).abs().max()
    assert apart <= 1e-5 * theirs.abs().max()  # they reach 19, and fp32 rounds in proportion


def test_every_key_of_their_config_is_known():
    known = SIZES.keys() | OPTIONAL_SIZES.keys() | OTHERWISE_READ | FIXED.keys() | HARMLESS
    assert (
        LlamaConfig().to_diff_dict().keys() | LlamaConfig(pad_token_id=0).to_dict().keys() <= known
    )


BAD_CONFIGS = {
    "attention_bias=True is not served": {"attention_bias": True},
    "mlp_bias=True is not served": {"mlp_bias": True},
    "hidden_act='gelu' is not served": {"hidden_act": "gelu"},
    "model_type='mistral' is not served": {"model_type": "mistral"},
    "architectures=.*Sequence.* is not served": {"architectures": ["LlamaForSequenceClass"]},
    "unknown keys logit_scale, quantization_config": {
        "logit_scale": 2.0,
        "quantization_config": {"bits": 4},
    },
    "gives no hidden_size": {"hidden_size": None},
    "head_dim=4 must be": {"head_dim": 4},
    "rope_type='yarn' is not served": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
    "takes no factor": {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
    "rope_scaling=.* must give factor": {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
    "missing: model.layers.2.*misshapen": {"num_hidden_layers": 3, "intermediate_size": 20},
    "surplus: model.layers.1": {"num_hidden_layers": 1},
    "lm_head.weight differs": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("says", BAD_CONFIGS)
def test_what_a_config_says_is_served_or_refused_by_name(says, tmp_path):
    folder, _ = folder_of(tmp_path / "theirs")
    edited(folder, "config.json", **BAD_CONFIGS[says])
    with pytest.raises(ValueError, match=says):
        load_llama(folder)


def spoil(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_what_does_not_matter_is_passed_over(tmp_path):
    folder, logits = folder_of(tmp_path / "theirs", tie_word_embeddings=True)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    spoil(folder, change)
    assert_same(logits, load_llama(folder))


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    folder, _ = folder_of(tmp_path / "theirs")

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["extra.bias"] = torch.zeros(3)
        tensors["lm_head.weight"] = torch.zeros(VOCAB, 8)
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    spoil(folder, change)
    with pytest.raises(ValueError, match="theirs does not fit") as refused:
        load_llama(folder)
    for words in (
        "missing: model.norm.weight",
        "surplus: extra.bias in model.safetensors",
        "misshapen: lm_head.weight in model.safetensors is F32 (13, 8), the config wants (13, 16)",
        "misshapen: model.layers.0.mlp.up_proj.weight in model.safetensors is I8",
    ):
        assert words in str(refused.value)


def test_broken_files_are_named(tmp_path):
    folder, _ = folder_of(tmp_path / "theirs")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_llama(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        load_llama(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        load_llama(folder)


def test_a_broken_shard_is_named(tmp_path):
    tiny_of("llama").save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        load_llama(tmp_path / "sharded")


class Opened:
    """A pickle of it makes a folder when it is opened."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_weights_in_a_pickle_are_not_opened(tmp_path):
    folder, _ = folder_of(tmp_path / "theirs")
    (folder / WEIGHTS).unlink()
    for name in ("pytorch_model.bin", WEIGHTS):
        (folder / name).write_bytes(pickle.dumps(Opened(tmp_path / "ran")))
        with pytest.raises((FileNotFoundError, ValueError), match=f"{WEIGHTS} is (missing|damag)"):
            load_llama(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "error", "says"),
    [
        ("model.safetensors", ValueError, "lm_head.weight lies in model.safetensors, but"),
        ("../elsewhere", ValueError, "weight_map must name a file beside it"),
        ("absent.safetensors", FileNotFoundError, "absent.safetensors is missing"),
    ],
)
def test_a_wrong_index_is_told(file, error, says, tmp_path):
    folder, _ = folder_of(tmp_path / "theirs")
    tensors = load_file(folder / WEIGHTS)
    places = dict.fromkeys(tensors, WEIGHTS)
    save_file({"lm_head.weight": tensors.pop("lm_head.weight")}, folder / "second.safetensors")
    save_file(tensors, folder / WEIGHTS)
    for place in (file, "second.safetensors"):
        index = {"weight_map": places | {"lm_head.weight": place}}
        (folder / INDEX).write_text(json.dumps(index))
        if place == file:
            with pytest.raises(error, match=says):
                load_llama(folder)
    load_llama(folder)


def test_what_belongs_to_the_text_comes_along(tmp_path):
    folder, _ = folder_of(tmp_path / "theirs", eos_token_id=5)
    (folder / "tokenizer.json").write_text("a tokenizer")
    (folder / "chat_template.jinja").write_text("a template")
    out = save_llama(load_llama(folder), tmp_path / "ours", like=folder)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 5
    with pytest.raises(ValueError, match="vocab_size=13 is not the model's 20"):
        save_llama(tiny(vocab_size=20), tmp_path / "other", like=folder)


def test_an_export_is_complete_or_absent(tmp_path, monkeypatch):
    model, out = tiny(), tmp_path / "out"

    def full(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("mtp.interop.llama.json.dumps", full)  # after the weights
        with pytest.raises(OSError, match="cannot write .*out: no space left"):
            save_llama(model, out)
    assert not [*tmp_path.iterdir()]
    save_llama(model, out)
    with pytest.raises(FileExistsError):
        save_llama(model, out)
    assert [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_of_the_weights_goes_out_with_them(dtype, tmp_path):
    save_llama(tiny().to(dtype), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in theirs.parameters()} == {dtype}
