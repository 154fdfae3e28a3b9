"""The tokenizer of a Hugging Face folder stays with its model, wherever the model goes."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from test_attach import small_folder  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import mtp  # noqa: E402
from mtp.interop.llama import load_llama, save_llama  # noqa: E402
from mtp.tokenizer import HuggingFaceTokenizer, load_tokenizer  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "hé?"}]
TEXT = "def f(x):\n    return 'zü€'  # \t"


@pytest.fixture
def theirs(tmp_path):
    """A folder with weights, tokenizer and chat template."""
    folder = small_folder(tmp_path / "theirs")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def answered(tokenizer):
    return tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_it_reads_and_writes_text(theirs):
    tokenizer = load_tokenizer(theirs)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode([*ids, tokenizer.end_id, tokenizer.vocab_size]) == TEXT
    assert tokenizer.end_id not in ids and max(ids) < tokenizer.vocab_size


def test_a_checkpoint_keeps_it_with_its_chat_template(theirs, tmp_path):
    tokenizer = load_tokenizer(theirs)
    folder = mtp.save(load_llama(theirs), tmp_path / "ours", tokenizer)
    again = mtp.load_tokenizer(folder)
    assert isinstance(again, HuggingFaceTokenizer)
    assert again.fingerprint == tokenizer.fingerprint and again.encode(TEXT)
    assert answered(again.theirs) == answered(tokenizer.theirs) == "user: hé?\n"


def test_in_through_decoding_and_out_again(theirs, tmp_path, capsys):
    pytest.importorskip("hydra")
    from scripts.convert import ConvertConfig, convert
    from scripts.generate import GenerateConfig, complete

    ours, out = str(tmp_path / "ours"), str(tmp_path / "out")
    convert(ConvertConfig("llama", str(theirs), "mtp", ours))
    complete(GenerateConfig(ours, prompt="abc", max_new_tokens=5, device="cpu", threads=1))
    assert "\nabc" in capsys.readouterr().out
    convert(ConvertConfig("mtp", ours, "llama", out))
    assert capsys.readouterr().out == f"written: {out}\n"
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (theirs, out))
    assert before.backend_tokenizer.to_str() == after.backend_tokenizer.to_str()
    assert answered(before) == answered(after)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == after.eos_token_id == 256
    assert torch.equal(
        load_llama(out)(torch.tensor([[1, 2]])), mtp.load(ours)(torch.tensor([[1, 2]]))
    )


def test_a_folder_without_a_readable_one_is_named(theirs):
    (theirs / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="theirs: its tokenizer cannot be read"):
        load_tokenizer(theirs)
    for file in theirs.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="theirs holds no tokenizer, such as tokenizer.json"):
        HuggingFaceTokenizer(theirs)


def test_a_tokenizer_without_an_end_is_refused(theirs):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (theirs / name).is_file():
            told = json.loads((theirs / name).read_text())
            told.pop("eos_token", None)
            (theirs / name).write_text(json.dumps(told))
    with pytest.raises(ValueError, match="theirs: its tokenizer has no eos_token"):
        load_tokenizer(theirs)


def test_a_vocabulary_that_the_model_does_not_know_is_refused(theirs, tmp_path):
    scripts = pytest.importorskip("scripts.convert")
    tokenizer, small = load_tokenizer(theirs), tmp_path / "small"
    model = mtp.Transformer(mtp.ModelConfig(dim=16, n_layers=4, n_heads=2, vocab_size=200))
    with pytest.raises(ValueError, match="theirs: the tokenizer has 257 tokens, .*vocab_size=200"):
        save_llama(model, small, tokenizer)
    assert not small.exists()
    save_llama(model, small)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(theirs / name, small / name)
    given = scripts.ConvertConfig("llama", str(small), "mtp", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="small: the tokenizer has 257 tokens"):
        scripts.convert(given)
