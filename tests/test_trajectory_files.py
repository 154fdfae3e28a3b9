"""Trajectories come back as they were collected, a stopped run goes on, nothing foreign is read."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from test_decode import some_requests, target

from mtp.checkpoint import fingerprint
from mtp.consistency.files import Origin, Report, collect_shards, origin_of, read_trajectories
from mtp.consistency.filters import FilterConfig
from mtp.consistency.trajectories import Collection
from mtp.decode.contract import Request
from mtp.tokenizer import ByteTokenizer

WINDOW = 5
ORIGIN = Origin("tokenizer", "model", WINDOW, {"seed": 0, "ends": (3,)})
NONE = FilterConfig(token_times=0, ngram_times=0, sentence_times=0)
ANYWHERE = torch.device("cpu")


def collected(folder, requests=None, filters=NONE, origin=ORIGIN, **options):
    model = target("transformer", ANYWHERE)
    requests = some_requests() if requests is None else requests
    options = {"batch_size": 3, "shard_size": 3} | options
    return collect_shards(folder, model, requests, origin, ByteTokenizer(), filters, **options)


def read(where, **wanted):
    return list(read_trajectories(where, **({"tokenizer": "tokenizer", "window": 5} | wanted)))


def contents(folder):
    """By file, without what depends on the clock and on who was decoded beside whom."""
    files = {}
    for path in sorted(folder.iterdir()):
        text = path.read_text()
        head, *lines = [text] if path.suffix == ".json" else text.splitlines()
        head = json.loads(head)
        for key in ("passes", "read_tokens", "seconds"):
            head.get("report", head).pop(key)
        files[path.name] = [head, *lines]
    return files


def test_trajectories_come_back_in_order(tmp_path):
    report = collected(tmp_path)
    wanted = list(Collection(target("transformer", ANYWHERE), some_requests(), WINDOW))
    assert read(tmp_path) == wanted
    assert origin_of(tmp_path) == replace(ORIGIN, settings={"seed": 0, "ends": [3]})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "report.json",
        *(f"shard-000000{first}.jsonl" for first in (0, 3, 6)),
    ]
    assert read(tmp_path / "shard-0000003.jsonl") == wanted[3:6]
    assert report.tokens == sum(t.length for t in wanted)
    assert report.states == sum(len(states) for t in wanted for states in t.windows)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == {"origin": ORIGIN.words() | {"settings": {"seed": 0, "ends": [3]}}} | asdict(
        report
    )


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 5, 7])
def test_a_stopped_run_goes_on_to_the_same_files(at, tmp_path):
    def stop(done, total):
        assert total == 7
        if done == at:
            raise Stopped

    filters = replace(NONE, min_tokens=4)
    collected(tmp_path / "whole", filters=filters)
    with pytest.raises(Stopped):
        collected(tmp_path / "parts", filters=filters, tell=stop)
    told = []
    collected(tmp_path / "parts", filters=filters, tell=lambda *said: told.append(said))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert told == [(i, 7) for i in range((at - 1) // 3 * 3 + 1, 8)]  # whole shards are kept


def test_what_is_complete_is_not_collected_again(tmp_path):
    report, told = collected(tmp_path), []
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert collected(tmp_path, tell=told.append) == report
    assert told == [] and {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "key, value",
    [
        ("tokenizer", "other"),
        ("model", "other"),
        ("window", 4),
        ("settings", {"seed": 1, "ends": (3,)}),
    ],
)
def test_a_folder_of_another_origin_is_not_gone_on_with(key, value, tmp_path):
    collected(tmp_path)
    with pytest.raises(ValueError, match=rf"shard-0000000.jsonl: {key} is .* here: choose another"):
        collected(tmp_path, origin=replace(ORIGIN, **{key: value}))


def test_dropped_responses_are_counted_and_left_out(tmp_path):
    requests = some_requests()
    every = list(Collection(target("transformer", ANYWHERE), requests, WINDOW))
    kept = [t for t in every if t.length > 4]
    assert 0 < len(kept) < len(every)
    report = collected(tmp_path, filters=replace(NONE, min_tokens=5))
    assert read(tmp_path) == kept
    assert report.dropped == {"length": len(every) - len(kept)} and report.kept == len(kept)
    assert report.responses == 7 and report.tokens == sum(t.length for t in every)
    ended = sum(t.response[-1] == 3 for t in every)
    assert 0 < report.unfinished == len(every) - ended


def test_prompts_that_do_not_fit_are_skipped_and_counted(tmp_path):
    one, *others = some_requests()
    requests = [one, Request([], 4), replace(others[0], prompt=[1] * 82), *others[1:]]
    report = collected(tmp_path, requests)  # 82 and three windows of 5 are more than 96
    assert report.skipped == {"empty": 1, "too_long": 1} and report.responses == 6
    assert [t.prompt for t in read(tmp_path)] == [r.prompt for r in (one, *others[1:])]
    collected(tmp_path / "just", [replace(one, prompt=[1] * 81)])
    with pytest.raises(ValueError, match=r"none of 2 prompts can be read .*max_seq_len=96"):
        collected(tmp_path / "none", requests[1:3])


def test_filters_that_drop_everything_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"dropped all 7 responses \(7 for length\): loosen"):
        collected(tmp_path, filters=replace(NONE, min_tokens=99))
    assert json.loads((tmp_path / "report.json").read_text())["dropped"] == {"length": 7}
    assert read(tmp_path) == []


@pytest.mark.parametrize("key, value", [("tokenizer", "x"), ("window", 8)])
def test_trajectories_of_something_else_are_refused_by_name(key, value, tmp_path):
    collected(tmp_path)
    said = rf"shard-0000000.jsonl: trajectories of {key}=.*wanted are those of {value!r}"
    with pytest.raises(ValueError, match=said):
        read_trajectories(tmp_path, **({"tokenizer": "tokenizer", "window": 5} | {key: value}))


def test_trajectories_of_another_model_are_refused_by_both_names(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    one, other = tmp_path / "one", tmp_path / "other"
    out = tmp_path / "out"
    collected(out, origin=replace(ORIGIN, model=fingerprint(one)))
    assert read(out, model=one) == read(out)
    said = f"of model='{fingerprint(one)}', wanted are those of '{fingerprint(other)}', {other}: "
    with pytest.raises(ValueError, match=said):
        read(out, model=other)


GOOD = {"prompt": [1], "windows": [[[1, 2, 3, 4, 5]]], "length": 5}


@pytest.mark.parametrize(
    "line, why",
    [
        ("{", "Expecting"),
        ("[]", "mapping"),
        (json.dumps(GOOD | {"more": 1}), "more"),
        (json.dumps({"prompt": [1], "length": 5}), "windows"),
        (json.dumps(GOOD | {"prompt": []}), "empty"),
        (json.dumps(GOOD | {"windows": [[]]}), "empty"),
        (json.dumps(GOOD | {"windows": [[[1, 2]]]}), "has not 5 tokens"),
        (json.dumps(GOOD | {"windows": [[["a"] * 5]]}), "integers"),
        (json.dumps(GOOD | {"windows": 3}), "iterable"),
        (json.dumps(GOOD | {"length": 6}), "length=6"),
        (json.dumps(GOOD | {"length": 0}), "length=0"),
        (json.dumps(GOOD | {"length": "5"}), "not supported"),
    ],
)
def test_a_damaged_line_is_named_with_its_file(line, why, tmp_path):
    collected(tmp_path)
    file = tmp_path / "shard-0000003.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=f"shard-0000003.jsonl, line 3: is no trajectory .*{why}"):
        read(tmp_path)


def test_lost_lines_and_shards_and_headers_are_named(tmp_path):
    collected(tmp_path)
    file = tmp_path / "shard-0000003.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="shard-0000003.jsonl: ends at line 3, should have 3"):
        read(tmp_path)
    for first in ("", "\n", "[]\n", '{"format_version": 1}\n', lines[1]):
        file.write_text(first)
        with pytest.raises(ValueError, match="shard-0000003.jsonl, line 1: is no header"):
            read(tmp_path)
    file.write_text('{"format_version": 2}\n')
    with pytest.raises(ValueError, match="format version 2; this release reads 1"):
        read(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="shard-0000006.jsonl: begins at response 6, 3 is missing"):
        read(tmp_path)
    with pytest.raises(ValueError, match="nothing: no trajectories there"):
        read(tmp_path / "nothing")


def test_reports_add_up():
    one = Report(responses=2, dropped={"length": 1}, seconds=0.5)
    two = Report(responses=3, dropped={"length": 1, "token_repetition": 2}, seconds=1.0)
    both = Report(responses=5, dropped={"length": 2, "token_repetition": 2}, seconds=1.5)
    assert one + two == both
