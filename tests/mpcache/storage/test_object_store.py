"""Stores on an S3 server: every command works, and no failure of server or process loses data."""

import itertools
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
from typer.testing import CliRunner

import mpcli.mptrain
from mpcache.collection.collect import collect
from mpcache.config import CollectConfig
from mpcache.maintenance.copy import copy
from mpcache.maintenance.verify import verify
from mpcache.parallel.config import ParallelConfig
from mpcache.storage import bucket_requests, cloud_connection
from mpcache.storage.base import Storage, open_storage
from mpcache.storage.object_store import ObjectStorage
from mpcache.store.reader import open_store
from mpcli.mpcache import app
from tests.helpers import servers
from tests.helpers.commands import clean, collect_with_four, equal, start, wait_for, workers_of
from tests.helpers.stores import (
    SIDES,
    files_of,
    lasting_content,
    marks_of,
    rows_of,
    small_config,
    write_corpus,
)

pytestmark = pytest.mark.filterwarnings(
    # Dask leaves sockets and event loops of lost workers to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def url(s3: str, tmp_path: Path) -> str:
    return f"{s3}/{tmp_path.name}"


@pytest.fixture(scope="module")
def originals(s3: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with model, corpus and a store, and the URL of the same store; only read."""
    folder = tmp_path_factory.mktemp("made")
    config = small_config(folder, rows=600)
    collect(config, folder / "store")
    collect(config, f"{s3}/team/made")
    return folder, f"{s3}/team/made"


def command(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def download(storage: Storage, folder: Path) -> Path:
    """Write all objects as files, without the code that copies stores."""
    for name in storage.object_names():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(storage.read(name))
    return folder


def marks(storage: Storage) -> int:
    """Marks of activations."""
    return sum(
        "/layers." in name and ".partial" not in name for name in storage.object_names("marks")
    )


# --- commands ---


def test_a_store_is_the_same_wherever_it_lies(originals: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = originals
    assert equal(download(open_storage(url), tmp_path / "store"), folder / "store")
    assert verify(url).findings == ()
    for what in ("info", "stats"):
        here = json.loads(command(what, folder / "store", "--json"))
        there = json.loads(command(what, url, "--json"))
        if what == "info":
            assert (here.pop("store"), there.pop("store")) == (str(folder / "store"), url)
        assert here == there


def test_a_collection_continues_below_a_root(
    originals: tuple[Path, str], s3: str, tmp_path: Path
) -> None:
    folder, _ = originals
    words = [
        "collect",
        folder / "model",
        folder / "corpus.jsonl",
        "--root",
        f"{s3}/{tmp_path.name}",
    ]
    words += ["--ctx-len", 16, "--part-rows", 192, "--chunk-rows", 32, "--validation-every", 4]
    words += ["--model-dtype", "float32", "--batch-sequences", 5, "--json", "--hookpoints"]
    first = json.loads(command(*words, "layers.0", "--rows", 300))
    more = json.loads(command(*words, "layers.0,layers.1.mlp", "--rows", 600))
    again = json.loads(command(*words, "layers.1.mlp", "--rows", 600))
    assert first["store"] == more["store"] == again["store"]
    assert again["forward_rows"] == 0
    path = download(open_storage(more["store"]), tmp_path / "store")
    (path / "store.json").write_bytes(
        (folder / "store/store.json").read_bytes()
    )  # the message names the first failure
    assert equal(path, folder / "store")
    (entry,) = json.loads(command("list", f"{s3}/{tmp_path.name}", "--json"))
    assert (entry["rows"], entry["complete"]) == (more["rows"], 1.0)


@contextmanager
def gone_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int) -> Iterator[None]:
    """Let the server disappear at the given call of a bucket's method."""
    real, calls = getattr(ObjectStorage, method), itertools.count(1)

    def stopped(*arguments: object) -> Any:
        if next(calls) == call:
            raise ConnectionError("the server is gone")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, method, stopped)
        yield


@pytest.mark.slow
def test_copies_work_in_both_directions_and_continue_after_a_stop(
    originals: tuple[Path, str], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = originals
    with gone_at(monkeypatch, "write_temporary", 20), pytest.raises(ConnectionError):
        copy(folder / "store", url)
    assert "is not a store" in command("info", url, code=2)
    done = json.loads(command("copy", folder / "store", url, "--json"))
    assert 0 < done["written"] < done["parts"]
    command("copy", url, tmp_path / "back")
    assert equal(tmp_path / "back", folder / "store")
    assert verify(url).findings == verify(tmp_path / "back").findings == ()
    assert "must be separate folders, neither inside the other" in command(
        "copy", url, f"{url}/below", code=2
    )
    command("convert", source, f"{url}-float", "--dtype", "float32")
    command("convert", folder / "store", tmp_path / "float", "--dtype", "float32")
    assert files_alike(f"{url}-float", tmp_path / "float")


def files_alike(url: str, folder: Path) -> bool:
    storage, other = open_storage(url), open_storage(folder)
    names = [name for name in storage.object_names() if name.startswith("arrays.zarr/")]
    return all(storage.read(name) == other.read(name) for name in names)


def test_a_stopped_removal_leaves_no_store_and_continues(
    originals: tuple[Path, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(originals[0] / "store", url)
    open_storage(url).create("notes.txt", b"mine")
    assert "'notes.txt'" in command("remove", url, "--yes", code=2)
    open_storage(url).delete("notes.txt")
    delete, calls = ObjectStorage.delete, 0

    def stopped(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise ConnectionError("the server is gone")
        delete(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "delete", stopped)
        assert "the server is gone" in command("remove", url, "--yes", code=1)
    assert "is not a store" in command("info", url, code=2)
    command("remove", url, "--yes")
    assert not open_storage(url).exists()


def test_fit_and_eval_read_a_bucket(originals: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = originals
    results = []
    for number, store in enumerate((url, folder / "store")):
        run = tmp_path / str(number)
        words = ["fit", store, "--run", run, "--hookpoints", "layers.0", "--arch", "topk"]
        words += ["--k", 4, "--expansion", 2, "--rows", 1000, "--batch-rows", 64]
        assert CliRunner().invoke(mpcli.mptrain.app, [str(w) for w in words]).exit_code == 0
        (coder,) = (run / "coders").iterdir()
        result = CliRunner().invoke(mpcli.mptrain.app, ["eval", str(coder), str(store), "--json"])
        results.append((json.loads(result.stdout), (coder / "coder.safetensors").read_bytes()))
    assert results[0] == results[1]


# --- care ---


def harm(url: str) -> dict[str, str]:
    """Damage a store by a foreign client; return the fault of each damaged object."""
    client, (_, _, bucket_name, prefix) = servers.raw_client(), url.split("/", 3)

    def put(name: str, change: Callable[[bytes], bytes]) -> None:
        key = f"{prefix}/{name}"
        data = change(client.get_object(Bucket=bucket_name, Key=key)["Body"].read())
        client.put_object(Bucket=bucket_name, Key=key, Body=data)

    def flipped(data: bytes) -> bytes:
        return data[:40] + bytes([data[40] ^ 1]) + data[41:]

    acts, other = "arrays.zarr/acts/layers.0/output/c/{}/0", "arrays.zarr/acts/layers.1.mlp"
    put(acts.format(0), lambda data: data[:-1])
    put(acts.format(1), flipped)
    put(f"{other}/input/c/1/0", lambda data: data + b"?")
    put("arrays.zarr/tokens/c/1/0", flipped)
    put("marks/0/layers.1.mlp/output.json", flipped)
    put("arrays.zarr/norms/layers.0/output/zarr.json", flipped)
    gone = [acts.format(2), "arrays.zarr/rows/position/c/2"]
    gone += ["arrays.zarr/norms/layers.0/output/c/3"]
    for name in gone:
        client.delete_object(Bucket=bucket_name, Key=f"{prefix}/{name}")
    client.put_object(Bucket=bucket_name, Key=f"{prefix}/arrays.zarr/foreign", Body=b"")
    return {
        acts.format(0): "truncated", acts.format(1): "flipped", f"{other}/input/c/1/0": "overlong",
        "arrays.zarr/tokens/c/1/0": "flipped", "marks/0/layers.1.mlp/output.json": "mark",
        "arrays.zarr/norms/layers.0/output/zarr.json": "metadata",
        **dict.fromkeys(gone, "missing"), "arrays.zarr/foreign": "uncommitted",
    }  # fmt: skip


def named(url: str) -> dict[str, str]:
    return {finding.path: finding.fault for finding in verify(url).findings}


@pytest.mark.slow
@pytest.mark.parametrize("by", ["model", "copy"])
def test_damage_in_a_bucket_is_named_and_repaired(
    originals: tuple[Path, str], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    folder, source = originals
    copy(folder / "store", url)
    before = stats_of(url)
    harmed = harm(url)
    assert named(url) == harmed
    assert "layers.1.mlp/output.json is damaged" in command("copy", url, f"{url}-copy", code=1)
    assert "norms/layers.0/output/zarr.json is damaged" in command("stats", url, code=1)
    words = ["repair", url, *(["--source", source] if by == "copy" else [])]
    with gone_at(monkeypatch, "publish", 4):
        assert "the server is gone" in command(*words, code=1)
    left = {name: fault for name, fault in named(url).items() if fault != "leftover"}
    assert left.items() < harmed.items()
    done = json.loads(command(*words, "--delete-leftovers", "--json"))
    assert len(done["deleted"]) == 1
    assert done["intact"]
    assert {record["outcome"] for record in done["marks"]} == {"mended"}
    assert [record["path"] for record in done["left"]] == ["arrays.zarr/foreign"]
    assert named(url) == {"arrays.zarr/foreign": "uncommitted"}
    open_storage(url).delete("arrays.zarr/foreign")
    assert lasting_content(download(open_storage(url), tmp_path / "store")) == lasting_content(
        folder / "store"
    )
    assert stats_of(url) == before


def stats_of(store: object) -> object:
    return json.loads(command("stats", store, "--json"))


@pytest.mark.slow
def test_parts_are_joined_and_cut_again_in_buckets(
    originals: tuple[Path, str], url: str, tmp_path: Path
) -> None:
    folder, source = originals
    here, there, other = tmp_path / "here", f"{url}/joined", f"{url}/uploaded"
    for begin, to in ((folder / "store", here), (source, there), (folder / "store", other)):
        command("convert", begin, to, "--part-rows", 384)
    assert verify(there).findings == ()
    assert stats_of(there) == stats_of(here)
    for to in (there, other):
        downloaded = download(open_storage(to), tmp_path / open_storage(to).name)
        assert (marks_of(downloaded), arrays_of(downloaded)) == (marks_of(here), arrays_of(here))
    for side, split in itertools.product(SIDES, ("train", "validation")):
        rows = rows_of(open_store(there), side, split)
        assert torch.equal(rows, rows_of(open_store(folder / "store"), side, split))
    for to in (f"{url}/cut", tmp_path / "cut"):
        command("convert", there, to, "--part-rows", 192)
    assert equal_parts(download(open_storage(f"{url}/cut"), tmp_path / "back"), folder / "store")
    assert equal_parts(tmp_path / "cut", folder / "store")
    words = ("convert", there, f"{url}/no", "--part-rows", 96)
    assert "must be a multiple of" in command(*words, code=2)
    assert not open_storage(f"{url}/no").exists()


def arrays_of(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(path).items() if name.startswith("arrays.zarr")}


def equal_parts(path: Path, other: Path) -> bool:
    """Whether all marks and objects are equal; sizes of arrays may differ."""
    actual, expected = (
        {n: d for n, d in arrays_of(p).items() if "/c/" in n} for p in (path, other)
    )
    return actual == expected and marks_of(path) == marks_of(other)


@pytest.mark.slow
def test_processes_take_care_of_a_bucket(
    originals: tuple[Path, str], url: str, tmp_path: Path
) -> None:
    folder, source = originals
    copy(folder / "store", url)
    harmed = harm(url)
    environment = {name: os.environ[name] for name in (*servers.CREDENTIALS, "AWS_ENDPOINT_URL")}
    with dask.config.set({"distributed.nanny.environ": environment}):
        findings = verify(url, ParallelConfig(workers=2)).findings
        assert {finding.path: finding.fault for finding in findings} == harmed
        assert json.loads(command("stats", source, "--workers", 2, "--json")) == stats_of(source)
        command("convert", source, f"{url}/joined", "--part-rows", 384, "--workers", 2)
    command("convert", folder / "store", tmp_path / "here", "--part-rows", 384)
    joined = download(open_storage(f"{url}/joined"), tmp_path / "joined")
    assert arrays_of(joined) == arrays_of(tmp_path / "here")


def test_mistakes_of_the_user_are_one_line(s3: str) -> None:
    for words, message in (
        (("info", "s3://nobody-has-it/a"), "there is no such bucket"),
        (("list", "s3://nobody-has-it"), "there is no such bucket"),
        (("info", "s3://key:secret@shared/a"), "must not contain credentials"),
        (("info", f"{s3}/nothing"), "is not a store"),
        (("list", f"{s3}/nothing"), "/nothing does not exist"),
    ):
        output = command(*words, code=2)
        assert message in output
        assert len(output.splitlines()) == 1
        assert "secret" not in output


def test_nothing_secret_gets_into_a_store(originals: tuple[Path, str]) -> None:
    storage = open_storage(originals[1])
    content = b"".join(storage.read(name) for name in storage.object_names())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        assert os.environ[name].encode() not in content


# --- a server that fails ---


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shorten the pauses between retries."""
    monkeypatch.setitem(
        cloud_connection._RETRIES["backoff"], "init_backoff", 0.02 * cloud_connection._SECONDS
    )
    monkeypatch.setattr(bucket_requests, "_PAUSE", 0.02)
    cloud_connection.bucket_client.cache_clear()
    yield
    cloud_connection.bucket_client.cache_clear()


@pytest.mark.usefixtures("s3", "hurried")
def test_storage_on_a_server_that_fails_a_third_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of call gives the same result as on a reliable server."""
    monkeypatch.setattr(bucket_requests, "PART_BYTES", 5 << 20)
    with servers.faulty(os.environ["AWS_ENDPOINT_URL"], 0, 0.33) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        storage = open_storage(f"s3://{servers.BUCKET}/{tmp_path.name}")
        for number in range(4):
            data = b"%d" % number
            assert storage.create(f"a{number}", data)
            assert not storage.create(f"a{number}", b"other")
            temporary = storage.write_temporary(
                "large", "key", (data * (1 << 20) for _ in range(11))
            )
            assert storage.publish(temporary, "large")
            assert b"".join(storage.read_pieces("large")) == data * (11 << 20)
            assert storage.create_copy(f"a{number}", f"b{number}")
            storage.replace(f"a{number}", b"new")
            storage.delete(temporary)
            assert storage.size(temporary) is None
            assert len(list(storage.object_names())) == 2 * number + 3
        assert len(storage.children()) == 9


@pytest.mark.slow
@pytest.mark.usefixtures("s3", "hurried")
def test_a_collection_on_a_server_that_fails_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, rows=200, hookpoints=("layers.0",))
    collect(config, tmp_path / "whole")
    with servers.faulty(os.environ["AWS_ENDPOINT_URL"], 5, 0.1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        url = f"s3://{servers.BUCKET}/{tmp_path.name}"
        assert not collect(config, url).missing
        assert verify(url).findings == ()
    cloud_connection.bucket_client.cache_clear()
    monkeypatch.undo()
    assert equal(download(open_storage(url), tmp_path / "store"), tmp_path / "whole")


# --- chaos ---


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.05])
def test_chaos(s3: str, tmp_path: Path, share: float) -> None:
    """Four workers; SIGKILL to any of them, and to the command three times; a server that fails."""
    write_corpus(tmp_path / "corpus.jsonl", documents=160)
    config = small_config(tmp_path, rows=8_000, part_rows=384)
    url, expected = f"{s3}/{tmp_path.name}", tmp_path / "whole"
    storage, draw = open_storage(url), random.Random(4)
    victims = ["command"] * 3 + ["worker"] * 6
    draw.shuffle(victims)
    with servers.faulty(os.environ["AWS_ENDPOINT_URL"], 6, share) as proxy:
        process = start(collect_on_server, config, url, proxy)
        for victim in victims:
            goal = marks(storage) + draw.randrange(1, 6)
            wait_for(lambda least=goal: marks(storage) >= least, 240)
            assert process.is_alive()
            if victim == "worker":
                os.kill(draw.choice(workers_of(process)), signal.SIGKILL)
            else:
                process.kill()
                process.join()
                process = start(collect_on_server, config, url, proxy)
        so_far = marks(storage)
        process.join()
    assert process.exitcode == 0
    collect(config, expected)
    assert so_far < marks(storage) == marks(open_storage(expected))  # work was left until the end
    path = download(storage, tmp_path / "store")
    assert equal(path, expected)
    assert clean(path)
    assert {finding.fault for finding in verify(url).findings} <= {"leftover"}


def collect_on_server(config: CollectConfig, url: str, address: str) -> None:
    environment = {**servers.CREDENTIALS, "AWS_ENDPOINT_URL": address}
    os.environ.update(environment)
    # the server that forks processes for the tests may be older than the one of the objects
    dask.config.set({"distributed.nanny.environ": environment})
    collect_with_four(config, url)
