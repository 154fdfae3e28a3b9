"""A model by its folder, and chats as its tokenizer's template writes them."""

import pytest

pytest.importorskip("transformers")

from test_attach import small_folder  # noqa: E402

from mtp.data import encode_document  # noqa: E402
from mtp.documents import Document, chat_segments  # noqa: E402
from mtp.interop.tokenizer import HuggingFaceTokenizer  # noqa: E402

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


@pytest.fixture
def templated(tmp_path):
    folder = small_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_answers_in_a_models_own_template_are_the_targets_as_it_would_write_them(templated):
    tokenizer = HuggingFaceTokenizer(templated)
    ids, keep, *_ = encode_document(Document(chat_segments(CHAT), messages=CHAT), tokenizer)
    theirs = tokenizer.theirs.apply_chat_template(CHAT, tokenize=False).removesuffix("\n")
    assert ids.tolist() == tokenizer.encode(theirs)
    assert tokenizer.theirs.decode(ids[keep]) == " Yes\n<end>No<end>"
    prompt = tokenizer.encode(tokenizer.chat.render(CHAT[:3], True))
    assert ids[: len(prompt)].tolist() == prompt and keep[len(prompt) :].all()


def test_without_a_template_a_chat_is_written_plainly(tmp_path):
    tokenizer = HuggingFaceTokenizer(small_folder(tmp_path / "model"))
    ids, *_ = encode_document(Document(chat_segments(CHAT), messages=CHAT), tokenizer)
    plain = "<|user|>\nHi\n<|assistant|>\n Yes\n\n<|user|>\nSo?\n<|assistant|>\nNo"
    assert ids.tolist() == [*tokenizer.encode(plain), tokenizer.end_id]


def test_a_template_that_refuses_a_chat_says_so(templated):
    (templated / "chat_template.jinja").write_text("{{ raise_exception('roles must take turns') }}")
    tokenizer = HuggingFaceTokenizer(templated)
    with pytest.raises(ValueError, match="template refuses .*: roles must take turns"):
        chat_segments(CHAT, tokenizer.chat)
