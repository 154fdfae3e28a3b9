"""scripts/attach.py: a run folder with logs, checkpoints and heads that load."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("hydra")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from test_attach import settings, small_folder  # noqa: E402
from test_run import TIMES  # noqa: E402

from mtp.data import read_vocabulary
from mtp.documents import DataConfig  # noqa: E402
from mtp.hooks import read_jsonl  # noqa: E402
from mtp.interop.attach import WEIGHTS, load_heads  # noqa: E402
from mtp.interop.folder import find_model  # noqa: E402
from mtp.train import TrainConfig  # noqa: E402
from scripts.attach import AttachConfig, attach, open_model  # noqa: E402


@pytest.fixture
def config(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_text("abcdefgh" * 30 + str(i))
    data = DataConfig("folder", str(texts), "*.txt", holdout=["7.txt"], seq_len=16)
    train = replace(settings(30, lr=0.05), log_every=2)
    model = str(small_folder(tmp_path / "model"))
    return AttachConfig(model, str(tmp_path / "run"), n=3, data=data, train=train)


def trunk_of(folder):
    return find_model(folder).open(torch.device("cpu"))


def lines(config):
    found = read_jsonl(Path(config.run_dir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def written(config):
    return load_file(Path(config.run_dir) / "heads" / WEIGHTS)


def test_the_command_trains_heads_for_a_folder(config, capsys):
    attach(config)
    out = f"{config.run_dir}/heads"
    assert f"written: {out}" in capsys.readouterr().out
    heads = load_heads(trunk_of(config.trunk), out)
    assert heads.n_future_tokens == 3 and all(p.any() for p in heads.parameters())
    log = lines(config)
    assert log[-1]["loss_3"] < 0.8 * log[0]["loss_3"]
    assert "loss_1" not in log[0] and "val_acceptance_length" in log[-1]
    with pytest.raises(ValueError, match="holds a run already"):
        attach(config)
    again, _ = open_model(replace(config, heads=out), find_model(config.trunk))
    assert torch.equal(next(again.parameters()), next(heads.parameters()))


def test_a_run_from_states_in_two_parts_is_the_run_in_one(config, tmp_path):
    train = replace(config.train, optim=replace(config.train.optim, final_lr_ratio=1.0))
    config = replace(config, states=str(tmp_path / "states"), draft_vocabulary=5, train=train)
    one = replace(config, run_dir=str(tmp_path / "one"))
    attach(one)
    attach(replace(config, train=replace(train, steps=14)))
    first = written(config)
    attach(replace(config, resume="true"))
    parts, whole = ([x for x in lines(c) if x["step"] not in (14, 30)] for c in (config, one))
    assert parts == whole
    ids = read_vocabulary(str(Path(config.run_dir, "vocabulary.json")))
    assert len(ids) == 5 and 256 in ids
    assert all(map(torch.equal, written(config).values(), written(one).values()))
    assert not any(map(torch.equal, first.values(), written(one).values()))
    with pytest.raises(ValueError, match=r"another: kind='causal' \(saved: 'residual'\)"):
        attach(replace(config, resume="auto", kind="causal"))


@pytest.mark.parametrize("learning", ["lora", "all"])
def test_a_trunk_that_learned_is_written_beside_its_heads(config, learning):
    if learning == "lora":
        pytest.importorskip("peft")
    config = replace(config, learning=learning, lora_rank=2, train=settings(6))
    attach(config)
    run_dir = Path(config.run_dir)
    attach(replace(config, resume="true", train=settings(9)))
    heads = load_heads(trunk_of(run_dir / "trunk"), run_dir / "heads")
    assert heads.n_future_tokens == 3 and lines(config)[-1]["loss_1"] > 0
    with pytest.raises(ValueError, match="another trunk: fingerprint"):
        load_heads(trunk_of(config.trunk), run_dir / "heads")
    # The other way round: heads that follow a trunk which was trained further.
    frozen = replace(config, learning="frozen", trunk=str(run_dir / "trunk"))
    attach(replace(frozen, run_dir=f"{run_dir}-again", heads=str(run_dir / "heads")))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "x"}, "kind='x' is unknown"),
        ({"learning": "x"}, "learning='x' is unknown: allowed are frozen, lora, all"),
        ({"learning": "all", "states": "y"}, "states=y: a trunk with learning=all changes"),
        ({"train": TrainConfig(compile=True)}, "train.compile=True: not for heads"),
        ({"resume": "maybe"}, "resume='maybe': allowed are false, true, auto"),
        ({"data": DataConfig(tokenizer="x")}, "data.tokenizer=x: the trunk brings its own"),
    ],
)
def test_what_does_not_fit_is_refused_by_key(change, message):
    with pytest.raises(ValueError, match=message):
        AttachConfig("x", **change)
