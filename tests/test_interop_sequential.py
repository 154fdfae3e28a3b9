"""Sequential heads go out to those who serve them: what is read back guesses as they do."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from conftest import tiny  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_decode import some_prompts, texts  # noqa: E402
from test_interop import tiny_of  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: E402
from transformers.modeling_layers import MtpModel  # noqa: E402
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer  # noqa: E402

import mtp  # noqa: E402
from mtp.decode.contract import Request  # noqa: E402
from mtp.decode.drafters import OwnHeads  # noqa: E402
from mtp.decode.loop import generate  # noqa: E402
from mtp.interop.attach import attach_heads, save_heads  # noqa: E402
from mtp.interop.huggingface import CausalLM  # noqa: E402
from mtp.interop.sequential import save_mimo, save_transformers  # noqa: E402

T = 9
EXACT = {"norm_eps": 1e-9}  # an epsilon weighs more before the last norm than after it
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def whole(n, **overrides):
    shape = {"n_layers": 3, "n_future_tokens": n, "gain": 1.4}
    return tiny("sequential", **(shape | EXACT | overrides)).float()


def attached(n, kind="causal", **overrides):
    model = attach_heads(tiny(kind, n_layers=6, gain=1.4, **EXACT, **overrides).float(), n, SEQ)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


SEQ = "sequential"
MODELS = {
    "whole": whole,
    "tied": lambda n: whole(n, tie_embeddings=True),
    "llama 3": lambda n: whole(n, rope_scaling=LLAMA3, rope_theta=500.0, n_kv_heads=2),
    "attached": attached,
    "attached to a tied trunk": lambda n: attached(n, "residual", tie_embeddings=True),
}


def row_of(n):
    return torch.randint(13, (2, T + n), generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def logits_of(model, row):
    """What training scores: logits (B, T, V) of each head."""
    return model(row, score=lambda fns, latents, weights, _: [x @ weights[0].T for x in latents])


class WithHeads(LlamaForCausalLM):
    """As a class of theirs whose checkpoints hold such layers."""

    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_transformers_reads_heads_that_guess_the_same(name, n, tmp_path):
    model, row = MODELS[name](n), row_of(n)
    theirs = WithHeads.from_pretrained(save_transformers(model, tmp_path / "out"))
    heads = MtpModel.from_pretrained(theirs)
    assert heads.num_mtp_layers == n - 1
    first, *others = logits_of(model, row)
    out = theirs(row[:, :T], output_hidden_states=True)
    torch.testing.assert_close(out.logits, first, rtol=1e-4, atol=1e-4)
    hidden = out.hidden_states[-1]
    for k, wanted in enumerate(others):
        ids, at = row[:, 1 + k :][:, :T], torch.arange(1 + k, T + 1 + k)[None]
        hidden = heads.forward_layer(k, hidden, at, None, input_ids=ids)
        got = heads.shared_head(hidden)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", ["whole", "attached"])
def test_generate_with_use_mtp_gives_our_text(name, n, tmp_path):
    model = MODELS[name](n)
    theirs = WithHeads.from_pretrained(save_transformers(model, tmp_path / "out"))
    requests = [Request(prompt, 20) for prompt in some_prompts(3)]
    ours = texts(generate(model, requests, OwnHeads()))
    for request, tokens in zip(requests, ours, strict=True):
        prompt = torch.tensor([request.prompt])
        got = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            use_mtp=True,
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert got[0, prompt.shape[1] :].tolist() == tokens


def test_without_the_class_the_folder_is_a_plain_llama(tmp_path):
    model = whole(2)
    folder = save_transformers(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is LlamaForCausalLM
    row = row_of(1)
    torch.testing.assert_close(theirs(row).logits, model(row), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def mimo_logits(folder, row):
    """As vLLM's mimo.py and mimo_mtp.py read the layout, but for its blank first column."""
    trunk = AutoModelForCausalLM.from_pretrained(folder)
    states = []  # its model returns what it has before the last norm
    trunk.model.norm.register_forward_hook(lambda module, args, out: states.append(args[0]))
    first = trunk(row[:, :T]).logits
    stored, prefix = load_file(folder / "model.safetensors"), "model.mtp_layers.0."
    own = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
    config, eps = trunk.config, trunk.config.rms_norm_eps

    def normed(x, name):
        return F.rms_norm(x, x.shape[-1:], own.pop(f"{name}.weight"), eps)

    tokens = F.embedding(row[:, 1 : T + 1], stored["model.embed_tokens.weight"])
    both = [normed(states[0], "hidden_layernorm"), normed(tokens, "token_layernorm")]
    x = F.linear(torch.cat(both, -1), own.pop("input_proj.weight"))
    last = own.pop("final_layernorm.weight")
    block = Qwen2DecoderLayer(config, 0)
    block.load_state_dict(own)  # all that is left, and nothing else
    at = torch.arange(T)[None]
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    x = block(x, attention_mask=mask, position_embeddings=trunk.model.rotary_emb(x, at))
    return first, F.linear(F.rms_norm(x, x.shape[-1:], last, eps), stored["lm_head.weight"])


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_of_mimo_holds_the_same_trunk_and_head(name, tmp_path):
    model, row = MODELS[name](2), row_of(2)
    folder = save_mimo(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MiMoForCausalLM"]
    assert config["num_nextn_predict_layers"] == 1
    for got, wanted in zip(mimo_logits(folder, row), logits_of(model, row), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("save", [save_transformers, save_mimo])
def test_the_type_of_the_trunk_goes_out_and_a_tokenizer_comes_along(save, tmp_path):
    model = attach_heads(tiny("causal").bfloat16(), 2, SEQ).float()
    like = save_transformers(whole(2), tmp_path / "like")
    (like / "tokenizer.json").write_text("a tokenizer")
    folder = save(model, tmp_path / "out", like)
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (folder / "tokenizer.json").read_text() == "a tokenizer"
    with pytest.raises(FileExistsError):
        save(model, folder)


@pytest.mark.parametrize("save", [save_transformers, save_mimo])
def test_what_these_layouts_cannot_hold_is_refused_by_name(save, tmp_path):
    for model, says in (
        (tiny("residual"), "kind='residual' is no sequential head"),
        (attach_heads(tiny(), 2), "kind='residual' is no sequential head"),
        (whole(2, unembedding="replicated"), "unembedding=replicated"),
        (attach_heads(tiny("linear"), 2, SEQ), "head='linear' is no layer of a Llama"),
        (attach_heads(CausalLM(tiny_of("llama")), 2, SEQ), "another library's model"),
        (whole(2).packed(), "packed copy only decodes"),
    ):
        with pytest.raises(ValueError, match=says):
            save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_layout_names_how_many_heads_it_holds(tmp_path):
    with pytest.raises(ValueError, match="n_future_tokens=4: at most .* layers of the trunk"):
        save_transformers(whole(4, n_layers=2), tmp_path / "out")
    with pytest.raises(ValueError, match="n_future_tokens=3: MiMo's layout holds one head, so 2"):
        save_mimo(whole(3), tmp_path / "out")


def test_a_checkpoint_is_converted(tmp_path, capsys):
    scripts = pytest.importorskip("scripts.convert")
    model = whole(2)
    source = scripts.FORMATS["mtp"].write(
        model, None, scripts.ConvertConfig("mtp", "", "mtp", str(tmp_path / "source"))
    )
    for out_format, save in (("transformers", save_transformers), ("mimo", save_mimo)):
        out = str(tmp_path / out_format)
        scripts.convert(scripts.ConvertConfig("mtp", str(source), out_format, out))
        direct = save(model, tmp_path / f"direct {out_format}")
        wrote, wanted = (load_file(f"{f}/model.safetensors") for f in (out, direct))
        assert wrote.keys() == wanted.keys()
        assert all(torch.equal(t, wanted[name]) for name, t in wrote.items())
        with pytest.raises(ValueError, match="allowed are mtp, llama, meta, causal_lm$"):
            scripts.ConvertConfig(out_format, out, "mtp", str(tmp_path / "back"))


def test_attached_heads_are_converted_with_their_trunk(tmp_path):
    scripts = pytest.importorskip("scripts.convert")
    model = attached(2)
    trunk, heads, out = (str(tmp_path / name) for name in ("trunk", "heads", "out"))
    mtp.save(model.trunk.model, trunk)
    save_heads(model, heads)
    scripts.convert(scripts.ConvertConfig("mtp", trunk, "mimo", out, heads=heads))
    wrote = load_file(f"{out}/model.safetensors")
    wanted = load_file(save_mimo(model, tmp_path / "direct") / "model.safetensors")
    assert wrote.keys() == wanted.keys()
    assert all(torch.equal(t, wanted[name]) for name, t in wrote.items())
