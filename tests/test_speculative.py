"""A folder that transformers opens alone decodes with our heads, and writes our text."""

import pytest
import torch

pytest.importorskip("transformers")

from conftest import tiny  # noqa: E402
from test_attach import attached  # noqa: E402
from test_decode import NEW, some_requests, truths  # noqa: E402
from test_interop import tiny_of  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from mtp.decode.drafters import OwnHeads  # noqa: E402
from mtp.decode.loop import generate  # noqa: E402
from mtp.interop.attach import attach_heads  # noqa: E402
from mtp.interop.custom_generate import cache_word  # noqa: E402
from mtp.interop.huggingface import CausalLM  # noqa: E402
from mtp.interop.llama import load_llama  # noqa: E402
from mtp.interop.speculative import CODE, save_speculative  # noqa: E402

MODELS = {
    "transformer": lambda: tiny("transformer", gain=1.4),
    "transformer without a trunk": lambda: tiny("transformer", gain=1.4, n_layers=4),
    "causal": lambda: tiny("causal", gain=1.4, tie_embeddings=True),
    "residual": lambda: tiny("residual", gain=1.4),
    "transformer on ours": lambda: attached("ours", "transformer"),
    "residual on ours": lambda: attached("ours", "residual"),
    "causal on theirs": lambda: attached("llama", "causal"),
    "transformer on theirs": lambda: attached("llama", "transformer"),
    "residual on GPT-2": lambda: attached("gpt2", "residual"),
}


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    """Where transformers copies code that it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")


def saved(model, tmp_path):
    folder = str(save_speculative(model, tmp_path / "out"))
    return folder, AutoModelForCausalLM.from_pretrained(folder)


def spoken(theirs, folder, prompt, **words):
    """The new tokens, and how many passes they took."""
    passes = []
    hook = theirs.base_model.register_forward_hook(lambda *_: passes.append(1))
    given = {"max_new_tokens": NEW, "do_sample": False} | words
    text = theirs.generate(
        torch.tensor([prompt]),
        custom_generate=folder,
        trust_remote_code=folder is not None,
        **given,
    )
    hook.remove()
    return text[0, len(prompt) :].tolist(), len(passes)


@pytest.mark.parametrize("name", MODELS)
def test_its_text_is_ours_in_as_many_passes(name, tmp_path):
    model, requests = MODELS[name](), some_requests(stop=False)[:4]
    folder, theirs = saved(model, tmp_path)
    truth, ours = truths(model, requests), generate(model, requests, OwnHeads())
    plain = [spoken(theirs, None, request.prompt) for request in requests]
    drafted = [spoken(theirs, folder, request.prompt) for request in requests]
    assert [text for text, _ in drafted] == [text for text, _ in plain] == truth
    assert [passes for _, passes in drafted] == [1 + completion.steps for completion in ours]
    assert sum(passes for _, passes in drafted) < sum(passes for _, passes in plain)


SETTINGS = {  # what plain decoding does too
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 5},
    "repetition costs": {"repetition_penalty": 1.5},
    "ends": {"eos_token_id": [3, 7], "pad_token_id": 0},
    "longest": {"max_new_tokens": 61},  # to the last position
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_mean_what_they_mean_in_plain_decoding(name, tmp_path):
    folder, theirs = saved(attached("gpt2", "residual"), tmp_path)
    got = []
    for custom in (None, folder):
        torch.manual_seed(0)
        got.append(spoken(theirs, custom, [1, 2, 3], **SETTINGS[name]))
    (plain, _), (drafted, passes) = got
    assert drafted == plain and passes < len(plain)


def test_a_model_opened_with_trust_drafts_unasked_and_streams(tmp_path):
    folder, theirs = saved(tiny(gain=1.4), tmp_path)
    trusting = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    heard = []

    class Streamer:
        def put(self, ids):
            heard.extend(ids.flatten().tolist())

        def end(self):
            heard.append("end")

    given = {"max_new_tokens": NEW, "do_sample": False}
    text = trusting.generate(torch.tensor([[1, 2, 3]]), streamer=Streamer(), **given)
    assert heard == [*text[0].tolist(), "end"]
    assert text[0, 3:].tolist() == spoken(theirs, None, [1, 2, 3])[0]


def test_a_cache_goes_in_by_the_name_that_a_model_has_for_it():
    class Old:
        def forward(self, input_ids, past_key_values=None): ...

    class New:
        def forward(self, input_ids, cache=None): ...

    assert [cache_word(kind) for kind in (Old, New)] == ["past_key_values", "cache"]


IMPOSSIBLE = {
    "2 texts at once": {"num_return_sequences": 2, "do_sample": True},
    "2 texts at once .*num_beams": {"num_beams": 2},
    "attention_mask hides": {"attention_mask": torch.tensor([[0, 1, 1]])},
    "empty DynamicCache": {"use_cache": False},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "leave it out": {"assistant_model": "another"},
}


@pytest.mark.parametrize("says", IMPOSSIBLE)
def test_what_it_cannot_do_is_refused_by_name(says, tmp_path):
    folder, theirs = saved(tiny(), tmp_path)
    with pytest.raises(ValueError, match=says):
        spoken(theirs, folder, [1, 2, 3], **IMPOSSIBLE[says])


UNFIT = {
    "no head to draft with": lambda: tiny(n_future_tokens=1),
    "unembedding='replicated'": lambda: tiny(unembedding="replicated"),
    "head='anticausal' is no layer": lambda: tiny("anticausal"),
    "packed copy": lambda: tiny().bfloat16().packed(),
    "sliding_window=16": lambda: attach_heads(CausalLM(tiny_of("mistral", sliding_window=16)), 3),
}


@pytest.mark.parametrize("says", UNFIT)
def test_models_whose_heads_cannot_go_along_are_refused(says, tmp_path):
    with pytest.raises(ValueError, match=says):
        save_speculative(UNFIT[says](), tmp_path / "out")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("trunk", ["ours", "gpt2"])
def test_a_folder_is_complete_or_absent(trunk, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("mtp.interop.speculative.shutil.copyfile", full)  # the last file
        with pytest.raises(OSError, match="cannot write .*out: no space left"):
            save_speculative(attached(trunk, "residual"), tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_it_is_a_plain_model_too_and_its_tokenizer_comes_along(tmp_path):
    like = tmp_path / "like"
    tiny_of("llama").save_pretrained(like)
    (like / "tokenizer.json").write_text("a tokenizer")
    for name, model in {"a": tiny(), "b": attached("llama", "residual")}.items():
        folder = save_speculative(model, tmp_path / name, like)
        assert (folder / "tokenizer.json").read_text() == "a tokenizer"
        assert (folder / "custom_generate/generate.py").read_text() == CODE.read_text()
        load_llama(folder)  # which refuses surplus tensors
