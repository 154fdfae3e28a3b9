"""Text to SQL: questions about small databases, for models too small for Spider.

A problem is a schema of one or two tables, an English question and one query that answers it:

    teacher(id, name, age, city, salary)
    car(id, teacher_id, name, price, color)
    -- Show the names of teachers in Paris who have no car with price above 30.
    SELECT name FROM teacher WHERE city = 'Paris' AND id NOT IN (SELECT teacher_id FROM car ...

Its template is the query with its numbers and strings blanked out. A tenth of the templates, by a
hash, is held out: problems to train on never have one, so no held-out question occurs in training,
nor any question whose query would differ in constants only. Words, columns, operators and forms
are the same on both sides; what is new are their combinations.

An answer is right if it gives the reference's rows on all of a problem's databases (as the test
suites of Zhong et al. 2020, 2010.02840), in the same order where the reference orders them.
"""

from __future__ import annotations

import hashlib
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from mtp.evaluate.schemas import NAME, Column, Table, rows, schema

N_DATABASES = 3  # on which an answer is compared
MOST_STEPS = 1_000_000  # of sqlite's machine; references take under a hundredth
MOST_ROWS = 1000


class Problem(NamedTuple):
    tables: tuple[Table, ...]  # in the order of the prompt
    question: str
    query: str

    @property
    def prompt(self) -> str:
        schema = "".join(f"{table.name}({', '.join(table.names)})\n" for table in self.tables)
        return f"{schema}-- {self.question}\n"

    @property
    def template(self) -> str:
        return re.sub(r"'[^']*'|\b\d+\b", "?", self.query)


# Words.

COMPARISONS = {
    ">": ("above", "over", "greater than", "more than"),
    "<": ("below", "under", "less than", "smaller than"),
    ">=": ("at least", "no less than"),
    "<=": ("at most", "no more than"),
    "=": ("exactly", "equal to"),
}
AGGREGATES = {
    "AVG": ("average", "mean"),
    "SUM": ("total", "summed"),
    "MAX": ("highest", "maximum", "largest"),
    "MIN": ("lowest", "minimum", "smallest"),
}
ASCENDING = ("sorted by {}", "in ascending order of {}", "from the lowest to the highest {}")
DESCENDING = (
    *("sorted by {} from high to low", "in descending order of {}"),
    *("from the highest to the lowest {}", "by decreasing {}"),
)
DIGITS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPENERS = (
    *("Show {}.", "List {}.", "Give {}.", "Find {}.", "Return {}.", "Tell me {}.", "Get {}."),
    *(
        "Can you tell me {}?",
        "I need {}.",
        "Please show me {}.",
        "We want to know {}.",
        "Look up {}.",
    ),
)
FRAMES = (("with {} {}", "and {} {}"), ("whose {} is {}", "and whose {} is {}"))
EITHER = tuple((first, joint.replace("and", "or")) for first, joint in FRAMES)


# Problems.


def problems(seed: int = 0, held_out: bool = False, conditions: int = 2) -> Iterator[Problem]:
    """Endless different problems of templates that are held out, or of those that are not.

    conditions: the most that a question sets to the rows of one table; more are harder.
    """
    if conditions < 1:
        raise ValueError(f"conditions={conditions}: must be at least 1")
    rng, seen = random.Random(f"sql {seed} {held_out}"), set[str]()
    while True:
        tables = schema(rng)
        author = _Author(rng, tables, conditions)
        question, query = author.write()
        problem = Problem(tables, question, query)
        if is_held_out(problem.template) != held_out or problem.prompt in seen:
            continue
        if _says_something(problem):
            seen.add(problem.prompt)
            yield problem


def is_held_out(template: str) -> bool:
    """Whether problems to train on never have this template."""
    return hashlib.sha256(template.encode("ascii")).digest()[0] < 26


class Phrase(NamedTuple):
    says: str
    sql: str


class _Author:
    """Writes a question and its query at once, of one of the shapes below."""

    def __init__(self, rng: random.Random, tables: tuple[Table, ...], conditions: int) -> None:
        self.rng, self.choice, self.most = rng, rng.choice, conditions
        self.child = max(tables, key=lambda table: table.parent is not None)
        self.parent = min(tables, key=lambda table: table.parent is not None)
        self.table = rng.choice(tables)
        self.two = len(tables) == 2
        self.joined = False

    def write(self) -> Phrase:
        alone = (self.rows, self.top, self.total, self.groups)
        both = (self.having, self.pairs, self.total_of, self.groups_of, self.without, self.most_of)
        shape = self.choice(both if self.two and self.rng.random() < 0.75 else alone)
        says, sql = shape()
        if says[0].islower():
            says = self.choice(OPENERS).format(says)
        return Phrase(says, f"SELECT {sql}")

    # Shapes of one table.

    def rows(self) -> Phrase:
        those, order = self.those(self.table), self.order(self.table)
        what = self.columns(self.table)
        says = f"the {what.says} of {those.says}{order.says}"
        return Phrase(says, f"{what.sql} FROM {self.table.name}{where(those)}{order.sql}")

    def top(self) -> Phrase:
        """The first few by a number."""
        table, count = self.table, self.choice((1, 1, 2, 3, 4, 5, 6, 7, 8, 9))
        what, those, by = self.columns(table), self.those(table), self.number(table)
        down, c = self.rng.random() < 0.6, self.choice(by.says)
        extreme = self.choice(AGGREGATES["MAX" if down else "MIN"])
        many = self.choice((f"{DIGITS[count]} ", f"{count} ")) if count > 1 else ""
        noun, rest = those.says.split(" ", 1) if " " in those.says else (those.says, "")
        noun = f"{many}{noun if count > 1 else table.name}"
        says = f"the {what.says} of the {noun} {rest}{', ' if rest else ''}with the {extreme} {c}"
        if not rest and self.rng.random() < 0.4:
            says = f"the {what.says} of the {noun} of {extreme} {c}"
        order = f" ORDER BY {by.name}{' DESC' if down else ''} LIMIT {count}"
        return Phrase(says, f"{what.sql} FROM {table.name}{where(those)}{order}")

    def total(self) -> Phrase:
        those, what = self.those(self.table, least=1), self.aggregate(self.table)
        return Phrase(self.of(what, those), f"{what.sql} FROM {self.table.name}{where(those)}")

    def groups(self) -> Phrase:
        table = self.table
        those, what, by = self.those(table), self.aggregate(table), self.text(table)
        group = self.field(table, by)
        having, order = self.limit_groups(by.says[0], range(5, 13)), self.order_groups(what)
        says = f"{self.of(what, those)} {self.choice(('for each', 'per', 'by', 'for every'))} "
        says += f"{self.choice(by.says)}{having.says}{order.says}"
        sql = f"{group}, {what.sql} FROM {table.name}{where(those)} GROUP BY {group}"
        return Phrase(says, f"{sql}{having.sql}{order.sql}")

    # Shapes of both.

    def having(self) -> Phrase:
        """Parents by their children."""
        join, what = self.join(), self.columns(self.parent)
        parents, children = self.those(self.parent, most=1), self.those(self.child, least=1)
        have = self.choice(("that have", "having", "which come with"))
        says = f"the {what.says} of {parents.says} {have} {children.says}"
        return Phrase(says, f"DISTINCT {what.sql}{join}{where(parents, children)}")

    def pairs(self) -> Phrase:
        """Children with their parents' columns."""
        join, mine, theirs = self.join(), self.columns(self.child), self.columns(self.parent, 1)
        children, parents = self.those(self.child), self.those(self.parent, most=1)
        order = self.order(self.child)
        says = f"the {mine.says} of {children.says} of {parents.says}"
        says += f", together with the {theirs.says} of the {self.parent.name}{order.says}"
        sql = f"{mine.sql}, {theirs.sql}{join}{where(children, parents)}{order.sql}"
        return Phrase(says, sql)

    def total_of(self) -> Phrase:
        join, what = self.join(), self.aggregate(self.child)
        children, parents = self.those(self.child, most=1), self.those(self.parent, least=1)
        of = self.choice(("of", "that belong to", "belonging to"))
        both = Phrase(f"{children.says} {of} {parents.says}", "")
        return Phrase(self.of(what, both), f"{what.sql}{join}{where(children, parents)}")

    def groups_of(self) -> Phrase:
        join, what, name = self.join(), self.aggregate(self.child), f"{self.parent.name}.name"
        children = self.those(self.child)
        having = self.limit_groups(self.parent.name, range(2, 5))
        order = self.order_groups(what)
        each = self.choice(("for each", "per", "for every"))
        says = f"{self.of(what, children)} {each} {self.parent.name}{having.says}{order.says}"
        sql = f"{name}, {what.sql}{join}{where(children)} GROUP BY {name}"
        return Phrase(says, f"{sql}{having.sql}{order.sql}")

    def without(self) -> Phrase:
        what, parents = self.columns(self.parent), self.those(self.parent)
        children = self.those(self.child)
        none = self.choice(("that have no", "without any", "having no"))
        says = f"the {what.says} of {parents.says} {none} {children.says}"
        inner = f"SELECT {self.parent.name}_id FROM {self.child.name}{where(children)}"
        outer = Phrase("", f"id NOT IN ({inner})")
        return Phrase(says, f"{what.sql} FROM {self.parent.name}{where(parents, outer)}")

    def most_of(self) -> Phrase:
        join, what, children = self.join(), self.columns(self.parent), self.those(self.child)
        down = self.rng.random() < 0.6
        extreme = self.choice(("the most", "the greatest number of") if down else ("the fewest",))
        says = f"the {what.says} of the {self.parent.name} with {extreme} {children.says}"
        order = f"GROUP BY {self.parent.name}.id ORDER BY COUNT(*){' DESC' if down else ''}"
        return Phrase(says, f"{what.sql}{join}{where(children)} {order} LIMIT 1")

    # Their parts.

    def join(self) -> str:
        self.joined = True
        child, parent = self.child.name, self.parent.name
        return f" FROM {child} JOIN {parent} ON {child}.{parent}_id = {parent}.id"

    def field(self, table: Table, column: Column) -> str:
        return f"{table.name}.{column.name}" if self.joined else column.name

    def number(self, table: Table) -> Column:
        return self.choice([column for column in table.columns if column.is_number])

    def text(self, table: Table) -> Column:
        return self.choice([c for c in table.columns if not c.is_number and c is not NAME])

    def columns(self, table: Table, most: int = 3) -> Phrase:
        chosen = self.rng.sample(table.columns, min(most, self.choice((1, 1, 2, 2, 3))))
        says = [self.choice(column.says) for column in chosen]
        sql = ", ".join(self.field(table, column) for column in chosen)
        return Phrase(" and ".join(filter(None, [", ".join(says[:-1]), says[-1]])), sql)

    def aggregate(self, table: Table) -> Phrase:
        if self.rng.random() < 0.4:
            return Phrase("number", "COUNT(*)")
        function, column = self.choice(list(AGGREGATES)), self.number(table)
        says = f"{self.choice(AGGREGATES[function])} {self.choice(column.says)}"
        return Phrase(says, f"{function}({self.field(table, column)})")

    def of(self, what: Phrase, those: Phrase) -> str:
        if what.says == "number" and self.rng.random() < 0.4:
            return f"how many {those.says} there are"
        return f"the {what.says} of {those.says}"

    def those(self, table: Table, least: int = 0, most: int = 9) -> Phrase:
        """The table's rows that meet some conditions."""
        count = self.rng.randint(least, min(most, self.most))
        columns = self.rng.sample(table.columns[1:], min(count, len(table.columns) - 1))
        if len(columns) == 1 and (short := columns[0].short) and self.rng.random() < 0.6:
            value = self.choice(columns[0].values)
            says = f"{table.plural} {self.choice(short).format(value)}"
            return Phrase(says, f"{self.field(table, columns[0])} = '{value}'")
        either = len(columns) == 2 and self.rng.random() < 0.25
        frame = self.choice(EITHER if either else FRAMES)
        parts, sql = [table.plural], []
        for i, column in enumerate(columns):
            c, rest, condition = self.condition(table, column)
            parts.append(frame[min(i, 1)].format(c, rest))
            sql.append(condition)
        return Phrase(" ".join(parts), (" OR " if either else " AND ").join(sql))

    def condition(self, table: Table, column: Column) -> tuple[str, str, str]:
        """The column's name, what is asked of it, and that in SQL."""
        c, field = self.choice(column.says), self.field(table, column)
        if column.is_number:
            return c, *self.of_number(table, column, field)
        one, other = self.rng.sample(column.values, 2)
        rest, sql = self.choice(
            (
                (one, f"= '{one}'"),
                (one, f"= '{one}'"),
                (f"not {one}", f"!= '{one}'"),
                (f"either {one} or {other}", f"IN ('{one}', '{other}')"),
            )
        )
        return c, rest, f"{field} {sql}"

    def of_number(self, table: Table, column: Column, field: str) -> Phrase:
        low, high = sorted(self.rng.sample(column.values[9:-9], 2))
        form = self.rng.random()
        if form < 0.12:
            return Phrase(f"between {low} and {high}", f"{field} BETWEEN {low} AND {high}")
        sign = self.choice((">", "<"))
        if form < 0.24:
            average = f"(SELECT AVG({column.name}) FROM {table.name})"
            words = self.choice(COMPARISONS[sign])
            return Phrase(f"{words} average", f"{field} {sign} {average}")
        sign = self.choice((">", "<", ">", "<", ">=", "<=", "="))
        return Phrase(f"{self.choice(COMPARISONS[sign])} {low}", f"{field} {sign} {low}")

    def order(self, table: Table) -> Phrase:
        if self.rng.random() < 0.55:
            return Phrase("", "")
        column, down = self.number(table), self.rng.random() < 0.5
        form = self.choice(DESCENDING if down else ASCENDING)
        says = f", {form.format(self.choice(column.says))}"
        return Phrase(says, f" ORDER BY {self.field(table, column)}{' DESC' if down else ''}")

    def limit_groups(self, group: str, counts: range) -> Phrase:
        if self.rng.random() < 0.6:
            return Phrase("", "")
        sign, count = self.choice((">", ">=", "<")), self.choice(counts)
        only = self.choice((f", only for each {group} with", f", if the {group} has"))
        says = f"{only} {self.choice(COMPARISONS[sign])} {count} of them"
        return Phrase(says, f" HAVING COUNT(*) {sign} {count}")

    def order_groups(self, what: Phrase) -> Phrase:
        if self.rng.random() < 0.6:
            return Phrase("", "")
        down = self.rng.random() < 0.6
        says = self.choice(DESCENDING if down else ASCENDING).format(f"the {what.says}")
        return Phrase(f", {says}", f" ORDER BY {what.sql}{' DESC' if down else ''}")


def where(*conditions: Phrase) -> str:
    parts = [phrase.sql for phrase in conditions if phrase.sql]
    if len(parts) > 1:
        parts = [f"({part})" if " OR " in part else part for part in parts]
    return f" WHERE {' AND '.join(parts)}" if parts else ""


# Answers.


def is_right(problem: Problem, answer: str) -> bool:
    """Whether a model's query gives the reference's rows on every database of the problem.

    The answer cannot do harm: it may read these tables and call a few functions, nothing else, for
    a bounded number of steps and rows. What fails is wrong.
    """
    for number in range(N_DATABASES):
        with closing(_database(problem.tables, number)) as database:
            try:
                found = _run(database, answer)
            except (sqlite3.Error, sqlite3.Warning, ValueError):  # ValueError: a zero byte
                return False
            expected = _run(database, problem.query)
        ordered = " ORDER BY " in problem.query
        if found != expected if ordered else Counter(found) != Counter(expected):
            return False
    return True


def _says_something(problem: Problem) -> bool:
    with closing(_database(problem.tables, 0)) as database:
        return any(any(row) for row in _run(database, problem.query))


def _database(tables: Sequence[Table], number: int) -> sqlite3.Connection:
    """In memory, filled by the schema and the number alone."""
    database = sqlite3.connect(":memory:")
    for table in tables:
        database.execute(f"CREATE TABLE {table.name} ({', '.join(table.names)})")
        places = ", ".join("?" * len(table.names))
        database.executemany(f"INSERT INTO {table.name} VALUES ({places})", rows(table, number))
    database.execute("PRAGMA query_only = ON")
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
    database.set_authorizer(_authorize)
    return database


FUNCTIONS = {"count", "sum", "total", "avg", "min", "max", "abs", "round", "lower", "upper"}
FUNCTIONS |= {"length", "like", "coalesce", "ifnull", "substr"}


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    reads = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
    calls = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS
    return sqlite3.SQLITE_OK if reads or calls else sqlite3.SQLITE_DENY


def _run(database: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
    database.set_progress_handler(lambda: 1, MOST_STEPS)  # what answers otherwise is interrupted
    rows = database.execute(query).fetchmany(MOST_ROWS)
    return [tuple(round(x, 6) if isinstance(x, float) else x for x in row) for row in rows]
