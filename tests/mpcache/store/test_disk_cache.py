"""The read cache saves network traffic and changes nothing that is read, also when it is lost."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mpcache.errors import DamagedStoreError
from mpcache.maintenance.copy import copy
from mpcache.storage import cloud_connection
from mpcache.storage.base import open_storage
from mpcache.store import disk_cache
from mpcache.store.reader import Store, open_store
from mpcache.store.zarr_codec import ReadInto
from mpcli.mptrain import app
from mptrain.bench.config import LoaderBenchConfig
from mptrain.bench.loader import bench_loader
from mptrain.data.loader import Loader
from mptrain.runs.fit import fit, plan_fit
from tests.helpers import servers
from tests.helpers.fits import config, equal, lasting, weights
from tests.helpers.stores import small_store

SIDE = ("layers.0", "output")
SMALL: dict[str, Any] = {"hookpoints": ("layers.0",), "kind": ("sae",), "arch": ("topk",)}
NAME = re.compile(r"[0-9a-f]{32}/[0-9a-f]{32}/[0-9]+-[0-9]+")


@pytest.fixture(scope="module")
def originals(s3: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store in a folder, and the URL of its copy; tests only read them."""
    path, _ = small_store(tmp_path_factory.mktemp("made"), rows=700, hookpoints=("layers.0",))
    copy(path, f"{s3}/cache/made")
    return path, f"{s3}/cache/made"


@pytest.fixture
def own(originals: tuple[Path, str], s3: str, tmp_path: Path) -> str:
    """The URL of a copy that a test may damage."""
    copy(originals[0], f"{s3}/{tmp_path.name}")
    return f"{s3}/{tmp_path.name}"


@pytest.fixture
def asked(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], list[str]]]:
    """Requests for committed objects since the last call: method and path."""
    log, seen = tmp_path / "requests", 0

    def look() -> list[str]:
        nonlocal seen
        lines = log.read_text().splitlines()
        new_lines, seen = lines[seen:], len(lines)
        return [line for line in new_lines if "/c/" in line]

    with servers.faulty(os.environ["AWS_ENDPOINT_URL"], 0, 0.0, str(log)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        cloud_connection.bucket_client.cache_clear()
        yield look
    cloud_connection.bucket_client.cache_clear()


def got(requests: list[str]) -> bool:
    """Whether any request asked for bytes rather than sizes."""
    return any(line.startswith("GET") for line in requests)


def everything(store: Store) -> list[torch.Tensor]:
    """All arrays that training may read, chunk by chunk, in several threads."""
    places = [(p.number, c) for p in store.parts([SIDE], "train") for c in range(-(-p.rows // 32))]
    reads: list[Callable[..., torch.Tensor]] = [
        partial(store.acts.read_chunk, *SIDE), partial(store.acts.read_norms, *SIDE),
        store.tokens.read_positions, store.tokens.read_sequences, store.tokens.read_token_ids,
    ]  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        return [x for read in reads for x in pool.map(read, *zip(*places, strict=True))]


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def kept(folder: Path) -> dict[str, bytes]:
    """All files of a cache but its counter, whose value must be right."""
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    counted = files.pop("length").stat().st_size
    contents = {name: file.read_bytes() for name, file in files.items()}
    assert counted == sum(map(len, contents.values()))
    return contents


# --- requests that the cache saves ---


def test_the_server_is_asked_once_for_what_is_read_in_all_epochs_and_runs(
    originals: tuple[Path, str], tmp_path: Path, asked: Callable[[], list[str]]
) -> None:
    _, url = originals
    folder = tmp_path / "cache"
    for number in range(2):
        store = open_store(url, str(folder))
        with Loader(
            store, [SIDE], "train", batch_rows=64, seed=number, window_rows=128,
            device=torch.device("cpu"),
        ) as loader:  # fmt: skip
            batches, epoch = loader.batches(), -(-loader.rows // 64)
            list(islice(batches, 2 * epoch))  # the first may still be read while the second is
            assert got(asked()) == (number == 0)
            store._objects._ends.cache_clear()  # as with more objects than it remembers
            list(islice(batches, 2 * epoch))
            assert asked() == []
    assert all(
        NAME.fullmatch(name) for name in kept(folder)
    )  # no requests for marks, metadata or rests


def test_runs_are_the_same_bit_for_bit_and_change_between_commands(
    originals: tuple[Path, str], tmp_path: Path, asked: Callable[[], list[str]]
) -> None:
    path, url = originals
    folder = str(tmp_path / "cache")
    settings = {"rows": 64 * 20, "max_norm": 3.0, "skip_tokens": ("7",), **SMALL}
    fit(config(str(path), tmp_path / "plain", **settings))
    for name in ("cold", "warm"):
        asked()
        fit(config(url, tmp_path / name, cache_dir=folder, cache_bytes=10**9, **settings))
        assert got(asked()) == (name == "cold")
        assert equal(weights(tmp_path / name), weights(tmp_path / "plain"))
        assert lasting(tmp_path / name) == lasting(tmp_path / "plain")
    # the cache is a setting of a command, not of a run
    fit(config(url, tmp_path / "warm", **settings))
    (coder, *_) = sorted((tmp_path / "warm/coders").iterdir())
    asked()
    words = ["eval", str(coder), url, "--cache-dir", folder, "--json"]
    there = json.loads(CliRunner().invoke(app, words).stdout)
    assert not got(asked())
    words[2:5] = [str(path)]
    assert json.loads(CliRunner().invoke(app, words).stdout) == there


def test_a_plan_counts_reads_from_cache_and_server(
    originals: tuple[Path, str], tmp_path: Path
) -> None:
    _, url = originals
    settings: dict[str, Any] = {"rows": 64 * 30, **SMALL}
    run = config(url, tmp_path / "run", cache_dir=str(tmp_path / "cache"), **settings)
    before = plan_fit(run)
    assert not (tmp_path / "cache").exists()
    store = open_store(url)
    there = store.stored_bytes([SIDE], "train") + store.stored_bytes([SIDE], "validation")
    assert before.store_bytes == there < before.read_bytes
    plain = plan_fit(config(url, tmp_path / "run", **settings))
    assert plain.store_bytes == plain.read_bytes
    fit(run)
    after = plan_fit(config(url, tmp_path / "other", cache_dir=run.cache_dir, **settings))
    assert after.store_bytes < 0.05 * there  # the ends of short parts are never read
    words = ["fit", url, "--run", str(tmp_path / "other"), "--hookpoints", "layers.0"]
    words += [
        "--rows",
        "1920",
        "--batch-rows",
        "64",
        "--dry-run",
        "--cache-dir",
        str(run.cache_dir),
    ]
    output = CliRunner().invoke(app, words).stdout
    assert f" GB of it from {url}, the rest from {run.cache_dir}; nothing was written" in output


def test_the_benchmark_reads_from_the_cache(
    originals: tuple[Path, str], tmp_path: Path, asked: Callable[[], list[str]]
) -> None:
    settings: dict[str, Any] = {"rows": 192, "batch_rows": 64, "window_rows": 64, "repeats": 1}
    run = LoaderBenchConfig(store=originals[1], cache_dir=str(tmp_path / "cache"), **settings)
    bench_loader(run)
    assert got(asked())
    assert kept(tmp_path / "cache")
    bench_loader(run)
    assert not got(asked())


# --- damage to the cache ---


@pytest.mark.parametrize("harm", ["flipped", "truncated", "zeros", "directory", "gone"])
def test_damaged_cache_entries_are_read_again_and_replaced(
    originals: tuple[Path, str], tmp_path: Path, harm: str
) -> None:
    path, url = originals
    folder = tmp_path / "cache"
    wanted = everything(open_store(path))
    assert same(everything(open_store(url, str(folder))), wanted)
    intact = kept(folder)
    for name, data in intact.items():
        file = folder / name
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if harm in ("gone", "directory"):
            file.unlink()
        else:
            torn = {"flipped": flipped, "truncated": data[:-1]}
            file.write_bytes(torn.get(harm, bytes(len(data))))
    if harm == "directory":
        (folder / next(iter(intact))).mkdir()
        with pytest.warns(RuntimeWarning, match="stores no more data"):
            assert same(everything(open_store(url, str(folder))), wanted)
        return
    if harm == "gone":
        (folder / "length").unlink()
    assert same(everything(open_store(url, str(folder))), wanted)
    assert kept(folder) == intact


def test_the_whole_folder_may_go_while_it_is_read(
    originals: tuple[Path, str], tmp_path: Path
) -> None:
    path, url = originals
    store, wanted = open_store(url, str(tmp_path / "cache")), everything(open_store(path))
    for _ in range(2):
        assert same(everything(store), wanted)
        shutil.rmtree(tmp_path / "cache")


def test_damage_in_the_store_is_not_kept(own: str, tmp_path: Path) -> None:
    storage, folder = open_storage(own), tmp_path / "cache"
    name = "arrays.zarr/acts/layers.0/output/c/0/0"
    data = storage.read(name)
    storage.replace(name, data[:40] + b"?" + data[41:])
    with pytest.raises(DamagedStoreError, match="0/0 is damaged"):
        open_store(own, str(folder)).acts.read_chunk("layers.0", "output", 0, 0)
    (index,) = kept(folder).values()  # the index is intact
    assert data.endswith(index)
    storage.replace(name, data)
    assert same(everything(open_store(own, str(folder))), everything(open_store(own)))


def test_other_content_under_the_same_name_is_never_mistaken(
    originals: tuple[Path, str], own: str, tmp_path: Path
) -> None:
    """A part that was rewritten with other bits has another digest in its mark."""
    folder, store = str(tmp_path / "cache"), open_store(own)
    cache = disk_cache.ReadCache(folder, None, store.storage, store.digest)
    other = disk_cache.ReadCache(folder, None, store.storage, "another store.json")
    elsewhere = disk_cache.ReadCache(folder, None, open_storage(originals[1]), store.digest)
    for number, (some_cache, key) in enumerate(
        [(cache, "a" * 32), (cache, "b" * 32), (other, "a" * 32), (elsewhere, "a" * 32)]
    ):
        content = np.full(4, number, np.uint8)
        for _ in range(2):
            decoded = some_cache.read_through(key, filling(content), lambda read: taken(read, 0, 4))
            assert decoded.tolist() == content.tolist()
        assert some_cache.size(key) == 4


def filling(content: np.ndarray) -> ReadInto:
    """A read function that gives this content at every offset."""

    def read(_: int, buffers: Sequence[np.ndarray]) -> None:
        (buffer,) = buffers
        buffer[:] = content

    return read


def taken(read: ReadInto, offset: int, length: int) -> np.ndarray:
    out = np.empty(length, np.uint8)
    read(offset, [out])
    return out


# --- a cache without room ---


def warned(store: Store, match: str) -> list[torch.Tensor]:
    """Read everything twice; there must be exactly one warning."""
    with pytest.warns(RuntimeWarning, match=match) as warnings:
        first, again = everything(store), everything(store)
    assert len(warnings) == 1
    assert same(first, again)
    return first


def test_a_full_cache_keeps_what_it_has(originals: tuple[Path, str], tmp_path: Path) -> None:
    path, url = originals
    folder = tmp_path / "cache"
    expected = everything(open_store(path))
    actual = warned(open_store(url, str(folder), 10_000), "of 10000 bytes are used.*each time")
    assert same(actual, expected)
    before = kept(folder)
    assert 8_000 < sum(map(len, before.values())) <= 10_000
    actual = warned(open_store(url, str(folder), 20_000), "of 20000 bytes are used")
    assert same(actual, expected)
    after = kept(folder)
    assert before.items() < after.items()
    assert sum(map(len, after.values())) <= 20_000


def test_a_file_system_is_not_filled_to_the_brim(
    originals: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, url = originals
    usage = SimpleNamespace(total=20_000_000, free=1_000_500)  # a twentieth, and a little
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    actual = warned(open_store(url, str(tmp_path / "cache")), r"has 0\.001 GB left")
    assert same(actual, everything(open_store(path)))
    assert max(map(len, kept(tmp_path / "cache").values())) <= 500


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_cache_that_cannot_be_written_is_no_error(
    originals: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path, url = originals

    def failing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(disk_cache.fcntl, "flock", failing)
    actual = warned(open_store(url, str(tmp_path / "cache")), os.strerror(code))
    assert same(actual, everything(open_store(path)))
    assert kept(tmp_path / "cache") == {}


# --- several at once ---


READER = """
import sys
from mpcache.store.reader import open_store
store = open_store(*sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
for part in store.parts([("layers.0", "output")], "train"):
    for chunk in range(-(-part.rows // 32)):
        print(float(store.acts.read_chunk("layers.0", "output", part.number, chunk).double().sum()))
"""


def test_processes_and_threads_share_a_cache(originals: tuple[Path, str], tmp_path: Path) -> None:
    path, url = originals
    folder = str(tmp_path / "cache")
    with subprocess.Popen(
        [sys.executable, "-c", READER, url, folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        other.stdin.close()
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(everything, [open_store(url, folder) for _ in range(2)]))
        sums = [float(line) for line in other.stdout]
    expected = everything(open_store(path))
    assert same(results[0], expected)
    assert same(results[1], expected)
    assert sums == [float(x.double().sum()) for x in expected[: len(sums)]] != []
    assert all(NAME.fullmatch(name) for name in kept(tmp_path / "cache"))


def test_no_two_take_the_same_room(
    originals: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat, storage = os.fstat, open_storage(originals[1])

    def slow(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        time.sleep(0.001)
        return status

    monkeypatch.setattr(os, "fstat", slow)

    def keep(number: int) -> None:
        cache = disk_cache.ReadCache(str(tmp_path / "cache"), 1000, storage, "digest")
        content = np.full(30, number, np.uint8)
        cache.read_through(
            f"{number // 3:032x}", filling(content), lambda read: taken(read, number, 30)
        )

    with ThreadPoolExecutor(8) as pool, pytest.warns(RuntimeWarning, match="990 of 1000 bytes"):
        list(pool.map(keep, range(60)))
    assert len(kept(tmp_path / "cache")) == 33


def test_a_team_shares_what_its_folder_is_open_to(
    originals: tuple[Path, str], tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o2775)
    mask = os.umask(0o077)
    try:
        open_store(originals[1], str(tmp_path / "cache")).acts.read_chunk(
            "layers.0", "output", 0, 0
        )
    finally:
        os.umask(mask)
    assert all(path.stat().st_mode & 0o020 for path in (tmp_path / "cache").rglob("*"))


# --- invalid caches ---


def test_invalid_caches_are_refused(originals: tuple[Path, str], tmp_path: Path) -> None:
    path, url = originals
    (tmp_path / "file").touch()

    def refused(store: object, *words: str) -> str:
        fixed = ["fit", str(store), "--run", str(tmp_path / "run"), "--hookpoints", "layers.0"]
        fixed += ["--rows", "64", "--batch-rows", "64", "--dry-run"]
        result = CliRunner().invoke(app, [*fixed, *words])
        assert result.exit_code == 2, result.output
        (message,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        return message

    assert "so a cache there saves no time" in refused(path, "--cache-dir", str(tmp_path / "cache"))
    assert "must be a local folder" in refused(url, "--cache-dir", "s3://shared/cache")
    assert "must be a local folder" in refused(url, "--cache-dir", "")
    assert "Not a directory" in refused(url, "--cache-dir", str(tmp_path / "file"))
    assert "Not a directory" in refused(url, "--cache-dir", str(tmp_path / "file/below"))
    assert "cache_bytes needs cache_dir" in refused(url, "--cache-bytes", "1GB")
    words = ("--cache-dir", str(tmp_path / "cache"), "--cache-bytes", "0")
    assert "cache_bytes must be at least 1" in refused(url, *words)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "Permission denied" in refused(url, "--cache-dir", str(tmp_path / "closed/cache"))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs two file systems")
def test_a_store_on_another_disk_has_a_cache_too(
    originals: tuple[Path, str], tmp_path: Path
) -> None:
    path, _ = originals
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    folder = Path("/dev/shm") / tmp_path.name
    try:
        assert same(everything(open_store(path, str(folder))), everything(open_store(path)))
        assert kept(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
