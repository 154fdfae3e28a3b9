"""Documents are read, held out, packed and resumed as promised."""

import gzip
import json
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mtp.data import Batches, Corpus, StreamingBatches, frequent_tokens, load_corpora, load_corpus
from mtp.documents import SOURCES, DataConfig, iter_documents, load_documents
from mtp.encoding import encode_document, prompt_of
from mtp.overlap import Overlap, ngram_overlap
from mtp.records import ChatTemplate, Document
from mtp.shards import prepare_shards
from mtp.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
END = BYTES.end_id


def plain(text, name=""):
    return Document(((text, True),), name)


def some_documents(count=9, seed=0):
    generator = np.random.default_rng(seed)
    return [
        plain("".join(generator.choice(list("abcdé\n"), size=generator.integers(1, 30))))
        for _ in range(count)
    ]


def corpus_of(*texts):
    return Corpus.from_documents(map(plain, texts), BYTES)


def stream_of(documents):
    """(token, document, is target) of the whole stream, from the documents themselves."""
    stream = []
    for number, document in enumerate(documents):
        for text, target in document.segments:
            stream += [(token, number, target) for token in text.encode()]
        stream.append((END, number, document.segments[-1][1]))
    return stream


def take(batches, count):
    return [next(batches) for _ in range(count)]


def joined(batches):
    return [torch.cat(parts).tolist() for parts in zip(*batches, strict=True)]


def same(left, right):
    return joined(left) == joined(right)


def write_jsonl(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


# Packing


class Digits:
    """Characters 1 to 9 and a (10) are their own ids, 0 ends a document."""

    vocab_size, end_id, fingerprint = 11, 0, "digits"

    def encode(self, text):
        return [int(character, 16) for character in text]


def test_the_example_of_the_docstring():
    corpus = Corpus.from_documents([plain("123456"), plain("789a")], Digits())
    (batch,) = Batches(corpus, seq_len=4, n_future_tokens=2, batch_size=3, epochs=1, shuffle=False)
    assert batch.row.tolist() == [[1, 2, 3, 4, 5, 6], [5, 6, 0, 7, 8, 9], [8, 9, 10, 0, 0, 0]]
    assert batch.doc.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, -1, -1]]
    assert batch.keep.tolist() == [[True] * 6, [True] * 6, [True] * 4 + [False] * 2]


@pytest.mark.parametrize("seq_len, n", [(1, 1), (4, 1), (4, 3), (5, 7), (16, 4)])
def test_rows_overlap_by_n_and_give_back_the_stream(seq_len, n):
    documents = some_documents()
    corpus = Corpus.from_documents(documents, BYTES)
    batches = Batches(corpus, seq_len, n, batch_size=1, epochs=1, shuffle=False)
    rows = [list(zip(*(x[0].tolist() for x in batch), strict=True)) for batch in batches]
    for row, following in zip(rows, rows[1:], strict=False):
        assert row[seq_len:] == following[:n] or following[n - 1][1] == -1
    tokens = [token for row in rows[:-1] for token in row[:seq_len]] + rows[-1]
    assert [token for token in tokens if token[1] >= 0] == stream_of(documents)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("seq_len, n, batch_size", [(1, 1, 2), (4, 3, 3), (5, 7, 1), (16, 4, 5)])
def test_every_target_of_every_head_counts_once(seq_len, n, batch_size, shuffle):
    documents = [*some_documents(), Document((("prompt", False), ("yes", True)))]
    corpus = Corpus.from_documents(documents, BYTES)
    batches = Batches(corpus, seq_len, n, batch_size, epochs=1, shuffle=shuffle)
    counted: Counter = Counter()
    for row, doc, keep in batches:
        for i in range(n):
            source, target = doc[:, :seq_len], doc[:, 1 + i : 1 + i + seq_len]
            valid = (source == target) & (source >= 0) & keep[:, 1 + i : 1 + i + seq_len]
            pairs = torch.stack([row[:, :seq_len], row[:, 1 + i : 1 + i + seq_len], source])
            counted.update((i, *pair) for pair in pairs[:, valid].T.tolist())
    stream = stream_of(documents)
    expected = Counter(
        (i, stream[t][0], stream[t + 1 + i][0], stream[t][1])
        for i in range(n)
        for t in range(len(stream) - 1 - i)
        if stream[t][1] == stream[t + 1 + i][1] and stream[t + 1 + i][2]
    )
    assert counted == expected


def test_the_end_token_belongs_to_its_document():
    (batch,) = Batches(corpus_of("ab", "c"), 4, 1, batch_size=1, epochs=1)
    assert batch.row.tolist() == [[97, 98, END, 99, END]]
    assert batch.doc.tolist() == [[0, 0, 0, 1, 1]]


def test_the_last_batch_is_completed_with_padding():
    batches = Batches(corpus_of("abcdefgh"), 4, 1, batch_size=3, epochs=1)
    (batch,) = batches
    assert (batch.doc[2] == -1).all() and not batch.keep[2].any()
    assert (batch.doc[:2] >= 0).sum() == 10 and next(batches, None) is None


def test_batches_have_the_types_of_the_contract():
    batch = next(Batches(corpus_of("abcdefgh"), 4, 2, batch_size=2))
    assert [x.dtype for x in batch] == [torch.int64, torch.int64, torch.bool]
    assert {x.shape for x in batch} == {(2, 6)}


def test_large_vocabularies_need_32_bits():
    tokenizer = Digits()
    assert encode_document(plain("12"), tokenizer).ids.dtype == np.uint16
    tokenizer.vocab_size = 2**16 + 1
    assert encode_document(plain("12"), tokenizer).ids.dtype == np.uint32


# Order, resuming, ranks


def test_epochs_are_different_orders_of_the_same_rows():
    corpus = Corpus.from_documents(some_documents(30), BYTES)
    batches = Batches(corpus, 4, 1, batch_size=1)
    first, second = ([batch.row.tolist() for batch in take(batches, batches.n_rows)] for _ in "12")
    assert first != second and sorted(first) == sorted(second)


def test_the_order_follows_from_the_seed():
    corpus = Corpus.from_documents(some_documents(30), BYTES)
    one, again, other = (take(Batches(corpus, 4, 1, 2, seed=seed), 9) for seed in (1, 1, 2))
    assert same(one, again) and not same(one, other)


@pytest.mark.parametrize("cut", [0, 1, 5, 13, 14, 40])
def test_resuming_gives_the_same_stream(cut):
    corpus = Corpus.from_documents(some_documents(), BYTES)
    batches = Batches(corpus, 4, 2, batch_size=3, seed=5)
    assert cut in (0, 1, 5) or cut * 3 > batches.n_rows  # some cuts lie in later epochs
    take(batches, cut)
    state = json.loads(json.dumps(batches.state_dict()))
    expected = take(batches, 20)
    resumed = Batches(corpus, 4, 2, batch_size=3, seed=5)
    resumed.load_state_dict(state)
    assert same(take(resumed, 20), expected)


@pytest.mark.parametrize("epochs", [None, 2])
def test_ranks_partition_each_global_batch(epochs):
    corpus = Corpus.from_documents(some_documents(), BYTES)
    whole = take(Batches(corpus, 4, 2, batch_size=6, epochs=epochs), 9)
    ranks = [Batches(corpus, 4, 2, 2, rank=r, world_size=3, epochs=epochs) for r in range(3)]
    for expected in whole:
        assert same([next(rank) for rank in ranks], [expected])


def test_all_ranks_have_equally_many_batches():
    corpus = corpus_of("abcdefgh")  # two rows
    ranks = [Batches(corpus, 4, 1, 1, rank=r, world_size=3, epochs=1) for r in range(3)]
    assert [len(list(rank)) for rank in ranks] == [1, 1, 1]


def test_the_state_moves_between_world_sizes():
    corpus = Corpus.from_documents(some_documents(), BYTES)
    alone = Batches(corpus, 4, 2, batch_size=4)
    take(alone, 3)
    ranks = [Batches(corpus, 4, 2, batch_size=2, rank=r, world_size=2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    for _ in range(7):
        assert same([next(rank) for rank in ranks], [next(alone)])


@pytest.mark.parametrize(
    "name, other",
    [
        ("corpus", lambda: Batches(corpus_of("hgfedcba"), 4, 1, 1)),
        ("seq_len", lambda: Batches(corpus_of("abcdefgh"), 5, 1, 1)),
        ("seed", lambda: Batches(corpus_of("abcdefgh"), 4, 1, 1, seed=1)),
        ("shuffle", lambda: Batches(corpus_of("abcdefgh"), 4, 1, 1, shuffle=False)),
    ],
)
def test_the_state_of_other_data_is_refused(name, other):
    state = Batches(corpus_of("abcdefgh"), 4, 1, 1).state_dict()
    with pytest.raises(ValueError, match=f"its {name} is"):
        other().load_state_dict(state)


# Corpora


def test_bytes_per_token_counts_end_tokens():
    assert corpus_of("abé", "x").bytes_per_token == 5 / 7


def test_the_fingerprint_knows_texts_borders_and_targets():
    halves = Document((("a", True), ("b", True)))
    masked = Document((("a", False), ("b", True)))
    corpora = [[plain("ab")], [plain("a"), plain("b")], [halves], [masked], [plain("ac")]]
    found = {Corpus.from_documents(documents, BYTES).fingerprint for documents in corpora}
    assert len(found) == len(corpora)
    assert corpus_of("ab").fingerprint == corpus_of("ab").fingerprint


# Targets


def targets(tmp_path, record, **keys):
    """The text of each run of targets and of the others, the end token as a dollar sign."""
    config = DataConfig("jsonl", write_jsonl(tmp_path / "a.jsonl", [record]), **keys)
    (document,) = iter_documents(replace(config, val_fraction=0.0), held_out=False)
    ids, keep, *_ = encode_document(document, BYTES)
    text = "".join("$" if i == END else chr(i) for i in ids.tolist())
    return "".join(c if kept else "." for c, kept in zip(text, keep, strict=True)), text


def test_plain_text_is_all_targets(tmp_path):
    assert targets(tmp_path, {"text": "hello"}) == ("hello$", "hello$")
    assert corpus_of("hello").keep is None


def test_only_the_completion_is_a_target(tmp_path):
    record = {"question": "1+1=", "answer": "2"}
    keys = {"prompt_key": "question", "completion_key": "answer"}
    assert targets(tmp_path, record, **keys) == ("....2$", "1+1=2$")


def test_only_what_the_assistant_says_is_a_target(tmp_path):
    turns = ["system: S", "user: U", "assistant: A", "user: V", "assistant: B"]
    roles = (turn.split(": ") for turn in turns)
    record = {"messages": [{"role": role, "content": content} for role, content in roles]}
    kept, text = targets(tmp_path, record)
    assert text == ("<|system|>\nS\n<|user|>\nU\n<|assistant|>\nA\n<|user|>\nV\n<|assistant|>\nB$")
    assert kept.replace(".", "") == "AB$"


def test_a_chat_that_ends_with_the_user_has_no_end_target(tmp_path):
    messages = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "U"}]
    kept, text = targets(tmp_path, {"messages": messages})
    assert text == "<|assistant|>\nA\n<|user|>\nU\n$" and kept.replace(".", "") == "A"


class Brackets(ByteTokenizer):
    """Writes a chat in its own way: an answer ends with ">", and the template goes on."""

    def __init__(self, render=None):
        self.chat = ChatTemplate(render or self.render, ">")

    def render(self, messages, open_answer):
        turns = [f"{m['role'][0]}<{m['content']}> " for m in messages]
        return "^" + "".join(turns) + "a<" * open_answer


def in_brackets(tmp_path, letters, render=None):
    roles = {"u": "user", "a": "assistant"}
    messages = [{"role": roles[x.lower()], "content": x} for x in letters]
    config = DataConfig("jsonl", write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]))
    (document,) = iter_documents(replace(config, val_fraction=0.0), held_out=False)
    ids, keep, *_ = encode_document(document, Brackets(render))
    return "".join("$" if i == END else chr(i) for i in ids), "".join("_x"[k] for k in keep + 0)


@pytest.mark.parametrize(
    ("letters", "text", "kept"),
    [
        ("UA", "^u<U> a<A>$", "________xxx"),
        ("UAUA", "^u<U> a<A> u<U> a<A>$", "________xx________xxx"),
        ("AU", "^a<A> u<U> $", "___xx_______"),
        ("UU", "^u<U> u<U> $", "____________"),
    ],
)
def test_a_template_writes_the_chat_and_answers_stay_the_targets(tmp_path, letters, text, kept):
    assert in_brackets(tmp_path, letters) == (text, kept)


def test_a_template_that_rewrites_a_chats_beginning_is_refused(tmp_path):
    def forgetful(messages, open_answer):
        return Brackets().render(messages[-2:], open_answer)

    with pytest.raises(ValueError, match="template does not write message 4 of a chat behind"):
        in_brackets(tmp_path, "UAUA", forgetful)


def test_the_split_of_chats_does_not_depend_on_a_template_but_the_corpus_does(tmp_path):
    messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    config = DataConfig("jsonl", path, val_fraction=0.0)
    found = {load_corpus(config, t, False).fingerprint for t in (BYTES, Brackets())}
    assert len(found) == 2


ASKED, ANSWERED = {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    "record, prompt",
    [
        ({"text": "t"}, "t"),
        ({"prompt": "p", "completion": "c"}, "p"),
        ({"messages": [ASKED]}, "<|user|>\nU\n<|assistant|>\n"),
        ({"messages": [ASKED, ANSWERED]}, "<|user|>\nU\n<|assistant|>\n"),
        ({"messages": [ASKED, ANSWERED, ASKED]}, "<|user|>\nU\n<|assistant|>\n"),
        ({"messages": [ASKED, ANSWERED] * 2}, "<|user|>\nU\n<|assistant|>\n"),
    ],
)
def test_a_prompt_is_all_before_the_first_answer(record, prompt, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [record] * 2)
    for document in iter_documents(DataConfig("jsonl", path, val_fraction=0.0), False):
        assert BYTES.decode(prompt_of(document, BYTES)) == prompt


def test_a_key_set_to_null_is_not_looked_for(tmp_path):
    record = {"prompt": "p", "completion": "c", "text": "t"}
    assert targets(tmp_path, record)[1] == "pc$"
    assert targets(tmp_path, record, prompt_key=None)[1] == "t$"


# Sources


def texts(config, held_out=False):
    return [document.text for document in iter_documents(config, held_out)]


def test_text_files_are_read_unchanged_and_in_order(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"two\r\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_bytes("\ufeffone".encode())
    (tmp_path / "c.md").write_text("no text file")
    assert texts(DataConfig("text", str(tmp_path), val_fraction=0.0)) == ["\ufeffone", "two\r\n"]
    assert texts(DataConfig("text", str(tmp_path / "c.md"), val_fraction=0.0)) == ["no text file"]


def test_each_line_of_a_text_file_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two\u2028\n")
    (tmp_path / "b.txt").write_text("three")
    wanted = ["one", " two\u2028", "three"]
    assert texts(DataConfig("lines", str(tmp_path), val_fraction=0.0)) == wanted


def test_folders_skip_hidden_and_installed_files(tmp_path):
    for name in ("a.py", ".git/b.py", "v/site-packages/c.py", "d/e.py", "d/f.txt", "d/empty.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    config = DataConfig("folder", str(tmp_path), pattern="*.py", val_fraction=0.0)
    assert texts(config) == ["a.py", "d/e.py"]


def test_parquet_reads_what_jsonl_reads(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"id": i, "messages": [{"role": "assistant", "content": str(i)}]} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", records)
    jsonl, other = (
        list(iter_documents(DataConfig(source, str(tmp_path), val_fraction=0.0), False))
        for source in ("jsonl", "parquet")
    )
    assert jsonl == other and len(jsonl) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_splits(tmp_path, monkeypatch, streaming):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "validation"):
        (tmp_path / "set").mkdir(exist_ok=True)
        records = [{"text": f"{split} {i}"} for i in range(3)]
        write_jsonl(tmp_path / "set" / f"{split}.jsonl", records)
    config = DataConfig(
        "datasets", str(tmp_path / "set"), streaming=streaming, val_split="validation"
    )
    assert texts(config) == ["train 0", "train 1", "train 2"]
    assert texts(config, held_out=True) == ["validation 0", "validation 1", "validation 2"]


def test_the_standard_library_is_read_twice_alike_and_without_tests():
    config = DataConfig("stdlib", pattern="json/**/*.py", val_fraction=0.0)
    first = list(iter_documents(config, held_out=False))
    assert first == list(iter_documents(config, held_out=False))
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = {document.name: document.text for document in first}
    assert source["json/decoder.py"] == (folder / "json" / "decoder.py").read_bytes().decode()
    every = DataConfig("stdlib", holdout=["json", "ast", "unittest"])
    for held_out in (False, True):
        parts = {part for d in iter_documents(every, held_out) for part in Path(d.name).parts}
        assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}


def test_code_is_each_text_once_and_the_wanted_share_of_micro_programs():
    config = DataConfig(
        "code", pattern="json/*.py", packages=["pluggy"], val_fraction=0.0, benchmarks=[]
    )
    documents = list(iter_documents(config, held_out=False))
    assert documents == list(iter_documents(config, held_out=False))
    assert len({document.text for document in documents}) == len(documents)
    sizes = Counter[str]()
    for document in documents:
        sizes[Path(document.name).parts[0]] += len(document.text.encode())
    assert sizes.keys() == {"json", "pluggy", "micro"}
    assert sizes["micro"] / sizes.total() == pytest.approx(0.2, abs=0.005)
    plain = replace(config, micro_share=0.0)
    assert texts(plain) == [d.text for d in documents if not d.name.startswith("micro")]


# Overlap with benchmarks


COPIED = "One two, three four five six seven eight nine ten eleven twelve THIRTEEN!"


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        (COPIED, True),
        (f"x = 1\n{COPIED}\ny", True),
        (COPIED.replace(" ", "\n    # ").upper(), True),  # layout and case do not hide a copy
        (COPIED.removeprefix("One"), False),  # twelve words at either border
        (COPIED.removesuffix("THIRTEEN!"), False),
        (COPIED.replace("six", "6"), False),
        (COPIED.replace("six", "sixes"), False),
        ("", False),
    ],
)
def test_an_overlap_is_thirteen_words_in_a_row(text, shared):
    assert (text in Overlap(["x", f"a {COPIED.lower()} b"])) is shared


@pytest.fixture
def problems(tmp_path):
    """Files of one problem, whose tests stand one below the other."""
    records = [{"id": 7, "tests": [COPIED[:29], COPIED[29:]], "text": "a b"}]
    lines = write_jsonl(tmp_path / "lines.jsonl", records)
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(Path(lines).read_bytes()))
    return tmp_path


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.jsonl.gz", "list.json"])
def test_documents_that_overlap_are_left_out_and_counted(problems, caplog, name):
    kept = ["one", "two"]
    path = write_jsonl(problems / "train.jsonl", [{"text": t} for t in [*kept, COPIED]])
    config = DataConfig("jsonl", path, val_fraction=0.0, benchmarks=[str(problems / name)])
    with caplog.at_level("INFO", "mtp"):
        assert texts(config) == kept
    assert f"1 of 3 documents left out, which share 13 words in a row with {name}" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "no file .*nowhere"), ("bad", "bad: no JSON")]
)
def test_missing_and_broken_benchmarks_are_refused_by_path(tmp_path, name, message):
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    (tmp_path / "bad").write_text('{"prompt": "a"}\n{"prompt"\n')
    config = DataConfig("jsonl", path, val_fraction=0.0, benchmarks=[str(tmp_path / name)])
    with pytest.raises(ValueError, match=f"data.benchmarks: .*{message}"):
        texts(config)


# Held-out documents


def test_holdout_takes_whole_packages_and_files():
    train, held_out = load_documents(DataConfig("stdlib", holdout=["json", "ast", "sqlite3"]))
    assert {Path(d.name).parts[0] for d in held_out} == {"json", "ast.py", "sqlite3"}
    assert not {d.name for d in train} & {d.name for d in held_out}
    assert {"abc.py", "email"} <= {Path(d.name).parts[0] for d in train}


def test_val_fraction_splits_by_content(tmp_path):
    records = [{"text": f"text {i % 200}"} for i in range(400)]
    config = DataConfig("jsonl", write_jsonl(tmp_path / "a.jsonl", records), val_fraction=0.25)
    train, held_out = texts(config), texts(config, held_out=True)
    assert len(train) + len(held_out) == 400
    assert not set(train) & set(held_out)  # equal texts are on one side
    assert 25 <= len(set(held_out)) <= 75  # 50 expected, a standard deviation is 6
    shuffled = write_jsonl(tmp_path / "b.jsonl", records[::-1])
    assert set(texts(replace(config, path=shuffled), held_out=True)) == set(held_out)


def test_a_share_is_of_training_alone_and_grows_by_more_of_the_same(tmp_path):
    records = [{"text": f"text {i}"} for i in range(400)]
    config = DataConfig("jsonl", write_jsonl(tmp_path / "a.jsonl", records), val_fraction=0.25)
    training, held_out = texts(config), texts(config, held_out=True)
    some = {share: texts(replace(config, share=share)) for share in (0.2, 0.5)}
    assert set(some[0.2]) < set(some[0.5]) < set(training)
    assert 0.35 < len(some[0.5]) / len(training) < 0.65  # a standard deviation is 0.03
    assert texts(replace(config, share=0.2), held_out=True) == held_out
    with pytest.raises(ValueError, match="no training documents.*data.share=1e-09 of the others"):
        texts(replace(config, share=1e-9))


def test_val_path_is_all_held_out(tmp_path):
    for name in ("train", "val"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(5)])
    config = DataConfig(
        "jsonl", str(tmp_path / "train.jsonl"), val_path=str(tmp_path / "val.jsonl")
    )
    train, validation = load_corpora(config, BYTES)
    assert len(train.ends) == len(validation.ends) == 5
    assert validation.fingerprint == corpus_of(*(f"val {i}" for i in range(5))).fingerprint


def test_the_end_of_a_lone_text_is_held_out(tmp_path):
    """Cut at the start of a line, so that both parts are text."""
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "book.txt").write_text(text)
    config = DataConfig("text", str(tmp_path / "book.txt"), val_fraction=0.1)
    (training,), (held_out,) = load_documents(config)
    assert training.text + held_out.text == text
    assert training.text.endswith("\n") and 0.05 < len(held_out.text) / len(text) < 0.15


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_lone_text_has_no_share(tmp_path, share):
    """It would train whole or not at all, whatever part of it was asked for."""
    (tmp_path / "book.txt").write_text("a line\n" * 100)
    config = DataConfig("text", str(tmp_path / "book.txt"), val_fraction=0.1, share=share)
    with pytest.raises(ValueError, match=f"data.share={share}.*is one document"):
        load_documents(config)


@pytest.mark.parametrize("title", ["", "A title\n"])
def test_a_lone_text_without_lines_is_cut_all_the_same(tmp_path, title):
    text = title + "word " * 1000
    (tmp_path / "book.txt").write_text(text)
    config = DataConfig("text", str(tmp_path / "book.txt"), val_fraction=0.1)
    (training,), (held_out,) = load_documents(config)
    assert training.text + held_out.text == text
    assert len(held_out.text) == pytest.approx(len(text) / 10, abs=1)


def test_ngram_overlap_is_the_share_found_in_training():
    assert ngram_overlap(["a b c  d"], ["b c\nd e"], n=2) == pytest.approx(2 / 3)
    assert ngram_overlap(["a b", "c d"], ["b c"], n=2) == 0.0  # n-grams do not cross documents
    assert ngram_overlap(["a"], ["a"], n=2) == 0.0


# Shards


@pytest.fixture
def mixed(tmp_path):
    records = [{"text": d.text} for d in some_documents(150)]
    records[3] = {"prompt": "what? ", "completion": "that"}
    return DataConfig(
        "jsonl", write_jsonl(tmp_path / "a.jsonl", records), val_fraction=0.1, seq_len=16
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_the_corpus_in_memory(mixed, tmp_path, workers):
    reported: list[int] = []
    prepare_shards(mixed, tmp_path / "out", workers, shard_tokens=500, report=reported.append)
    shards = DataConfig("shards", str(tmp_path / "out"), seq_len=16)
    memory, opened = load_corpora(mixed, BYTES), load_corpora(shards, BYTES)
    shard_files = (tmp_path / "out").glob("*/shard-*.npy")
    found = Counter((file.parent.name, file.name.split(".")[1]) for file in shard_files)
    assert found["train", "tokens"] == found["train", "keep"] > 2
    assert found["validation", "tokens"] > 0 == found["validation", "keep"]  # no prompts there
    assert sum(reported) == sum(len(corpus.tokens) for corpus in memory)
    for left, right in zip(memory, opened, strict=True):
        assert left.fingerprint == right.fingerprint and left.n_bytes == right.n_bytes
        assert same(*(list(Batches(x, 16, 4, 2, epochs=1)) for x in (left, right)))


def test_shards_bring_their_tokenizer(mixed, tmp_path):
    prepare_shards(mixed, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()


def test_shards_of_another_tokenizer_are_refused(mixed, tmp_path):
    prepare_shards(mixed, tmp_path / "out")
    with pytest.raises(ValueError, match="data.tokenizer has digits"):
        load_corpora(DataConfig("shards", str(tmp_path / "out")), Digits())


def test_frequent_tokens_begin_with_the_end_token_and_go_by_frequency(mixed, tmp_path):
    assert bytes(frequent_tokens(corpus_of("abacabad", "b"), 4).tolist()[1:]) == b"abc"
    corpus = corpus_of("aaab")
    assert [frequent_tokens(corpus, n).tolist() for n in (1, 2, 9)] == [
        [END],
        [END, ord("a")],
        [END, ord("a"), ord("b")],
    ]
    prepare_shards(mixed, tmp_path / "shards", shard_tokens=100)
    shards = DataConfig(source="shards", path=str(tmp_path / "shards"))
    there, here = (load_corpus(config, BYTES, False) for config in (shards, mixed))
    assert frequent_tokens(there, 9).tolist() == frequent_tokens(here, 9).tolist()


def test_shards_are_never_overwritten(mixed, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out.*exists already"):
        prepare_shards(mixed, tmp_path / "out")


def test_failed_preparation_leaves_nothing(mixed, tmp_path):
    Path(str(mixed.path)).write_text('{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        prepare_shards(replace(mixed, val_fraction=0.0), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# Streams


def test_a_stream_has_the_rows_of_the_corpus():
    documents = [*some_documents(), Document((("prompt", False), ("yes", True)))]
    corpus = Corpus.from_documents(documents, BYTES)
    whole = (len(corpus.tokens) - 3) // 4  # rows that need no padding
    expected = take(Batches(corpus, 4, 3, batch_size=1, shuffle=False), whole)
    assert same(take(StreamingBatches(lambda: documents, BYTES, 4, 3, 1), whole), expected)


@pytest.mark.parametrize("cut", [0, 1, 2, 7, 20, 31])
def test_resuming_a_stream_gives_the_same_stream(cut):
    documents = [*some_documents(), Document((("prompt", False), ("yes", True)))]
    batches = StreamingBatches(lambda: documents, BYTES, 4, 3, batch_size=2)
    take(batches, cut)
    state = json.loads(json.dumps(batches.state_dict()))
    assert cut < 31 or state["document"] >= len(documents)  # this cut lies in the second pass
    expected = take(batches, 30)
    resumed = StreamingBatches(lambda: documents, BYTES, 4, 3, batch_size=2)
    resumed.load_state_dict(state)
    assert same(take(resumed, 30), expected)


def test_ranks_partition_a_stream_and_its_state_moves():
    documents = some_documents()
    alone = StreamingBatches(lambda: documents, BYTES, 4, 3, batch_size=4)
    take(alone, 3)
    ranks = [StreamingBatches(lambda: documents, BYTES, 4, 3, 2, r, 2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    for _ in range(9):
        assert same([next(rank) for rank in ranks], [next(alone)])


def test_the_state_of_another_stream_is_refused():
    one, other = some_documents(seed=1), some_documents(seed=2)
    left = StreamingBatches(lambda: one, BYTES, 4, 3, 1)
    right = StreamingBatches(lambda: other, BYTES, 4, 3, 1)
    take(left, 5)
    with pytest.raises(ValueError, match="its ahead is"):
        right.load_state_dict(left.state_dict())


# Refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": "csv"}, "data.source='csv': allowed: text, folder"),
        ({"source": "text"}, "data.path: source='text' needs one"),
        ({"path": "x"}, "data.path: source='stdlib'"),
        ({"source": "folder", "path": "x"}, "data.pattern"),
        ({"val_path": "x"}, "data.val_path"),
        ({"source": "text", "path": "x", "val_split": "test"}, "data.val_split"),
        ({"streaming": True}, "data.streaming"),
        ({"source": "datasets", "path": "x", "streaming": True}, "val_split or val_path"),
        ({"source": "jsonl", "path": "x", "holdout": ["json"]}, "data.holdout"),
        ({"source": "text", "path": "x", "val_path": "y", "holdout": ["z"]}, "data.holdout"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0"),
        ({"source": "code"}, r"data.benchmarks: source='code' needs .*\[\] leaves nothing out"),
        ({"source": "code", "benchmarks": [], "path": "x"}, "data.path: source='code'"),
        ({"source": "shards", "path": "x", "benchmarks": ["y"]}, "data.benchmarks: not for"),
        ({"packages": ["rich"]}, "data.packages: for source='code' only"),
        ({"micro_share": 1.0}, "data.micro_share=1.0"),
        ({"share": 0.0}, r"data.share=0.0: allowed: \(0, 1\]"),
        ({"source": "shards", "path": "x", "share": 0.5}, "data.share: not for this source"),
        ({"seq_len": 0}, "data.seq_len=0"),
        ({"seed": -1}, "data.seed=-1"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


@pytest.mark.parametrize(
    "lines, message",
    [
        (b'{"text": "a"}\n{"text": "b\xff"}\n', r"a\.jsonl: no UTF-8 at byte 25"),
        (b'{"text": "a"}\n{"text"\n', r"a\.jsonl, line 2: no JSON"),
        (b'["text"]\n', "line 1: holds list"),
        (b'{"body": "a"}\n', r"line 1: has the keys \['body'\].*data.text_key='text'"),
        (b'{"text": null}\n', "'text' must be a string"),
        (b'{"text": "\\ud800"}\n', "line 1: 'text'.*surrogates"),
        (b'{"messages": "hi"}\n', "messages must be a list"),
        (b'{"messages": [{"content": "hi"}]}\n', "'role' must be a string"),
        (b'{"messages": ["hi"]}\n', "'role' must be a string"),
    ],
)
def test_bad_records_are_refused_by_place(tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(ValueError, match=message):
        texts(DataConfig("jsonl", str(tmp_path), val_fraction=0.0))


def test_files_that_are_no_utf8_are_refused_by_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"a\.txt: no UTF-8 at byte 3"):
        texts(DataConfig("text", str(tmp_path)))


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "folder"])
def test_missing_and_empty_sources_are_refused_by_name(tmp_path, source):
    if source == "parquet":
        pytest.importorskip("pyarrow")
    nothing_fits = r"no file in .* is called \*\.x \(data.pattern\)"
    for path, message in (("nowhere", "no file or folder .*nowhere"), (".", nothing_fits)):
        config = DataConfig(source, str(tmp_path / path), pattern="*.x")
        with pytest.raises(ValueError, match=message):
            texts(config)


def test_an_empty_validation_part_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("only one document")
    config = DataConfig("text", str(tmp_path), val_fraction=0.0)
    with pytest.raises(ValueError, match="no validation documents among .*data.val_fraction"):
        load_corpora(config, BYTES)


def test_a_misspelt_holdout_is_refused():
    with pytest.raises(ValueError, match=r"data.holdout.*\['jsonn'\]"):
        texts(DataConfig("stdlib", pattern="json/*.py", holdout=["json", "jsonn"]), held_out=True)


def test_shards_hold_no_documents_and_must_exist(tmp_path):
    config = DataConfig("shards", str(tmp_path))
    with pytest.raises(ValueError, match="no shards in"):
        load_corpora(config, BYTES)
    with pytest.raises(ValueError, match="holds token ids"):
        load_documents(config)


def test_a_stream_is_no_corpus():
    config = DataConfig("datasets", "x", streaming=True, val_split="validation")
    with pytest.raises(ValueError, match="StreamingBatches"):
        load_corpus(config, BYTES, held_out=False)


def test_empty_corpora_and_streams_are_refused():
    with pytest.raises(ValueError, match="at least one document"):
        Corpus.from_documents([], BYTES)
    with pytest.raises(ValueError, match="stream is empty"):
        StreamingBatches(list, BYTES, 4, 1, 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_len": 9}, r"9 tokens, one row needs 10"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"n_future_tokens": 0}, "n_future_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 1}, "rank=1.*world_size=1"),
    ],
)
def test_impossible_batches_are_refused_by_name(changes, message):
    sizes = {"seq_len": 4, "n_future_tokens": 1, "batch_size": 1, **changes}
    with pytest.raises(ValueError, match=message):
        Batches(corpus_of("abcdefgh"), **sizes)


def test_every_source_has_a_test():
    words = ["text", "lines", "folder", "stdlib", "code", "jsonl", "parquet", "datasets", "shards"]
    assert sorted(SOURCES) == sorted([*words, "task"])  # tasks: tests/test_tasks.py
