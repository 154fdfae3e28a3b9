"""A model by its folder: its own text, with heads or without, and its own way to write chats."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("hydra")

from test_attach import settings, small_folder  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from mtp.documents import DataConfig  # noqa: E402
from mtp.encoding import chat_template, encode_document  # noqa: E402
from mtp.interop.attach import attach_heads, save_heads  # noqa: E402
from mtp.interop.folder import find_model, load_causal_lm  # noqa: E402
from mtp.interop.huggingface import CausalLM  # noqa: E402
from mtp.model import Transformer  # noqa: E402
from mtp.records import Document, chat_segments  # noqa: E402
from mtp.tokenizer import HuggingFaceTokenizer  # noqa: E402
from scripts.attach import AttachConfig, attach  # noqa: E402
from scripts.convert import ConvertConfig, convert  # noqa: E402
from scripts.draft_vocabulary import VocabularyConfig, draft_vocabulary  # noqa: E402
from scripts.generate import GenerateConfig, complete, main  # noqa: E402
from scripts.self_distill import SelfDistillConfig, self_distill  # noqa: E402

CPU = torch.device("cpu")
TEMPLATE = (  # with words of its own before a chat, and a line break after each turn
    "{% if messages[0]['role'] != 'system' %}Be kind.<end>\n{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Yes\n"},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "No"},
]
NEW = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    folder = small_folder(tmp_path_factory.mktemp("chat") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def heads(model, tmp_path_factory):
    heads = attach_heads(load_causal_lm(model, CPU, torch.float32), 4)
    return save_heads(heads, tmp_path_factory.mktemp("heads") / "heads")


def said(capsys, folder, **settings):
    settings = {"prompt": "ab", "max_new_tokens": NEW, "device": "cpu", "threads": 1} | settings
    capsys.readouterr()
    complete(GenerateConfig(str(folder), **settings))
    return capsys.readouterr()


def their_text(folder, prompt):
    """What transformers' own greedy decoding writes."""
    tokenizer = HuggingFaceTokenizer(folder)
    ids = torch.tensor([tokenizer.encode(prompt)])
    model = AutoModelForCausalLM.from_pretrained(folder)
    mask = torch.ones_like(ids)
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    return tokenizer.decode(whole[0, ids.shape[1] :].tolist())


# Decoding.


def test_the_text_of_a_folder_is_the_text_of_its_model(model, capsys):
    assert said(capsys, model).out == f"ab{their_text(model, 'ab')}\n"


@pytest.mark.parametrize("settings", [{}, {"tree": 4}, {"depth": "auto"}, {"samples": 2}])
def test_attached_heads_guess_and_leave_the_text(settings, model, heads, capsys):
    plain = said(capsys, model, samples=settings.get("samples", 1))
    drafted = said(capsys, model, heads=str(heads), drafter="heads", **settings)
    assert drafted.out == plain.out
    with pytest.raises(ValueError, match="no head to draft with"):
        said(capsys, model, drafter="heads", **settings)


def test_a_vocabulary_is_the_frequent_tokens_and_limits_guesses_alone(
    model, heads, tmp_path, capsys
):
    tokenizer, out = HuggingFaceTokenizer(model), tmp_path / "frequent.json"
    (tmp_path / "a.txt").write_text("zzzyyx")
    data = DataConfig("text", str(tmp_path), val_fraction=0)
    draft_vocabulary(VocabularyConfig(str(model), str(out), count=3, data=data))
    assert json.loads(out.read_text()) == [tokenizer.end_id, *tokenizer.encode("zy")]
    words = {"heads": str(heads), "drafter": "heads", "vocabulary": str(out)}
    assert said(capsys, model, **words).out == said(capsys, model).out


@pytest.mark.parametrize("text", ["{}", "[1, 'a']", "[0.5]", ""])
def test_what_is_no_vocabulary_is_refused(text, model, heads, tmp_path, capsys):
    (tmp_path / "v.json").write_text(text)
    words = {"heads": str(heads), "drafter": "heads", "vocabulary": str(tmp_path / "v.json")}
    with pytest.raises(ValueError, match="vocabulary=.* holds no list of token ids"):
        said(capsys, model, **words)


def test_only_our_checkpoints_are_checked(model):
    with pytest.raises(ValueError, match="check=true: .* checkpoints of ours"):
        main(GenerateConfig(str(model), check=True))


def test_every_token_that_the_folder_calls_an_end_is_one(tmp_path):
    folder = small_folder(tmp_path / "model")
    end = HuggingFaceTokenizer(folder).end_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, end]}))
    assert find_model(folder).ends == (end, 5)


@pytest.mark.parametrize("text", ["{", "3"])
def test_a_damaged_config_is_refused_by_name(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        find_model(tmp_path)


# How a folder is opened.


OTHERWISE = {"attention_bias": True, "mlp_bias": True, "head_dim": 16}


def llama_with(folder, **changes):
    """A folder of random weights whose config is another Llama's."""
    small_folder(folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes", [{}, *({key: x} for key, x in OTHERWISE.items())])
def test_a_llama_that_ours_can_be_is_ours_and_no_other_and_texts_are_its_own(
    changes, tmp_path, capsys
):
    folder = llama_with(tmp_path / "model", **changes)
    opened = load_causal_lm(folder, CPU, torch.float32)
    assert isinstance(opened, CausalLM if changes else Transformer)
    assert said(capsys, folder).out == f"ab{their_text(folder, 'ab')}\n"
    ids = torch.arange(12)[None] % 7
    theirs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(opened(ids), theirs, rtol=1e-4, atol=1e-5)


def test_damaged_weights_of_a_llama_are_told_and_not_opened_otherwise(tmp_path):
    folder = small_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_causal_lm(folder, CPU, torch.float32)


@pytest.mark.parametrize("learning", ["frozen", "all"])
def test_a_folder_gets_heads_and_goes_out_by_one_command_each(learning, tmp_path, capsys):
    folder = small_folder(tmp_path / "model")
    tokenizer, text = HuggingFaceTokenizer(folder), their_text(folder, "ab")
    unused = min({*range(tokenizer.vocab_size)} - {*tokenizer.encode(text), tokenizer.end_id})
    ends = {"eos_token_id": [tokenizer.end_id, unused]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    (texts := tmp_path / "texts").mkdir()
    for name in "abcd":
        (texts / f"{name}.txt").write_text(f"{name}{text * 20}")
    data = DataConfig("folder", str(texts), "*.txt", holdout=["d.txt"], seq_len=16)
    run_dir, train = tmp_path / "run", settings(4)
    attach(AttachConfig(str(folder), str(run_dir), learning=learning, data=data, train=train))
    trunk = folder if learning == "frozen" else run_dir / "trunk"
    assert find_model(trunk).ends == find_model(folder).ends
    assert isinstance(load_causal_lm(trunk, CPU, torch.float32), Transformer)
    drafted = said(capsys, trunk, heads=str(run_dir / "heads"), drafter="heads")
    assert drafted.out == said(capsys, trunk).out == f"ab{their_text(trunk, 'ab')}\n"
    out = tmp_path / "out"
    formats = {"source_format": "llama", "out_format": "speculative"}
    convert(ConvertConfig(**formats, source=str(trunk), out=str(out), heads=str(run_dir / "heads")))
    assert (out / "custom_generate").is_dir() and their_text(out, "ab") == their_text(trunk, "ab")


# Chats.


def test_a_chat_prompt_is_asked_in_the_template_and_the_answer_is_shown(templated, capsys):
    opened = "Be kind.<end>\n[user]ab<end>\n[assistant]"
    answer = their_text(templated, opened)
    assert said(capsys, templated, chat=True).out == f"{answer}\n"
    assert said(capsys, templated, chat=True, samples=2).out == f"{answer}\n" * 2


def test_answers_in_a_models_own_template_are_targets_as_it_would_write_them(templated):
    tokenizer = HuggingFaceTokenizer(templated)
    ids, keep, *_ = encode_document(Document(chat_segments(CHAT), messages=CHAT), tokenizer)
    theirs = tokenizer.theirs.apply_chat_template(CHAT, tokenize=False).removesuffix("\n")
    assert ids.tolist() == tokenizer.encode(theirs)
    assert tokenizer.theirs.decode(ids[keep]) == " Yes\n<end>No<end>"
    prompt = tokenizer.encode(chat_template(tokenizer).render(CHAT[:3], True))
    assert ids[: len(prompt)].tolist() == prompt and keep[len(prompt) :].all()


def test_without_a_template_a_chat_is_written_plainly(model):
    tokenizer = HuggingFaceTokenizer(model)
    ids, *_ = encode_document(Document(chat_segments(CHAT), messages=CHAT), tokenizer)
    plain = "<|user|>\nHi\n<|assistant|>\n Yes\n\n<|user|>\nSo?\n<|assistant|>\nNo"
    assert ids.tolist() == [*tokenizer.encode(plain), tokenizer.end_id]


def test_a_template_that_refuses_a_chat_says_so(tmp_path):
    folder = small_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must take turns') }}")
    with pytest.raises(ValueError, match="template refuses .*: roles must take turns"):
        chat_segments(CHAT, chat_template(HuggingFaceTokenizer(folder)))


@pytest.mark.parametrize("turns", [1, 2])
def test_a_model_gives_the_last_answer_of_a_chat_itself(turns, templated, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT[:turns]}) + "\n")
    data = DataConfig("jsonl", str(tmp_path / "chats.jsonl"), val_fraction=0)
    out = tmp_path / "own.jsonl"
    settings = {"max_new_tokens": NEW, "device": "cpu", "data": data}
    self_distill(SelfDistillConfig(str(templated), str(out), **settings))
    opened = "Be kind.<end>\n[user]Hi<end>\n[assistant]"
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["prompt_ids"] == HuggingFaceTokenizer(templated).encode(opened)
