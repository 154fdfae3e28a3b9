"""The commands: they run from a shell, end in files and texts, and fail in one line."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import a_run

import mtp
from mtp.checkpoint import load_training
from mtp.consistency.files import read_trajectories
from mtp.data import read_vocabulary
from mtp.documents import DataConfig
from mtp.hooks import read_jsonl
from mtp.tokenizer import ByteTokenizer, train_sentencepiece

pytest.importorskip("hydra")
from scripts.draft_vocabulary import VocabularyConfig, draft_vocabulary  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("model.dim=16", "model.n_layers=5", "model.n_heads=2", "model.multiple_of=8"),
    *("model.max_seq_len=256", "data.seq_len=32", "train.batch_size=2", "train.log_every=1"),
    *("device=cpu", "sample_every=0"),
]
NAMED = ["checkpoint=x", "out=y"]
SUMMARY = {
    *("params", "train_tokens", "train_seconds", "val_bits_per_byte", "prompts", "identical"),
    *("mean_acceptance_length", "acceptance_length_text", "repetition", "acceptance"),
    *("verify_cost", "speedup", "ar_over_bare_loop", "total_seconds"),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name in ("a", "b", "c", "held"):
        line = f"def {name}(self, x): return {name}.x + 1\n"
        (folder / f"{name}.txt").write_text(line * 20)
    return [f"data.path={folder}", "data.source=text", "data.holdout=[held]"]


def shell(name, *words):
    return subprocess.run(
        [sys.executable, f"scripts/{name}.py", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def run_in(folder, *words):
    """A run directory that `python scripts/train.py` left, and what the command said."""
    done = shell("train", *SMALL, f"run_dir={folder}", "train.optim.lr=1e-2", *words)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    return run_in(folder, *texts, "train.steps=30", "train.optim.warmup_steps=1")


# From a shell.


def test_training_leaves_a_run_and_says_how_it_went(trained):
    folder, done = trained
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == list(range(1, 31))
    assert mtp.load(folder).config.dim == 16
    assert done.stdout == ""
    for words in ("parameters", "loss per head", "held out", f"saved {folder}/checkpoints/step-"):
        assert words in done.stderr


def test_a_command_leaves_no_files_of_its_own(trained):
    assert not [path for path in ("outputs", "multirun", ".hydra") if (ROOT / path).exists()]


def test_a_mistake_is_one_line_and_a_failure_for_the_shell(tmp_path):
    done = shell("train", "train.precision=fp8", f"run_dir={tmp_path}/x")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: train.precision='fp8' is unknown: allowed are float32, bfloat16\n"
    )


# Generating.


def generated(command, trained, *words):
    at = [f"checkpoint={trained[0]}", "max_new_tokens=40", "device=cpu"]
    return command("generate", *at, *words)


@pytest.mark.parametrize("sampling", [[], ["sampling.temperature=0.8", "samples=3", "seed=5"]])
def test_drafting_changes_the_steps_and_not_the_text(sampling, trained, command):
    plain = generated(command, trained, "prompt='def '", *sampling)
    assert plain.out.startswith("def ") and "mean acceptance length 1.00" in plain.err
    model = ["drafter=model", f"draft={trained[0]}"]
    beam = ["drafter=beam", "width=3", "whole=true"]
    for drafter in (["drafter=heads"], model, [*model, "depth=1"], ["drafter=lookup"], beam):
        drafted = generated(command, trained, "prompt='def '", *drafter, *sampling)
        assert plain.out == drafted.out
        assert "mean acceptance length 1.00" not in drafted.err


def test_a_lossy_rule_says_so(trained, command):
    joint = generated(command, trained, "prompt=a", "drafter=beam", "rule=joint", "threshold=0.1")
    assert joint.err.rstrip().endswith("rule=joint is lossy")
    assert "lossy" not in generated(command, trained, "prompt=a", "drafter=heads").err


def test_a_draft_of_another_tokenizer_is_refused(trained, command, tmp_path):
    """Its guesses would be silently worthless where the vocabularies are equally large."""
    pytest.importorskip("sentencepiece")
    lines = [f"def f{i}(self, value): return value + {i} * self.x\n" for i in range(300)]
    other = train_sentencepiece(lines, tmp_path / "m.model", vocab_size=300)
    mtp.save(mtp.load(trained[0]), tmp_path / "draft", other)
    with pytest.raises(SystemExit, match="draft has another tokenizer than"):
        generated(command, trained, "prompt=a", "drafter=model", f"draft={tmp_path}/draft")


def test_a_depth_that_adapts_leaves_the_text(trained, command):
    plain = generated(command, trained, "prompt='def '")
    adaptive = generated(command, trained, "prompt='def '", "drafter=heads", "depth=auto")
    assert adaptive.out == plain.out
    assert "mean acceptance length 1.00" not in adaptive.err  # all depths are tried at the start


def test_samples_of_one_prompt_differ_and_seeds_repeat_them(trained, command):
    words = ["prompt=d", "sampling.temperature=1", "max_new_tokens=20", "samples=2"]
    first, again = (generated(command, trained, *words, "seed=1").out for _ in range(2))
    other = generated(command, trained, *words, "seed=2").out
    assert first == again != other


@pytest.mark.parametrize("samples", [1, 2])
def test_a_text_is_shown_up_to_its_stop_string(samples, trained, command):
    """Shown as it comes, for one sample; whole, for several."""
    words = ["prompt='def '", "drafter=heads", f"samples={samples}"]
    whole = generated(command, trained, *words).out
    stop = whole[9:12]
    shown = generated(command, trained, *words, f"stop=[zzzz,'{stop}']").out
    texts = [whole[: whole.index(stop, 4)] + "\n"] * samples
    assert stop.isprintable() and shown == "".join(texts)


def test_a_file_of_prompts_gives_a_text_per_line(trained, command, tmp_path):
    (tmp_path / "prompts.txt").write_text("def a\ndef b\n")
    both = generated(command, trained, f"prompts={tmp_path}/prompts.txt").out
    alone = [generated(command, trained, f"prompt='def {name}'").out for name in "ab"]
    assert both == "".join(alone)


@pytest.mark.parametrize("words", [["threads=2"], ["threads=auto", "precision=auto"]])
def test_the_settings_are_said_and_set(words, trained, command):
    said = generated(command, trained, "prompt=a", "drafter=heads", *words).err.splitlines()[0]
    assert said.startswith(f"decoding with {torch.get_num_threads()} thread")
    assert all(f"in {name} " in said for name in ("float32", "bfloat16")) == (len(words) > 1)


# Checking heads.


@pytest.fixture(scope="module")
def sound(texts, tmp_path_factory):
    """A run that learnt its text well enough for every head to know its place."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    return run_in(folder, *texts, "train.steps=150", "train.batch_size=8")[0]


@pytest.mark.parametrize("words", [[], ["prompt='def a(self'"]])
def test_sound_heads_are_called_sound(words, sound, command):
    said = command("generate", f"checkpoint={sound}", "check=true", "device=cpu", *words).out
    assert said.endswith("the heads are sound\n")
    assert [line.split()[0] for line in said.splitlines()[:5]] == ["head", *"1234"]


def test_heads_in_the_wrong_order_are_a_failure_in_words(sound, command, tmp_path, capsys):
    model, tokenizer = mtp.load(sound), mtp.load_tokenizer(sound)
    heads = model.heads.heads
    heads[1], heads[3] = heads[3], heads[1]
    mtp.save(model, tmp_path / "checkpoints" / "step-00000001", tokenizer)
    (tmp_path / "run.json").write_text((sound / "run.json").read_text())
    with pytest.raises(SystemExit) as caught:
        command("generate", f"checkpoint={tmp_path}", "check=true", "device=cpu")
    said = capsys.readouterr().out
    assert caught.value.code == 1 and "sound" not in said
    assert "head 2 predicts the token 4 ahead" in said and "wrong order" in said


def test_a_checkpoint_without_its_run_is_checked_on_prompts_only(sound, command, tmp_path):
    mtp.save(mtp.load(sound), tmp_path / "alone", mtp.load_tokenizer(sound))
    words = [f"checkpoint={tmp_path}/alone", "check=true", "device=cpu"]
    with pytest.raises(SystemExit, match="^error: .*run.json .* give prompt=TEXT or prompts=FILE"):
        command("generate", *words)
    assert "the heads are sound" in command("generate", *words, "prompt='def b(self'").out


# Collecting.


@pytest.fixture
def questions(tmp_path):
    """Four records; the last is too long for a context of 256."""
    records = [{"prompt": f"def {name}(", "completion": "x"} for name in ("a", "b", "c")]
    records.append({"prompt": "x" * 250})
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["data.source=jsonl", f"data.path={path}", "data.val_fraction=0"]


def test_trajectories_are_collected_once_and_are_the_models_own_text(
    trained, questions, command, tmp_path
):
    words = [f"checkpoint={trained[0]}", f"out={tmp_path}/out", "device=cpu", "window=8"]
    words += ["max_new_tokens=20", "shard_size=2", "filters.token_times=0", *questions]
    words += ["filters.ngram_times=0"]
    said = command("collect_trajectories", *words).err
    assert "3/3 responses" in said and "3 of 3 responses kept" in said
    assert "prompts skipped: {'too_long': 1}" in said
    model, tokenizer = mtp.load(trained[0]), ByteTokenizer()
    found = list(read_trajectories(tmp_path / "out", tokenizer.fingerprint, 8))
    prompts = [tokenizer.encode(f"def {name}(") for name in ("a", "b", "c")]
    requests = [mtp.Request(p, 20, stop=mtp.stop_at(tokenizer.end_id)) for p in prompts]
    assert [t.prompt for t in found] == prompts
    assert [t.response for t in found] == [c.tokens for c in mtp.generate(model, requests)]
    again = command("collect_trajectories", *words).err
    assert "3 of 3 responses kept" in again and "3/3" not in again
    with pytest.raises(SystemExit, match="shard-0000000.jsonl: settings is .* choose another"):
        command("collect_trajectories", *words, "max_new_tokens=21")


def test_a_collection_trains_the_model_that_it_is_of_and_goes_on_with_it(
    trained, questions, command, tmp_path
):
    words = ["device=cpu", "filters.token_times=0", "filters.ngram_times=0", "max_new_tokens=20"]
    command(
        "collect_trajectories",
        f"checkpoint={trained[0]}",
        f"out={tmp_path}/out",
        *words,
        *questions,
    )
    words = [f"run_dir={tmp_path}/run", f"init_from={trained[0]}", "device=cpu", "train.steps=2"]
    words += ["train.batch_size=1", "train.log_every=1", "train.optim.warmup_steps=1"]
    words += [f"consistency.trajectories={tmp_path}/out", "consistency.refresh_every=1"]
    said = command("train", "experiment=consistency", *words).err
    assert "loss consistency" in said
    assert load_training(tmp_path / "run").progress["data"]["refreshed"] == 2


def test_a_corpus_gives_the_beginnings_of_its_documents(trained, texts, command, tmp_path):
    words = [f"checkpoint={trained[0]}", f"out={tmp_path}/out", "device=cpu", "window=4"]
    words += ["max_new_tokens=4", "prompt_tokens=5", "limit=2", *texts]
    command("collect_trajectories", *words)
    found = read_trajectories(tmp_path / "out", ByteTokenizer.fingerprint, 4)
    assert [bytes(t.prompt) for t in found] == [b"def a", b"def b"]
    with pytest.raises(SystemExit, match="^error: filters dropped all 2 responses .2 for length"):
        command("collect_trajectories", *words, f"out={tmp_path}/x", "filters.min_tokens=9")


# Preparing.


def test_training_from_shards_is_training_from_texts(texts, command, tmp_path):
    command("prepare_data", f"out={tmp_path}/shards", "workers=1", *texts)
    tokenizer = f"data.tokenizer={tmp_path}/shards/tokenizer"
    from_shards = ["data=shards", f"data.path={tmp_path}/shards", tokenizer]
    losses = []
    for name, source in (("one", texts), ("two", from_shards)):
        command("train", *SMALL, *source, f"run_dir={tmp_path}/{name}", "train.steps=2")
        lines = read_jsonl(tmp_path / name / "metrics.jsonl")
        losses.append([{k: v for k, v in x.items() if "loss" in k} for x in lines])
    assert losses[0] == losses[1] and "val_loss_1" in losses[0][-1]


def test_a_gathered_checkpoint_is_the_checkpoint(trained, command, tmp_path):
    said = command("gather", f"checkpoint={trained[0]}", f"out={tmp_path}/plain")
    assert f"written: {tmp_path}/plain" in said.out
    ours, theirs = mtp.load(tmp_path / "plain"), mtp.load(trained[0])
    for name, p in theirs.named_parameters():
        assert torch.equal(dict(ours.named_parameters())[name], p), name


def test_a_trained_tokenizer_can_be_trained_with(texts, command, tmp_path):
    pytest.importorskip("sentencepiece")
    out = f"{tmp_path}/words.model"
    said = command("train_tokenizer", f"out={out}", "vocab_size=300", *texts)
    assert "300 pieces" in said.out + said.err
    words = [*texts, "data.seq_len=8", f"data.tokenizer={out}", f"run_dir={tmp_path}/run"]
    command("train", *SMALL, *words, "train.steps=1")
    assert mtp.load(tmp_path / "run").config.vocab_size == 300


# Sweeps.


def sweep(texts, folder, *words):
    return ["-m", *SMALL, *texts, f"run_dir={folder}", "train.steps=2", *words]


def test_a_sweep_leaves_a_run_per_job_named_after_what_differs(texts, tmp_path):
    words = sweep(texts, tmp_path / "sweep", "train.optim.lr=1e-3,3e-3", "model.head=linear")
    done = shell("train", *words)
    assert done.returncode == 0, done.stderr
    runs = {path.name: path for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert set(runs) == {"train.optim.lr=0.001", "train.optim.lr=0.003"}
    for name, path in runs.items():
        kept = json.loads((path / "run.json").read_text())
        assert kept["train"]["optim"]["lr"] == float(name.partition("=")[2])
        assert kept["run_dir"] == str(path) and kept["model"]["head"] == "linear"
        assert mtp.load(path).config.head == "linear"


def test_a_sweep_goes_on_with_more_jobs_and_leaves_those_that_are_done(texts, command, tmp_path):
    command("train", *sweep(texts, tmp_path, "train.optim.lr=1e-3,3e-3"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    more = ["train.optim.lr=1e-3,3e-3,1e-2", "resume=auto", "train.log_every=2"]
    command("train", *sweep(texts, tmp_path, *more))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    assert len(before) == 2 and len(after) == 3 and before.items() <= after.items()


def test_one_job_is_no_folder_of_its_own(texts, command, tmp_path):
    command("train", *sweep(texts, tmp_path, "train.optim.lr=1e-3"))
    assert mtp.load(tmp_path).config.dim == 16


def test_jobs_that_fail_are_named_and_do_not_keep_others_from_running(
    texts, command, tmp_path, capsys
):
    words = sweep(texts, tmp_path, "train.optim.lr=1e12,1e-3,0")
    with pytest.raises(SystemExit) as caught:
        command("train", *words)
    assert "not finite" in str(caught.value.code)
    said = capsys.readouterr().err
    assert "error in job train.optim.lr=1000000000000.0: step " in said
    assert "error in job train.optim.lr=0: optim.lr=0.0 must be above 0" in said
    assert "Traceback" not in said
    assert mtp.load(tmp_path / "train.optim.lr=0.001").config.dim == 16


# Mistakes: (script, words, what the message has to say).


@pytest.mark.parametrize(
    ("script", "words", "say"),
    [
        ("train", ["model=nope"], ["model/nope", "300m", "13b"]),
        ("train", ["model.hed=3"], ["model.hed", "n_layers", "head"]),
        ("train", ["model.head=medusa"], ["head='medusa'", "transformer", "anticausal"]),
        ("train", ["data=shards"], ["data.path"]),
        ("train", ["data.source=text", "data.path=/nowhere"], ["data.path", "/nowhere"]),
        ("train", ["device=gpu"], ["device='gpu'", "cpu", "cuda"]),
        ("train", ["resume=true"], ["resume=true", "holds no checkpoint"]),
        ("generate", ["prompt=a"], ["checkpoint"]),
        ("generate", ["checkpoint=/nowhere", "prompt=a"], ["/nowhere is no folder"]),
        ("generate", ["checkpoint=x", "prompt=a", "prompts=b"], ["prompt=TEXT or prompts=FILE"]),
        ("prepare_data", ["data.source=stdlib"], ["out"]),
        ("prepare_data", ["out=x", "data.source=web"], ["data.source='web'", "jsonl"]),
        ("prepare_data", ["out=x", "data=code"], ["data.benchmarks", "HumanEval", "[]"]),
        ("collect_trajectories", ["out=x", "data=stdlib"], ["checkpoint"]),
        ("collect_trajectories", [*NAMED, "window=0"], ["window=0"]),
        ("collect_trajectories", [*NAMED, "filters.ngram=0"], ["filters.ngram=0", "at least 1"]),
        ("collect_trajectories", [*NAMED, "precision=fp8"], ["precision='fp8'", "bfloat16"]),
        ("train_tokenizer", ["out=x.model", "data.path=y"], ["data.path", "stdlib"]),
    ],
)
def test_mistakes_end_in_one_line_that_names_them(script, words, say, command, tmp_path, capsys):
    run_dir = [f"run_dir={tmp_path}/run"] if script == "train" else []
    with pytest.raises(SystemExit) as caught:
        command(script, *words, *run_dir)
    message = str(caught.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert [word for word in say if word not in message] == []
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "say"),
    [
        (["drafter=x"], "drafter='x' is unknown: allowed are none, heads, model, lookup"),
        (["drafter=model"], "drafter=model needs draft="),
        (["drafter=model", "draft=/nowhere"], "/nowhere is no folder"),
        (["drafter=lookup", "draft={run}"], "drafter=lookup takes no draft="),
        (["max_new_tokens=9999"], "max_seq_len is 256"),
        (["drafter=heads", "tree=0"], "tree=0 must be at least 1"),
        (["depth=3"], "drafter=none takes no depth=: only heads, model, lookup, jacobi"),
        (["threshold=0.5"], "rule=match takes no threshold=: only joint does"),
        (["rule=joint", "threshold=2"], "threshold=2.0 must lie in (0, 1]"),
        (["stop=['']"], "stop strings ('',): give at least one, and none of them empty"),
        (["depth=some"], "depth='some': allowed are a number of guesses, null and auto"),
        (["depth=true"], "depth=True: allowed are a number of guesses, null and auto"),
        (["threads=0"], "threads=0: allowed are auto and numbers from 1 on"),
        (["precision=half"], "precision='half': allowed are float32, bfloat16, auto"),
        (["drafter=heads", "depth=9"], "depth=9 exceeds the model's 3 extra heads"),
    ],
)
def test_mistakes_in_generating_end_in_one_line(words, say, trained, command):
    with pytest.raises(SystemExit, match="^error: ") as caught:
        generated(command, trained, "prompt=a", *(word.format(run=trained[0]) for word in words))
    assert say in str(caught.value.code)


def test_an_interruption_is_a_line_too(command, trained, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mtp.interop.folder.find_model", interrupted)
    with pytest.raises(SystemExit, match="^stopped$"):
        generated(command, trained, "prompt=a")


# The demo.


@pytest.fixture
def demo(texts, tmp_path, monkeypatch, command):
    """The demo, with smaller prompts than it ships with; `command` cleans up after it."""
    pytest.importorskip("matplotlib")
    import scripts.demo

    small = partial(
        scripts.demo.DecodeConfig, prompts=1, prompt_tokens=8, new_tokens=12, bare_tokens=12
    )
    monkeypatch.setattr(scripts.demo, "DecodeConfig", small)
    words = [*SMALL, *texts, f"run_dir={tmp_path}/demo", "train.steps=2"]
    return lambda *more: scripts.demo.main([*words, *more])


def test_the_demo_leaves_its_files_and_figures(demo, tmp_path, capsys):
    demo()
    folder = tmp_path / "demo"
    names = {"checkpoints", "metrics.jsonl", "run.json", "loss.png", "heads.html", "summary.json"}
    assert {path.name for path in folder.iterdir()} == names
    summary = json.loads((folder / "summary.json").read_text())
    assert not SUMMARY - summary.keys()
    assert summary["identical"] is True and summary["prompts"] == 1
    assert len(summary["val_bits_per_byte"]) == 4 and len(summary["acceptance"]) == 3
    assert summary["params"] == sum(p.numel() for p in mtp.load(folder).parameters())
    assert summary["train_tokens"] == 2 * 2 * 32
    assert 1 <= summary["acceptance_length_text"] <= 4 >= summary["mean_acceptance_length"] >= 1
    said = capsys.readouterr().out
    assert "the same text" in said and f"{folder}/heads.html" in said


def test_the_demo_leaves_the_runs_of_others_alone(demo, tmp_path):
    kept = tmp_path / "demo" / "checkpoints" / "step-00000099"
    kept.mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a run already"):
        demo("train.steps=1")
    assert kept.is_dir()


def test_the_demos_sentence_says_when_there_is_no_gain_and_when_texts_differ():
    import scripts.demo

    figures = {"acceptance": [0.5] * 3, "mean_acceptance_length": 2.5, "verify_cost": 1.25}
    good = scripts.demo.in_words(figures | {"speedup": 1.5, "identical": True})
    bad = scripts.demo.in_words(figures | {"speedup": 0.75, "identical": False})
    assert "Verifying 4 tokens costs 1.25 plain steps" in good and "2.50 are accepted" in good
    assert "1.50 times faster and gives the same text" in good
    assert "0.75 times as fast: no gain" in bad and "OTHER TEXT, which is a bug" in bad


def test_a_draft_vocabulary_goes_to_a_folder_that_is_not_there_yet(tmp_path):
    (tmp_path / "text.txt").write_text("aab\n" * 20)
    data = DataConfig("text", str(tmp_path / "text.txt"), val_fraction=0.1)
    out = str(tmp_path / "new" / "frequent.json")
    draft_vocabulary(VocabularyConfig(str(a_run(tmp_path / "run")), out, 2, data))
    assert read_vocabulary(out) == [ByteTokenizer.end_id, ord("a")]
