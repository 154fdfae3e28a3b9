"""What earlier releases wrote is read, value by value; what a later one wrote is refused in a
sentence. A folder of tests/files is what `make.py` beside it wrote at a release.
"""

import json
import re
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
import torch

from benchmarks.record import read
from mtp import load, load_tokenizer
from mtp.checkpoint import check, load_training
from mtp.consistency.files import origin_of, read_trajectories
from mtp.data import Batches, load_corpus
from mtp.documents import DataConfig
from mtp.evaluate.samples import Sample, read_samples
from mtp.interop.attach import load_heads
from mtp.optim import OptimConfig, Optimizer

FILES = Path(__file__).resolve().parent / "files"
HEADERS = {  # what has a version -> where it stands
    "checkpoint": "checkpoint/config.json",
    "shards": "shards/train/index.json",
    "heads": "heads/heads.json",
    "trajectories": "trajectories/shard-0000000.jsonl",
    "samples": "samples.jsonl",
    "record": "record.json",
}


def corpus(folder, held_out):
    config = DataConfig("shards", path=str(folder / "shards"))
    return load_corpus(config, load_tokenizer(folder / "checkpoint"), held_out)


def trajectories(folder):
    tokenizer = load_tokenizer(folder / "checkpoint").fingerprint
    return read_trajectories(folder / "trajectories", tokenizer, 3, folder / "checkpoint")


READERS = {
    "checkpoint": lambda folder: load(folder / "checkpoint"),
    "shards": lambda folder: corpus(folder, held_out=False),
    "heads": lambda folder: load_heads(load(folder / "checkpoint"), folder / "heads"),
    "trajectories": trajectories,
    "samples": lambda folder: read_samples(folder / "samples.jsonl"),
    "record": lambda folder: read(folder / "record.json"),
}


@pytest.fixture(params=["first_release"])
def release(request):
    folder = FILES / request.param
    said = json.loads((folder / "expected.json").read_text())
    return SimpleNamespace(folder=folder, **said)


def test_a_checkpoint_gives_its_logits(release):
    folder = release.folder / "checkpoint"
    check(folder)
    model = load(folder)
    tokens = torch.tensor([load_tokenizer(folder).encode("one two")])
    found = model(tokens, return_all_heads=True)[0, -1, :, :8].flatten()
    torch.testing.assert_close(found, torch.tensor(release.logits), atol=1e-5, rtol=0)


def test_training_goes_on_from_it(release):
    model = load(release.folder / "checkpoint")
    training = load_training(release.folder / "checkpoint", model)
    assert training.progress["tokens"] == release.tokens_read
    Batches(corpus(release.folder, False), 16, 2, 2).load_state_dict(training.progress["data"])
    Optimizer(model, OptimConfig()).load_state_dict(training.optimizer)


def test_shards_have_their_documents(release):
    for held_out, (tokens, documents, n_bytes, fingerprint) in enumerate(release.shards):
        found = corpus(release.folder, bool(held_out))
        assert (len(found.tokens), len(found.ends)) == (tokens, documents)
        assert (found.n_bytes, found.fingerprint) == (n_bytes, fingerprint)


def test_attached_heads_are_those_of_their_trunk(release):
    heads = load_heads(load(release.folder / "checkpoint"), release.folder / "heads").heads
    assert len(list(heads.parameters())) == 2
    assert all((parameter == 0.5).all() for parameter in heads.parameters())


def test_trajectories_end_in_their_responses(release):
    assert [t.response for t in trajectories(release.folder)] == release.responses
    assert origin_of(release.folder / "trajectories").settings == {"by": "make.py"}


def test_samples_and_a_record_have_their_values(release):
    run, samples = read_samples(release.folder / "samples.jsonl")
    assert run == release.run and samples == [Sample(**release.sample)]
    assert read(release.folder / "record.json")["values"] == release.values


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_version_is_named(what, version, release, tmp_path):
    """Before anything else of the file is asked for: a later header may look otherwise."""
    folder = copytree(release.folder, tmp_path / "release")
    file = folder / HEADERS[what]
    lines = file.read_text().split("\n")[1:] if file.suffix == ".jsonl" else []
    file.write_text("\n".join([json.dumps({"format_version": version}), *lines]))
    with pytest.raises(ValueError, match=re.escape(f"has format version {version!r}; this ")):
        READERS[what](folder)
