"""Faults of a bucket's server, its user or an earlier command must not damage a store."""

import dataclasses
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch
from obstore.store import MemoryStore

from mpcache.collection.catalog import list_stores
from mpcache.collection.collect import collect
from mpcache.config import ConvertConfig, RepairConfig
from mpcache.errors import DamagedStoreError
from mpcache.maintenance.convert import convert
from mpcache.maintenance.copy import copy
from mpcache.maintenance.remove import plan_removal, remove
from mpcache.maintenance.repair import repair
from mpcache.maintenance.verify import verify
from mpcache.storage import bucket_requests, cloud_connection, object_store
from mpcache.storage.base import open_storage
from mpcache.storage.object_store import ObjectStorage
from mpcache.store.mark import TokenProgress
from mpcache.store.object_paths import mark_path
from mpcache.store.part_layout import Layout
from mpcache.store.sealed_json import digest, seal
from mpcache.store.writer import Writer, check_object_size
from tests.helpers import servers
from tests.helpers.stores import small_config

LAYOUT = Layout(
    ctx_len=4, part_rows=8, chunk_rows=4, validation_every=4, dtype="float32", codec="none",
    token_dtype="uint8",
)  # fmt: skip
ARRAY = "acts/layers.0/output"
IDENTITY = {"seed": 0}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryStore]:
    """obstore's in-memory store stands for a server."""
    memory = MemoryStore()
    monkeypatch.setattr(bucket_requests, "bucket_client", lambda scheme, name: memory)
    monkeypatch.setattr(bucket_requests, "_PAUSE", 0.0)
    for cached in (
        bucket_requests._check_bucket,
        bucket_requests._check_create_only,
        bucket_requests._announce_wait,
    ):
        cached.cache_clear()
    yield memory
    bucket_requests._check_create_only.cache_clear()


@pytest.fixture
def store(memory: MemoryStore) -> ObjectStorage:
    """A store of one part."""
    storage = ObjectStorage("gs://in-memory/store")
    content = {
        "format": "mpcache", "format_version": 1, "fingerprint": digest(IDENTITY),
        "identity": IDENTITY, "layout": dataclasses.asdict(LAYOUT), "config": {},
        "provenance": {"model": {"model": "m"}, "dataset": {"dataset": "d"}},
    }  # fmt: skip
    storage.create("store.json", seal(content))
    writer = Writer(storage, LAYOUT, digest(IDENTITY))
    for array in ("tokens", "rows/sequence", "rows/position", ARRAY):
        writer.grow(array, 1, 3)
    progress = TokenProgress(cursor=(0, 0), next_cursor=(1, 0), last=True)
    writer.commit_tokens(0, np.zeros((2, 4), np.uint8), None, progress)
    writer.commit_rows(0, np.arange(8))
    writer.commit_acts(0, ARRAY, torch.randn(8, 3))
    return storage


# --- copies ---


@pytest.mark.usefixtures("memory")
def test_a_source_that_breaks_off_is_no_fault_of_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bucket_requests, "PART_BYTES", 100)

    def pieces() -> Iterator[bytes]:
        yield from [b"x" * 60] * 8
        raise ConnectionError("the source is gone")

    storage = ObjectStorage("gs://in-memory/target")
    with pytest.raises(ConnectionError, match="the source is gone"):
        storage.write_temporary("a", "key", pieces())
    assert list(storage.object_names()) == []


def test_a_copy_that_is_not_what_its_mark_says_is_not_marked(store: ObjectStorage) -> None:
    mark = store.read(mark_path(0, ARRAY))
    names = json.loads(mark)["objects"]
    target = Writer(ObjectStorage("gs://in-memory/target"), LAYOUT, digest(IDENTITY))
    sources = {name: [store.read(name)[:-1]] for name in names}
    with pytest.raises(DamagedStoreError, match="was copied, but a read returns different bytes"):
        target.adopt(0, ARRAY, mark, sources)
    assert list(target.storage.object_names()) == []


# --- removals ---


def test_no_copy_continues_with_what_a_removal_left(
    store: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, delete = "gs://in-memory/copy", ObjectStorage.delete
    copy(store, url)
    storage = open_storage(url)
    count = len(list(storage.object_names()))
    for kept in range(count - 1, 0, -1):  # a removal is stopped again and again
        deleted = len(list(storage.object_names())) - kept

        def stopped(self: ObjectStorage, name: str) -> None:
            nonlocal deleted
            if deleted == 0:
                raise KeyboardInterrupt
            deleted -= 1
            delete(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(ObjectStorage, "delete", stopped)
            patch.setattr(object_store, "request_threads", InTurn)
            with pytest.raises(KeyboardInterrupt):
                remove(plan_removal(url))
        left = set(storage.object_names())
        assert (
            not any(n.startswith("marks") for n in left)
            or {n for n in store.object_names() if n.startswith("arrays.zarr")} <= left
        )
        with pytest.raises(ValueError, match=f"run mpcache remove {url} to finish the removal"):
            copy(store, url)
    remove(plan_removal(url))
    assert not storage.exists()
    copy(store, url)
    assert verify(url).findings == ()


class InTurn:
    """A pool without threads: a stopped call stops the caller at once."""

    map = staticmethod(map)


def test_half_a_copy_is_removed_and_its_removal_continues(
    store: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "gs://in-memory/copy"
    with monkeypatch.context() as patch:
        patch.setattr("mpcache.maintenance.copy.finish_store", lambda *_: None)
        copy(store, url)
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "request_threads", lambda: None)
        with pytest.raises(AttributeError):
            remove(plan_removal(url))
    assert set(open_storage(url).object_names("store.json.incoming.partial")) == set()
    assert plan_removal(url).description == "half of a store, copied or removed"
    remove(plan_removal(url))
    assert not open_storage(url).exists()


def test_leftover_claims_go_before_what_they_name(store: ObjectStorage) -> None:
    names = [f"arrays.zarr/{ARRAY}/c/0/0.key.partial", f"{mark_path(0, ARRAY)}.0.claim.partial"]
    for name in names:
        store.create(name, b"")
    assert repair(store, RepairConfig(delete_leftovers=True)).deleted == tuple(names[::-1])


# --- servers ---


@pytest.mark.usefixtures("memory")
def test_a_server_that_creates_what_is_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    put = obstore.put

    def careless(*arguments: Any, mode: str = "overwrite", **options: Any) -> Any:
        return put(*arguments, **options)

    storage = ObjectStorage("gs://in-memory/store")
    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put", careless)
        with pytest.raises(ValueError, match="ignores the HTTP header If-None-Match"):
            storage.create("a", b"1")
        assert list(storage.object_names()) == []
    assert storage.create("a", b"1")
    assert list(storage.object_names()) == ["a"]


@pytest.mark.usefixtures("memory")
def test_waiting_is_announced_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*_: object) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(bucket_requests, "_SOON", 0.0)
    monkeypatch.setattr(bucket_requests, "_PATIENCE", 0.1)
    monkeypatch.setattr(bucket_requests, "_PAUSE", 0.01)
    for _ in range(2):
        with pytest.raises(ConnectionError, match="away"):
            ObjectStorage("gs://in-memory/store").bucket.request(away, "a")
    assert capsys.readouterr().err == "waiting for the server of gs://in-memory\n"


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a store on a server that takes every request and answers none."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setitem(cloud_connection._TIMEOUTS, "read_timeout", cloud_connection._SECONDS)
        cloud_connection.bucket_client.cache_clear()
        with servers.environment(address):
            yield "s3://shared/store"
    cloud_connection.bucket_client.cache_clear()


def test_ctrl_c_ends_the_wait_for_a_silent_server(silent: str) -> None:
    began = time.monotonic()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        open_storage(silent).read("store.json")
    assert time.monotonic() - began < 30


# --- names and sizes ---


def test_a_root_may_hold_what_no_url_leads_to(store: ObjectStorage, memory: MemoryStore) -> None:
    for key in ("no\u200bte/x", "a:b/store.json", "who?"):
        obstore.put(memory, key, b"x")
    assert [entry.store for entry in list_stores("gs://in-memory")] == ["store"]


def test_parts_that_no_server_copies_are_refused_before_anything_is_written(
    store: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = dataclasses.replace(LAYOUT, part_rows=1 << 20)
    check_object_size(store, large, [1192])
    check_object_size(open_storage(tmp_path), large, [1 << 20])
    message = r"one object of 5 GB in .*, got 5\.0 GB; use a smaller --part-rows, at most 1047778$"
    with pytest.raises(ValueError, match=message):
        check_object_size(store, large, [64, 1193])
    monkeypatch.setattr(ObjectStorage, "max_object_bytes", 8 * 3 * 4 - 1)
    target = "gs://in-memory/other"
    for write in (
        lambda: copy(store, target),
        lambda: convert(store, target, ConvertConfig(codec="lz4")),
        lambda: collect(small_config(tmp_path), target),
    ):
        with pytest.raises(ValueError, match="use a smaller --part-rows"):
            write()
        assert not open_storage(target).exists()
    assert convert(store, target, ConvertConfig(dtype="float16")).parts == 4
