"""In lm-evaluation-harness our models answer as they do through its own adapter, once exported."""

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from conftest import DATA, tiny  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

import mtp  # noqa: E402
from mtp.evaluate.code import load_benchmark  # noqa: E402
from mtp.evaluate.harness import HarnessModel  # noqa: E402
from mtp.evaluate.sandbox import Sandbox  # noqa: E402
from mtp.interop.llama import save_llama  # noqa: E402
from mtp.tokenizer import ByteTokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "configs" / "lm_eval"
WINDOW = 48
PROSE = "the cat sat on the mat and the dog sat on the cat, which is the end of the matter. "
PAIRS = [
    ("the cat", " sat"),
    ("the cat ", "sat on the mat"),  # the space belongs to what comes
    ("the cat  ", "sat"),
    ("the ca", "t sat on the mat"),  # a seam within a word
    ("", "the cat"),
    ("caf\u00e9 \u4e16", " \u00fcber"),
    (PROSE * 2, " the end"),  # longer than the window
    (PROSE, (PROSE * 3)[: WINDOW // 2]),
    ("a", "b"),
]
TEXTS = ["", "t", PROSE[: WINDOW - 1], PROSE[:WINDOW], PROSE[: WINDOW + 1], PROSE * 2]
STOPS = {"until": ["the", "e"], "max_gen_toks": 20, "do_sample": False}
GENERATIONS = [
    ("the cat sat", {"until": [], "max_gen_toks": 24}),
    ("the dog ", {"until": [], "max_gen_toks": 24}),
    ("and", STOPS),
    (PROSE * 2, {"until": ["\n\n"], "max_gen_toks": 30, "do_sample": False}),
    ("on the mat", {"until": "a", "max_new_tokens": 17, "temperature": 0.0}),
]


def byte_level():
    """Byte b of a text is the token b, as in `ByteTokenizer`."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    letters = [chr(b) if b in shown else chr(next(hidden)) for b in range(256)]
    tokenizer = Tokenizer(models.BPE({letter: b for b, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return readable(tokenizer, eos_token="<|end|>")


def word_pieces():
    """Byte pairs, so that seams move, and a text that begins with a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([PROSE * 20], trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return readable(tokenizer, bos_token="<s>", eos_token="</s>")


def readable(tokenizer, **special):
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def a_model(vocab_size):
    return tiny(gain=2.0, vocab_size=vocab_size, max_seq_len=WINDOW).float()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run's checkpoint, its export, and the export of a model with another tokenizer."""
    root = tmp_path_factory.mktemp("models")
    model = a_model(257)
    mtp.save(model, root / "run" / "checkpoints" / "step-00000001", ByteTokenizer())
    save_llama(model, root / "exported")
    byte_level().save_pretrained(root / "exported")
    save_llama(a_model(330), root / "pieces")
    word_pieces().save_pretrained(root / "pieces")
    return root


@pytest.fixture(scope="module", params=["run", "pieces"])
def both(request, folders):
    """Our adapter's arguments, and the harness's own adapter for transformers."""
    ours, theirs = {
        "run": ({"checkpoint": str(folders / "run")}, folders / "exported"),
        "pieces": ({"pretrained": str(folders / "pieces")}, folders / "pieces"),
    }[request.param]
    # Its cache of logits, release 0.4.13, scores wrong places where two requests are one text,
    # cut at different seams, as "the cat | sat" and "the c|at sat" are.
    settings = {"dtype": "float32", "device": "cpu", "batch_size": 3, "logits_cache": False}
    return ours, HFLM(pretrained=str(theirs), **settings)


def instances(kind, arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_are_those_of_the_harness(both, batch_size):
    ours, theirs = both
    requests = instances("loglikelihood", PAIRS)
    got = HarnessModel(**ours, batch_size=batch_size).loglikelihood(requests, disable_tqdm=True)
    wanted = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [x for x, _ in got] == pytest.approx([x for x, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]


def test_what_greedy_decoding_writes_is_greedy(both):
    ours, theirs = both
    model = HarnessModel(**ours)
    context = model.tok_encode("the cat")
    request = mtp.Request(context, max_new_tokens=6)
    written = mtp.generate(model.target, [request])[0].tokens
    other = [*written[:-1], (written[-1] + 1) % 256]
    requests = [(None, context, written), (None, context, other)]
    for adapter in (model, theirs):
        answers = adapter._loglikelihood_tokens(requests, disable_tqdm=True)
        assert [greedy for _, greedy in answers] == [True, False]


def test_rolling_log_likelihoods_are_those_of_the_harness(both):
    ours, theirs = both
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    got = HarnessModel(**ours).loglikelihood_rolling(requests, disable_tqdm=True)
    wanted = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert got == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("drafter", ["none", "heads", "lookup"])
def test_greedy_texts_are_those_of_the_harness(both, drafter):
    ours, theirs = both
    if drafter == "heads" and "pretrained" in ours:
        pytest.skip("a model of transformers has no heads that draft")
    requests = instances("generate_until", GENERATIONS)
    model = HarnessModel(**ours, drafter=drafter, batch_size=2)
    got = model.generate_until(requests, disable_tqdm=True)
    assert got == theirs.generate_until(requests, disable_tqdm=True)
    assert all(got[:2])


def test_a_text_that_a_stop_or_the_end_token_ends_is_cut_there(folders):
    """Whatever the model would write after it."""
    model = HarnessModel(checkpoint=str(folders / "run"))
    whole = written(model, "the cat sat", {"max_gen_toks": 24})
    assert written(model, "the cat sat", {"max_gen_toks": 24, "until": whole[5:7]}) == whole[:5]
    request = mtp.Request(model.tok_encode("the cat sat"), max_new_tokens=24)
    ids = mtp.generate(model.target, [request])[0].tokens
    model.text.ends = (ids[5],)
    before = model.text.decode(ids[: ids.index(ids[5]) + 1])
    for stops in ([], ["not written"]):
        settings = {"max_gen_toks": 24, "until": stops}
        assert written(model, "the cat sat", settings) == before != whole


def written(model, context, settings):
    (text,) = model.generate_until(instances("generate_until", [(context, settings)]), True)
    return text


def test_samples_differ_and_follow_the_seed(folders):
    model = HarnessModel(checkpoint=str(folders / "run"), drafter="heads")
    warm = {"max_gen_toks": 24, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    requests = instances("generate_until", [("the cat", warm)] * 2)

    def samples(seed):
        torch.manual_seed(seed)
        return model.generate_until(requests, disable_tqdm=True)

    first, second = samples(1)
    assert first != second
    assert samples(1) == [first, second] != samples(2)


def test_a_context_without_tokens_begins_with_the_prefix_token(folders):
    """The harness moves the spaces that a context ends with into the continuation."""
    model = HarnessModel(checkpoint=str(folders / "run"))
    blank, empty = model.loglikelihood(
        instances("loglikelihood", [(" ", "the cat"), ("", " the cat")]), disable_tqdm=True
    )
    assert blank == pytest.approx(empty)
    assert written(model, "", {"max_gen_toks": 4}) is not None


def test_chats_are_written_as_training_data_writes_them(folders):
    model = HarnessModel(checkpoint=str(folders / "run"))
    chat = [{"role": "user", "content": "Hi"}]
    asked = "<|user|>\nHi\n<|assistant|>\n"
    assert model.apply_chat_template(chat) == asked
    begun = [*chat, {"role": "assistant", "content": "Sure"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == asked + "Sure"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, "either checkpoint=RUN or pretrained="),
        ({"checkpoint": "run", "pretrained": "pieces"}, "either checkpoint=RUN or pretrained="),
        ({"checkpoint": "run", "drafter": "head"}, "drafter='head'.*none"),
        ({"checkpoint": "run", "batch_size": "auto"}, "batch_size='auto'.*from 1"),
        ({"checkpoint": "run", "dtype": "int8"}, "dtype='int8'.*float32"),
        ({"pretrained": "pieces", "drafter": "heads"}, "head"),
    ],
)
def test_wrong_arguments_are_named(folders, wrong, named):
    places = {k: str(folders / v) for k, v in wrong.items() if k in ("checkpoint", "pretrained")}
    with pytest.raises(ValueError, match=named):
        HarnessModel(**(wrong | places))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_gen_toks": WINDOW}, "max_gen_toks=48: allowed are 1 to 47"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: served are until"),
        ({"num_beams": 4}, "num_beams: served are until"),
    ],
)
def test_generation_arguments_that_are_not_served_are_named(folders, settings, named):
    with pytest.raises(ValueError, match=named):
        written(HarnessModel(checkpoint=str(folders / "run")), "a", {"max_gen_toks": 4} | settings)


def test_a_continuation_that_does_not_fit_is_named_before_any_is_scored(folders):
    model = HarnessModel(checkpoint=str(folders / "run"))
    model.target = None
    with pytest.raises(ValueError, match=r"\('a', 'x+'\) has 49 tokens.* 1 to 48"):
        model.loglikelihood(instances("loglikelihood", [("a", "b"), ("a", "x" * 49)]))


MULTIPLE_CHOICE = """
task: animals
custom_dataset: !function animals.rows
test_split: test
output_type: multiple_choice
doc_to_text: "the {{word}}"
doc_to_choice: [" sat", " the", " of"]
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROWS = """
from datasets import Dataset

def rows(**_):
    return {"test": Dataset.from_list([{"word": word} for word in ("cat", "dog", "end")])}
"""


@pytest.fixture
def animals(tmp_path):
    (tmp_path / "animals.yaml").write_text(MULTIPLE_CHOICE)
    (tmp_path / "animals.py").write_text(ROWS)
    return tmp_path


def evaluate(model, task, folder, metadata=None, **settings):
    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    found = simple_evaluate(
        model, tasks=[task], task_manager=manager, bootstrap_iters=0, random_seed=None, **settings
    )
    return found["results"][task]


def test_a_multiple_choice_task_gives_both_adapters_one_score(animals, both):
    ours, theirs = both
    by_name = evaluate("mtp", "animals", animals, model_args=ours, device="cpu", batch_size="2")
    wanted = evaluate(theirs, "animals", animals)
    for metric in ("acc,none", "acc_norm,none"):
        assert by_name[metric] == wanted[metric]


class Scripted(LM):
    """Writes what it was given, prompt by prompt."""

    def __init__(self, texts):
        super().__init__()
        self.texts = texts

    def generate_until(self, requests, disable_tqdm=False):
        return [self.texts[request.args[0]] for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def sandbox_level():
    try:
        return Sandbox().level
    except OSError:
        return "weak"  # tests of what it holds are in test_sandbox.py; these programs are ours


@pytest.mark.skipif(not DATA.is_dir(), reason="MTP_TEST_DATA is not there")
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_code_tasks_pass_references_and_nothing_else(name):
    problems = load_benchmark(name, path=DATA).problems[:4]
    metadata = {"path": str(DATA), "sandbox": sandbox_level()}
    right = {problem.prompt: problem.reference for problem in problems}
    wrong = dict.fromkeys(list(right)[1:], "    return None\n")
    for texts, score in ((right, 1.0), (right | wrong, 0.25)):
        found = evaluate(Scripted(texts), f"mtp_{name}", TASKS, metadata, limit=len(problems))
        assert found["pass@1,none"] == score


@pytest.mark.skipif(not DATA.is_dir(), reason="MTP_TEST_DATA is not there")
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_code_tasks_stop_where_the_benchmark_does(name):
    metadata = {"path": str(DATA), "sandbox": sandbox_level()}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    (task,) = manager.load([f"mtp_{name}"])["tasks"].values()
    problem = load_benchmark(name, path=DATA).problems[0]
    assert tuple(task.config.generation_kwargs["until"]) == problem.stops
    assert task.doc_to_text(task.test_docs()[0]) == problem.prompt


def test_the_command_is_the_harness_with_our_model(folders, animals):
    command = [sys.executable, str(ROOT / "scripts" / "lm_eval.py"), "--model", "mtp"]
    command += ["--model_args", f"checkpoint={folders / 'run'}", "--tasks", "animals"]
    done = subprocess.run(
        [*command, "--include_path", str(animals)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=animals,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "|animals|" in done.stdout


def test_newer_releases_find_the_model_where_the_package_says():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = declared["lm_eval.models"]["mtp"].partition(":")
    assert getattr(import_module(module), name) is HarnessModel
