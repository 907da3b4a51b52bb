"""Records survive the file, a torn line is no record, and rewinding makes continuing exact."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptrain.runs.metrics_file import MetricsFile, Record, read_records, rewind
from tests.helpers.records import RECORD

counts, floats = st.integers(0, 2**53), st.floats()
records = st.builds(
    Record,
    coder=st.text(st.characters(exclude_categories=["Cs"]), min_size=5),
    step=st.integers(0, 20),
    rows=counts,
    train_seconds=floats,
    wait_seconds=floats,
    fvu=floats,
    validation_fvu=st.none() | floats,
    l0=floats,
    dead_share=floats,
    lr=floats,
    rows_per_second=floats,
    peak_memory_bytes=counts,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def write(folder, items):
    path = folder / "metrics.jsonl"
    path.unlink(missing_ok=True)
    path.touch()
    for item in items:
        MetricsFile(path).add(item)
    return path


@given(st.lists(records, max_size=4))
def test_what_is_read_is_what_was_written(folder, items):
    path = write(folder, items)
    assert repr(read_records(path)) == repr(items)  # compare repr, since NaN differs from itself


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@given(st.lists(records, max_size=4))
def test_every_line_is_strict_json(folder, items):
    lines = write(folder, items).read_text().splitlines()
    assert len([json.loads(line, parse_constant=refuse) for line in lines]) == len(items)


@given(st.lists(records, min_size=1, max_size=4), st.data())
def test_a_torn_last_line_is_no_record(folder, items, data):
    path = write(folder, items[:-1])
    complete_bytes = len(path.read_bytes())
    MetricsFile(path).add(items[-1])
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(complete_bytes, len(content) - 1))])
    assert repr(read_records(path)) == repr(items[:-1])


@given(st.lists(records, max_size=5), st.integers(0, 20), st.binary(max_size=9))
def test_rewinding_keeps_what_is_not_later(folder, items, step, torn):
    path = write(folder, items)
    with path.open("ab") as file:
        file.write(torn.replace(b"\n", b""))
    rewind(path, lambda item: item.step <= step)
    kept = [item for item in items if item.step <= step]
    content = path.read_bytes()
    assert repr(read_records(path)) == repr(kept)
    assert content == write(folder, kept).read_bytes()
    assert [file.name for file in folder.iterdir()] == ["metrics.jsonl"]


def test_continuing_after_a_crash_writes_the_same_file(folder):
    steps, saved = 9, 4
    items = [replace(RECORD, step=step, fvu=1 / (step + 1)) for step in range(steps)]
    uninterrupted = write(folder, items).read_bytes()
    path = write(folder, items[:7])
    path.write_bytes(path.read_bytes()[:-3])
    rewind(path, lambda item: item.step <= saved)
    for item in items[saved + 1 :]:
        MetricsFile(path).add(item)
    assert path.read_bytes() == uninterrupted


def test_rewinding_without_a_file_makes_none(tmp_path):
    rewind(tmp_path / "metrics.jsonl", lambda _: True)
    assert not list(tmp_path.iterdir())


def test_divergence_is_not_mistaken_for_a_step_without_validation(tmp_path):
    path = write(tmp_path, [replace(RECORD, validation_fvu=math.nan), RECORD])
    diverged, skipped = read_records(path)
    assert diverged.validation_fvu is not None
    assert math.isnan(diverged.validation_fvu)
    assert skipped.validation_fvu is None


@pytest.mark.parametrize("line", ["", "{", "3", '{"coder": "a"}', '{"coder": [1]}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = write(tmp_path, [RECORD])
    path.write_text(path.read_text() + line + "\n")
    MetricsFile(path).add(RECORD)
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl, line 2 is damaged, .* the fields coder, step"
    ):
        read_records(path)
