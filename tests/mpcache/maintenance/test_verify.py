"""Each kind of damage to a store is reported by its name, with a remedy."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpcache.maintenance import mark_check
from mpcache.maintenance.findings import REMEDIES
from mpcache.maintenance.verify import Verdict, verify
from mpcache.parallel.config import ParallelConfig
from mpcache.store.object_paths import mark_path
from mpcache.store.sealed_json import seal, unseal
from mpcli.mpcache import app
from tests.helpers.commands import fast_starting_workers
from tests.helpers.damage import ACTS, HARM, MARK, OBJECT, flip
from tests.helpers.stores import small_store


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores of unlike rows, which tests only read."""
    folder = tmp_path_factory.mktemp("made")
    small_store(folder, rows=900)
    (folder / "other").mkdir()
    small_store(folder / "other", rows=900, seed=1)
    return folder


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(original / "store", tmp_path / "store"))


@pytest.mark.parametrize("name", HARM)
def test_each_damage_has_its_name_and_its_remedy(original: Path, store: Path, name: str) -> None:
    shutil.copytree(original / "other/store", store.parent / "other")
    harm, faults = HARM[name]
    assert verify(store).findings == ()
    harm(store)
    verdict = verify(store)
    assert {finding.path: finding.fault for finding in verdict.findings} == faults
    harmless = {"uncommitted", "foreign", "leftover"}
    assert verdict.intact == (set(faults.values()) <= harmless)
    result = CliRunner().invoke(app, ["verify", str(store)])
    assert result.exit_code == (0 if verdict.intact else 1)
    for path, fault in faults.items():
        assert any(line.split()[:2] == [fault, f"{path}:"] for line in result.stdout.splitlines())
        assert f"-> {fault}: {REMEDIES[fault]}" in result.stdout  # type: ignore[index]


def test_every_fault_is_covered() -> None:
    assert {fault for _, faults in HARM.values() for fault in faults.values()} == set(REMEDIES)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Dask's sockets
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(threads=1), ParallelConfig(threads=3), ParallelConfig(workers=2)],
    ids=str,
)
def test_findings_do_not_depend_on_parallelism(store: Path, parallel: ParallelConfig) -> None:
    for part in (0, 2, 3):
        flip(store / f"{ACTS}/c/{part}/0", 60)
    flip(store / "marks/1/tokens.json", 9)
    with fast_starting_workers():
        verdict = verify(store, parallel)
    assert [f.path for f in verdict.findings] == [
        *(f"{ACTS}/c/{part}/0" for part in (0, 2, 3)), "marks/1/tokens.json"
    ]  # fmt: skip
    assert verdict == verify(store)


# --- journals ---


def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that collects the names of the objects read from now on."""
    seen: list[str] = []
    look = mark_check.content_fault

    def looked(store, part, array, spec):
        seen.append(spec.object_path(part))
        return look(store, part, array, spec)

    monkeypatch.setattr(mark_check, "content_fault", looked)
    return seen


def test_a_stopped_verification_continues(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No object is read twice, and the verdict equals that of an uninterrupted run."""
    flip(store / OBJECT, 100)
    expected, journal = verify(store), tmp_path / "journal"
    seen = checked(monkeypatch)
    look = mark_check.content_fault

    def stopped(*arguments):
        if len(seen) == 9:
            raise KeyboardInterrupt
        return look(*arguments)

    monkeypatch.setattr(mark_check, "content_fault", stopped)
    with pytest.raises(KeyboardInterrupt):
        verify(store, ParallelConfig(threads=1), journal=journal)
    with journal.open("ab") as file:
        file.write(b'{"mark": "marks/0/tok')  # as a killed process leaves it
    monkeypatch.setattr(mark_check, "content_fault", look)
    first = set(seen)
    seen.clear()
    verdict = verify(store, ParallelConfig(threads=1), journal=journal)
    assert verdict.earlier > 0
    twice = {name.split("/c/")[1].split("/")[0] for name in first & set(seen)}
    assert twice <= {"2", "3"}  # the damaged objects, and the interrupted one
    assert same(verdict, expected)
    seen.clear()
    assert same(verify(store, journal=journal), expected)
    assert {name.split("/c/")[1] for name in seen} == {"2/0", "2", "2/0/0"}  # the damaged objects


def same(verdict: Verdict, expected: Verdict) -> bool:
    """Whether two verdicts are equal, apart from the counts of earlier checks."""
    return (verdict.findings, verdict.marks, verdict.objects) == (
        expected.findings,
        expected.marks,
        expected.objects,
    )


def test_only_what_was_read_is_counted(store: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    flip(store / OBJECT, 100)
    first = verify(store, journal=journal)
    mark = unseal((store / MARK).read_bytes(), MARK)
    assert first.bytes == sum(
        record["bytes"]
        for file in (store / "marks").rglob("*.json")
        for record in unseal(file.read_bytes(), "mark")["objects"].values()
    )
    again = verify(store, journal=journal)
    assert again.bytes == sum(record["bytes"] for record in mark["objects"].values())
    (store / OBJECT).unlink()
    once_more = verify(store, journal=journal)
    assert once_more.bytes == again.bytes - mark["objects"][OBJECT]["bytes"]


@pytest.mark.parametrize("harm", ["object deleted", "object cut short", "object grown"])
def test_damage_is_found_despite_the_journal(store: Path, tmp_path: Path, harm: str) -> None:
    journal = tmp_path / "journal"
    assert verify(store, journal=journal).intact
    HARM[harm][0](store)
    flip(store / "arrays.zarr/norms/layers.0/output/c/2", 8)
    verdict = verify(store, journal=journal)
    assert verdict.findings == verify(store).findings
    assert verdict.earlier == verdict.marks - 1


def test_the_last_finding_under_a_mark_counts(store: Path, tmp_path: Path) -> None:
    journal, data = tmp_path / "journal", (store / OBJECT).read_bytes()
    assert verify(store, journal=journal).intact
    (store / OBJECT).unlink()
    assert not verify(store, journal=journal).intact
    (store / OBJECT).write_bytes(data)
    flip(store / OBJECT, 100)
    assert not verify(store, journal=journal).intact


def test_the_journal_of_another_path_or_store_is_refused(
    original: Path, store: Path, tmp_path: Path
) -> None:
    """A copy has the same marks, and its own damage."""
    journal = tmp_path / "journal"
    assert verify(original / "store", journal=journal).intact
    before = journal.read_bytes()
    result = CliRunner().invoke(app, ["verify", str(store), "--journal", str(journal)])
    assert result.exit_code == 2
    assert f"{journal} is the journal of {original / 'store'}, not of" in result.stderr
    assert "give another file" in result.stderr
    assert journal.read_bytes() == before
    own = tmp_path / "own"
    assert verify(store, journal=own).intact
    shutil.rmtree(store)
    shutil.copytree(original / "other/store", store)
    with pytest.raises(
        ValueError, match="the journal of another store that was there before, not of"
    ):
        verify(store, journal=own)


def test_a_rewritten_mark_is_checked_again(original: Path, store: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    assert verify(store, journal=journal).earlier == 0
    mark = unseal((store / MARK).read_bytes(), MARK)
    (store / MARK).write_bytes(seal({**mark, "host": "elsewhere"}))
    flip(store / OBJECT, 100)
    verdict = verify(store, journal=journal)
    assert verdict.earlier == verdict.marks - 1
    assert [finding.path for finding in verdict.findings] == [OBJECT]


def test_a_store_that_cannot_be_written_is_verified(store: Path, tmp_path: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in store.rglob("*")}
    assert verify(store, journal=tmp_path / "journal").intact
    assert {f: f.stat().st_mtime_ns for f in store.rglob("*")} == before


def test_a_file_that_is_no_journal_is_left_alone(store: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    result = CliRunner().invoke(app, ["verify", str(store), "--journal", str(tmp_path / "notes")])
    assert result.exit_code == 2
    assert "is not a journal of mpcache verify; give another file" in result.stderr
    assert (tmp_path / "notes").read_text() == "mine"


def test_marks_name_their_store(original: Path) -> None:
    mark = unseal((original / "store" / mark_path(0, "tokens")).read_bytes(), "mark")
    about = unseal((original / "store/store.json").read_bytes(), "store")
    assert mark["fingerprint"] == about["fingerprint"]
