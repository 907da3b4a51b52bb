"""A repaired store equals the collected one bit for bit, or the repair reports why not."""

import functools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel
from typer.testing import CliRunner

from mpcache.config import ConvertConfig, RepairConfig
from mpcache.maintenance import original_collection
from mpcache.maintenance.convert import convert
from mpcache.maintenance.repair import repair
from mpcache.maintenance.verify import verify
from mpcache.storage import atomic_files
from mpcache.store.reader import open_store
from mpcache.store.sealed_json import seal, unseal
from mpcli.mpcache import app
from tests.helpers.damage import ACTS, HARM, MARK, OBJECT, flip
from tests.helpers.stores import files_of, lasting_content, marks_of, small_store

TOKENS, NORMS = "arrays.zarr/tokens/c/2/0", "arrays.zarr/norms/layers.0/output/c/2"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with short last parts, beside a store of other rows; tests only read them."""
    folder = tmp_path_factory.mktemp("made")
    small_store(folder, rows=1_000_000)
    (folder / "other").mkdir()
    small_store(folder / "other", rows=900, seed=1)
    return folder


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    shutil.copytree(original / "other/store", tmp_path / "other")
    return Path(shutil.copytree(original / "store", tmp_path / "store"))


def other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine: the model computes almost the same."""
    load = original_collection.load_for_collection

    def loaded(config):
        loaded_model = load(config)
        with torch.no_grad():
            loaded_model.model.layers[0].mlp.down_proj.weight[0, 0] += 1e-3
        return loaded_model

    monkeypatch.setattr(original_collection, "load_for_collection", loaded)


MENDED = [name for name in HARM if name not in ("settings", "object that is a link")]


@pytest.mark.parametrize("name", MENDED)
def test_all_damage_is_undone(original: Path, store: Path, name: str) -> None:
    HARM[name][0](store)
    harmless = {f.path for f in verify(store).findings if not f.is_damage}
    done = repair(store, RepairConfig(delete_leftovers=True))
    assert done.intact
    assert verify(store).intact
    repaired = {n: data for n, data in lasting_content(store).items() if n not in harmless}
    if name == "mark deleted":  # not damage: collect commits that part again
        assert MARK not in repaired
    else:
        assert repaired == {
            n: data for n, data in lasting_content(original / "store").items() if n not in harmless
        }
    left = {f.path for f in done.left}
    assert left == {p for p, fault in HARM[name][1].items() if fault in ("foreign", "uncommitted")}


@pytest.mark.parametrize(
    ("paths", "needs"),
    [
        ((OBJECT,), "model"),
        (("arrays.zarr/rows/position/c/2",), "nothing"),
        (("arrays.zarr/rows/sequence/c/1", "marks/1/rows/sequence.json"), "nothing"),
        ((TOKENS,), "dataset"),
        ((TOKENS, OBJECT, "arrays.zarr/rows/position/c/2"), "both"),
        (("marks/2/tokens.json", "marks/3/tokens.json"), "dataset"),
        (("arrays.zarr/norms/layers.0/output/c/2",), "model"),
    ],
)
def test_only_what_is_needed_is_loaded(
    original: Path,
    store: Path,
    paths: tuple[str, ...],
    needs: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for path in paths:
        flip(store / path, 8)

    def refused(*_: object) -> None:
        raise AssertionError

    if needs not in ("model", "both"):
        monkeypatch.setattr(original_collection, "load_for_collection", refused)
    if needs not in ("dataset", "both"):
        monkeypatch.setattr(original_collection, "open_documents", refused)
    touched = {f: f.stat().st_mtime_ns for f in store.rglob("*") if f.is_file()}
    done = repair(store)
    assert done.intact
    assert {mark.outcome for mark in done.marks} <= {"mended", "mark rebuilt"}
    assert lasting_content(store) == lasting_content(original / "store")
    changed = {
        f.relative_to(store).as_posix() for f, t in touched.items() if f.stat().st_mtime_ns != t
    }
    assert changed == set(paths)  # nothing else was written


def test_another_machine_changes_nothing_without_accept_other_bits(
    original: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(store / OBJECT, 100)
    before = files_of(store), marks_of(store)
    other_bits(monkeypatch)
    result = CliRunner().invoke(app, ["repair", str(store), "--device", "cpu"])
    assert result.exit_code == 1
    assert "other bits" in result.stdout
    assert "computes other bits than those that" in result.stdout
    assert "or accept the new rows with --accept-other-bits" in result.stderr
    assert (files_of(store), marks_of(store)) == before
    result = CliRunner().invoke(app, ["repair", str(store), "--device=cpu", "--accept-other-bits"])
    assert result.exit_code == 0, result.output
    assert "rewritten" in result.stdout
    assert verify(store).findings == ()
    old = unseal((original / "store" / MARK).read_bytes(), MARK)
    new = unseal((store / MARK).read_bytes(), MARK)
    assert new["objects"] != old["objects"]
    assert {k: new["replaces"][k] for k in ("objects", "host", "time")} == {
        k: old[k] for k in ("objects", "host", "time")
    }
    assert "other bits" in new["replaces"]["reason"]
    rows = open_store(store).acts.read_chunk("layers.0", "output", 2, 0)
    assert not torch.equal(
        rows, open_store(original / "store").acts.read_chunk("layers.0", "output", 2, 0)
    )


def test_a_damaged_mark_is_not_believed_for_other_bits(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the mark, only the objects show what was committed."""
    flip(store / MARK, 50)
    before = files_of(store)
    other_bits(monkeypatch)
    (mark,) = repair(store).marks
    assert mark.outcome == "other bits"
    assert files_of(store) == before


def test_a_damaged_mark_with_a_damaged_object_has_the_others_as_witnesses(
    original: Path, store: Path
) -> None:
    flip(store / MARK, 50)
    flip(store / OBJECT, 100)
    (mark,) = repair(store).marks
    assert mark.outcome == "mark rebuilt"
    assert lasting_content(store) == lasting_content(original / "store")
    assert unseal((store / MARK).read_bytes(), MARK)["replaces"] == {"reason": mark.reason}


def test_an_old_mark_of_another_store_is_seen_through(original: Path, store: Path) -> None:
    """Old marks do not name their store; then no object agrees with a foreign mark."""
    content = unseal((store.parent / "other" / MARK).read_bytes(), MARK)
    content.pop("fingerprint")
    (store / MARK).write_bytes(seal(content))
    assert {f.fault for f in verify(store).findings} == {"flipped"}
    (mark,) = repair(store).marks
    assert mark.outcome == "mark rebuilt"
    assert lasting_content(store) == lasting_content(original / "store")


# --- moved models and stores ---


def test_a_model_that_moved(original: Path, store: Path, tmp_path: Path) -> None:
    for name in ("model", "corpus.jsonl"):
        shutil.move(original / name, tmp_path / name)
    try:
        flip(store / OBJECT, 100)
        flip(store / TOKENS, 9)
        with pytest.raises(ValueError, match="does not exist; give an existing folder"):
            repair(store)
        words = ["repair", str(store), "--device", "cpu", "--json"]
        words += ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "corpus.jsonl")]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["intact"]
    finally:
        for name in ("model", "corpus.jsonl"):
            shutil.move(tmp_path / name, original / name)
    assert lasting_content(store) == lasting_content(original / "store")


def test_tokens_stay_damaged_where_a_library_cannot_open_the_dataset(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is repaired, whatever kind of error the library raises."""
    flip(store / TOKENS, 8)
    flip(store / "marks/1/rows/sequence.json", 8)

    def fail(*_: object) -> None:
        raise ValueError("BuilderConfig 'x' not found")

    monkeypatch.setattr(original_collection, "open_documents", fail)
    outcomes = {(m.part, m.array): m for m in repair(store).marks}
    assert outcomes[1, "rows/sequence"].is_whole
    assert outcomes[2, "tokens"].outcome == "left"
    assert "BuilderConfig" in outcomes[2, "tokens"].reason


def test_another_model_is_refused(original: Path, store: Path, tmp_path: Path) -> None:
    flip(store / OBJECT, 100)
    model = AutoModel.from_pretrained(original / "model")
    with torch.no_grad():
        model.layers[2].mlp.down_proj.weight[0, 0] += 1
    shutil.copytree(original / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError,
        match=r"was collected with another model than that of .*give the original with --mo",
    ):
        repair(store, RepairConfig(model=str(tmp_path / "model")))


def test_a_damaged_store_file_cannot_be_repaired(store: Path) -> None:
    flip(store / "store.json", 300)
    result = CliRunner().invoke(app, ["repair", str(store)])
    assert result.exit_code == 1
    assert "store.json is damaged" in result.stderr


def test_a_link_is_reported_and_left(store: Path) -> None:
    HARM["object that is a link"][0](store)
    done = repair(store)
    assert not done.intact
    (mark,) = done.marks
    assert (mark.outcome, "symbolic link" in mark.reason) == ("left", True)
    assert (store / OBJECT).is_symlink()


def test_leftovers_stay_without_their_option(store: Path) -> None:
    HARM["rest of a write"][0](store)
    assert [f.fault for f in repair(store).left] == ["leftover"]
    assert repair(store, RepairConfig(delete_leftovers=True)).deleted == (f"{OBJECT}.ab.partial",)
    assert verify(store).findings == ()


# --- converted stores, and other stores as sources ---

CONVERTED = [
    ConvertConfig(codec="zstd", chunk_rows=64),
    ConvertConfig(dtype="bfloat16"),
    ConvertConfig(part_rows=384, dtype="float16"),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    return small_store(folder, rows=1_000_000, dtype="float32")[0]


def harm_all_kinds(path: Path) -> None:
    for name in ("acts/layers.0/output/c/2/0", "tokens/c/2/0", "rows/sequence/c/1"):
        flip(path / "arrays.zarr" / name, 8)
    flip(path / "marks/0/rows/position.json", 9)


@pytest.mark.parametrize("changes", CONVERTED, ids=str)
@pytest.mark.parametrize("source", ["model", "its source", "a copy"])
def test_a_converted_store_is_repaired(
    wide: Path, tmp_path: Path, changes: ConvertConfig, source: str
) -> None:
    """Repaired by the model with the same roundings, by the source store, or by a copy."""
    new, kept = tmp_path / "new", tmp_path / "kept"
    convert(wide, new, changes)
    shutil.copytree(new, kept)
    harm_all_kinds(new)
    sources = {"model": None, "its source": str(wide), "a copy": str(kept)}
    done = repair(new, RepairConfig(source=sources[source]))
    assert {mark.outcome for mark in done.marks} <= {"mended", "mark rebuilt"}
    assert lasting_content(new) == lasting_content(kept)


def test_rounded_twice(wide: Path, tmp_path: Path) -> None:
    convert(wide, tmp_path / "one", ConvertConfig(dtype="bfloat16"))
    convert(tmp_path / "one", tmp_path / "two", ConvertConfig(dtype="float32"))
    shutil.copytree(tmp_path / "two", tmp_path / "kept")
    flip(tmp_path / "two" / OBJECT, 100)
    assert repair(tmp_path / "two").intact
    assert lasting_content(tmp_path / "two") == lasting_content(tmp_path / "kept")


def test_invalid_sources_are_refused(
    original: Path, wide: Path, store: Path, tmp_path: Path
) -> None:
    flip(store / OBJECT, 100)
    with pytest.raises(ValueError, match="must hold the same rows as"):
        repair(store, RepairConfig(source=str(original / "other/store")))
    only = ConvertConfig(hookpoints=("layers.1.mlp",))
    convert(original / "store", tmp_path / "some", only)
    with pytest.raises(
        ValueError, match=r"must hold acts/layers\.0/output, got no such array; give another copy"
    ):
        repair(store, RepairConfig(source=str(tmp_path / "some")))
    with pytest.raises(ValueError, match="--source copies the rows without a model"):
        RepairConfig(source="store", model="model")
    with pytest.raises(
        ValueError, match="--accept-other-bits applies only to rows that a model computes"
    ):
        RepairConfig(source="store", accept_other_bits=True)
    shutil.copytree(store, tmp_path / "damaged too")
    (mark,) = repair(store, RepairConfig(source=str(tmp_path / "damaged too"))).marks
    assert mark.outcome == "left"


# --- stopped at any moment ---


class Kill(BaseException):
    """Raised to stop a repair at a given moment."""


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("least"), rows=500, hookpoints=("layers.0",))[0]


class KillBeforeChange:
    """Kills before the given change of a file, counted from 1; never where it is 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changes_until = 0
        for name in ("write_temporary_file", "create_link", "sync_folder"):
            monkeypatch.setattr(atomic_files, name, self._counted(getattr(atomic_files, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.changes_until -= 1
            if self.changes_until == 0:
                raise Kill
            return function(*arguments)

        return call


@pytest.mark.slow
@pytest.mark.parametrize("accept", [False, True])
def test_stopped_at_any_moment_a_part_is_as_it_was_or_whole(
    least: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accept: bool
) -> None:
    """Stopped before every change of a file in turn; then the same command succeeds."""
    path, config = tmp_path / "store", RepairConfig(accept_other_bits=accept)
    shutil.copytree(least, path)
    damage = (OBJECT, NORMS, "marks/1/layers.0/output.json", f"{ACTS}/zarr.json")
    for name in damage[: 1 if accept else None]:
        flip(path / name, 8)
    shutil.move(path, tmp_path / "damaged")
    before = {f.path for f in verify(tmp_path / "damaged").findings}
    if accept:
        other_bits(monkeypatch)
    monkeypatch.setattr(
        original_collection,
        "load_for_collection",
        functools.cache(original_collection.load_for_collection),
    )
    kill = KillBeforeChange(monkeypatch)
    # where other bits are accepted, all objects of the mark are removed before the mark
    parts = {
        f"arrays.zarr/{n}/layers.0/output/c/{p}"
        for n in ("acts", "norms", "moments")
        for p in (1, 2)
    }
    moments, done = 0, None
    while done is None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "damaged", path)
        moments += 1
        kill.changes_until = moments
        try:
            done = repair(path, config)
        except Kill:
            now = {f.path for f in verify(path).findings if f.fault != "leftover"}
            more = {name for name in now - before if accept}
            assert now <= before | more
            assert all(any(name.startswith(part) for part in parts) for name in more)
            kill.changes_until = 0
            assert repair(path, config).intact
        assert {f.fault for f in verify(path).findings} <= {"leftover"}
        if not accept:
            repaired = {
                n: d for n, d in lasting_content(path).items() if not n.endswith(".partial")
            }
            assert repaired == lasting_content(least)
    assert moments > 8


@pytest.mark.slow
def test_killed_again_and_again(original: Path, store: Path, tmp_path: Path) -> None:
    """SIGKILL at seeded moments, also in the middle of a write."""
    from multiprocessing import get_context

    draw = random.Random(3)
    for part in range(5):
        flip(store / f"{ACTS}/c/{part}/0", 64)
        flip(store / f"marks/{part}/layers.1.mlp/output.json", 9)
    before = {f.path for f in verify(store).findings if f.is_damage}
    context = get_context("forkserver")
    context.set_forkserver_preload(["mpcache.maintenance.repair"])
    kills = 0
    while before:
        process = context.Process(target=repair_until_killed, args=(store, draw.randrange(2, 4)))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        now = {f.path for f in verify(store).findings if f.is_damage}
        assert now < before  # each process completes at least one write
        before = now
    assert kills >= 4  # there are ten writes, and no process lives for more than two
    repaired = {n: d for n, d in lasting_content(store).items() if not n.endswith(".partial")}
    assert repaired == lasting_content(original / "store")


def repair_until_killed(store: Path, moment: int) -> None:
    write, left = atomic_files.write_temporary_file, moment

    def killed(path: Path, pieces: Iterable[bytes]) -> Path:
        nonlocal left
        left -= 1
        if left == 0:
            data = b"".join(pieces)
            path.with_name(f"{path.name}.cut.partial").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, pieces)

    atomic_files.write_temporary_file = killed
    repair(store)
