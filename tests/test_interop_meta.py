"""Meta's multi-token release: the published output on its way in, the same bits on its way out."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

from mtp.interop.meta import PARAMS, WEIGHTS, load_meta, meta_params, our_config, save_meta
from mtp.model import ModelConfig
from mtp.tokenizer import ByteTokenizer, train_sentencepiece

DIM, HEADS, KV, VOCAB, HIDDEN = 16, 2, 1, 13, 48
SAID = {
    "dim": DIM,
    "n_layers": 5,
    "n_heads": HEADS,
    "n_kv_heads": KV,
    "n_future_tokens": 4,
    "vocab_size": VOCAB,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def release_tensors(dtype=torch.float32):
    """A random model in the release's names and shapes: two layers, of which the last is head 1."""
    generator = torch.Generator().manual_seed(0)
    width = DIM // HEADS
    block = {
        "attention.wq": (HEADS * width, DIM),
        "attention.wk": (KV * width, DIM),
        "attention.wv": (KV * width, DIM),
        "attention.wo": (DIM, DIM),
        "feed_forward.w1": (HIDDEN, DIM),
        "feed_forward.w2": (DIM, HIDDEN),
        "feed_forward.w3": (HIDDEN, DIM),
        "attention_norm": (DIM,),
        "ffn_norm": (DIM,),
    }
    shapes = {"tok_embeddings": (VOCAB, DIM), "norm": (DIM,), "output": (VOCAB, DIM)}
    for place in ("layers.0", "layers.1", "extra_heads.0", "extra_heads.1", "extra_heads.2"):
        shapes |= {f"{place}.{name}": shape for name, shape in block.items()}
    return {
        f"{name}.weight": (torch.randn(shape, generator=generator) * 0.6).to(dtype)
        for name, shape in shapes.items()
    }


def release(folder, dtype=torch.float32, **said):
    folder.mkdir()
    (folder / PARAMS).write_text(json.dumps(SAID | said))
    torch.save(release_tensors(dtype), folder / WEIGHTS)
    return folder


def published_forward(w, tokens):
    """Logits (T, heads, V) in fp64, from the description: complex rotary positions on neighbouring
    pairs, every head applied to the trunk's output, one norm and one output for all.
    """
    w = {name: t.double() for name, t in w.items()}
    width = DIM // HEADS
    speeds = 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(len(tokens)).double(), speeds)
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def rotated(x):  # (T, width)
        pairs = torch.view_as_complex(x.reshape(len(x), -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(1)

    def attention(x, at):
        q, k, v = (x @ w[f"{at}.attention.w{name}.weight"].T for name in "qkv")
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        outs = []
        for head in range(HEADS):
            own, shared = head * width, head // (HEADS // KV) * width
            mine = rotated(q[:, own : own + width])
            keys, values = rotated(k[:, shared : shared + width]), v[:, shared : shared + width]
            scores = (mine @ keys.T / width**0.5).masked_fill(future, float("-inf"))
            outs.append(scores.softmax(-1) @ values)
        return torch.cat(outs, -1) @ w[f"{at}.attention.wo.weight"].T

    def block(x, at):
        x = x + attention(norm(x, w[f"{at}.attention_norm.weight"]), at)
        y = norm(x, w[f"{at}.ffn_norm.weight"])
        w1, w2, w3 = (w[f"{at}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
        return x + (F.silu(y @ w1.T) * (y @ w3.T)) @ w2.T

    trunk = block(w["tok_embeddings.weight"][tokens], "layers.0")
    heads = ("layers.1", "extra_heads.0", "extra_heads.1", "extra_heads.2")
    latents = torch.stack([block(trunk, at) for at in heads], -2)
    return norm(latents, w["norm.weight"]) @ w["output.weight"].T


TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_release_has_the_published_output(dtype, tmp_path):
    folder = release(tmp_path / "theirs", dtype)
    model, tokenizer = load_meta(folder, dtype=torch.float64)
    wanted = published_forward(release_tensors(dtype), TOKENS)
    assert tokenizer is None
    with torch.no_grad():
        every = model(TOKENS[None], return_all_heads=True)[0]
        assert torch.equal(model(TOKENS[None])[0], every[:, 0])
    # Our table of rotary positions is fp32.
    torch.testing.assert_close(every, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_release_goes_out_as_it_came(dtype, tmp_path):
    folder = release(tmp_path / "theirs", dtype)
    out = save_meta(load_meta(folder, dtype)[0], tmp_path / "ours")
    theirs, ours = (torch.load(f / WEIGHTS, weights_only=True) for f in (folder, out))
    assert theirs.keys() == ours.keys()
    assert all(ours[name].dtype == dtype for name in ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert json.loads((out / PARAMS).read_text()) == SAID
    assert sorted(path.name for path in out.iterdir()) == [WEIGHTS, PARAMS]


def test_a_file_holds_each_weight_once(tmp_path):
    model = tiny()
    out = save_meta(model, tmp_path / "ours")
    weights = sum(p.nbytes for p in model.parameters())
    assert (out / WEIGHTS).stat().st_size < weights + 400 * len(torch.load(out / WEIGHTS))


@pytest.mark.parametrize(
    "shape",
    [{}, {"n_kv_heads": None}, {"n_future_tokens": 1}, {"hidden_dim": 11}, {"hidden_dim": 999}],
)
def test_a_model_of_ours_comes_back(shape, tmp_path):
    model = tiny(**shape)
    back, _ = load_meta(save_meta(model, tmp_path / "out"), dtype=torch.float64)
    assert back.config.ffn_dim == model.config.ffn_dim
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True)
    )


def test_a_tied_unembedding_is_written_twice(tmp_path):
    model = tiny(tie_embeddings=True)
    back, _ = load_meta(save_meta(model, tmp_path / "out"), dtype=torch.float64)
    assert not back.config.tie_embeddings
    with torch.no_grad():
        assert torch.equal(model(TOKENS[None, :9]), back(TOKENS[None, :9]))


# params.json.


def test_the_release_reads_as_its_own_numbers():
    said = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_future_tokens": 4, "vocab_size": 32000}
    config = our_config(said)
    assert (config.trunk_layers, config.n_future_tokens) == (28, 4)
    assert (config.kv_heads, config.ffn_dim, config.rope_theta) == (32, 11008, 1e4)
    assert our_config(said | {"n_future_tokens": None}).n_future_tokens == 1  # a plain Llama


@pytest.mark.parametrize(
    ("dim", "multiple_of", "factor", "width"), [(8192, 4096, 1.3, 28672), (6656, 256, None, 17920)]
)
def test_the_feed_forward_layer_has_the_width_of_published_llamas(dim, multiple_of, factor, width):
    """Llama 2 70B and Llama 1 33B."""
    said = {"dim": dim, "n_layers": 2, "n_heads": 64, "vocab_size": 9, "multiple_of": multiple_of}
    config = our_config(said | {"ffn_dim_multiplier": factor})
    assert config.ffn_dim == our_config(meta_params(config)).ffn_dim == width


def test_any_width_of_the_feed_forward_layer_comes_back():
    for width in range(1, 300):  # 51 is one whose quotient is rounded down
        config = ModelConfig(dim=16, n_heads=2, hidden_dim=width)
        assert our_config(meta_params(config)).ffn_dim == width


@pytest.mark.parametrize(
    ("says", "said"),
    [
        ("unknown keys moe, use_scaled_rope may", {"use_scaled_rope": True, "moe": {}}),
        ("gives no dim", {"dim": None}),
        ("dim='16' must be a number", {"dim": "16"}),
        ("n_heads=2.5 must be a number", {"n_heads": 2.5}),
        ("n_layers=3 must be at least n_future_tokens=4", {"n_layers": 3}),
        ("vocab_size=-1 means that of tokenizer.model, which is missing", {"vocab_size": -1}),
    ],
)
def test_what_params_say_is_served_or_refused_by_name(says, said, tmp_path):
    with pytest.raises(ValueError, match=says):
        load_meta(release(tmp_path / "theirs", **said))


SLOWED = {
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [("head", "causal"), ("unembedding", "replicated"), ("rope_scaling", SLOWED)],
)
def test_models_that_the_format_has_no_word_for_are_refused(key, value, tmp_path):
    model = tiny(value) if key == "head" else tiny(**{key: value})
    with pytest.raises(ValueError, match=f"{key}=.* has no place in Meta's format"):
        save_meta(model, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


# Tokenizers.


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    pytest.importorskip("sentencepiece")
    lines = [f"def f{i}(self, value): return value + {i}\n" for i in range(60)]
    return train_sentencepiece(lines, tmp_path_factory.mktemp("text") / "m.model", vocab_size=290)


def test_the_tokenizer_comes_along(pieces, tmp_path):
    out = save_meta(tiny(vocab_size=290), tmp_path / "out", pieces)
    assert sorted(file.name for file in out.iterdir()) == [WEIGHTS, PARAMS, "tokenizer.model"]
    assert load_meta(out)[1].fingerprint == pieces.fingerprint
    (out / "tokenizer.model").rename(tmp_path / "tokenizer.model")  # where the release has it
    (out / PARAMS).write_text((out / PARAMS).read_text().replace(": 290", ": -1"))
    model, tokenizer = load_meta(out)
    assert tokenizer.fingerprint == pieces.fingerprint and model.config.vocab_size == 290


def test_a_tokenizer_of_another_vocabulary_is_refused(pieces, tmp_path):
    says = "tokenizer.model has 290 pieces, the model vocab_size=13"
    with pytest.raises(ValueError, match=says):
        save_meta(tiny(), tmp_path / "out", pieces)
    with pytest.raises(ValueError, match="ByteTokenizer has no place"):
        save_meta(tiny(vocab_size=257), tmp_path / "out", ByteTokenizer())
    pieces.save(tmp_path)
    with pytest.raises(ValueError, match=says):
        load_meta(release(tmp_path / "theirs"))


# consolidated.pth.


def spoiled(tmp_path, change):
    folder = release(tmp_path / "theirs")
    tensors = release_tensors()
    change(tensors)
    torch.save(tensors, folder / WEIGHTS)
    return folder


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    def change(tensors):
        del tensors["norm.weight"]
        tensors["extra_heads.3.ffn_norm.weight"] = torch.ones(DIM)
        tensors["output.weight"] = torch.zeros(VOCAB, 8)
        tensors["layers.0.ffn_norm.weight"] = torch.ones(DIM, dtype=torch.int32)
        tensors["layers.1.ffn_norm.weight"] = [1.0]

    with pytest.raises(ValueError, match="consolidated.pth does not fit") as refused:
        load_meta(spoiled(tmp_path, change))
    for words in (
        "missing: norm.weight",
        "surplus: extra_heads.3.ffn_norm.weight",
        "misshapen: output.weight is float32 (13, 8), params.json wants (13, 16)",
        "misshapen: layers.0.ffn_norm.weight is int32 (16,)",
        "misshapen: layers.1.ffn_norm.weight is a list",
    ):
        assert words in str(refused.value)


def test_what_does_not_matter_is_passed_over(tmp_path):
    folder = spoiled(tmp_path, lambda tensors: tensors.update({"rope.freqs": torch.ones(4)}))
    (folder / PARAMS).write_text(json.dumps(SAID | {"max_batch_size": 32, "max_seq_len": 64}))
    assert load_meta(folder)[0].config.max_seq_len == 64


class Calls:
    """A pickle of it makes a folder when it is opened without care."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("place", ["beside", "instead"])
def test_a_pickle_with_code_inside_is_refused_and_not_run(place, tmp_path):
    folder, trap = release(tmp_path / "theirs"), Calls(tmp_path / "trap")
    bad = release_tensors() | {"norm.weight": trap} if place == "beside" else trap
    torch.save(bad, folder / WEIGHTS)
    with pytest.raises(ValueError, match="consolidated.pth holds posix.mkdir: weights are tensors"):
        load_meta(folder)
    assert not (tmp_path / "trap").exists()


def test_broken_files_are_named(tmp_path):
    folder = release(tmp_path / "theirs")
    whole = (folder / WEIGHTS).read_bytes()
    head = b"\xff" * 200
    for broken in (whole[: len(whole) // 2], whole[:-9], b"", b"weights", head + whole[200:]):
        (folder / WEIGHTS).write_bytes(broken)
        with pytest.raises(ValueError, match="consolidated.pth is damaged"):
            load_meta(folder)
    torch.save([torch.ones(2)], folder / WEIGHTS)
    with pytest.raises(ValueError, match="consolidated.pth holds no tensors by name"):
        load_meta(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="consolidated.pth is missing"):
        load_meta(folder)
    for text in ("{", "[]", "7"):
        (folder / PARAMS).write_text(text)
        with pytest.raises(ValueError, match="params.json"):
            load_meta(folder)
    (folder / PARAMS).unlink()
    with pytest.raises(FileNotFoundError, match="params.json"):
        load_meta(folder)


def test_an_export_is_complete_or_absent(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def full(tensors, file):
        file.write_bytes(b"half")
        raise RuntimeError("failed writing file")  # torch's words for it

    with monkeypatch.context() as patched:
        patched.setattr("mtp.interop.meta.torch.save", full)
        with pytest.raises(OSError, match="cannot write .*out: failed writing file"):
            save_meta(tiny(), out)
    assert not [*tmp_path.iterdir()]
    save_meta(tiny(), out)
    with pytest.raises(FileExistsError):
        save_meta(tiny(), out)


# From one format to another.


@pytest.mark.parametrize("out_format", ["mtp", "llama", "meta"])
@pytest.mark.parametrize("source_format", ["mtp", "llama", "meta"])
def test_converted_models_are_the_same(source_format, out_format, pieces, tmp_path, capsys):
    scripts = pytest.importorskip("scripts.convert")
    heads = 1 if "llama" in (source_format, out_format) else 3
    model = tiny(vocab_size=290, n_future_tokens=heads).float()
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    given = scripts.ConvertConfig(out_format, "", source_format, source)
    scripts.FORMATS[source_format].write(model, pieces, given)
    scripts.convert(scripts.ConvertConfig(source_format, source, out_format, out))
    back, tokenizer = scripts.FORMATS[out_format].read(out, torch.float32)
    with torch.no_grad():
        wanted, got = (m(TOKENS[None], return_all_heads=True) for m in (model, back))
    assert torch.equal(wanted, got)
    assert (tokenizer is None) == ("llama" in (source_format, out_format))
    alone = "" if tokenizer else ", without a tokenizer"
    assert capsys.readouterr().out == f"written: {out}{alone}\n"


def test_conversion_takes_precision_and_a_folder_to_be_like(tmp_path):
    scripts = pytest.importorskip("scripts.convert")
    save_meta(tiny(), tmp_path / "meta")
    like = scripts.save_llama(tiny(), tmp_path / "like")
    (like / "tokenizer.json").write_text("a tokenizer")
    places = ("meta", str(tmp_path / "meta"), "llama", str(tmp_path / "out"))
    scripts.convert(scripts.ConvertConfig(*places, precision="bfloat16", like=str(like)))
    assert (tmp_path / "out/tokenizer.json").read_text() == "a tokenizer"
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_heads_go_out_with_code_that_drafts_and_do_not_come_back(tmp_path):
    scripts = pytest.importorskip("scripts.convert")
    source, out = str(tmp_path / "meta"), str(tmp_path / "out")
    save_meta(tiny(), source)
    scripts.convert(scripts.ConvertConfig("meta", source, "speculative", out))
    assert (tmp_path / "out/custom_generate/generate.py").is_file()
    with pytest.raises(ValueError, match="source_format='speculative': allowed are mtp, llama, me"):
        scripts.ConvertConfig("speculative", out, "mtp", "elsewhere")
