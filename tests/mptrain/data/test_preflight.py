"""Stores that a run cannot use are refused with a remedy; unfinished collections are awaited."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mpcache.store.reader import open_store
from mptrain.config.coder_grid import FitConfig
from mptrain.data import preflight
from mptrain.data.preflight import await_parts, check_window_memory, open_trainable_store
from mptrain.data.ranges_as_text import format_ranges, parse_ranges
from mptrain.runs.fit import fit, plan_fit
from tests.helpers.stores import small_store, write_corpus

MLP = ("layers.1.mlp", "output")


def config(store: Path, **changes: object) -> FitConfig:
    settings = {
        "store": str(store), "run": "run", "hookpoints": ("layers.1.mlp",), "k": (3,),
        "expansion": (2,), "rows": 512, "batch_rows": 64, "kind": ("sae",), "device": "cpu",
    }  # fmt: skip
    return FitConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("suited"))[0]


@pytest.fixture
def begun(original: Path, tmp_path: Path) -> Path:
    """A copy of the store whose parts 2 and later have tokens, and no activations yet."""
    path = tmp_path / "store"
    shutil.copytree(original, path)
    for folder in (path / "marks").iterdir():
        if int(folder.name) >= 2:
            for mark in folder.glob("layers*/*.json"):
                mark.unlink()
    return path


def commit_missing_marks(begun: Path, original: Path) -> None:
    """Commit the missing marks one by one."""
    for mark in sorted((original / "marks").rglob("*.json")):
        target = begun / mark.relative_to(original)
        if not target.exists():
            time.sleep(0.02)
            shutil.copy(mark, target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_rows": 2048, "rows": 4096}, r"too few for one batch of 2048; collect more rows, .*"
         r"--follow, or use --batch-rows \d+ or less"),
        ({"hookpoints": ("layers.7",)}, "has no hookpoint 'layers.7'; "
         "use one of: layers.0, layers.1"),
        ({"hookpoints": ("layers.0",), "kind": ("transcoder",)},
         "has no input of layers.0, only its output; "
         "collect the input with --hookpoints layers.0:input"),
    ],
)  # fmt: skip
def test_messages_name_the_remedy(original: Path, changes: dict[str, object], message: str) -> None:
    chosen = config(original, **changes)
    sides = [(chosen.hookpoints[0], "input" if "transcoder" in chosen.kind else "output")]
    with pytest.raises(ValueError, match=message) as error:
        open_trainable_store(chosen, sides)
    assert "\n" not in str(error.value)


def test_windows_must_fit_into_the_memory_of_the_machine(original: Path) -> None:
    needed = 2 * 128 * 16 * 2  # two windows of 128 rows, 16 bfloat16 values each
    store = open_store(original)
    assert store.width(*MLP) == 16
    check_window_memory(store, [MLP], 128, needed)
    with pytest.raises(ValueError, match="use --window-rows 127 or less"):
        check_window_memory(store, [MLP], 128, needed - 1)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(ValueError, match=f"this machine has {memory / 1e9:.3g} GB"):
        open_trainable_store(config(original, window_rows=10**12), [MLP])


def test_a_store_under_way_is_trained_on_as_far_as_it_is_committed(begun: Path) -> None:
    assert {
        part.number for part in open_trainable_store(config(begun), [MLP]).parts([MLP], "train")
    } == {0}


def test_a_store_without_train_rows_yet_is_refused(begun: Path) -> None:
    for mark in (begun / "marks/0").glob("layers*/*.json"):
        mark.unlink()
    with pytest.raises(ValueError, match=r"has 0 train rows, .* with --follow$"):
        plan_fit(config(begun))


def test_a_side_that_nobody_collects_is_warned_of_once(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def look(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", look)
    with (
        pytest.warns(
            RuntimeWarning, match="is complete, but holds only layers.0:output, .*layers.7:out"
        ) as warned,
        pytest.raises(KeyboardInterrupt),
    ):
        await_parts(str(original), [MLP, ("layers.7", "output")])
    assert len(warned) == 1


def test_sides_under_way_are_waited_for_or_refused(begun: Path, original: Path) -> None:
    shutil.copytree(original / "marks/2/layers.0", begun / "marks/2/layers.0", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="wait for a running collection with --follow"):
        open_trainable_store(config(begun), [MLP, ("layers.0", "output")])


def test_follow_waits_and_trains_as_on_the_finished_store(
    begun: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_POLL_SECONDS", 0.01)
    collector = threading.Thread(target=commit_missing_marks, args=(begun, original))
    collector.start()
    followed = fit(config(begun, run=str(tmp_path / "followed"), follow=True))
    collector.join()
    expected = fit(config(original, run=str(tmp_path / "whole")))
    clocks = ("train_seconds", "rows_per_second")
    for result, expected_result in zip(followed, expected, strict=True):
        assert {**result.to_json(), **dict.fromkeys(clocks)} == {
            **expected_result.to_json(),
            **dict.fromkeys(clocks),
        }
    for file in (tmp_path / "whole").glob("coders/*/coder.safetensors"):
        expected_result = load_file(tmp_path / "followed" / file.relative_to(tmp_path / "whole"))
        assert all(torch.equal(t, expected_result[name]) for name, t in load_file(file).items())


def test_follow_waits_for_tokens_and_for_sides_that_are_not_begun(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "store", []
    shutil.copytree(original, path)
    shutil.rmtree(path / "marks")
    looks = iter([["0/tokens", "0/rows"], ["0", "1/tokens", "1/rows"], ["."]])

    def look(_: float) -> None:
        seen.append(open_store(path).is_planned)
        for name in next(looks):
            for mark in (original / "marks").rglob("*.json"):
                relative_path = mark.relative_to(original / "marks")
                if name == "." or str(relative_path).startswith(name):
                    (path / "marks" / relative_path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(mark, path / "marks" / relative_path)

    monkeypatch.setattr(time, "sleep", look)
    assert await_parts(str(path), [MLP]).part_numbers("tokens") == open_store(
        original
    ).part_numbers("tokens")
    assert seen == [False, False, False]


def test_a_dataset_that_ended_early_is_planned_whole(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", documents=8)
    path, summary = small_store(tmp_path, rows=100_000)
    assert summary.exhausted
    assert open_store(path).is_planned


@given(st.sets(st.integers(0, 40)))
def test_ranges_list_their_numbers(numbers: set[int]) -> None:
    assert parse_ranges(format_ranges(numbers)) == numbers
    assert format_ranges({0, 1, 2, 8}) == "0-2, 8"
