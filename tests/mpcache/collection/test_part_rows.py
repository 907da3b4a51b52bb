"""Converting to parts of another size, and back, keeps rows, their order and their tokens."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mpcache.collection.collect import collect
from mpcache.collection.find_store import find_store
from mpcache.config import ConvertConfig, split_of
from mpcache.maintenance.convert import convert
from mpcache.maintenance.verify import verify
from mpcache.store.part_layout import Layout
from mpcache.store.reader import Store, open_store
from mpcache.store.units_of_part import Units
from mpcli.mpcache import app
from tests.helpers.stores import SIDES, files_of, marks_of, rows_of, small_config, small_store


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all parts of its dataset, the last ones short; tests only read it."""
    return small_store(tmp_path_factory.mktemp("made"), rows=1_000_000)[0]


def tokens_of(store: Store, split: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """All sequences of a split, and the token of each row found through rows/..., in order."""
    row_tokens, tokens = [], []
    for part in store.part_numbers("tokens"):
        if store.layout.split_of(part) != split:
            continue
        tokens.append(store.tokens.read_tokens(part))
        sequence = store.read_part("rows/sequence", part)["rows/sequence"].astype(np.int64)
        position = store.read_part("rows/position", part)["rows/position"]
        # the format numbers sequences across parts; these are of this part
        row_tokens.append(tokens[-1][sequence - part * store.layout.part_sequences, position])
    return np.concatenate(tokens), row_tokens


@pytest.mark.parametrize("factor", [2, 3, 7, 100])
def test_rows_keep_their_order_and_their_tokens(
    original: Path, tmp_path: Path, factor: int
) -> None:
    convert(original, tmp_path / "new", ConvertConfig(part_rows=192 * factor))
    assert verify(tmp_path / "new").findings == ()
    source, new = open_store(original), open_store(tmp_path / "new")
    assert new.fingerprint == source.fingerprint
    assert new.part_rows == 192 * factor
    for split in ("train", "validation"):
        for side in SIDES:
            assert torch.equal(rows_of(new, side, split), rows_of(source, side, split))
        (sequences, rows), (expected, wanted_rows) = tokens_of(new, split), tokens_of(source, split)
        assert np.array_equal(sequences, expected)
        assert np.array_equal(np.concatenate(rows), np.concatenate(wanted_rows))
    for side in SIDES:
        for moment, expected in zip(
            new.acts.moments(*side), source.acts.moments(*side), strict=True
        ):
            torch.testing.assert_close(moment, expected, rtol=1e-12, atol=1e-12)
    lasts = [new.index.token_progress(p).last for p in new.part_numbers("tokens")]
    assert sum(lasts) == 2


@pytest.mark.parametrize("through", [(2,), (7,), (2, 6), (6, 2), (3, 2)])
def test_converting_back_gives_the_same_store(
    original: Path, tmp_path: Path, through: tuple[int, ...]
) -> None:
    path = original
    for number, factor in enumerate((*through, 1)):
        convert(path, tmp_path / str(number), ConvertConfig(part_rows=192 * factor))
        path = tmp_path / str(number)
    assert marks_of(path) == marks_of(original)
    # the collection's arrays span all the rows that it wanted
    actual, expected = (
        {n: d for n, d in files_of(p).items() if "/c/" in n} for p in (path, original)
    )
    assert actual == expected


def test_with_another_dtype_and_chunks_at_once(original: Path, tmp_path: Path) -> None:
    changes = ConvertConfig(part_rows=576, dtype="float32", chunk_rows=288, codec="lz4")
    convert(original, tmp_path / "new", changes)
    assert verify(tmp_path / "new").findings == ()
    source, new = open_store(original), open_store(tmp_path / "new")
    for side in SIDES:
        wanted = rows_of(source, side, "train").float()
        assert torch.equal(rows_of(new, side, "train"), wanted)
    assert new.provenance["converted_from"]["part_rows"] == 192


def test_a_stopped_conversion_continues(original: Path, tmp_path: Path) -> None:
    changes = ConvertConfig(part_rows=384)
    convert(original, tmp_path / "whole", changes)
    convert(original, tmp_path / "new", changes)
    for name in ("0/tokens.json", "1/layers.0/output.json", "2/rows/sequence.json"):
        (tmp_path / "new/marks" / name).unlink()
    assert convert(original, tmp_path / "new", changes).written == 3
    assert marks_of(tmp_path / "new") == marks_of(tmp_path / "whole")


def test_part_sizes_that_do_not_fit_are_refused(original: Path, tmp_path: Path) -> None:
    for rows in ("96", "288", "200"):
        words = ["convert", str(original), str(tmp_path / "new"), "--part-rows", rows]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2
        assert "part_rows must be a multiple of" in result.stderr
    shutil.copytree(original, tmp_path / "store")
    (tmp_path / "store/marks/2/layers.0/output.json").unlink()
    with pytest.raises(ValueError, match=r"part 2 of acts/layers\.0/output is not collected yet"):
        convert(tmp_path / "store", tmp_path / "new", ConvertConfig(part_rows=384))
    others = ConvertConfig(part_rows=384, hookpoints=("layers.1.mlp",))
    assert convert(tmp_path / "store", tmp_path / "some", others).written
    assert not (tmp_path / "new").exists()


def test_a_source_that_has_grown_needs_a_new_target(tmp_path: Path) -> None:
    """The last part was short, and a committed part never changes."""
    path, _ = small_store(tmp_path, rows=900)
    changes = ConvertConfig(part_rows=768)
    convert(path, tmp_path / "new", changes)
    assert verify(tmp_path / "new").intact
    small_store(tmp_path, rows=1500)
    with pytest.raises(
        ValueError, match="before the source had all rows of that part; convert into"
    ):
        convert(path, tmp_path / "new", changes)
    assert verify(tmp_path / "new").intact


def test_nothing_is_collected_into_larger_parts(tmp_path: Path) -> None:
    path, _ = small_store(tmp_path, rows=900)
    convert(path, tmp_path / "root" / "new", ConvertConfig(part_rows=384))
    config = small_config(tmp_path, rows=1500)
    with pytest.raises(ValueError, match="no rows can be collected into it"):
        collect(config, tmp_path / "root" / "new")
    target = find_store(tmp_path / "root", config)  # the root chooses another store
    assert not Path(str(target.storage)).exists()


@given(every=st.integers(1, 12), count=st.integers(1, 9), part=st.integers(0, 400))
def test_units_are_each_in_one_part_of_their_split(every: int, count: int, part: int) -> None:
    layout = Layout(
        ctx_len=8, part_rows=64 * count, chunk_rows=64, validation_every=every,
        dtype="float32", codec="none", token_dtype="uint8",
    )  # fmt: skip
    units = Units(layout, 64)
    held = units.units_of(part)
    assert len(held) == count
    assert [units.part_of(unit) for unit in held] == [(part, i) for i in range(count)]
    assert {split_of(unit, every) for unit in held} == {split_of(part, every)}
    between = [
        n for n in range(held[0], held[-1] + 1) if split_of(n, every) == layout.split_of(part)
    ]
    assert between == list(held)
    before = units.previous_part(part)
    alike = [n for n in range(part) if split_of(n, every) == split_of(part, every)]
    assert before == (alike[-1] if alike else None)
    if before is not None:
        assert units.units_of(before)[-1] == max(
            n for n in range(held[0]) if split_of(n, every) == split_of(part, every)
        )
