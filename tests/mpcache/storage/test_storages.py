"""LocalStorage and bucket keep one contract: that of a dictionary of names, whoever else writes."""

import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from obstore import exceptions

from mpcache.errors import DamagedStoreError
from mpcache.storage import bucket_requests, cloud_connection
from mpcache.storage import local as local_storage
from mpcache.storage.base import Storage, open_storage


def read(storage: Storage, name: str, offset: int, *lengths: int) -> bytes:
    buffers = [np.empty(length, np.uint8) for length in lengths]
    storage.read_into(name, offset, buffers)
    return b"".join(buffer.tobytes() for buffer in buffers)


NAMES = st.sampled_from(["a", "b/c", "b/d/e", "marks/0/x y.json", "b/c.partial", "é"])
DATA = st.binary(max_size=40)
KINDS = ("folder", "s3", "memory")


@pytest.fixture(params=KINDS)
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    """A new storage; obstore's in-memory store stands for a server that is not Amazon's."""
    if request.param == "folder":
        return open_storage(tmp_path / "place")
    if request.param == "s3":
        return open_storage(f"{request.getfixturevalue('s3')}/{tmp_path.name}")
    from obstore.store import MemoryStore

    memory = MemoryStore()
    monkeypatch.setattr(bucket_requests, "bucket_client", lambda scheme, name: memory)
    monkeypatch.setattr(bucket_requests, "_PAUSE", 0.0)
    bucket_requests._check_bucket.cache_clear()
    return open_storage("gs://in-memory/place")


OPERATIONS = st.one_of(
    st.tuples(st.sampled_from(["create", "replace", "write_temporary"]), NAMES, DATA),
    st.tuples(st.sampled_from(["delete", "create_copy", "publish"]), NAMES, NAMES),
)


@hypothesis.settings(
    max_examples=15,
    suppress_health_check=list(
        hypothesis.HealthCheck
    ),  # one storage for each test is enough, and creating it may be slow
)
@hypothesis.given(st.lists(OPERATIONS, max_size=12))
@hypothesis.example(
    [("create", "a", b"0"), ("create_copy", "a", "b/c")]
)  # the folder does not exist
@hypothesis.example([("write_temporary", "a", b"0"), ("publish", "a", "d/e/f")])
def test_a_storage_is_a_dictionary(
    storage: Storage, operations: list[tuple[str, str, object]]
) -> None:
    for name in list(storage.object_names()):
        storage.delete(name)
    expected: dict[str, bytes] = {}
    for what, name, more in operations:
        if what == "create":
            assert storage.create(name, more) == (name not in expected)
            expected.setdefault(name, more)
        elif what == "replace":
            storage.create(name, b"")
            storage.replace(name, more)
            expected[name] = more
        elif what == "write_temporary":
            expected[f"{name}.key.partial"] = more
            assert (
                storage.write_temporary(name, "key", [more[:5], more[5:]]) == f"{name}.key.partial"
            )
        elif what == "publish":
            temporary = f"{name}.key.partial"
            assert storage.publish(temporary, more) == (temporary in expected)
            if temporary in expected:
                expected[more] = expected[temporary]
                if storage.size(temporary) is None:
                    del expected[temporary]
        elif what == "delete":
            storage.delete(name)
            expected.pop(name, None)
        elif name in expected:
            linked = storage.create_copy(name, more)
            # an existing link may count as the requested one
            assert linked or more in expected
            assert not linked or expected.setdefault(more, expected[name]) == expected[name]
        else:
            with pytest.raises(FileNotFoundError):
                storage.create_copy(name, more)
    assert {name: storage.read(name) for name in storage.object_names()} == expected
    assert list(storage.object_names("b")) == [
        n for n in storage.object_names() if n.startswith("b/")
    ]
    assert {name: storage.size(name) for name in expected} == {
        n: len(d) for n, d in expected.items()
    }
    assert {name: b"".join(storage.read_pieces(name)) for name in expected} == expected
    assert set(storage.children()) >= {name.partition("/")[0] for name in expected}


def test_missing_objects(storage: Storage) -> None:
    assert not storage.exists()
    assert not storage.exists("a")
    assert storage.size("a") is None
    assert list(storage.object_names()) == storage.children() == []
    assert not storage.publish("a", "b")
    storage.delete("a")
    for ask in (
        storage.read,
        lambda n: list(storage.read_pieces(n)),
        lambda n: read(storage, n, 0, 1),
    ):
        with pytest.raises(FileNotFoundError):
            ask("a")


def test_ranges_are_exact_or_refused(storage: Storage) -> None:
    storage.create("a", b"0123456789")
    assert read(storage, "a", 3, 4) == b"3456"
    assert read(storage, "a", 3, 1, 0, 3) == b"3456"
    for offset, length in ((8, 3), (10, 1), (40, 1)):
        with pytest.raises(ValueError, match=f"ends before byte {offset + length}"):
            read(storage, "a", offset, length)


def test_much_is_read_in_several_calls(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of buffers, and however few bytes the system returns at a time."""
    monkeypatch.setattr(local_storage, "_CALL", 300)
    monkeypatch.setattr(local_storage, "_CALL_BUFFERS", 3)
    preadv = os.preadv

    def little(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        assert len(buffers) <= 3
        assert sum(map(len, buffers)) <= 300
        return preadv(descriptor, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)

    monkeypatch.setattr(os, "preadv", little)
    content = np.random.default_rng(0).bytes(3000)
    storage.create("a", content)
    assert read(storage, "a", 5, 0, 1, 100, 700, 2, 0, 299, 301) == content[5 : 5 + 1403]
    with pytest.raises(ValueError, match="ends before byte 3001"):
        read(storage, "a", 2900, 50, 51)


def test_large_objects_go_and_come_in_parts(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_requests, "PART_BYTES", 5 << 20)
    content = bytes(range(256)) * (52 << 10)
    pieces = (content[start : start + 700_001] for start in range(0, len(content), 700_001))
    assert storage.publish(storage.write_temporary("large", "key", pieces), "large")
    assert storage.size("large") == len(content)
    assert b"".join(storage.read_pieces("large")) == content
    assert read(storage, "large", 9 << 20, 300) == content[9 << 20 :][:300]


def test_one_of_many_writers_creates(storage: Storage) -> None:
    storage.create("other", b"")
    results: list[bool] = []
    start = threading.Barrier(6)

    def create(data: bytes) -> None:
        start.wait()
        results.append(storage.create("mark", data))

    threads = [threading.Thread(target=create, args=(b"%d" % n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 5 + [True]


def test_text_and_pickle_lead_back(storage: Storage) -> None:
    storage.create("a", b"1")
    assert open_storage(storage.address).read("a") == b"1"
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"1"
    assert storage.child("b").create("c", b"2")
    assert storage.read("b/c") == b"2"
    assert storage.child("b").name == "b"
    assert storage.child("b").is_within(storage)
    assert storage.is_within(storage)
    assert not storage.is_within(storage.child("b"))
    assert not storage.child("bc").is_within(storage.child("b"))


def test_nothing_is_left_of_what_is_removed(storage: Storage) -> None:
    kept = storage.child("kept-beside")
    kept.create("store.json", b"other")
    store = storage.child("kept")
    for name in ("store.json", "arrays.zarr/a/c/0", "marks/0/a.json"):
        store.create(name, b"1")
    store.delete_all("store.json", "store.json.rest.partial", "marks")
    assert not store.exists()
    assert kept.read("store.json") == b"other"
    assert list(storage.object_names()) == ["kept-beside/store.json"]


# --- names ---


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://key:secret@shared/a", "credentials"),
        ("s3://key:secret/with@shared/a", "credentials"),
        ("https://key:secret@shared/a", "credentials"),
        ("s3://shared/a?X-Amz-Signature=secret", "credentials"),
        ("s3://Shared/a", "a store must be a path, s3://BUCKET/NAME"),
        ("s3://", "a store must be"),
        ("S3://shared/a", "a store must be"),
        ("https://shared/a", "a store must be"),
        ("file:///etc", "a store must be"),
        ("s3://shared/a/../b", "names between the slashes of a URL"),
        ("s3://shared//a", "names between the slashes of a URL"),
        ("s3://shared/./a", "names between the slashes of a URL"),
        ("s3://shared/a\x1b[31m", "names between the slashes of a URL"),
        ("s3://sha\x1b[31mred/a", "a store must be"),
    ],
)
def test_invalid_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_storage(url)
    assert "secret" not in str(error.value)
    assert str(error.value).isprintable()


def test_a_url_that_became_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="give the URL as a str") as error:
        open_storage(Path("s3://key:secret@shared/a"))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("key", ["a//b", "a/../b", "con\x1btrol", ".."])
def test_keys_that_no_store_has_are_refused_by_name(s3: str, tmp_path: Path, key: str) -> None:
    storage = open_storage(f"{s3}/{tmp_path.name}")
    storage.create("marks/0/tokens.json", b"1")
    put_raw(f"{tmp_path.name}/marks/{key}", b"2")
    with pytest.raises(
        DamagedStoreError, match="with a name that is not valid in a store"
    ) as error:
        list(storage.object_names("marks"))
    assert str(error.value).isprintable()


def test_a_folder_that_a_console_made_is_nothing(s3: str, tmp_path: Path) -> None:
    put_raw(f"{tmp_path.name}/", b"")
    assert list(open_storage(f"{s3}/{tmp_path.name}").object_names()) == []


def put_raw(key: str, data: bytes) -> None:
    from tests.helpers.servers import BUCKET, raw_client

    raw_client().put_object(Bucket=BUCKET, Key=key, Body=data)


# --- errors ---


def test_a_bucket_that_is_not_there(s3: str) -> None:
    storage = open_storage("s3://nobody-has-it/a")
    for ask in (
        lambda: storage.exists("store.json"),
        lambda: storage.read("store.json"),
        lambda: storage.create("store.json", b""),
        lambda: list(storage.object_names()),
        storage.children,
        lambda: storage.publish("a", "b"),
        lambda: storage.write_temporary("a", "key", [b""]),
    ):
        with pytest.raises(NotADirectoryError, match="no such bucket"):
            ask()


@pytest.fixture
def fresh_clients() -> Iterator[None]:
    cloud_connection.bucket_client.cache_clear()
    yield
    cloud_connection.bucket_client.cache_clear()


@pytest.mark.usefixtures("s3", "fresh_clients")
def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(cloud_connection._RETRIES, "max_retries", 1)
    monkeypatch.setattr(bucket_requests, "_TRIES", 1)
    with pytest.raises(ConnectionError, match=r"s3://shared/a/store\.json: "):
        open_storage("s3://shared/a").exists("store.json")


@pytest.mark.usefixtures("s3", "fresh_clients")
def test_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="there are no credentials; set AWS_PROFILE"):
        open_storage("s3://shared/a").exists("store.json")
    (tmp_path / "none").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    assert not open_storage("s3://shared/none").exists("store.json")


@pytest.mark.usefixtures("fresh_clients")
def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mpcache\[gs\]'"):
        open_storage("gs://shared/a").exists("store.json")


def test_plain_http_is_for_this_machine_alone() -> None:
    here = ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1")
    there = ("http://example.org", "https://127.0.0.1.example.org", "", "http://10.0.0.1")
    assert all(map(cloud_connection.is_local_address, here))
    assert not any(map(cloud_connection.is_local_address, there))


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (
            exceptions.GenericError("GET http://169.254.169.254/token - 403"),
            PermissionError,
            "GOOGLE_APP",
        ),
        (exceptions.PermissionDeniedError("x"), PermissionError, "access is denied"),
        (exceptions.GenericError("status code: 400 Bad\nDebug source: secret"), OSError, "400 Bad"),
        (exceptions.GenericError("status code: 503 Slow Down"), ConnectionError, "503"),
        (
            exceptions.GenericError(
                "PUT http://key:secret@host/a - status code: 400 Bad Request: "
                "<Error><Code>Signature</Code><AWSAccessKeyId>secret</AWSAccessKeyId></Error>"
            ),
            OSError,
            "http://host/a - status code: 400 Bad Request: Signature$",
        ),
        (exceptions.GenericError("status code: 429 Too Many"), ConnectionError, "429"),
        (FileNotFoundError("<Code>NoSuchBucket</Code>"), NotADirectoryError, "no such bucket"),
    ],
)
def test_errors_of_servers_in_words(raised: Exception, kind: type[OSError], message: str) -> None:
    with (
        pytest.raises(kind, match=message) as error,
        cloud_connection.translate_errors("gs://shared/a"),
    ):
        raise raised
    assert type(error.value) is kind
    assert "gs://shared/a" in str(error.value)
    assert "secret" not in str(error.value)
