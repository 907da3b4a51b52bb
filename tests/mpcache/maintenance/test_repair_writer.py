"""A repair restores the committed bytes on any machine; one lost part stops no other."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcache.config import ConvertConfig, RepairConfig
from mpcache.maintenance import recompute as recompute_module
from mpcache.maintenance.convert import convert
from mpcache.maintenance.repair import repair
from mpcache.maintenance.verify import verify
from mpcache.store import part_encoder
from mpcache.store.moments import RowMeasurements, measure_rows
from mpcache.store.sealed_json import unseal
from tests.helpers.damage import ACTS, MARK, OBJECT, flip
from tests.helpers.paths import GOLDEN
from tests.helpers.stores import files_of, small_store

STORE_V1 = GOLDEN / "store-v1"
NORMS = "arrays.zarr/norms/layers.0/output/c/2"
MOMENTS = "arrays.zarr/moments/layers.0/output/c/2/0/0"
TOKENS, TOKENS_MARK = "arrays.zarr/tokens/c/2/0", "marks/2/tokens.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that tests only read."""
    folder = tmp_path_factory.mktemp("made")
    return small_store(folder, rows=900, hookpoints=("layers.0",))[0]


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "store"))


def all_of(path: Path) -> dict[str, bytes]:
    """Every byte, marks included."""
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture
def other_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate another processor or version: norms and moments differ in their last bits."""

    def measured(x_RW: torch.Tensor) -> RowMeasurements:
        measurements = measure_rows(x_RW)
        mean_W = torch.nextafter(measurements.moments.mean_W, torch.tensor(torch.inf).double())
        moments = dataclasses.replace(measurements.moments, mean_W=mean_W)
        norms_R = torch.nextafter(measurements.norms_R, torch.tensor(torch.inf))
        return dataclasses.replace(measurements, moments=moments, norms_R=norms_R)

    monkeypatch.setattr(part_encoder, "measure_rows", measured)


@pytest.mark.usefixtures("other_sums")
def test_where_activations_are_equal_the_part_is_the_same(original: Path, store: Path) -> None:
    """Norms and moments that are not damaged stay as they were committed."""
    flip(store / OBJECT, 100)
    (mark,) = repair(store).marks
    assert mark.outcome == "mended"
    assert all_of(store) == all_of(original)


@pytest.mark.usefixtures("other_sums")
@pytest.mark.parametrize("damaged", [(MOMENTS,), (NORMS,), (MOMENTS, NORMS, OBJECT)])
def test_damaged_moments_are_computed_again(
    original: Path, store: Path, damaged: tuple[str, ...]
) -> None:
    for name in damaged:
        flip(store / name, 8)
    (mark,) = repair(store).marks
    assert mark.outcome == "rewritten"
    assert verify(store).findings == ()
    repaired, expected = files_of(store), files_of(original)
    changed = {name for name in expected if repaired[name] != expected[name]}
    assert changed == set(damaged) - {OBJECT}
    old, new = (unseal((s / MARK).read_bytes(), MARK) for s in (original, store))
    assert new["replaces"]["reason"] == mark.reason
    assert "the same activations" in mark.reason
    assert new["replaces"]["objects"] == old["objects"]
    assert {n for n in old["objects"] if new["objects"][n] != old["objects"][n]} == changed


@pytest.mark.usefixtures("other_sums")
def test_a_damaged_mark_of_activations_that_are_computed_alike(original: Path, store: Path) -> None:
    flip(store / MARK, 50)
    (mark,) = repair(store).marks
    assert mark.outcome == "mark rebuilt"
    assert verify(store).findings == ()
    assert (store / OBJECT).read_bytes() == (original / OBJECT).read_bytes()


# --- from a copy ---


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize(
    "name",
    [
        f"{ACTS}/c/1/0",
        "arrays.zarr/tokens/c/1/0",
        "arrays.zarr/rows/position/c/1",
        "arrays.zarr/norms/layers.0/output/c/1",
        "arrays.zarr/moments/layers.0/output/c/1/0/0",
    ],
)
def test_a_store_of_older_code_is_repaired(tmp_path: Path, codec: Any, name: str) -> None:
    """A copy restores every byte; a converted store all but the values computed from rows."""
    damaged, source = tmp_path / "damaged", tmp_path / "source"
    shutil.copytree(STORE_V1, damaged)
    convert(STORE_V1, source, ConvertConfig(codec=codec))
    flip(damaged / name, 8)
    done = repair(damaged, RepairConfig(source=str(source)))
    assert done.intact
    assert verify(damaged).findings == ()
    if codec == "zstd" or not name.startswith(("arrays.zarr/norms", "arrays.zarr/moments")):
        assert all_of(damaged) == all_of(STORE_V1)


def test_a_damaged_mark_has_that_of_a_copy(tmp_path: Path) -> None:
    """The copy's mark is used where an existing object agrees with it."""
    damaged = Path(shutil.copytree(STORE_V1, tmp_path / "damaged"))
    marks = ("marks/1/tokens.json", "marks/1/layers.0/output.json", "marks/1/rows/position.json")
    for name in marks:
        flip(damaged / name, 50)
    done = repair(damaged, RepairConfig(source=str(STORE_V1)))
    assert {mark.outcome for mark in done.marks} == {"mark rebuilt"}
    assert verify(damaged).findings == ()
    assert files_of(damaged) == files_of(STORE_V1)
    for name in marks:
        old, new = (unseal((s / name).read_bytes(), name) for s in (STORE_V1, damaged))
        own = ("host", "time", "attempt", "replaces", "fingerprint")
        assert {k: v for k, v in new.items() if k not in own} == {
            k: v for k, v in old.items() if k not in own
        }


def test_a_copy_that_is_damaged_too_puts_back_nothing(tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(STORE_V1, tmp_path / "damaged"))
    name = f"{ACTS}/c/1/0"
    flip(damaged / name, 8)
    source = shutil.copytree(damaged, tmp_path / "source")
    before = all_of(damaged)
    (mark,) = repair(damaged, RepairConfig(source=str(source))).marks
    assert (mark.outcome, "differ from those that were written" in mark.reason) == ("left", True)
    assert all_of(damaged) == before


# --- tokens ---


def other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of the tokenizer library splits texts differently."""
    real = recompute_module.iter_parts

    def parts(*arguments: Any) -> Any:
        for part in real(*arguments):
            tokens = part.tokens.copy()
            tokens[0, 0] ^= 1
            yield dataclasses.replace(part, tokens=tokens)

    monkeypatch.setattr(recompute_module, "iter_parts", parts)


def test_tokens_without_their_mark_have_their_object_as_witness(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(store / TOKENS_MARK, 50)
    before = all_of(store)
    other_tokens(monkeypatch)
    (mark,) = repair(store).marks
    assert mark.outcome == "other bits"
    assert all_of(store) == before
    (mark,) = repair(store, RepairConfig(accept_other_bits=True)).marks
    assert mark.outcome == "rewritten"
    assert (store / TOKENS).read_bytes() != before[TOKENS]


# --- a part that cannot be repaired stops no other part ---


def test_tokens_that_cannot_be_repaired_leave_their_part_alone(
    original: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "marks/0/tokens.json").unlink()
    for name in ("arrays.zarr/rows/position/c/0", f"{ACTS}/c/2/0"):
        flip(store / name, 9)
    monkeypatch.setattr(recompute_module, "iter_parts", lambda *_: iter(()))
    done = repair(store)
    assert [(mark.part, mark.array, mark.outcome) for mark in done.marks] == [
        (0, "rows/position", "left"), (0, "tokens", "left"), (2, "acts/layers.0/output", "mended"),
    ]  # fmt: skip
    assert "marks/0/tokens.json is missing" in done.marks[0].reason
    assert not done.intact
    assert (store / OBJECT).read_bytes() == (original / OBJECT).read_bytes()


@pytest.mark.parametrize("cause", ["does not exist", "was collected with another dataset"])
def test_a_dataset_that_is_gone_stops_what_needs_it_alone(
    original: Path, store: Path, tmp_path: Path, cause: str
) -> None:
    for name in ("arrays.zarr/tokens/c/0/0", OBJECT):
        flip(store / name, 9)
    dataset = tmp_path / "corpus.jsonl"
    if cause != "does not exist":
        dataset.write_text('{"text": "another"}\n' * 50)
    done = repair(store, RepairConfig(dataset=str(dataset)))
    assert [(mark.array, mark.outcome) for mark in done.marks] == [
        ("tokens", "left"), ("acts/layers.0/output", "mended"),
    ]  # fmt: skip
    assert cause in done.marks[0].reason
    assert (store / OBJECT).read_bytes() == (original / OBJECT).read_bytes()
