"""No sample is lost, none of another run is taken over, and other harnesses read the export."""

import json
from dataclasses import replace

import pytest

from mtp.evaluate.samples import Sample, SampleFile, export, read_samples, tally

RUN = {"model": "abc", "says": "MBPP, 500", "temperature": 0.2, "ks": (1, 10)}
ONE = Sample("Mbpp/11", 0, 7, "hash", "x = 'é\u2028'\n", "passed", {"tokens": [1, 2]})
TWO = replace(ONE, number=1, verdict="timeout")


def file_of(tmp_path, *samples):
    path = tmp_path / "runs" / "samples.jsonl"
    samples_file = SampleFile(path, RUN)
    for sample in samples:
        samples_file.append(sample)
    return path


def test_samples_come_back_as_they_were_written(tmp_path):
    path = file_of(tmp_path, ONE, TWO)
    again = SampleFile(path, RUN)
    assert again.samples == [ONE, TWO] and again.done == {("Mbpp/11", 0), ("Mbpp/11", 1)}
    assert read_samples(path)[0] == json.loads(json.dumps(RUN))


def test_a_line_that_a_crash_cut_short_is_dropped_wherever_it_was_cut(tmp_path):
    path = file_of(tmp_path, ONE, TWO)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for at in range(start, len(whole)):
        path.write_bytes(whole[:at])
        samples_file = SampleFile(path, RUN)
        assert samples_file.samples == [ONE]
        samples_file.append(TWO)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("key, value", [("model", "other"), ("temperature", 0.8), ("new", 1)])
def test_samples_of_another_run_are_not_gone_on_with_and_not_touched(tmp_path, key, value):
    path = file_of(tmp_path, ONE)
    path.write_bytes(path.read_bytes() + b'{"torn')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"another run.*{key} is .*{value!r} here.*another file"):
        SampleFile(path, {**RUN, key: value})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no json\n", b"[1]\n", b'{"task_id": "a"}\n', b'{"run"'])
def test_other_files_are_refused_and_kept(tmp_path, content):
    path = tmp_path / "other.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="other.jsonl: is no file of samples"):
        SampleFile(path, RUN)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"{]\n", b'{"task_id": "a"}\n', b"3\n"])
def test_a_line_that_is_no_sample_is_named(tmp_path, line):
    path = file_of(tmp_path, ONE)
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match="line 3: is no sample"):
        read_samples(path)


def test_a_sample_that_is_there_twice_is_refused(tmp_path):
    path = file_of(tmp_path, ONE, ONE)
    with pytest.raises(ValueError, match="twice"):
        SampleFile(path, RUN)


def test_tally_counts_samples_and_passes_by_problem():
    other = replace(ONE, task_id="Mbpp/12", verdict="exited_early")
    assert tally([ONE, TWO, other]) == {"Mbpp/11": (2, 1), "Mbpp/12": (1, 0)}


def test_the_export_has_the_two_established_keys(tmp_path):
    export([ONE, TWO], tmp_path / "export.jsonl")
    text = (tmp_path / "export.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    assert lines == [{"task_id": "Mbpp/11", "completion": ONE.completion}] * 2
