"""A model's own text as data: written once, read back with the ids that it wrote."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("hydra")

import mtp
from mtp.data import Corpus
from mtp.documents import DataConfig, iter_documents
from mtp.encoding import encode_document
from mtp.hooks import read_jsonl
from mtp.tokenizer import ByteTokenizer
from scripts.self_distill import SelfDistillConfig, self_distill

BYTES = ByteTokenizer()
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model: its bytes are no UTF-8, so that its texts do not say what it wrote."""
    shape = {"dim": 16, "n_layers": 4, "n_heads": 2, "multiple_of": 8, "max_seq_len": 64}
    model = mtp.Transformer(mtp.ModelConfig(**shape), torch.Generator().manual_seed(0))
    return mtp.save(model, tmp_path_factory.mktemp("model") / "m", BYTES)


@pytest.fixture
def config(folder, tmp_path):
    texts = [{"text": f"{name} text of one document"} for name in "abcde"]
    pairs = [{"prompt": f"{name}?", "completion": "no"} for name in "fgh"]
    lines = "".join(json.dumps(record) + "\n" for record in (*texts, *pairs))
    (tmp_path / "prompts.jsonl").write_text(lines)
    data = DataConfig("jsonl", str(tmp_path / "prompts.jsonl"), val_fraction=0)
    return SelfDistillConfig(
        str(folder),
        str(tmp_path / "own.jsonl"),
        prompt_tokens=6,
        max_new_tokens=NEW,
        batch_size=3,
        device="cpu",
        data=data,
        sampling=mtp.Sampling(1.0),
    )


def written(config):
    return {record["number"]: record for record in read_jsonl(Path(config.out))}


def documents(config):
    return list(iter_documents(DataConfig("jsonl", config.out, val_fraction=0), False))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_prompt_is_continued_as_decoding_it_alone_does(temperature, config, folder):
    config = replace(config, sampling=mtp.Sampling(temperature))
    self_distill(config)
    records, model = written(config), mtp.load(folder)
    prompts = [f"{name} text" for name in "abcde"] + [f"{name}?" for name in "fgh"]
    assert sorted(record["prompt"] for record in records.values()) == prompts
    for number, record in records.items():
        stop = mtp.stop_at(BYTES.end_id)
        request = mtp.Request(BYTES.encode(record["prompt"]), NEW, number, stop)
        (alone,) = mtp.generate(model, [request], sampling=config.sampling)
        assert record["completion_ids"] == alone.tokens


def test_completions_are_read_back_with_their_ids_as_targets(config):
    self_distill(config)
    records = list(read_jsonl(Path(config.out)))
    assert any(BYTES.encode(r["completion"]) != r["completion_ids"] for r in records)
    for record, document in zip(records, documents(config), strict=True):
        prompt, completion = record["prompt_ids"], record["completion_ids"]
        ids, keep, *_ = encode_document(document, BYTES)
        cut_off = completion[-1] != BYTES.end_id
        assert ids.tolist() == [*prompt, *completion, *[BYTES.end_id] * cut_off]
        assert keep.tolist() == [False] * len(prompt) + [True] * len(completion) + [False] * cut_off


def test_a_stopped_run_goes_on_and_repeats_nothing(config, capsys):
    self_distill(config)
    whole, path = written(config), config.out
    with open(path, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    with open(path, "wb") as file:
        file.writelines([*lines[:3], lines[3][:20]])
    capsys.readouterr()
    self_distill(config)
    assert "5 completions now, 8 in all" in capsys.readouterr().out
    assert written(config) == whole
    with open(path, "rb") as file:
        assert file.read().splitlines(keepends=True)[:3] == lines[:3]


def test_more_completions_than_prompts_differ_and_leave_the_first_ones(config):
    self_distill(replace(config, count=3))
    few = written(config)
    self_distill(replace(config, count=10))
    many = written(config)
    assert few.items() <= many.items() and len(many) == 10
    assert many[1]["prompt_ids"] == many[9]["prompt_ids"]
    assert many[1]["completion_ids"] != many[9]["completion_ids"]


def test_another_runs_file_is_refused(config):
    self_distill(config)
    with pytest.raises(ValueError, match="out=.* other prompts or settings: choose another file"):
        self_distill(replace(config, max_new_tokens=NEW + 1))


def test_prompts_without_room_are_counted(config, capsys):
    self_distill(replace(config, max_new_tokens=60))
    assert "3 completions now, 3 in all; 5 prompts were" in capsys.readouterr().out


def test_ids_of_another_tokenizer_are_refused(config):
    self_distill(config)

    class Other(ByteTokenizer):
        fingerprint = "other"

    with pytest.raises(
        ValueError, match=f"ids of the tokenizer of fingerprint {BYTES.fingerprint}"
    ):
        Corpus.from_documents(documents(config), Other())


@pytest.mark.parametrize("ids", ["12", [1, "2"], [-1], [True]])
def test_what_is_no_id_is_refused_by_line(ids, config, tmp_path):
    self_distill(config)
    record = next(read_jsonl(Path(config.out))) | {"prompt_ids": ids}
    (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="bad.jsonl, line 1: ids must be a list of numbers"):
        documents(replace(config, out=str(tmp_path / "bad.jsonl")))
