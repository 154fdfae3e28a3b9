"""Questions about databases: templates held out, references right, answers judged by running."""

import ast
import re
from itertools import islice

import pytest
import torch

import mtp
from benchmarks.task_score import answer, scores
from benchmarks.tasks import TASKS, TaskConfig, docstrings, functions, questions, write
from mtp.documents import DataConfig, iter_documents
from mtp.encoding import encode_document
from mtp.evaluate import schemas, sql

SAMPLE = 1500
HARMFUL = {
    "changes": "DELETE FROM {}",
    "drops": "DROP TABLE {}",
    "writes a file": "ATTACH 'escaped.db' AS other",
    "reads settings": "PRAGMA table_info({})",
    "two statements": "SELECT name FROM {0}; DELETE FROM {0}",
    "loads code": "SELECT load_extension('x') FROM {}",
    "fills memory": "SELECT randomblob(1000000000) FROM {}",
    "does not end": "WITH x(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM x) SELECT i FROM x",
    "takes too long": "SELECT * FROM ({1}) WHERE (SELECT COUNT(*) FROM {0}, {0} b, {0} c, {0} d)",
    "is no SQL": "SELEC name FROM {}",
    "holds a zero byte": "SELECT name\0 FROM {}",
    "is empty": "",
}


def some(held_out, count=SAMPLE, **given):
    return list(islice(sql.problems(held_out=held_out, **given), count))


@pytest.fixture(scope="module")
def train():
    return some(False)


@pytest.fixture(scope="module")
def held_out():
    return some(True, 300)


def test_problems_are_the_same_every_time_and_all_differ(train):
    assert some(False, 50) == train[:50] != some(False, 50, seed=1)
    assert len({problem.prompt for problem in train}) == SAMPLE


def test_no_template_is_on_both_sides(train, held_out):
    """Nor a question with its schema, as a query is one function of the two."""
    here, there = ({problem.template for problem in part} for part in (train, held_out))
    assert not here & there
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert all(map(sql.is_held_out, there)) and not any(map(sql.is_held_out, here))


def test_a_template_is_the_query_without_its_constants():
    query = "SELECT name FROM car WHERE price > {} AND brand = '{}' ORDER BY price LIMIT {}"
    one, other = (sql.Problem((), "", query.format(*x)) for x in [(3, "Acme", 5), (40, "Apex", 1)])
    assert one.template == other.template != sql.Problem((), "", query.replace("price", "speed"))


def test_held_out_problems_have_no_words_of_their_own(train, held_out):
    words = [
        {word for p in part for word in re.findall(r"[a-z]+", (p.prompt + p.query).lower())}
        for part in (train + some(False, 3000, seed=1), held_out)
    ]
    assert words[1] <= words[0]


def test_references_are_right_and_say_something(train, held_out):
    for problem in train[:200] + held_out[:100]:
        assert sql.is_right(problem, problem.query)
        assert not sql.is_right(problem, "SELECT NULL")


def test_queries_have_the_length_and_variety_of_hand_written_ones(train):
    lengths = sorted(len(problem.query) for problem in train)
    tenth, half, most = (lengths[SAMPLE * share // 10] for share in (1, 5, 9))
    assert 50 < tenth < 80 < half < 130 < most < 200
    for clause in ("JOIN", "GROUP BY", "HAVING", "NOT IN (SELECT", "LIMIT", " OR ", "BETWEEN"):
        share = sum(clause in problem.query for problem in train) / SAMPLE
        assert 0.01 < share < 0.75, clause
    assert len({problem.template for problem in train}) > 0.95 * SAMPLE


def test_fewer_conditions_make_shorter_queries(train):
    easier = some(False, 500, conditions=1)
    assert not any(re.search(r"\w+ < \d+ OR ", problem.query) for problem in easier)
    mean = [sum(len(p.query) for p in part) / len(part) for part in (easier, train)]
    assert mean[0] < mean[1]


CHANGES = [  # a slip, by which an answer becomes wrong
    (r" DESC\b", ""),
    (r"LIMIT (\d+)", r"LIMIT 1\1"),
    (r"(> \d)\d+\b(?!.*HAVING)", r"\g<1>"),
    (r"= '\w+'", "= 'Nobody'"),
    (r"NOT IN", "IN"),
    (r"\bAVG\((?=[\w.]+\) FROM \w+ (?:JOIN|WHERE))", "MAX("),
    (r"SELECT (\S+) FROM", r"SELECT \1, \1 FROM"),
]


@pytest.mark.parametrize(("pattern", "instead"), CHANGES)
def test_a_slip_makes_an_answer_wrong(train, pattern, instead):
    changed = [
        (problem, re.sub(pattern, instead, problem.query, count=1))
        for problem in train
        if re.search(pattern, problem.query)
    ][:60]
    caught = sum(not sql.is_right(problem, query) for problem, query in changed)
    assert len(changed) > 20 and caught > 0.85 * len(changed)


def test_the_order_of_rows_counts_only_where_the_reference_has_one(train):
    form = r"SELECT [\w, ]+ FROM \w+ WHERE \w+ \S+ \S+"
    free = next(p for p in train if re.fullmatch(form, p.query))
    assert sql.is_right(free, f"{free.query} ORDER BY id DESC")
    bound = next(p for p in train if p.query.endswith(" DESC") and "GROUP" not in p.query)
    assert not sql.is_right(bound, bound.query.removesuffix(" DESC"))
    assert not sql.is_right(bound, bound.query.split(" ORDER BY ")[0])


def test_other_words_for_the_same_rows_are_right(train):
    joined = next(p for p in train if re.search(r"WHERE \w+\.\w+ > \d+$", p.query))
    assert sql.is_right(joined, re.sub(r"(\w+\.\w+) > (\d+)$", r"NOT \1 <= \2", joined.query))
    assert sql.is_right(joined, joined.query.lower())


@pytest.mark.parametrize("kind", HARMFUL)
def test_an_answer_that_would_do_harm_is_wrong_and_does_none(train, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problem = train[0]
    assert not sql.is_right(problem, HARMFUL[kind].format(problem.tables[0].name, problem.query))
    assert sql.is_right(problem, problem.query)
    assert not list(tmp_path.iterdir())


def test_a_question_can_mean_one_column_only():
    for _, _, numbers, texts in schemas.ENTITIES:
        says = [phrase for column in (schemas.NAME, *numbers, *texts) for phrase in column.says]
        assert len(set(says)) == len(says)
        assert all(len(column.values) >= schemas.N_ROWS for column in (schemas.NAME, *numbers))


def test_conditions_below_one_are_refused():
    with pytest.raises(ValueError, match="conditions=0: must be at least 1"):
        next(sql.problems(conditions=0))


# As files and under a model.


@pytest.mark.parametrize("task", TASKS)
def test_files_are_read_as_prompts_that_are_no_targets(task, tmp_path):
    pairs = list(islice(TASKS[task](False), 20))
    assert write(tmp_path / "some.jsonl", pairs) == 20
    config = DataConfig("jsonl", str(tmp_path / "some.jsonl"), val_fraction=0.0)
    tokenizer = mtp.tokenizer.ByteTokenizer()
    for pair, document in zip(pairs, iter_documents(config, False), strict=True):
        encoded = encode_document(document, tokenizer)
        assert tokenizer.decode(encoded.ids[~encoded.keep]) == pair.prompt
        assert tokenizer.decode(encoded.ids[encoded.keep]) == pair.completion
        assert encoded.keep[-1]


def test_a_function_is_cut_after_its_docstring():
    source = '''
class A:
    def f(self, x):
        """Says."""
        return x

    def only(self):
        """Nothing more."""

    def shared(self): "On one line"; return 1

def bare():
    return 2
'''
    assert list(functions(source)) == [('def f(self, x):\n    """Says."""\n', "    return x")]


def test_functions_of_the_standard_library_are_whole_and_of_one_side():
    train, held_out = ({problem[:2] for problem in docstrings(part)} for part in (False, True))
    assert not train & held_out and len(train) > 5 * len(held_out) > 500
    for prompt, completion in held_out:
        (function,) = ast.parse(prompt + completion).body
        assert ast.get_docstring(function) and len(function.body) > 1


def test_an_unknown_task_and_a_folder_that_exists_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="task='sq': allowed are sql, docstrings"):
        TaskConfig("sq")
    with pytest.raises(SystemExit, match="exists already"):
        TaskConfig(out=str(tmp_path))


@pytest.mark.parametrize("task", TASKS)
def test_a_problems_own_completion_scores_one_and_another_less(task):
    one, other = islice(TASKS[task](True), 2)
    assert one.score(one.completion) == 1 > one.score(other.completion)


def test_scores_are_of_the_text_before_the_end_token():
    tokenizer, problems = mtp.tokenizer.ByteTokenizer(), list(islice(questions(True), 4))
    first, second, _, last = (problem.completion for problem in problems)
    texts = [first, second, "SELECT 1", last[:-4]]
    done = [mtp.Completion([*tokenizer.encode(text), tokenizer.end_id]) for text in texts]
    assert list(scores(problems, tokenizer, done).values()) == [1, 1, 0, 0]
    alike = [problem._replace(prompt="alike") for problem in problems]
    assert list(scores(alike, tokenizer, done).values()) == [1, 1, 0, 0]


def test_answers_stop_at_the_end_token_or_the_limit(held_out):
    config = mtp.ModelConfig(dim=16, n_layers=2, n_heads=1, n_future_tokens=1, max_seq_len=1024)
    model, tokenizer = mtp.Transformer(config), mtp.tokenizer.ByteTokenizer()
    with torch.no_grad():
        model.embedding.weight.zero_()  # all logits are equal: the first id, again and again
    (done,) = answer(model, tokenizer, held_out[:1], new_tokens=5)
    assert done.tokens == [0] * 5
