"""The benchmark of training speed: its arithmetic and its turns, and the script for a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import train_speed
from benchmarks.decode import DecodeConfig
from benchmarks.decoders import DecodersConfig
from benchmarks.joint_ways import JointConfig
from benchmarks.record import launch, parse
from benchmarks.science import STUDIES, ScienceConfig
from benchmarks.shapes import shape
from benchmarks.train_speed import (
    LARGE,
    SMALL,
    SpeedConfig,
    Step,
    figures,
    prepare,
    regrouped,
    take_turns,
)
from mtp.loss import mtp_loss
from mtp.model import Transformer

ROOT = Path(__file__).resolve().parent.parent
TOY = ["shape=1m", "batch_size=1", "seq_len=4", "pairs=2", "device=cpu"]
FIGURES = {
    *("time_ratio", "time_ratio_iqr", "flop_ratio", "overhead", "overhead_small_vocab"),
    *("sequential_over_reference_time", "tokens_per_second", "flops_utilisation"),
}


# Shapes.


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="shape '70b' is unknown: allowed are small, .* 6.7b, "):
        shape("70b")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision='fp8' is unknown: allowed are float32, bfl"):
        SpeedConfig(precision="fp8")


# What is compared.


def test_every_number_of_heads_reads_the_same_parameters():
    config = replace(shape("1m"), vocab_size=SMALL, n_future_tokens=1)
    one = Transformer(config)
    four = regrouped(one, replace(config, n_future_tokens=4))
    places = [[p.data_ptr() for p in model.parameters()] for model in (one, four)]
    assert places[0] == places[1]
    assert (len(four.trunk), len(four.heads.heads)) == (1, 4)
    mtp_loss(four, torch.zeros(1, 8, dtype=torch.long))[0].backward()
    assert all(p.grad is not None for p in four.parameters())
    assert all(p.grad is None for p in one.parameters())


@pytest.mark.parametrize(
    ("works", "vocab", "names"),
    [
        (True, LARGE, ["n=1", "n=4", "n=4 reference"]),
        (True, SMALL, ["n=1", "n=4"]),
        (False, LARGE, ["n=1", "n=4", "n=4 reference"]),
    ],
)
def test_steps_are_eager_and_compiled_where_a_compiler_works(works, vocab, names, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        train_speed, "compile_blocks", lambda blocks, device: compiled.append(len(blocks)) or works
    )
    calls = prepare(SpeedConfig(shape="1m", seq_len=4), vocab, torch.device("cpu"))
    again = [f"{n.split()[0]} compiled{n[3:]}" for n in names] if works else []
    assert [str(step) for step in calls] == names + again
    assert set(compiled) == {5}  # all blocks


def test_a_step_scores_n_targets_per_position_under_autocast_where_asked_for(monkeypatch):
    seen = []

    def score(fns, inputs, weights, targets, scale, params):
        seen.append((len(fns), targets.shape, torch.is_autocast_enabled("cpu")))
        return (sum(w.sum() for w in weights) * 0, torch.zeros_like(targets).float())

    monkeypatch.setattr(train_speed, "sequential", score)
    monkeypatch.setattr(train_speed, "compile_blocks", lambda *_: False)
    for precision in ("float32", "bfloat16", "pure_bfloat16"):
        config = SpeedConfig(shape="1m", batch_size=3, seq_len=4, precision=precision)
        prepare(config, SMALL, torch.device("cpu"))[Step(4)]()
    assert seen == [(4, (4, 3, 4), enabled) for enabled in (False, True, False)]


def test_steps_take_turns_there_and_back(monkeypatch):
    now, calls = [0.0], []

    def call(name, taken):
        now[0] += taken
        calls.append(name)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    steps = {Step(1): lambda: call("a", 1.0), Step(4): lambda: call("b", 2.0)}
    assert take_turns(steps, 3) == [{Step(1): 1.0, Step(4): 2.0}] * 3
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"


# Arithmetic.


def test_operations_are_six_per_weight_and_token_and_those_of_attention():
    config = SpeedConfig(shape="1m", seq_len=16)
    found = figures(config, LARGE, [{Step(n): 1.0 for n in (1, 4)}], None)
    dim, layers, hidden = 128, 5, 352  # 8/3 x 128 rounded up to a multiple of 32
    block = 4 * dim**2 + 3 * dim * hidden + 2 * dim  # with its two norms
    attention = 2 * dim * 16 * layers  # forward, scores and sums over half the positions
    wanted = {n: 6 * (layers * block + n * LARGE * dim) + 3 * attention for n in (1, 4)}
    assert {n: found[f"n={n}"]["flops_per_token"] for n in (1, 4)} == wanted
    assert found["n=4"]["flop_ratio"] == wanted[4] / wanted[1]


def test_ratios_are_medians_over_rounds_and_to_the_right_baseline():
    """A machine that is twice as slow in the second round disturbs no ratio."""
    config = SpeedConfig(shape="1m", batch_size=2, seq_len=8)
    one, four, plain = Step(1), Step(4), Step(4, plain=True)
    rounds = [{one: 1.0 * slow, four: 3.0 * slow, plain: 4.5 * slow} for slow in (1, 2, 1)]
    found = figures(config, LARGE, rounds, peak=1e9)
    assert found["n=4"]["time_ratio"] == 3.0 and found["n=4"]["time_ratio_iqr"] == [3.0, 3.0]
    assert found["n=4"]["baseline"] == "n=1"
    assert found["n=4"]["overhead"] == pytest.approx(3.0 / found["n=4"]["flop_ratio"])
    assert found["n=4 reference"]["time_ratio"] == found["n=4 reference"]["overhead"] == 1.5
    assert found["n=4"]["seconds"] == 3.0 and found["n=4"]["tokens_per_second"] == 16 / 3
    used = found["n=4"]["flops_per_token"] * 16 / 3 / 1e9
    assert found["n=4"]["flops_utilisation"] == pytest.approx(used)
    assert figures(config, LARGE, rounds, None)["n=4"]["flops_utilisation"] is None


# The commands.


@pytest.mark.parametrize("compiler", [True, False])
def test_the_benchmark_runs_and_ends_with_its_figures(compiler, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "compile_blocks", lambda blocks, device: compiler)
    monkeypatch.setattr(sys, "argv", ["train_speed", *TOY, f"name={tmp_path / 'speed'}"])
    launch(SpeedConfig, train_speed.run)
    captured = capsys.readouterr()
    values = json.loads(captured.out.splitlines()[-1])
    assert values.keys() == FIGURES | {"compiled"}
    assert values["compiled"].keys() == FIGURES if compiler else values["compiled"] is None
    recorded = json.loads((tmp_path / "speed.json").read_text())["values"]
    assert recorded.keys() == values.keys() | {"load_before", "steps"}
    assert values.items() <= recorded.items()
    steps = recorded["steps"]
    assert steps.keys() == {str(SMALL), str(LARGE)}
    assert values["overhead"] == steps[str(LARGE)]["n=4"]["overhead"]
    assert values["overhead_small_vocab"] == steps[str(SMALL)]["n=4"]["overhead"]
    against = steps[str(LARGE)]["n=4 reference"]["time_ratio"]
    assert values["sequential_over_reference_time"] == 1 / against
    assert "n=4 reference" in captured.err


def gpu_script(folder, python, half="train", **environment):
    """Run it with a stand-in for the interpreter, given as shell code."""
    command(folder / "python", python)
    given = {"PYTHON": str(folder / "python"), "RESULTS": str(folder / "results"), **environment}
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), half],
        env=os.environ | given,
        capture_output=True,
        text=True,
    )


def command(path, code):
    path.write_text(f"#!/usr/bin/env bash\n{code}\n")
    path.chmod(0o755)


def test_the_gpu_script_goes_on_after_a_part_that_fails_and_says_so(tmp_path):
    python = """
case "$*" in
    -c*) echo some_gpu ;;
    *train_memory*) echo '{"peak": 1}' ;;
    *shape=300m*) exit 7 ;;
    *shape=1.3b*) exit 124 ;;
    *) echo "$*"; echo '{"speed": 2}' ;;
esac"""
    done = gpu_script(tmp_path, python)
    assert done.returncode == 1
    *_, memory, small, middle, large = done.stdout.splitlines()
    assert memory.startswith("train_memory_some_gpu (") and memory.endswith('{"peak": 1}')
    assert small.endswith("failed with status 7") and "_300m" in small
    assert middle.endswith("was stopped after 120 seconds") and "_1.3b" in middle
    assert large.endswith('{"speed": 2}') and "_6.7b" in large
    assert f"name={tmp_path}/results/train_speed_some_gpu_6.7b" in done.stderr


def test_the_gpu_script_fits_into_ten_minutes_and_its_words_are_known(tmp_path):
    command(tmp_path / "timeout", 'echo "${@:3}"')  # after -k 10
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = gpu_script(tmp_path, "echo some_gpu", PATH=path)
    parts = [line.split(": ")[1].split() for line in done.stdout.splitlines()[-4:]]
    assert sum(int(limit) for limit, *_ in parts) < 600
    assert [module for _, _, _, module, *_ in parts] == ["benchmarks.train_memory"] + [
        "benchmarks.train_speed"
    ] * 3
    configs = [parse(SpeedConfig, words) for _, _, _, _, *words in parts[1:]]
    assert [config.shape for config in configs] == ["300m", "1.3b", "6.7b"]
    assert all(config.model(LARGE, 8).max_seq_len >= config.seq_len for config in configs)


@pytest.mark.parametrize(("environment", "studies"), [({}, 4), ({"QUICK": "1"}, 1)])
def test_the_gpu_script_has_studies_that_exist(environment, studies, tmp_path):
    command(tmp_path / "timeout", 'echo "${@:3}"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = gpu_script(tmp_path, "echo some_gpu", "studies", PATH=path, **environment)
    parts = [line.split(": ")[1].split() for line in done.stdout.splitlines()[-studies:]]
    assert {module for _, _, _, module, *_ in parts} == {"benchmarks.science"}
    configs = [parse(ScienceConfig, words) for _, _, _, _, *words in parts]
    for config in configs:
        assert config.words and config.name.endswith(f"science_{config.study}_some_gpu")
        assert (STUDIES / f"{config.study}.yaml").is_file()


@pytest.mark.parametrize(
    ("environment", "drafts"),
    [
        ({"RUN": "runs/sql", "DRAFT": "runs/small"}, {"1.3b": "30m", "runs/sql": "runs/small"}),
        ({"RUN": "runs/bytes8"}, {"1.3b": "30m", "runs/bytes8": ""}),
        ({"QUICK": "1"}, {"1m": "1m"}),
    ],
)
def test_the_gpu_script_decodes_jointly(environment, drafts, tmp_path):
    command(tmp_path / "timeout", 'echo "${@:3}"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = gpu_script(tmp_path, "echo some_gpu", "joint", PATH=path, **environment)
    parts = [line.split(": ")[1].split() for line in done.stdout.splitlines()[-len(drafts) :]]
    assert {module for _, _, _, module, *_ in parts} == {"benchmarks.joint"}
    configs = [parse(JointConfig, words) for _, _, _, _, *words in parts]
    assert {config.model: config.draft for config in configs} == drafts


@pytest.mark.parametrize(
    ("environment", "models"),
    [({"RUN": "runs/bytes8"}, ["1.3b", "runs/bytes8"]), ({"QUICK": "1"}, ["1m"])],
)
def test_the_gpu_script_decodes_too(environment, models, tmp_path):
    command(tmp_path / "timeout", 'echo "${@:3}"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = gpu_script(tmp_path, "echo some_gpu", "decode", PATH=path, **environment)
    parts = [line.split(": ")[1].split() for line in done.stdout.splitlines()[-len(models) :]]
    assert sum(int(limit) for limit, *_ in parts) < 600
    assert {module for _, _, _, module, *_ in parts} == {"benchmarks.decode"}
    assert [parse(DecodeConfig, words).model for _, _, _, _, *words in parts] == models


@pytest.mark.parametrize(
    ("environment", "models"),
    [
        ({"RUN": "runs/sql", "TASK": "sql"}, ("runs/sql", "", "")),
        ({"RUN": "runs/sql", "DRAFT": "a", "CONSISTENCY": "b"}, ("runs/sql", "a", "b")),
        ({"QUICK": "1"}, ("1m", "1m", "1m")),
    ],
)
def test_the_gpu_script_compares_all_decoders(environment, models, tmp_path):
    command(tmp_path / "timeout", 'echo "${@:3}"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = gpu_script(tmp_path, "echo some_gpu", "decoders", PATH=path, **environment)
    _, _, _, module, *words = done.stdout.splitlines()[-1].split(": ")[1].split()
    config = parse(DecodersConfig, words)
    assert module == "benchmarks.decoders" and config.task == environment.get("TASK", "text")
    assert (config.model, config.draft, config.consistency) == models


def test_the_gpu_script_wants_a_gpu(tmp_path):
    done = gpu_script(tmp_path, "echo cpu")
    assert done.returncode == 1
    assert done.stderr == "error: torch sees no CUDA device here\n"


def test_the_gpu_script_runs_at_toy_size(tmp_path):
    """All but the counting of memory, which takes half a minute and has its own tests."""
    python = f"""
case "$*" in
    *train_memory*) echo '{{}}' ;;
    *) TORCHDYNAMO_DISABLE=1 exec {sys.executable} "$@" ;;
esac"""
    done = gpu_script(tmp_path, python, QUICK="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").iterdir()
    assert file.name == "train_speed_cpu_1m.json"
    line = done.stdout.splitlines()[-1]
    assert json.loads(line.partition("): ")[2]).keys() == FIGURES | {"compiled"}
