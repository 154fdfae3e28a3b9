"""Checkpoints: exact, complete or absent, readable without pickle, and clear about damage."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import KINDS, tiny
from safetensors.torch import load_file, save_file

from mtp import checkpoint
from mtp.checkpoint import (
    TrainingState,
    find,
    fingerprint,
    load,
    load_tokenizer,
    load_training,
    save,
)
from mtp.tokenizer import ByteTokenizer

PROGRESS = {"step": 7, "seconds": 0.1, "data": {"row": 3, "corpus": "x", "shuffle": True}}
FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "training.json",
    "optimizer.safetensors",
}


def training():
    moments = {"a.exp_avg": torch.arange(6) / 7, "a.exp_avg_sq": (torch.arange(6) / 9).view(3, 2).T}
    return TrainingState(PROGRESS, moments | {"a.step": torch.tensor(7.0)})


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a model with everything in it."""
    return save(tiny(), tmp_path / "saved", ByteTokenizer(), training(), {"note": [1, "two"]})


def test_the_fingerprint_is_of_all_files_but_those_of_training(saved, tmp_path):
    was = fingerprint(saved)
    assert fingerprint(shutil.copytree(saved, tmp_path / "training-done")) == was
    for name in ("training.json", "optimizer.safetensors"):
        (saved / name).unlink()
    assert fingerprint(saved) == was
    others = []
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        other = shutil.copytree(saved, tmp_path / f"other-{name}")
        (other / name).write_bytes((other / name).read_bytes() + b" ")
        others.append(fingerprint(other))
    again = save(tiny(), tmp_path / "again", ByteTokenizer(), None, {"note": [1, "two"]})
    assert len({was, *others, fingerprint(again)}) == 5  # other checksums in its config


def test_a_hugging_face_folder_is_refused_with_the_way_to_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="no checkpoint config of this library.*convert.py source"):
        load(tmp_path)


# What is saved comes back.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "overrides", [{}, {"unembedding": "replicated"}, {"tie_embeddings": True}], ids=str
)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(kind, overrides, tmp_path):
    model = tiny(kind, **overrides)
    loaded = load(save(model, tmp_path / "x"), dtype=torch.float64)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, t in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t), name
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(loaded(tokens), model(tokens))


def test_a_tied_matrix_is_stored_once_and_tied_again(tmp_path):
    folder = save(tiny(tie_embeddings=True), tmp_path / "x")
    assert "output.0" not in load_file(folder / "model.safetensors")
    loaded = load(folder)
    assert loaded.output.weights[0] is loaded.embedding.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_loads_in_the_type_asked_for(dtype, tmp_path):
    model = tiny().float()
    loaded = load(save(model, tmp_path / "x"), dtype=dtype)
    for name, t in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t.to(dtype)), name


def test_training_state_comes_back_bit_for_bit(saved):
    state = training()
    folder = save(tiny(), saved.with_name("other"), training=state)
    loaded = load_training(folder)
    assert loaded.progress == PROGRESS
    assert loaded.optimizer.keys() == state.optimizer.keys()
    assert all(torch.equal(loaded.optimizer[name], t) for name, t in state.optimizer.items())


def test_the_tokenizer_and_the_notes_come_back(saved):
    assert load_tokenizer(saved).fingerprint == ByteTokenizer.fingerprint
    assert json.loads((saved / "config.json").read_text())["notes"]["note"] == [1, "two"]


def test_the_folder_holds_the_documented_files_and_nothing_pickled(saved):
    assert {path.name for path in saved.iterdir()} == FILES
    for path in saved.glob("*.json"):
        json.loads(path.read_text())
    for path in saved.glob("*.safetensors"):
        load_file(path)


def test_others_may_read_what_was_saved(saved):
    assert saved.stat().st_mode & 0o777 == 0o755


# Which checkpoint is meant.


def test_a_run_directory_stands_for_its_newest_checkpoint_by_number(tmp_path):
    for seed, name in enumerate(["step-00000009", "step-10", "step-100000000", "step-2"]):
        save(tiny(seed=seed), tmp_path / "checkpoints" / name, ByteTokenizer())
    (tmp_path / "checkpoints" / "step-old").mkdir()
    assert find(tmp_path).name == "step-100000000"
    newest = tiny(seed=2).state_dict()
    loaded = load(tmp_path, dtype=torch.float64).state_dict()
    assert all(torch.equal(t, newest[name]) for name, t in loaded.items())
    assert load_tokenizer(tmp_path).fingerprint == ByteTokenizer.fingerprint


def test_a_checkpoint_stands_for_itself(saved):
    assert find(saved) == find(str(saved)) == saved


@pytest.mark.parametrize("call", [find, load, load_training])
@pytest.mark.parametrize("exists", [True, False])
def test_a_place_without_a_checkpoint_is_named(call, exists, tmp_path):
    where = tmp_path if exists else tmp_path / "nothing"
    with pytest.raises(FileNotFoundError, match=f"{where} is no checkpoint") as caught:
        call(where)
    assert "checkpoints/step-*" in str(caught.value)


def test_a_checkpoint_without_training_state_cannot_be_trained_on(tmp_path):
    folder = save(tiny(), tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=f"{folder} holds no training state"):
        load_training(folder)


# Damage.


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_missing_surplus_and_misshapen_tensors_are_all_named(saved):
    def change(tensors):
        del tensors["norm.weight"]
        tensors["extra.bias"] = torch.zeros(2)
        tensors["embedding.weight"] = torch.zeros(3, 16)

    rewrite(saved, change)
    with pytest.raises(ValueError, match=f"{saved}/model.safetensors does not fit") as caught:
        load(saved)
    for problem in (
        "missing: norm.weight (16,)",
        "surplus: extra.bias (2,)",
        "misshapen: embedding.weight is (3, 16), the config wants (13, 16)",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("size", [0, 5, 200])
def test_truncated_tensors_are_damage_to_a_named_file(saved, name, size):
    (saved / name).write_bytes((saved / name).read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{saved}/{name} is damaged"):
        load_training(saved)
        load(saved)


def test_a_missing_weights_file_is_named(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"{saved}/model.safetensors is missing"):
        load(saved)


@pytest.mark.parametrize(
    "text",
    [b"", b'{"format_ver', b"[]", b"7", b"{}", b'{"format_version": 1}', b"\xff\xfe"]
    + [b'{"format_version": 1, "model": 5}'],
)
def test_a_damaged_config_is_named(saved, text):
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"{saved}/config.json is no checkpoint config"):
        load(saved)


@pytest.mark.parametrize("text", [b"", b'{"step": 1', b"\xff"])
def test_a_damaged_training_file_is_named(saved, text):
    (saved / "training.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"{saved}/training.json is damaged"):
        load_training(saved)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_an_unknown_format_version_is_refused(saved):
    edit_config(saved, format_version=99)
    with pytest.raises(ValueError, match="format version 99; this release reads 1"):
        load(saved)


def test_unknown_model_keys_are_named(saved):
    edit_config(saved, model={"dim": 16, "n_experts": 8, "window": 3})
    with pytest.raises(ValueError, match="unknown model keys: n_experts, window"):
        load(saved)


# Writing: complete or absent.


def breaks(monkeypatch, where):
    """Let one of the writers fail in the middle of its work."""

    def torn(tensors, path, *args):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def out_of_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if where == "tensors":
        monkeypatch.setattr("safetensors.torch.save_file", torn)
    elif where == "tokenizer":
        monkeypatch.setattr(ByteTokenizer, "save", out_of_space)
    else:
        monkeypatch.setattr(os, where, out_of_space)


@pytest.mark.parametrize("where", ["tensors", "tokenizer", "fsync", "rename"])
def test_a_failed_write_leaves_the_earlier_checkpoint_and_nothing_else(where, tmp_path):
    run = tmp_path / "checkpoints"
    earlier = save(tiny(seed=1), run / "step-1", ByteTokenizer(), training())
    with pytest.MonkeyPatch.context() as monkeypatch:
        breaks(monkeypatch, where)
        with pytest.raises(OSError, match=f"cannot write the checkpoint {run}/step-2") as caught:
            save(tiny(), run / "step-2", ByteTokenizer(), training())
    assert "No space left" in str(caught.value)
    assert "Earlier checkpoints are untouched" in str(caught.value)
    assert os.listdir(run) == ["step-1"]
    assert find(tmp_path) == earlier
    load(tmp_path)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tiny(), tmp_path / "x")
    assert not os.listdir(tmp_path)


def test_half_a_checkpoint_that_a_killed_process_left_is_never_found(tmp_path):
    save(tiny(), tmp_path / "checkpoints" / "step-1")
    killed = []
    with pytest.MonkeyPatch.context() as monkeypatch:  # as if the process ended before the rename
        monkeypatch.setattr(os, "rename", lambda source, target: killed.append(source))
        monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        save(tiny(), tmp_path / "checkpoints" / "step-2")
    assert killed[0].is_dir()
    assert find(tmp_path).name == "step-1"


def test_a_disk_without_room_is_one_message_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    large = TrainingState({}, {"a.exp_avg": torch.zeros(2**20)})
    with pytest.raises(OSError, match="4 MiB are needed, 1 MiB are free"):
        save(tiny(), tmp_path / "x", training=large)
    assert not os.listdir(tmp_path)


@pytest.fixture
def small_files():
    """No file may grow beyond 20,000 bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_meanwhile_is_one_message_and_leaves_nothing(tmp_path, small_files):
    with pytest.raises(OSError, match=f"cannot write the checkpoint {tmp_path}/x: "):
        save(tiny(), tmp_path / "x")
    assert not os.listdir(tmp_path)


def test_a_checkpoint_is_never_overwritten(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(FileExistsError, match=f"{saved} exists already"):
        save(tiny(seed=5), saved)
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}


def test_a_place_that_cannot_be_a_folder_is_one_message(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=f"cannot write the checkpoint {tmp_path}/file/step-1"):
        save(tiny(), tmp_path / "file" / "step-1")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_readable_as_other_new_files_are(mask, tmp_path):
    before = os.umask(mask)
    try:
        folder = save(tiny(), tmp_path / "saved", ByteTokenizer(), training())
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~mask}


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = tiny()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    save(model, tmp_path / "x", training=training())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert (
        checkpoint.FORMAT_VERSION
        == json.loads((tmp_path / "x/config.json").read_text())["format_version"]
    )


def test_gathering_refuses_damage_and_keeps_types(saved, tmp_path):
    plain = checkpoint.gather(saved, tmp_path / "plain")
    for name in ("model", "optimizer"):
        assert (plain / f"{name}.safetensors").read_bytes() == (
            saved / f"{name}.safetensors"
        ).read_bytes()
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors is damaged: it is not what was"):
        checkpoint.gather(saved, tmp_path / "again")
    assert not (tmp_path / "again").exists()
