"""Synthetic tasks: problems from a seed, judged from their prompt, held out, batched, resumed."""

import random
import string
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from mtp.documents import DataConfig, iter_documents
from mtp.loss import MultiTokenLoss, future_targets
from mtp.model import ModelConfig, Transformer
from mtp.problems import ProblemBatches, evaluator, problems, verdicts
from mtp.run import RunConfig, run
from mtp.tasks.copying import Copying
from mtp.tasks.induction import ENDINGS, SENTENCES, Induction
from mtp.tasks.polynomial import PolynomialArithmetic
from mtp.tasks.star_graph import StarGraph
from mtp.tasks.table import TASKS, make_task
from mtp.tokenizer import ByteTokenizer
from mtp.train import TrainConfig, train

BYTES = ByteTokenizer()
OTHERS = {  # parameters that are not the defaults
    "copying": {"length": 3, "symbols": 5},
    "induction": {"sentences": 3, "names": 2},
    "polynomial": {"least": 6, "most": 9, "pauses": 5},
    "star_graph": {"degree": 5, "length": 5, "nodes": 50},
}


def drawn(task, count=400, seed=0):
    return [task.draw(random.Random(f"{seed} {i}")) for i in range(count)]


def data_of(name, **given):
    known = {"task_args": {}, "val_fraction": 0.2, "seq_len": 192}
    return DataConfig("task", task=name, **known | given)


# All tasks.


@pytest.mark.parametrize("args", [{}, "others"])
@pytest.mark.parametrize("name", TASKS)
def test_the_check_agrees_with_the_generator_on_every_answer(name, args):
    task = make_task(name, OTHERS[name] if args else {})
    longest = 0
    for prompt, answer in drawn(task):
        assert (prompt + answer).isascii() and task.is_right(prompt, answer)
        longest = max(longest, len(prompt + answer))
    assert 0.6 * task.longest < longest <= task.longest


@pytest.mark.parametrize("name", TASKS)
def test_an_answer_with_any_letter_changed_left_out_or_added_is_wrong(name):
    task = make_task(name, {})
    asked = 1 if name == "induction" else None  # of the answer only the name's second letter
    for prompt, answer in drawn(task, 50):
        for i in range(len(answer[:asked])):
            for letter in "q7Z":
                other = answer[:i] + letter + answer[i + 1 :]
                assert task.is_right(prompt, other) == (other == answer)
        assert not task.is_right(prompt, "") and not task.is_right(prompt, answer[1:])
        if asked is None:
            assert not task.is_right(prompt, answer[:-1])
            assert not task.is_right(prompt, answer + answer[-1])


@pytest.mark.parametrize("name", TASKS)
def test_problems_come_again_by_their_seed_and_differ(name):
    task = make_task(name, {})
    assert drawn(task, 50) == drawn(task, 50) != drawn(task, 50, seed=1)
    assert len(set(drawn(task))) > 390  # short sums of polynomials may meet


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        (None, {}, "task=None: allowed: copying, induction, polynomial, star_graph"),
        ("sorting", {}, "task='sorting': allowed: copying"),
        ("copying", {"size": 3}, "task_args: copying has no size; it has length, symbols"),
        ("copying", {"length": 0}, "task_args.length=0: must be at least 1"),
        ("copying", {"length": 2.5}, "task_args.length=2.5: must be a whole number"),
        ("copying", {"length": "2"}, "task_args.length='2': must be a whole number"),
        ("copying", {"symbols": 27}, "task_args.symbols=27: allowed: 2 to 26"),
        ("star_graph", {"degree": 1}, "task_args.degree=1: must be at least 2"),
        ("star_graph", {"length": 1}, "task_args.length=1: must be at least 2"),
        ("star_graph", {"nodes": 6}, "task_args.nodes=6: allowed: 7 (what degree=3 and length=3"),
        ("star_graph", {"nodes": 63}, "task_args.nodes=63: allowed: 7 (what"),
        ("polynomial", {"least": 0}, "task_args.least=0: allowed: 1 to most=5"),
        ("polynomial", {"least": 6}, "task_args.least=6: allowed: 1 to most=5"),
        ("polynomial", {"most": 100}, "task_args.most=100: must be at most 99"),
        ("polynomial", {"pauses": -1}, "task_args.pauses=-1: must be at least 0"),
        ("induction", {"sentences": 1}, "task_args.sentences=1: must be at least 2"),
        ("induction", {"names": 27}, "task_args.names=27: allowed: 2 to 26"),
    ],
)
def test_parameters_that_make_no_task_are_refused_in_one_message(name, args, words):
    with pytest.raises(ValueError) as caught:
        DataConfig("task", task=name, task_args=args)
    assert str(caught.value).startswith(f"data.{words}")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"source": "stdlib", "task": "copying"}, "data.task: for source='task' only"),
        ({"source": "task", "task": "copying", "path": "x"}, "data.path: source='task' finds its"),
        ({"source": "task", "task": "copying", "tokenizer": "x"}, "data.tokenizer: source='task'"),
        ({"source": "task", "task": "copying", "val_fraction": 0}, "data.val_fraction: source='ta"),
        ({"source": "task", "task": "copying", "holdout": ["x"]}, "data.holdout: for source text"),
    ],
)
def test_keys_that_go_with_other_sources_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        DataConfig(**given)


# Each task.


def test_stars_have_the_shape_asked_for_and_every_arm_is_asked_for():
    task, firsts = StarGraph(degree=3, length=4, nodes=62), Counter()
    for prompt, way in drawn(task, 300):
        edges, ends = prompt[:-1].split("/")
        edges = [tuple(edge) for edge in edges.split(",")]
        out = Counter(a for a, _ in edges)
        into = Counter(b for _, b in edges)
        start, goal = ends
        assert len(edges) == 9 and out[start] == 3 and not into[start] and not out[goal]
        assert set(into.values()) == {1} and set(out.values()) == {1, 3}
        assert way[0] == start and way[-1] == goal and len(way) == 4
        assert {*zip(way, way[1:], strict=False)} <= {*edges}
        firsts[[b for a, b in edges if a == start].index(way[1])] += 1
    assert min(firsts.values()) > 70  # the goal's arm stands anywhere in the list


def test_a_way_along_another_arm_is_wrong():
    assert StarGraph.is_right("cd,xa,ab,xc/xb=", "xab")
    for wrong in ("xcd", "xcb", "xb", "axb", "xabx", "xaab", "Xab", "xa"):
        assert not StarGraph.is_right("cd,xa,ab,xc/xb=", wrong)


def evaluated(text):
    """A third way: Python reads the expression, numpy multiplies."""
    text = text.rstrip("=").rstrip("_")
    quoted = "".join(f"P('{text[i : i + 5]}')" if c == "P" else c for i, c in marked(text))
    return "".join(map(str, eval(quoted, {"P": Value}).c))


def marked(text):
    i = 0
    while i < len(text):
        yield i, "P" if text[i].isdigit() else text[i]
        i += 5 if text[i].isdigit() else 1


class Value:
    def __init__(self, c):
        self.c = [int(x) % 7 for x in c][:5]
        self.c += [0] * (5 - len(self.c))

    def __neg__(self):
        return Value([-x for x in self.c])

    def __add__(self, other):
        return Value([a + b for a, b in zip(self.c, other.c, strict=True)])

    def __mul__(self, other):
        return Value(np.convolve(self.c, other.c))

    def __matmul__(self, other):
        total, power = Value([0]), Value([1])
        for c in self.c:
            total, power = total + Value([c]) * power, power * other
        return total


def test_polynomials_are_worth_what_a_third_reader_says():
    task = PolynomialArithmetic(1, 6, pauses=2)
    for prompt, answer in drawn(task, 300):
        assert evaluated(prompt) == answer and prompt.endswith("__=")
    for prompt, answer in (
        ("((10000+-60000)*01000)=", "02000"),
        ("(12000*12000)=", "14400"),
        ("(00100@11000)=", "12100"),  # (1 + X)^2
        ("(00010*00100)=", "00000"),  # X^5 is 0
        ("--30000=", "30000"),
    ):
        assert PolynomialArithmetic.is_right(prompt, answer) and evaluated(prompt) == answer


def test_numbers_of_operations_and_signs_come_equally_often():
    drawings = [prompt for prompt, _ in drawn(PolynomialArithmetic(2, 4), 900)]
    signs = Counter("".join(drawings).translate({ord(c): None for c in string.digits + "()="}))
    assert signs.keys() == {*"-+*@"} and min(signs.values()) > 0.85 * max(signs.values())
    counts = Counter(sum(c in "-+*@" for c in prompt) for prompt in drawings)
    assert counts.keys() == {2, 3, 4} and min(counts.values()) > 240


def test_a_storys_last_name_stands_before_it_and_nowhere_leads_to_two():
    names = Counter()
    for prompt, answer in drawn(Induction(6, 3)):
        text = prompt + answer
        capitals = [i for i, c in enumerate(text) if c.isupper()]
        of_first = {
            text[i]: {text[j + 1] for j in capitals if text[j] == text[i]} for i in capitals
        }
        assert all(len(second) == 1 for second in of_first.values())
        assert len(of_first) <= 3 and text.count(". ") == 5 and answer[1:] == "."
        assert capitals[-1] == len(prompt) - 1 and prompt[-1] in prompt[:-1]
        names[text[capitals[-1] : -1]] += 1
    assert len(names) > 250 and len(ENDINGS) < len(SENTENCES)  # of 26 x 26: none to learn by heart


def test_a_letter_that_followed_another_name_is_wrong():
    prompt = "Qe met Zu by the lake. the fox saw Q"
    assert Induction.is_right(prompt, "e.") and Induction.is_right(prompt, "e")
    assert not Induction.is_right(prompt, "u.") and not Induction.is_right(prompt, ".e")
    assert not Induction.is_right("Ab met Cd. the fox saw Q", "e")  # not known


def test_a_word_is_its_own_answer():
    assert Copying.is_right("abca=", "abca")
    for wrong in ("abc", "abcab", "acba", "", "abca="):
        assert not Copying.is_right("abca=", wrong)


# Batches.


def test_the_docstrings_row_is_the_one_made():
    batches = ProblemBatches(data_of("copying", task_args={"length": 2}, seq_len=7), BYTES, 2, 1)
    row = batches._rows([next(iter(problems(batches._config, False, 0, 1)))])
    text = row.row[0, :5].tolist()
    assert (
        text[2] == ord("=") and text[:2] == text[3:] and row.row[0, 5:].tolist() == [256, 0, 0, 0]
    )
    assert row.doc[0].tolist() == [0] * 6 + [-1] * 3
    assert row.keep[0].tolist() == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("name", TASKS)
def test_only_answers_and_their_ends_are_targets(name):
    """Of stories, which are read as text, everything."""
    config = data_of(name)
    batch = next(ProblemBatches(config, BYTES, 3, 8))
    assert batch.row.shape == (8, 192 + 3)
    _, valid = future_targets(batch, 3)
    for i, document in enumerate(problems(config, False, 0, 8)):
        (prompt, _), (answer, _) = document.segments
        start, end = len(prompt), len(prompt + answer)
        assert batch.row[i, : end + 1].tolist() == [*(prompt + answer).encode(), BYTES.end_id]
        asked = 0 if name == "induction" else start
        assert batch.keep[i].nonzero().flatten().tolist() == [*range(asked, end + 1)]
        assert (batch.doc[i] == 0).nonzero().flatten().tolist() == [*range(end + 1)]
        assert valid[0, i, end - 1] and not valid[:, i, end:].any()


def test_heads_ahead_see_no_target_behind_the_end():
    """Head i at position t has a target where t + i is the answer or its end."""
    config = data_of("copying", task_args={"length": 2}, seq_len=7)
    _, valid = future_targets(next(ProblemBatches(config, BYTES, 2, 1)), 2)
    assert valid[0, 0].nonzero().flatten().tolist() == [2, 3, 4]
    assert valid[1, 0].nonzero().flatten().tolist() == [1, 2, 3]


def texts_of(config, held_out, count=300):
    return [document.text for document in problems(config, held_out, 0, count)]


@pytest.mark.parametrize("name", TASKS)
def test_no_held_out_problem_is_trained_on(name):
    small = {"copying": {"length": 2, "symbols": 6}}  # 36 problems: both parts meet all of theirs
    config = data_of(name, task_args=small.get(name, {}))
    train, held_out = (texts_of(config, part) for part in (False, True))
    other = texts_of(replace(config, seed=1), True)
    assert not {*train, *texts_of(replace(config, seed=1), False)} & {*held_out, *other}
    assert texts_of(config, False, 20) == train[:20] and held_out != other


def test_as_documents_a_task_is_held_out_in_the_same_way():
    config = data_of("copying", task_args={"length": 2, "symbols": 6})
    parts = [{d.text for d in islice(iter_documents(config, part), 500)} for part in (False, True)]
    assert {*texts_of(config, False)} == parts[0] and {*texts_of(config, True)} == parts[1]
    assert len(parts[0] | parts[1]) == 36


def test_a_part_without_problems_is_refused(monkeypatch):
    monkeypatch.setattr("mtp.problems.MOST_DRAWS", 20)
    config = data_of("copying", task_args={"length": 1, "symbols": 2}, val_fraction=1e-9)
    with pytest.raises(ValueError, match="no held-out problem of data.task='copying' among 20"):
        problems(config, True, 0, 1)


def test_ranks_partition_the_stream_and_a_state_moves_between_world_sizes():
    config = data_of("star_graph")
    alone = ProblemBatches(config, BYTES, 2, 4)
    ranks = [ProblemBatches(config, BYTES, 2, 2, rank, 2) for rank in range(2)]
    for _ in range(3):
        assert torch.equal(next(alone).row, torch.cat([next(part).row for part in ranks]))
    moved = ProblemBatches(config, BYTES, 2, 4)
    moved.load_state_dict(ranks[1].state_dict())
    assert torch.equal(next(moved).row, next(alone).row)


@pytest.mark.parametrize("change", [{"seed": 1}, {"task_args": {"degree": 4}}, {"seq_len": 150}])
def test_a_state_of_other_problems_is_refused(change):
    state = ProblemBatches(data_of("star_graph"), BYTES, 2, 4).state_dict()
    other = ProblemBatches(data_of("star_graph", **change), BYTES, 2, 4)
    if "seq_len" in change:  # the same problems in wider rows
        return other.load_state_dict(state)
    with pytest.raises(ValueError, match="state of other data: its "):
        other.load_state_dict(state)


def test_rows_too_short_for_a_problem_are_refused_before_anything_is_made(tmp_path):
    data = data_of("star_graph", seq_len=23)
    with pytest.raises(ValueError, match="data.seq_len=23: data.task='star_graph' has problems of"):
        run(RunConfig(run_dir=str(tmp_path / "run"), data=data))
    model = ModelConfig(dim=16, n_layers=5, n_heads=2, max_seq_len=24)
    with pytest.raises(ValueError, match="model.max_seq_len=24: .* problems of 24 tokens, and ans"):
        run(RunConfig(run_dir=str(tmp_path / "run"), model=model, data=replace(data, seq_len=24)))
    assert not (tmp_path / "run").exists()


# Training.


def small(**given):
    shape = {"dim": 32, "n_layers": 3, "n_heads": 2, "multiple_of": 16, "max_seq_len": 256}
    return Transformer(ModelConfig(**shape | given), torch.Generator().manual_seed(0))


def test_accuracy_is_that_of_greedy_answers_up_to_their_end(monkeypatch):
    """A model that says what it is told, with and without an end."""
    config = data_of("copying", task_args={"length": 3})
    documents = problems(config, True, 0, 4)
    answers = [BYTES.encode(document.segments[1][0]) for document in documents]
    end, wrong = [BYTES.end_id], [answers[1][::-1][:1] + answers[1][:2]]
    said = [answers[0] + end, wrong[0] + end, answers[2] + answers[2][:1], answers[3][:2] + end]

    def told(model, requests, drafter, sampling, *, batch_size):
        assert sampling.temperature == 0 and batch_size == 2
        assert [r.prompt for r in requests] == [BYTES.encode(d.segments[0][0]) for d in documents]
        assert all(r.max_new_tokens == 4 for r in requests)
        return [type("Completion", (), {"tokens": tokens}) for tokens in said]

    monkeypatch.setattr("mtp.problems.generate", told)
    assert verdicts(None, BYTES, config, documents, 2) == [True, False, False, False]


def test_a_model_learns_and_greedy_answers_are_right_where_every_argmax_is():
    """Teacher-forced: an answer is right if each of its tokens is the most probable one behind the
    right ones, its end too.
    """
    config = data_of("copying", task_args={"length": 2, "symbols": 3}, seq_len=6)
    training = TrainConfig(steps=60, batch_size=16, eval_batches=1)
    training.optim.lr, training.optim.warmup_steps = 5e-3, 10
    model, evaluate = small(n_future_tokens=2), evaluator(config, BYTES, training, 2)
    before = evaluate(model)
    train(model, ProblemBatches(config, BYTES, 2, 16), MultiTokenLoss(2), training)
    after = evaluate(model)
    assert after["val_loss_1"] < before["val_loss_1"] and 0 <= after["val_accuracy"] <= 1
    documents = problems(config, False, 0, 16)
    batch = next(ProblemBatches(config, BYTES, 2, 16))
    with torch.no_grad():
        said = model(batch.row[:, :-2]).argmax(-1)
    targets, valid = future_targets(batch, 2)
    right = ((said == targets[0]) | ~valid[0]).all(1).tolist()
    assert verdicts(model, BYTES, config, documents, 8) == right and any(right)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    def config(name, steps, resume="false"):
        training = TrainConfig(steps=steps, batch_size=4, eval_batches=1, save_every=2)
        training.optim.warmup_steps, training.optim.final_lr_ratio = 1, 1.0
        model = ModelConfig(dim=16, n_layers=3, n_heads=2, multiple_of=8, n_future_tokens=2)
        return RunConfig(
            run_dir=str(tmp_path / name),
            resume=resume,
            sample_every=0,
            model=model,
            data=data_of("star_graph", seq_len=32),
            train=training,
        )

    whole = run(config("whole", 4))
    run(config("parts", 2))
    parts = run(config("parts", 4, resume="true"))
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.metrics["val_accuracy"] == parts.metrics["val_accuracy"]
