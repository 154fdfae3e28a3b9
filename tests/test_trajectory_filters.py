"""Each rule drops what it names, at its bound and not before, and no other."""

import pytest

from mtp.consistency.filters import RULES, FilterConfig, why_dropped

OFF = {"token_times": 0, "ngram_times": 0, "sentence_times": 0}


def only(**rules):
    return FilterConfig(**(OFF | rules))


@pytest.mark.parametrize(
    "rules, kept, dropped, word",
    [
        ({"min_tokens": 3}, [1, 2, 3], [1, 2], "length"),
        ({"max_tokens": 3}, [1, 2, 3], [1, 2, 3, 4], "length"),
        ({"token_times": 3}, [1, 1, 2, 1, 1], [2, 1, 1, 1], "token_repetition"),
        (
            {"ngram": 2, "ngram_times": 3},
            [1, 2, 9, 1, 2, 8, 2, 1],
            [1, 2, 9, 1, 2, 8, 1, 2],
            "ngram_repetition",
        ),
    ],
)
def test_a_rule_of_tokens_drops_at_its_bound(rules, kept, dropped, word):
    config = only(**rules)
    assert why_dropped(kept, "", config) is None
    assert why_dropped(dropped, "", config) == word
    assert why_dropped(dropped, "", only()) is None


@pytest.mark.parametrize(
    "kept, dropped",
    [
        ("One is here. One is here.", "One is here. Two are there. One is here. One is here."),
        ("a = b + c\n" * 2, "a = b + c\nelse:\n    a = b + c\n  a  =  b + c\n"),
        ("else:\n" * 9, "is it so? is it so? is it so?"),
    ],
)
def test_sentences_and_lines_of_three_words_are_counted_wherever_they_stand(kept, dropped):
    config = only(sentence_times=3)
    assert why_dropped([1], kept, config) is None
    assert why_dropped([1], dropped, config) == "sentence_repetition"


def test_an_empty_or_short_response_breaks_no_rule_of_repetition():
    assert why_dropped([], "", FilterConfig()) is None
    assert why_dropped([1], "a", FilterConfig()) is None


def test_the_first_rule_in_their_order_is_named():
    config = FilterConfig(max_tokens=5)
    assert why_dropped([1] * 99, "", config) == next(iter(RULES)) == "length"


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("min_tokens", -1, "at least 0"),
        ("ngram", 0, "at least 1"),
        ("token_times", 1, "0 or at least 2"),
        ("sentence_times", -2, "0 or at least 2"),
    ],
)
def test_impossible_bounds_are_refused_by_name(key, value, allowed):
    with pytest.raises(ValueError, match=f"filters.{key}={value} must be {allowed}"):
        FilterConfig(**{key: value})
    with pytest.raises(ValueError, match="filters.max_tokens=2 must be 0 or at least min_tokens=3"):
        FilterConfig(min_tokens=3, max_tokens=2)
