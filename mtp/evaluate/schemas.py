"""Small databases from word lists: schemas of one or two tables, and rows to fill them.

teacher(id, name, age, city, salary)
car(id, teacher_id, name, price, color)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

N_ROWS = 60  # of each table; numbers of a column all differ: only counts can tie
N_WITH_CHILDREN = 20  # rows of the first table that the second one refers to


class Column(NamedTuple):
    name: str
    says: tuple[str, ...]  # what a question calls it
    values: Sequence[Any]
    short: tuple[str, ...] = ()  # for text: how a question says that it is {}

    @property
    def is_number(self) -> bool:
        return isinstance(self.values, range)


class Table(NamedTuple):
    name: str
    plural: str
    columns: tuple[Column, ...]  # without id and the reference to the parent
    parent: str | None = None

    @property
    def names(self) -> list[str]:
        reference = [f"{self.parent}_id"] if self.parent else []
        return ["id", *reference, *(column.name for column in self.columns)]


# name | what a question calls it | lowest to highest
NUMBERS = """
    age | age / years of age | 18 90
    salary | salary / pay | 20 99
    height | height / body height | 140 210
    experience | experience / years of experience | 1 70
    bonus | bonus / yearly bonus | 10 99
    capacity | capacity / number of seats | 100 180
    area | area / surface | 200 280
    founded | founding year / year of foundation | 1900 1990
    staff | staff / number of workers | 30 110
    budget | budget / yearly budget | 400 480
    price | price / cost | 5 95
    weight | weight / mass | 10 90
    stock | stock / number in stock | 1 80
    speed | speed / top speed | 120 200
    length | length / extent | 50 130
    pages | pages / number of pages | 300 390
    rating | rating / review score | 1 70
    sales | sales / copies sold | 500 590
    released | release year / year of release | 1930 2020
    duration | duration / running time | 60 150
    year | year / calendar year | 1940 2020
    attendance | attendance / number of visitors | 700 790
    distance | distance / way to go | 20 99
    fee | fee / entry fee | 3 75
"""
# name | what a question calls it | how it says that it is a value | values
TEXTS = """
    city | city / town | in {} / from {} | Paris London Rome Madrid Berlin Vienna Oslo Athens
    country | country / home country | | France Japan Brazil Kenya Canada India Egypt Norway
    level | level / grade | | junior senior expert trainee leading
    team | team / group | on the {} team / of the {} team | red blue green north south west
    language | language / mother tongue | speaking {} | French German Spanish Hindi Arabic Dutch
    owner | owner / proprietor | owned by {} / run by {} | Smith Jones Garcia Chen Novak Silva
    status | status / state | | open closed planned full delayed
    region | region / district | in the {} region | coastal central northern southern alpine
    color | color / paint | painted {} / in {} | black white silver yellow orange purple
    brand | brand / maker | made by {} / by {} | Acme Globex Initech Vortex Zenith Apex
    material | material / fabric | made of {} / in {} | steel wood glass cotton leather plastic
    genre | genre / kind | of the {} genre | drama comedy jazz horror folk science
    publisher | publisher / publishing house | published by {} | Orion Penguin Vega Harper Mira
    season | season / time of year | in {} / during {} | spring summer autumn winter
    sponsor | sponsor / backer | sponsored by {} / backed by {} | Nova Titan Orbit Delta Lotus
"""
# tables, singular or singular/plural | numbers | texts
KINDS = (
    """teacher student singer player driver doctor nurse author pilot chef employee actor artist
    farmer lawyer dancer coach/coaches guide | age salary height experience bonus
    | city country level team language""",
    """school museum hotel airport stadium library/libraries hospital factory/factories shop park
    theater station bank farm gallery/galleries gym | capacity area founded staff budget
    | city country owner status region""",
    """car phone bike boat camera machine chair guitar lamp watch/watches bag coat | price weight
    stock speed length | color brand material country""",
    """book song film game album poem novel painting play course | pages rating sales released
    duration price | genre language publisher""",
    """concert match/matches race flight visit tour meeting festival trip show | year attendance
    distance fee duration | season status sponsor city""",
)
NAME = Column("name", ("name",), tuple(f"{a}{i}" for a in "ABCDEF" for i in range(1, 11)))


def _columns() -> dict[str, Column]:
    found = {}
    for line in NUMBERS.strip().splitlines():
        name, says, bounds = map(str.strip, line.split("|"))
        low, high = map(int, bounds.split())
        found[name] = Column(name, tuple(says.split(" / ")), range(low, high))
    for line in TEXTS.strip().splitlines():
        name, says, short, values = map(str.strip, line.split("|"))
        forms = tuple(filter(None, short.split(" / ")))
        found[name] = Column(name, tuple(says.split(" / ")), tuple(values.split()), forms)
    return found


def _kinds() -> list[tuple[str, str, tuple[Column, ...], tuple[Column, ...]]]:
    columns, found = _columns(), []
    for kind in KINDS:
        tables, *lists = (part.split() for part in kind.split("|"))
        numbers, texts = (tuple(columns[name] for name in names) for names in lists)
        for word in tables:
            name, _, plural = word.partition("/")
            found.append((name, plural or f"{name}s", numbers, texts))
    return found


ENTITIES = _kinds()


def schema(rng: random.Random) -> tuple[Table, ...]:
    """One table, or two in any order, the rows of one of which refer to a row of the other."""
    chosen = rng.sample(ENTITIES, rng.choice((1, 2, 2, 2)))
    tables: list[Table] = []
    for name, plural, numbers, texts in chosen:
        columns = [*rng.sample(numbers, rng.randint(1, 2)), *rng.sample(texts, rng.randint(1, 2))]
        rng.shuffle(columns)
        parent = tables[0].name if tables else None
        tables.append(Table(name, plural, (NAME, *columns), parent))
    rng.shuffle(tables)
    return tuple(tables)


@lru_cache(maxsize=1024)
def rows(table: Table, number: int) -> list[tuple[Any, ...]]:
    """What fills the table: a number gives other rows, always the same."""
    rng = random.Random(f"{table.names} {number}")
    columns: list[Sequence[Any]] = [range(1, N_ROWS + 1)]
    if table.parent:
        columns.append(rng.choices(rng.sample(columns[0], N_WITH_CHILDREN), k=N_ROWS))
    for column in table.columns:
        apart = column.is_number or column is NAME
        draw = rng.sample if apart else rng.choices
        columns.append(draw(column.values, k=N_ROWS))
    return list(zip(*columns, strict=True))
