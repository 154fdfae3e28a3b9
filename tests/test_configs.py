"""Every shipped YAML composes into its dataclass, and what is wrong is named with its key."""

import json
import re
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from mtp.decode.sampling import Sampling
from mtp.documents import DataConfig
from mtp.estimate import estimate
from mtp.loss import MultiTokenLoss
from mtp.model import ROPE_SCALING, ModelConfig, Transformer
from mtp.optim import OptimConfig
from mtp.run import RunConfig, run
from mtp.tasks.table import TASKS
from mtp.train import TrainConfig

hydra = pytest.importorskip("hydra")
from hydra.errors import ConfigCompositionException  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from benchmarks.pilot import PilotConfig  # noqa: E402
from scripts.attach import AttachConfig  # noqa: E402
from scripts.cli import REPORTS, register  # noqa: E402
from scripts.collect_trajectories import CollectConfig  # noqa: E402
from scripts.compare import CompareConfig  # noqa: E402
from scripts.convert import FORMATS, ConvertConfig  # noqa: E402
from scripts.draft_vocabulary import VocabularyConfig  # noqa: E402
from scripts.gather import GatherConfig  # noqa: E402
from scripts.generate import GenerateConfig  # noqa: E402
from scripts.prepare_data import PrepareConfig  # noqa: E402
from scripts.self_distill import SelfDistillConfig  # noqa: E402
from scripts.train_tokenizer import TokenizerConfig  # noqa: E402

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SCHEMAS = {
    "train": RunConfig,
    "convert": ConvertConfig,
    "attach": AttachConfig,
    "draft_vocabulary": VocabularyConfig,
    "gather": GatherConfig,
    "collect_trajectories": CollectConfig,
    "generate": GenerateConfig,
    "prepare_data": PrepareConfig,
    "self_distill": SelfDistillConfig,
    "train_tokenizer": TokenizerConfig,
}
REPORT_SCHEMAS = {"pilot": PilotConfig, "compare": CompareConfig}
REPORT_NEEDED = {"pilot": ["model=x", "prompts=y"], "compare": ["data=/"]}
NEEDED = {  # what a command or file leaves to the user
    "convert": ["source_format=meta", "source=x", "out_format=llama", "out=y"],
    "attach": ["trunk=x"],
    "draft_vocabulary": ["checkpoint=x", "out=y"],
    "gather": ["checkpoint=x", "out=y"],
    "collect_trajectories": ["checkpoint=x", "out=y"],
    "generate": ["checkpoint=x", "prompt=a"],
    "prepare_data": ["out=x"],
    "self_distill": ["checkpoint=x", "out=y"],
    "train_tokenizer": ["out=x.model"],
    "data=shards": ["data.path=x"],
    "data=code": ["data.benchmarks=[]"],
    "experiment=consistency": ["consistency.trajectories=x", "init_from=x"],
    "experiment=distill_draft": ["distill.target=x"],
    "attach=7b_lora": ["trunk=x", "data.path=y"],
}
STREAM = DataConfig("datasets", "x", val_split="x", streaming=True)
# Gloeckle et al. 2024, table S14: the small models' names leave out the embeddings.
NON_EMBEDDING = ("1m", "3m", "10m", "30m", "100m", "300m", "1b")
DRAFTS = ("draft_0.5m", "draft_2m", "draft_8m")  # all parameters, with a vocabulary of bytes
TOTAL = ("0.3b", "0.6b", "1.3b", "3b", "6.7b", "13b")


def compose(name, *words):
    register(name, SCHEMAS[name])
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        return OmegaConf.to_object(hydra.compose(name, overrides=list(words)))


def names(group):
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def choices():
    return [f"{group}={name}" for group in ("model", "data", "experiment") for name in names(group)]


def test_every_file_is_tried_below():
    tried = {f"{name}.yaml" for name in SCHEMAS}
    tried |= {choice.replace("=", "/") + ".yaml" for choice in choices()}
    tried |= {f"attach/{name}.yaml" for name in names("attach")}
    tried.add("cluster/slurm.yaml")  # in test_cluster.py, where its launcher is installed
    tried |= {f"report/{name}.yaml" for name in REPORT_SCHEMAS}
    tried |= {f"study/{name}.yaml" for name in names("study")}  # in test_science.py
    tried |= {f"choose_n/{name}.yaml" for name in names("choose_n")}  # in test_choose_n.py
    tried |= {f"lm_eval/{name}.yaml" for name in names("lm_eval")}  # not ours: test_harness.py
    assert {str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.yaml")} == tried


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_command_composes_into_its_dataclass(name):
    assert isinstance(compose(name, *NEEDED.get(name, ())), SCHEMAS[name])


@pytest.mark.parametrize("name", REPORT_SCHEMAS)
def test_every_report_composes_where_its_keys_are_no_groups(name):
    register(name, REPORT_SCHEMAS[name])
    with hydra.initialize_config_dir(str(REPORTS), version_base=None):
        found = OmegaConf.to_object(hydra.compose(name, overrides=REPORT_NEEDED[name]))
    assert isinstance(found, REPORT_SCHEMAS[name])


def test_the_help_of_conversion_has_a_cell_for_every_pair():
    register("convert", ConvertConfig)
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        shown = hydra.compose("convert", return_hydra_config=True).hydra.help.template
    table = shown.partition("What goes along:\n")[2].partition("\n\n")[0]
    (_, *sources), *rows = (re.split(r"  +", line.strip()) for line in table.split("\n"))
    assert sources == [name for name, format in FORMATS.items() if format.read]
    assert [out for out, *_ in rows] == [name for name, format in FORMATS.items() if format.write]
    for out, *cells in rows:
        assert len(cells) == len(sources)
        takes_heads = {"heads=" in cell for cell in cells if cell != "-"}
        assert takes_heads == {"heads" in FORMATS[out].keys}


@pytest.mark.parametrize("choice", choices())
def test_every_choice_composes_into_a_run_whose_rows_fit_its_context(choice):
    config = compose("train", choice, *NEEDED.get(choice, ()))
    assert isinstance(config, RunConfig)
    assert config.model.n_future_tokens <= config.data.seq_len <= config.model.max_seq_len


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_an_experiment_that_trains(name, tmp_path):
    small = "model.dim=16 model.n_heads=2 train.batch_size=2 train.steps=2 train.eval_batches=1"
    config = compose("train", f"experiment={name}", f"run_dir={tmp_path}/run", *small.split())
    assert config.data.task == name
    assert 0 <= run(config).metrics["val_accuracy"] <= 1


@pytest.mark.parametrize("choice", [f"attach={name}" for name in names("attach")])
def test_every_choice_composes_into_heads_for_a_trunk(choice):
    config = compose("attach", choice, *NEEDED[choice])
    assert isinstance(config, AttachConfig) and config.run_dir != AttachConfig.run_dir
    assert config.n <= config.data.seq_len


def test_without_choices_the_dataclasses_defaults_hold():
    composed, defaults = asdict(compose("train")), asdict(RunConfig())
    assert json.dumps(composed) == json.dumps(defaults)  # tuples and lists alike


def test_the_demo_is_small_enough_for_a_laptop():
    config = compose("train", "experiment=demo")
    expected = estimate(config.model, config.train, config.data.seq_len)
    assert expected["memory_bytes"] < 2**31
    assert config.model.n_future_tokens == 4 and config.data.holdout


# Sizes.


@cache
def parameters(name, n_future_tokens):
    """(total, without embedding and unembedding); nothing is allocated."""
    model = replace(compose("train", f"model={name}").model, n_future_tokens=n_future_tokens)
    with torch.device("meta"):
        shapes = Transformer(model)
    total = sum(p.numel() for p in shapes.parameters())
    tables = [shapes.embedding.weight, *shapes.output.weights]
    return total, total - sum(p.numel() for p in tables)


def said(name):
    return float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]


def test_every_model_is_measured():
    assert sorted(NON_EMBEDDING + TOTAL + DRAFTS) == names("model")


@pytest.mark.parametrize("name", NON_EMBEDDING)
def test_small_models_are_named_after_their_non_embedding_parameters(name):
    assert parameters(name, 4)[1] == pytest.approx(said(name), rel=0.15)


@pytest.mark.parametrize("name", TOTAL)
def test_large_models_are_named_after_all_parameters(name):
    assert parameters(name, 4)[0] == pytest.approx(said(name), rel=0.15)


@pytest.mark.parametrize("name", DRAFTS)
def test_drafts_are_named_after_all_parameters_and_learn_the_next_token(name):
    assert parameters(name, 1)[0] == pytest.approx(said(name.removeprefix("draft_")), rel=0.1)
    assert compose("train", f"model={name}").model.n_future_tokens == 1


@pytest.mark.parametrize("name", NON_EMBEDDING + TOTAL)
def test_sizes_do_not_depend_on_the_number_of_future_tokens(name):
    assert len({parameters(name, n)[0] for n in (1, 2, 4)}) == 1


# What is wrong is named.


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        *(
            (TrainConfig, {key: 0}, f"train.{key}=0 must be at least 1")
            for key in ("steps", "batch_size", "accumulation", "log_every", "eval_batches")
        ),
        *(
            (TrainConfig, {key: -1}, f"train.{key}=-1 must be at least 0 (0 switches it off)")
            for key in ("eval_every", "save_every")
        ),
        (
            TrainConfig,
            {"precision": "fp8"},
            "train.precision='fp8' is unknown: allowed are float32, bfloat16",
        ),
        *(
            (TrainConfig, {key: "x"}, f"train.{key}='x' is unknown: allowed are {first}")
            for key, first in (("recompute", "none, heads"), ("sharding", "replicate, shard"))
        ),
        (TrainConfig, {"keep_last": 0}, "train.keep_last=0 must be at least 1 (null for all)"),
        (OptimConfig, {"name": "x"}, "optim.name='x' is unknown: allowed are adamw, muon"),
        (RunConfig, {"resume": "x"}, "resume='x': allowed are false, true, auto"),
        *(
            (ModelConfig, {key: 0}, f"{key}=0 must be above 0")
            for key in ("norm_eps", "rope_theta")
        ),
        (TrainConfig, {"max_seconds": 0}, "train.max_seconds=0 must be above 0 (null for no limit"),
        *((OptimConfig, {key: 0}, f"optim.{key}=0 must be above 0") for key in ("lr", "clip")),
        *(
            (OptimConfig, {key: -1}, f"optim.{key}=-1 must be at least 0")
            for key in ("weight_decay", "warmup_steps", "final_lr_ratio")
        ),
        (ModelConfig, {"hidden_dim": -8}, "hidden_dim=-8 must be at least 1, or null"),
        (
            ModelConfig,
            {"rope_scaling": dict.fromkeys(ROPE_SCALING, 1.0) | {"factor": 0.0}},
            "rope_scaling={'factor': 0.0",
        ),
        (ModelConfig, {"head": "x"}, "head='x' is unknown: allowed are transformer, linear"),
        (ModelConfig, {"unembedding": "x"}, "unembedding='x' is unknown: allowed are shared"),
        (DataConfig, {"source": "x"}, "data.source='x': allowed: text, folder, stdlib"),
        (DataConfig, {"seq_len": 0}, "data.seq_len=0: must be at least 1"),
        (MultiTokenLoss, {"n_future_tokens": 2, "cut": "x"}, "cut='x' is unknown: allowed are au"),
        (Sampling, {"temperature": -1}, "temperature=-1 must be at least 0"),
        (Sampling, {"top_k": -1}, "top_k=-1 must be at least 0 (0 keeps all)"),
        (Sampling, {"top_p": 0}, "top_p=0 must lie in (0, 1]"),
        (GenerateConfig, {}, "give either prompt=TEXT or prompts=FILE"),
        (GenerateConfig, {"prompt": "a", "prompts": "b"}, "give either prompt=TEXT or prompts="),
        (GenerateConfig, {"prompt": "a", "precision": "x"}, "precision='x': allowed are float32"),
        (ConvertConfig, {"source_format": "x"}, "source_format='x': allowed are mtp, llama, meta"),
        *(
            (ConvertConfig, {"source_format": "mtp", "out_format": "mtp"} | more, words)
            for more, words in (
                ({"precision": "fp8"}, "precision='fp8': allowed are float32, bfloat16"),
                (
                    {"like": "x"},
                    "like='x' is for out_format=llama, speculative, transformers, mimo",
                ),
                ({"heads": "x"}, "heads='x' is for out_format=speculative, transformers, mimo, m"),
                ({"vocabulary": "x"}, "vocabulary='x' is for out_format=medusa, not mtp"),
                ({"out_format": "medusa"}, "out_format=medusa: needs heads=FOLDER"),
                ({"source_format": "causal_lm"}, "source_format=causal_lm: needs heads=FOLDER"),
                ({"out_format": "causal_lm"}, "out_format='causal_lm': allowed are mtp, llama"),
                ({"out": str(CONFIGS)}, f"out='{CONFIGS}': exists already"),
            )
        ),
        (AttachConfig, {"kind": "linear"}, "kind='linear' is unknown: allowed are residual, tran"),
        (AttachConfig, {"data": DataConfig(tokenizer="x")}, "data.tokenizer=x: the trunk brings"),
        (AttachConfig, {"data": STREAM}, "data.streaming=true: heads are trained on a corpus"),
        (VocabularyConfig, {"count": 0}, "count=0 must be at least 1"),
        (SelfDistillConfig, {"count": 0}, "count=0 must be at least 1"),
        (SelfDistillConfig, {"precision": "x"}, "precision='x': allowed are float32, bfloat16"),
        (SelfDistillConfig, {"data": DataConfig(tokenizer="x")}, "data.tokenizer=x: the model"),
        (TokenizerConfig, {"out": str(CONFIGS)}, f"out='{CONFIGS}': give a .model file"),
    ],
)
def test_impossible_values_are_refused_by_key_and_value(kind, values, words):
    with pytest.raises(ValueError) as caught:
        kind(**values)
    assert words in str(caught.value)


def test_impossible_values_from_the_command_line_give_the_same_message():
    with pytest.raises(ValueError, match="train.precision='fp8' is unknown"):
        compose("train", "train.precision=fp8")


@pytest.mark.parametrize("word", ["model.hed=3", "trian.steps=3", "train.optim.beta=1"])
def test_unknown_keys_are_refused_by_name(word):
    with pytest.raises(ConfigCompositionException, match=word.partition("=")[0]):
        compose("train", word)


def test_unknown_choices_are_refused_with_those_there_are():
    with pytest.raises(hydra.errors.MissingConfigException, match="nope") as caught:
        compose("train", "model=nope")
    assert all(name in str(caught.value) for name in names("model"))
