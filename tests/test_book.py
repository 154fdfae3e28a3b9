"""The results book is what the records say, and nothing else."""

import json

import pytest

from benchmarks.book import RESULTS, book
from benchmarks.claims import CLAIMS, FAILS, HOLDS, WAITS, Claim


def test_the_page_is_made_of_the_records_that_stand_beside_it():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == "".join(book(RESULTS))


def test_a_claim_without_a_record_waits(tmp_path):
    page = "".join(book(tmp_path))
    assert page.count(f"| {WAITS} |") == len(CLAIMS)


@pytest.mark.parametrize("holds, verdict", [(True, HOLDS), (False, FAILS), (None, "not testable")])
def test_a_verdict_is_of_the_values_recorded(holds, verdict):
    rule = None if holds is None else lambda values: values["speedup"] > 1
    claim = Claim("paper", "faster", "2", "make", "some", str, rule, "no machine")
    entry = json.loads(json.dumps({"values": {"speedup": 2 if holds else 0.5}}))
    assert claim.verdict(entry).startswith(verdict)
