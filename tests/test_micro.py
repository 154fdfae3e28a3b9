"""Micro-programs hold what they promise: right, graded, the same everywhere, templates held out."""

import ast
import builtins
import re
from collections import Counter
from itertools import islice

import pytest

from mtp.evaluate.micro import (
    LEVELS,
    PRIMITIVES,
    completion,
    held_out,
    prompt,
    tasks,
    training_text,
)

SAMPLE = 3000  # training documents
TASKS = {split: tasks(split) for split in ("test", "train")}


@pytest.fixture(scope="module")
def documents():
    return list(training_text(SAMPLE))


def body_of(code):
    """A function's statements, whatever its arguments and loop variables are called."""
    function = ast.parse(code).body[0]
    body = "\n".join(ast.unparse(line) for line in function.body if not isinstance(line, ast.Expr))
    for number, argument in enumerate(function.args.args):
        body = re.sub(rf"\b{argument.arg}\b", f"_{number}", body)
    return body


@pytest.mark.parametrize("split", ["test", "train"])
def test_references_pass_their_asserts_and_whole_programs_do(split):
    for task in TASKS[split]:
        for source in (task["code"], prompt(task) + completion(task)):
            exec("\n".join([source, *task["test_list"]]), {})


@pytest.mark.parametrize("split", ["test", "train"])
def test_tasks_have_the_schema_and_every_area_and_level_equally(split):
    found = TASKS[split]
    keys = {"task_id", "text", "code", "test_list", "area", "level", "template"}
    assert all(task.keys() == keys and len(task["test_list"]) == 3 for task in found)
    cells = Counter((task["area"], task["level"]) for task in found)
    assert cells == {(area, level): 20 for area in PRIMITIVES for level in LEVELS}
    assert len({task["code"] for task in found}) == len({task["task_id"] for task in found}) == 300


def test_levels_are_steps_and_constants():
    for task in TASKS["test"]:
        steps = task["template"].split(": ")[1].split(", ")
        assert (
            len(steps) == len(completion(task).splitlines()) == (1, 2, 2, 3, 3)[task["level"] - 1]
        )


def test_no_part_of_a_reference_is_idle():
    """Asserts tell the reference from the same program without one of its assignments."""
    for task in TASKS["test"]:
        lines = task["code"].splitlines()
        for i in range(1, len(lines) - 1):
            shorter = "\n".join([*lines[:i], *lines[i + 1 :], *task["test_list"]])
            with pytest.raises(AssertionError):
                exec(shorter, {})


def test_no_constant_answer_passes():
    assert all(
        len({check.partition(" == ")[2] for check in task["test_list"]}) > 1
        for task in TASKS["test"]
    )


def test_test_templates_are_held_out_and_training_templates_are_not():
    test, train = ({task["template"] for task in TASKS[split]} for split in ("test", "train"))
    assert all(map(held_out, test)) and not any(map(held_out, train))


def test_no_training_document_shares_a_body_with_a_test(documents):
    assert not {body_of(task["code"]) for task in TASKS["test"]} & set(map(body_of, documents))


def test_training_teaches_every_primitive_by_itself(documents):
    single = [
        document for document in documents if "=" not in document.split('"""')[2].split("return")[0]
    ]
    alone = {document[4 : document.index("(")] for document in single}
    assert {primitive.name for area in PRIMITIVES.values() for primitive in area} <= alone


def test_documents_have_the_form_of_the_tests_and_all_differ(documents):
    assert len(set(documents)) == SAMPLE
    form = re.compile(r'def \w+\([\w, ]+\):\n    """[^\n]+\n\n(    assert [^\n]+\n){3}    """\n')
    for text in [*documents, *(prompt(task) + completion(task) for task in TASKS["test"])]:
        start = form.match(text)
        assert start and re.fullmatch(r"(    [^\n]+\n){1,3}", text[start.end() :])


def test_documents_and_tasks_are_the_same_every_time(documents):
    assert tasks() == TASKS["test"]
    assert list(islice(training_text(), 50)) == list(training_text(50)) == documents[:50]
    assert list(training_text(50, seed=1)) != documents[:50]


def test_no_function_is_called_like_one_of_python():
    names = {primitive.name for area in PRIMITIVES.values() for primitive in area}
    assert not names & set(dir(builtins))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='validation': allowed: test, train"):
        tasks("validation")
