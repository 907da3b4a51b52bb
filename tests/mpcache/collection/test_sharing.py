"""Several users, machines and runs share one store: a committed part never changes."""

import datetime
import json
import multiprocessing
import os
import queue
import random
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from obstore.store import MemoryStore

from mpcache.collection import producer as producer_module
from mpcache.collection.collect import collect
from mpcache.config import CollectConfig
from mpcache.maintenance.verify import verify
from mpcache.storage import atomic_files, bucket_requests
from mpcache.storage.base import Storage, open_storage
from mpcache.storage.local import LocalStorage
from mpcache.storage.object_store import ObjectStorage
from mpcache.store.digests import object_matches
from mpcache.store.mark import ObjectRecord
from mpcache.store.part_layout import Layout
from mpcache.store.reader import open_store
from mpcache.store.writer import Writer
from tests.helpers.stores import files_of, marks_of, small_config, small_store

LAYOUT = Layout(
    ctx_len=4, part_rows=8, chunk_rows=4, validation_every=4, dtype="float32", codec="none",
    token_dtype="uint8",
)  # fmt: skip
ARRAY = "acts/layers.0/output"


class Killed(BaseException):
    """Raised in a killed writer, which then does nothing more."""


class Schedule:
    """Lets one of several writers do its next file-system step, with checks in between."""

    def __init__(self, draw: random.Random, looked_at: Callable[[], None]) -> None:
        self.draw, self.look = draw, looked_at
        self.gates: dict[int, queue.Queue[bool]] = {}
        self.arrived: queue.Queue[tuple[int, bool]] = queue.Queue()
        self.dead: set[int] = set()

    def step(self) -> None:
        me = threading.get_ident()
        if me in self.dead:
            raise Killed
        if me in self.gates:
            self.arrived.put((me, False))
            if not self.gates[me].get():
                self.dead.add(me)
                raise Killed

    def run(self, writers: list[Callable[[], None]], kills: int) -> None:
        def body(work: Callable[[], None]) -> None:
            self.gates[threading.get_ident()] = queue.Queue()
            try:
                self.step()
                work()
            except Killed:
                pass
            finally:
                self.arrived.put((threading.get_ident(), True))

        # daemons: if the law is broken, the other threads wait for ever
        threads = [threading.Thread(target=body, args=(work,), daemon=True) for work in writers]
        for thread in threads:
            thread.start()
        waiting: set[int] = set()
        running, left = len(threads), len(threads)
        while left:
            while running:
                who, ended = self.arrived.get()
                running -= 1
                waiting ^= set() if ended else {who}
                left -= ended
            self.look()
            if waiting:
                chosen = self.draw.choice(sorted(waiting))
                waiting.remove(chosen)
                kill = kills > 0 and self.draw.random() < 0.1
                kills -= kill
                running = 1
                self.gates[chosen].put(not kill)


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Schedule]]:
    """Schedules: every step of the writers waits for its turn."""
    schedules: list[Schedule] = []

    def gated(function: Callable[..., object]) -> Callable[..., object]:
        def wait(*args: object, **kwargs: object) -> object:
            schedules[-1].step()
            return function(*args, **kwargs)

        return wait

    for kind in (LocalStorage, ObjectStorage):
        for name in (
            "create",
            "write_temporary",
            "publish",
            "create_copy",
            "delete",
            "size",
            "read",
        ):
            monkeypatch.setattr(kind, name, gated(getattr(kind, name)))
    yield schedules
    monkeypatch.undo()


@pytest.fixture(params=["folder", "bucket"])
def shared(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    """A storage of either kind; obstore's in-memory store stands for a server."""
    if request.param == "folder":
        return open_storage(tmp_path / "store")
    memory = MemoryStore()
    monkeypatch.setattr(bucket_requests, "bucket_client", lambda scheme, name: memory)
    return open_storage("gs://in-memory/store")


def claim_and_lose(storage: Storage, lost: int) -> None:
    """A writer dies after its claim, and one object that the claim names is lost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(storage), "publish", refused)
        with pytest.raises(AssertionError):
            Writer(storage, LAYOUT, "0" * 64).commit_acts(0, ARRAY, torch.zeros(8, 3))
    names = [name for name in storage.object_names("arrays.zarr") if name.endswith(".partial")]
    assert len(names) == 3
    storage.delete(names[lost])


@pytest.mark.parametrize(("kills", "lost"), [(0, None), (2, None), (0, 1), (2, 2)])
@pytest.mark.parametrize("seed", range(12))
def test_what_is_marked_is_never_overwritten(
    shared: Storage, scheduled: list[Schedule], seed: int, kills: int, lost: int | None
) -> None:
    """Three writers of the same part with unlike values, in any order, killed anywhere.

    Or they find the claim of a fourth, whose objects are not all there.
    """
    values = [torch.full((8, 3), float(v)) for v in (1, 2, 3)]
    mark = "marks/0/layers.0/output.json"
    first: list[bytes] = []

    def look() -> None:
        if shared.exists(mark):
            first.append(shared.read(mark))
            assert first[0] == first[-1]
            for name, record in json.loads(first[0])["objects"].items():
                assert object_matches(shared, name, ObjectRecord(**record))

    def writer(x: torch.Tensor) -> Callable[[], None]:
        return lambda: Writer(shared, LAYOUT, "0" * 64).commit_acts(0, ARRAY, x)

    scheduled.append(Schedule(random.Random(seed), look))
    scheduled[-1].gates = {}
    Writer(shared, LAYOUT, "0" * 64).grow(ARRAY, 1, 3)
    if lost is not None:
        claim_and_lose(shared, lost)
    scheduled[-1].run([writer(x) for x in values], kills)
    writer(values[0])()  # whatever was left behind, the next run succeeds
    look()
    stored = shared.read("arrays.zarr/acts/layers.0/output/c/0/0")
    assert stored[:4] in [x.numpy().tobytes()[:4] for x in values]
    rests = [name for name in shared.object_names() if name.endswith(".partial")]
    assert kills or lost is not None or not rests


def refused(*_: object, **__: object) -> None:
    raise AssertionError("this must not be called")


def test_an_error_after_the_claim_costs_nothing(
    shared: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objects of a claim stay, and the next run completes the claim without new writes."""
    publish, calls = type(shared).publish, 0

    def failing(*arguments: str) -> bool:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ConnectionError("the server is gone")
        return publish(*arguments)

    monkeypatch.setattr(type(shared), "publish", failing)
    with pytest.raises(ConnectionError):
        Writer(shared, LAYOUT, "0" * 64).commit_acts(0, ARRAY, torch.ones(8, 3))
    monkeypatch.setattr(type(shared), "write_temporary", refused)
    Writer(shared, LAYOUT, "0" * 64).commit_acts(0, ARRAY, torch.zeros(8, 3))
    assert not [name for name in shared.object_names() if name.endswith(".partial")]
    assert shared.read("arrays.zarr/acts/layers.0/output/c/0/0")[:4] == b"\0\0\x80\x3f"


def test_an_error_before_the_claim_leaves_nothing(
    shared: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> bool:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(type(shared), "create", failing)
    with pytest.raises(ConnectionError):
        Writer(shared, LAYOUT, "0" * 64).commit_acts(0, ARRAY, torch.ones(8, 3))
    assert list(shared.object_names()) == []


def collect_on_unlike_hardware(config: CollectConfig, path: Path, noise: float) -> None:
    """Runs in a separate process: a machine whose results differ in their last bits."""
    capture = producer_module.capture_part

    def noisy(*args: object) -> None:
        capture(*args)  # type: ignore[arg-type]
        buffers = args[3]
        assert isinstance(buffers, dict)
        for x_RW in buffers.values():
            x_RW += noise

    producer_module.capture_part = noisy
    collect(config, path)


def run_both(*calls: tuple[object, ...]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mpcache.collection.collect"])
    processes = [context.Process(target=collect_on_unlike_hardware, args=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.slow
def test_two_collections_of_the_same_thing_at_once_on_unlike_hardware(tmp_path: Path) -> None:
    config, path = small_config(tmp_path, dtype="float32"), tmp_path / "store"
    run_both((config, path, 0.0), (config, path, 0.5))
    assert verify(path).findings == ()
    collect(config, tmp_path / "alone")
    shared, alone = open_store(path), open_store(tmp_path / "alone")
    assert set(marks_of(path)) == set(marks_of(tmp_path / "alone"))
    for array in (a for a in alone.arrays if a.startswith("acts/")):
        for part in alone.part_numbers(array):
            difference = shared.read_part(array, part)[array] - alone.read_part(array, part)[array]
            assert (difference == 0).all() or (abs(difference - 0.5) < 1e-5).all()


@pytest.mark.slow
def test_one_adds_a_hookpoint_while_another_adds_rows(tmp_path: Path) -> None:
    path, _ = small_store(tmp_path, rows=600, hookpoints=("layers.0",))
    more_rows = small_config(tmp_path, rows=1500, hookpoints=("layers.0",))
    more_hookpoints = small_config(tmp_path, rows=600)
    run_both((more_rows, path, 0.0), (more_hookpoints, path, 0.0))
    assert verify(path).findings == ()
    small_store(tmp_path)
    collect(small_config(tmp_path), tmp_path / "at_once")
    assert marks_of(path) == marks_of(tmp_path / "at_once")


class JumpingClock(datetime.datetime):
    """A clock that jumps between the years 1970 and 2096 each time it is read."""

    reads = 0

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "JumpingClock":
        cls.reads += 1
        return cls.fromtimestamp(4e9 * (cls.reads % 2), tz)


def test_stale_temporary_files_and_jumping_clocks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = small_store(tmp_path, rows=600)
    expected = marks_of(path)
    for array in ("layers.0/output", "layers.1.mlp/input"):
        mark = path / f"marks/1/{array}.json"
        for number, rest in enumerate((b"", mark.read_bytes()[:80])):
            stale = mark.with_name(f"output.json.{number}.claim.partial")
            stale.write_bytes(rest)
            os.utime(stale, (2e9 * number, 2e9 * number))
        mark.unlink()
    for file in (path / "arrays.zarr/acts/layers.0/output/c").rglob("0"):
        if file.is_file():
            file.with_name("0.stale.partial").write_bytes(b"rest")
    monkeypatch.setattr(datetime, "datetime", JumpingClock)
    times = iter([4e9, 0.0] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(times))
    small_store(tmp_path, rows=600)
    years = {mark.get("time", "")[:4] for mark in all_marks(path)}
    assert years & {"1970", "2096"}, "no mark was written by the clock that jumps"
    assert marks_of(path) == expected
    verdict = verify(path)
    assert verdict.intact
    assert {finding.fault for finding in verdict.findings} <= {"leftover"}


def all_marks(path: Path) -> list[dict[str, str]]:
    return [json.loads(file.read_bytes()) for file in path.glob("marks/**/*.json")]


# --- permissions ---


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
@pytest.mark.parametrize(
    ("root", "folders", "files"),
    [(0o2775, 0o2775, 0o664), (0o770, 0o775, 0o664), (0o755, 0o755, 0o644), (0o1777, 0o755, 0o644)],
)
def test_stores_are_as_open_to_the_group_as_their_root(
    tmp_path: Path, root: int, folders: int, files: int
) -> None:
    """A store inherits no permissions from a folder for anyone, such as /tmp."""
    folder = tmp_path / "root"
    folder.mkdir()
    folder.chmod(root)
    collect(small_config(tmp_path, rows=300, hookpoints=("layers.0",)), folder / "deep" / "store")
    paths = list(folder.rglob("*"))
    assert {stat.S_IMODE(f.stat().st_mode) for f in paths if f.is_dir()} == {folders}
    assert {stat.S_IMODE(f.stat().st_mode) for f in paths if f.is_file()} == {files}


def test_a_link_that_the_server_made_twice_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS repeats a request whose answer was lost, and the second try finds the name taken."""
    link = os.link

    def twice(source: Path, path: Path) -> None:
        link(source, path)
        raise FileExistsError

    monkeypatch.setattr(os, "link", twice)
    assert open_storage(tmp_path).create("mark", b"x")
    monkeypatch.undo()
    assert not open_storage(tmp_path).create("mark", b"y")
    assert (tmp_path / "mark").read_bytes() == b"x"


def test_a_read_only_store_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading never tries to write. Tests that run as root would not notice permissions."""
    path, _ = small_store(tmp_path, rows=600)
    before = {**files_of(path)}
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    for file in [copy, *copy.rglob("*")]:
        file.chmod(0o555 if file.is_dir() else 0o444)

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("link", "rename", "replace", "mkdir", "unlink", "chmod", "fsync"):
        monkeypatch.setattr(os, name, refused)
    monkeypatch.setattr(atomic_files, "write_temporary_file", refused)
    store = open_store(copy)
    assert verify(copy).findings == ()
    assert len(store.acts.read_chunk("layers.0", "output", 0, 0)) == 32
    assert collect(small_config(tmp_path, rows=600), copy).forward_rows == 0
    assert files_of(copy) == before
