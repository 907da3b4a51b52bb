"""A converted store holds the same rows, rounded as asked, and says where they come from."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mpcache.collection.collect import collect
from mpcache.config import ConvertConfig
from mpcache.maintenance.convert import convert
from mpcache.maintenance.verify import verify
from mpcache.storage import atomic_files
from mpcache.storage.base import open_storage
from mpcache.store.reader import open_store
from mpcache.store.store_metadata import is_store
from mpcli.mpcache import app
from tests.helpers.stores import SIDES, files_of, marks_of, rows_of, small_config, small_store


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 store with all parts of its dataset, the last ones short; tests only read it."""
    folder = tmp_path_factory.mktemp("made")
    return small_store(folder, rows=1_000_000, dtype="float32")[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("codec", "chunk_rows"), [("zstd", None), (None, 48), ("lz4", 192)])
def test_rows_are_the_sources_rounded_once(
    original: Path, tmp_path: Path, dtype: str, codec: str | None, chunk_rows: int | None
) -> None:
    changes = ConvertConfig(dtype=dtype, codec=codec, chunk_rows=chunk_rows)  # type: ignore[arg-type]
    convert(original, tmp_path / "new", changes)
    assert verify(tmp_path / "new").findings == ()
    source, new = open_store(original), open_store(tmp_path / "new")
    assert new.fingerprint == source.fingerprint
    assert (new.layout.codec, new.chunk_rows) == (codec or "none", chunk_rows or 32)
    for split in ("train", "validation"):
        for side in SIDES:
            expected = rows_of(source, side, split).to(getattr(torch, dtype))
            assert torch.equal(rows_of(new, side, split), expected)
    for array in ("tokens", "rows/sequence", "rows/position"):
        for part in source.part_numbers(array):
            converted, expected = (
                new.read_part(array, part)[array],
                source.read_part(array, part)[array],
            )
            assert (converted == expected).all()
            assert new.mark(part, array).rows == source.mark(part, array).rows


@pytest.mark.slow
def test_converting_equals_collecting(original: Path, tmp_path: Path) -> None:
    """One rounding of float32 values, whether before the first write or after it."""
    changes = {"dtype": "bfloat16", "codec": "zstd"}
    convert(original, tmp_path / "new", ConvertConfig(**changes))  # type: ignore[arg-type]
    collect(small_config(original.parent, rows=1_000_000, **changes), tmp_path / "collected")
    assert marks_of(tmp_path / "new") == marks_of(tmp_path / "collected")
    converted, expected = files_of(tmp_path / "new"), files_of(tmp_path / "collected")
    assert converted.pop("store.json") != expected.pop("store.json")
    assert converted == expected


def test_provenance_names_the_source(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "one", ConvertConfig(dtype="bfloat16"))
    convert(tmp_path / "one", tmp_path / "two", ConvertConfig(hookpoints=("layers.*.mlp:input",)))
    two = open_store(tmp_path / "two")
    source = two.provenance["converted_from"]
    assert (source["store"], source["dtype"]) == ("one", "bfloat16")
    assert source["converted_from"]["dtype"] == "float32"
    assert two.provenance["model"] == open_store(original).provenance["model"]
    assert [(h, s) for h in two.hookpoints for s in two.sides(h)] == [("layers.1.mlp", "input")]
    assert two.config["hookpoints"] == ["layers.1.mlp:input"]


@pytest.mark.parametrize("moment", [1, 9, 40])
def test_a_stopped_conversion_continues_and_follows_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    path, _ = small_store(tmp_path, rows=600)
    write, calls = atomic_files.write_temporary_file, 0

    def stopped(*args) -> Path:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        return write(*args)

    changes = ConvertConfig(codec="lz4", chunk_rows=64)
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "write_temporary_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            convert(path, tmp_path / "new", changes)
    assert not is_store(open_storage(tmp_path / "new"))
    convert(path, tmp_path / "new", changes)
    small_store(tmp_path, rows=900)
    done = convert(path, tmp_path / "new", changes)
    assert 0 < done.written < done.parts
    convert(path, tmp_path / "at_once", changes)
    assert marks_of(tmp_path / "new") == marks_of(tmp_path / "at_once")
    assert files_of(tmp_path / "new") == files_of(tmp_path / "at_once")


def test_nothing_is_collected_into_rounded_rows(tmp_path: Path) -> None:
    path, _ = small_store(tmp_path, rows=600)
    convert(path, tmp_path / "wide", ConvertConfig(dtype="float32"))
    convert(path, tmp_path / "packed", ConvertConfig(codec="zstd"))
    with pytest.raises(ValueError, match="no rows can be collected into it"):
        collect(small_config(tmp_path, rows=900, dtype="float32"), tmp_path / "wide")
    collect(small_config(tmp_path, rows=900, codec="zstd"), tmp_path / "packed")
    assert verify(tmp_path / "packed").findings == ()


def test_values_that_overflow_are_counted(tmp_path: Path) -> None:
    from transformers import AutoModel

    config = small_config(tmp_path, rows=300, dtype="float32", hookpoints=("layers.1.mlp:output",))
    model = AutoModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3] = 1e9
    model.save_pretrained(tmp_path / "model")
    collect(config, tmp_path / "store")
    command = ["convert", str(tmp_path / "store"), str(tmp_path / "new"), "--dtype", "float16"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "384 values became infinite" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chunk-rows", "50"), "multiple of ctx_len and of chunk_rows"),
        (("--hookpoints", "layers.7"), "use some of: layers.0:output, layers.1.mlp:input"),
        (("--hookpoints", "layers.0:input"), "hookpoints must be in the store"),
        (("--hookpoints", "../secret"), "names joined by dots"),
        (("--dtype", "int4"), "must be one of bfloat16, float16, float32"),
    ],
)
def test_invalid_conversions_are_refused(
    original: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = CliRunner().invoke(app, ["convert", str(original), str(tmp_path / "new"), *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "new").exists()
