"""Text survives the round trip, and each tokenizer can be saved, recognised and refused."""

import json
import string
from types import SimpleNamespace

import pytest

from mtp.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    TextStream,
    load_tokenizer,
    train_sentencepiece,
)

NASTY = [
    "",
    " ",
    "\n\n\t \r\n",
    "  leading and trailing  ",
    "a  b   c    d",
    "nul \x00 and bell \x07",
    "é ∀x∈ℝ 漢字 🙂 \u200b\ufeff",
    "<unk></s><|user|>",
]
CODE = 'def f(x):\n\tif x:\n\t    return  {"k": [1,  2]}\n\n\n    # done\n'
TEXTS = [CODE, "class A:\n    def g(self):\n        return self.x + 1\n", string.printable] * 5


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("sentencepiece") / "code.model"
    train_sentencepiece(TEXTS, path, vocab_size=400)
    return path


@pytest.fixture(scope="module")
def pieces(model_file):
    return SentencePieceTokenizer(model_file)


@pytest.mark.parametrize("text", [*NASTY, CODE])
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode("utf-8"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [*NASTY, CODE])
def test_sentencepiece_round_trip(pieces, text):
    assert pieces.decode(pieces.encode(text)) == text


def test_sentencepiece_merges_indentation(pieces):
    assert len(pieces.encode("        return")) < 4


def test_byte_decoding_drops_the_end_token_and_replaces_what_is_no_utf8():
    assert ByteTokenizer().decode([104, 256, 105, 0xFF, -1]) == "hi\ufffd"


def test_sentencepiece_decoding_drops_special_ids(pieces):
    ids = pieces.encode("x = 1")
    unknown, beyond = 0, pieces.vocab_size
    assert pieces.decode([unknown, *ids[:1], pieces.end_id, *ids[1:], -1, beyond]) == "x = 1"


def test_text_never_encodes_to_the_end_token(pieces):
    assert 0 <= pieces.end_id < pieces.vocab_size == 400
    assert pieces.end_id not in pieces.encode("</s> <unk> <0x00>")


def test_training_is_deterministic(pieces, tmp_path):
    again = train_sentencepiece(iter(TEXTS), tmp_path / "again.model", vocab_size=400)
    assert again.fingerprint == pieces.fingerprint


def test_training_leaves_only_the_model(pieces, tmp_path):
    train_sentencepiece(TEXTS, tmp_path / "a.model", vocab_size=400)
    assert [path.name for path in tmp_path.iterdir()] == ["a.model"]


def test_long_texts_are_not_left_out(tmp_path):
    pytest.importorskip("sentencepiece")
    rare = "zyx" * 5000
    tokenizer = train_sentencepiece(["abc " * 20, rare], tmp_path / "a.model", vocab_size=275)
    assert len(tokenizer.encode("zyxzyx")) < 6


def test_impossible_vocabulary_is_refused(tmp_path):
    pytest.importorskip("sentencepiece")
    with pytest.raises(ValueError, match="vocab_size=100000"):
        train_sentencepiece(["too little text"], tmp_path / "a.model", vocab_size=100000)
    assert not list(tmp_path.iterdir())


def test_saved_tokenizers_load_as_they_were(pieces, model_file, tmp_path):
    for name, tokenizer in {"bytes": ByteTokenizer(), "pieces": pieces}.items():
        tokenizer.save(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(CODE) == tokenizer.encode(CODE)
    assert load_tokenizer(str(model_file)).fingerprint == pieces.fingerprint
    assert load_tokenizer("bytes").fingerprint == ByteTokenizer.fingerprint != pieces.fingerprint


@pytest.mark.parametrize("content", [None, {"kind": "words"}, ["bytes"], "broken"])
def test_unknown_tokenizers_are_refused(tmp_path, content):
    if content is not None:
        text = content if content == "broken" else json.dumps(content)
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"the word 'bytes'.*\.model file.*folder"):
        load_tokenizer(tmp_path)


def test_broken_models_are_refused_by_name(tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "broken.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="broken.model"):
        load_tokenizer(tmp_path / "broken.model")


def test_a_model_without_end_token_is_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "endless"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="endless.model.*end-of-sentence"):
        load_tokenizer(tmp_path / "endless.model")


@pytest.mark.parametrize("text", [*NASTY, CODE])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_streamed_text_is_the_text_and_splits_no_character(size, kind, text, request):
    tokenizer = ByteTokenizer() if kind == "bytes" else request.getfixturevalue("pieces")
    ids, stream = tokenizer.encode(text * 3), TextStream(tokenizer)
    told = [stream.push(ids[at : at + size]) for at in range(0, len(ids), size)]
    assert not any("\ufffd" in part for part in told)
    assert "".join(told) + stream.close() == text * 3


def test_a_stream_waits_for_the_last_byte_of_a_character_and_no_longer():
    stream, (first, second) = TextStream(ByteTokenizer()), "é".encode()
    assert [stream.push([65, first]), stream.push([second]), stream.push([66])] == ["A", "é", "B"]


def test_a_stream_tells_bytes_that_are_no_text_once_they_can_no_longer_become_one():
    stream = TextStream(ByteTokenizer())
    assert stream.push([65, 0xC3]) == "A" and stream.push([66]) == "\ufffdB"
    assert stream.push([0xC3]) == "" and stream.close() == "\ufffd"


def test_a_stream_does_not_wait_for_ever_for_what_never_becomes_text():
    stream, decoded = TextStream(ByteTokenizer()), []
    decode = stream.tokenizer.decode
    stream.tokenizer = SimpleNamespace(decode=lambda ids: decoded.append(len(ids)) or decode(ids))
    told = "".join(stream.push([0x80]) for _ in range(100))
    assert told + stream.close() == "\ufffd" * 100
    assert len(told) > 80 and max(decoded) < 40
