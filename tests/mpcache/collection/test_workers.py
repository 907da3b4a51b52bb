"""With several workers, lost or not, and several commands, the store equals that of one process."""

import dataclasses
import errno
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed.client import Client
from typer.testing import CliRunner

from mpcache.collection import dask_client, store_side
from mpcache.collection import producer as producer_module
from mpcache.collection.collect import collect
from mpcache.collection.dask_client import DaskCollector
from mpcache.collection.store_side import Collection, WaitConfig
from mpcache.data.dataset import open_documents
from mpcache.data.vocabulary import vocabulary_of
from mpcache.errors import UsageError
from mpcache.maintenance.verify import verify
from mpcache.model.loading import load_tokenizer
from mpcache.parallel.config import CollectParallelConfig, Share
from mpcache.parallel.dask_cluster import CONNECT_TIMEOUT_KEY, start_cluster
from mpcache.storage import atomic_files
from mpcache.storage.base import open_storage
from mpcli.mpcache import app
from tests.helpers.commands import (
    clean,
    collect_with_four,
    equal,
    fast_starting_workers,
    start,
    wait_for,
    workers_of,
)
from tests.helpers.stores import files_of, marks_of, small_config, write_corpus

ROWS = {"rows": 2400, "codec": "zstd"}

# Dask's threads warn of connections that a kill has cut; these tests check the store
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _workers_start_at_once() -> Iterator[None]:
    with fast_starting_workers():
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    """A Dask cluster of another owner, which outlives commands."""
    with (
        start_cluster(2, 2, "mpcache.collection.dask_worker") as local,
        Client(local, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def everywhere(cluster: Client) -> Iterator[CollectParallelConfig]:
    yield CollectParallelConfig(scheduler=cluster.scheduler.address)
    cluster.run(mend)


def count(path: Path) -> int:
    """The number of marks of activations."""
    return len([file for file in path.glob("marks/*/*/*.json") if file.parent.name != "rows"])


# --- faults that tests plant in workers ---


def slow_down(seconds: float) -> None:
    read = producer_module.capture_part

    def slow(*arguments: Any) -> None:
        time.sleep(seconds)
        read(*arguments)

    mend()
    producer_module.capture_part = slow


def fill_disk(after: int) -> None:
    put, calls = atomic_files.write_temporary_file, 0

    def full(*arguments: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        return put(*arguments)

    atomic_files.write_temporary_file = full


def break_part(broken_part: int) -> None:
    read_part = producer_module.ActivationProducer.read_part

    def broken(self: Any, part: int, *arguments: Any) -> Any:
        if part == broken_part:
            raise RuntimeError("the part is broken")
        return read_part(self, part, *arguments)

    producer_module.ActivationProducer.read_part = broken


_UNPATCHED = (
    atomic_files.write_temporary_file,
    producer_module.capture_part,
    producer_module.ActivationProducer.read_part,
)


def mend() -> None:
    (
        atomic_files.write_temporary_file,
        producer_module.capture_part,
        producer_module.ActivationProducer.read_part,
    ) = _UNPATCHED


# --- lost workers, lost commands ---


def test_a_lost_worker_costs_nothing(tmp_path: Path) -> None:
    config, parallel = small_config(tmp_path, **ROWS), CollectParallelConfig(workers=2)
    path, expected = tmp_path / "store", tmp_path / "whole"
    tokenizer = load_tokenizer(config)
    with DaskCollector(parallel, config, open_storage(path), quiet=True) as collector:
        facts = collector.model_facts()
        documents = open_documents(config, vocabulary_of(tokenizer))
        collector.client.run(slow_down, 0.05)
        pids = collector.client.run(os.getpid)

        def kill() -> None:
            wait_for(lambda: count(path) > 6)
            os.kill(next(iter(pids.values())), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        collection = Collection(config, path, facts, tokenizer, documents, parallel=parallel)
        summary = collection.run(collector.collect_parts)
        killer.join()
        collector.client.wait_for_workers(2, timeout=60)
        now = collector.client.run(os.getpid)
    assert len(now) == 2
    assert len(set(now.values()) & set(pids.values())) == 1
    assert not summary.missing
    assert summary.rows == summary.forward_rows
    collect(config, expected)
    assert equal(path, expected)
    assert clean(path)


def test_a_command_continues_while_workers_of_a_killed_command_still_run(
    tmp_path: Path, cluster: Client, everywhere: CollectParallelConfig
) -> None:
    config, path, expected = small_config(tmp_path, **ROWS), tmp_path / "store", tmp_path / "whole"
    cluster.run(slow_down, 0.1)
    for seen in (2, 12):
        process = start(collect, config, path, everywhere)
        wait_for(lambda least=seen: count(path) >= least)
        process.kill()
        process.join()
    summary = collect(config, path, everywhere)
    assert not summary.missing
    assert 0 < summary.forward_rows < summary.rows
    collect(config, expected)
    assert equal(path, expected)
    assert clean(path)


@pytest.mark.slow
def test_chaos(tmp_path: Path) -> None:
    """Four workers; SIGKILL to any of them again and again, and to the command three times."""
    write_corpus(tmp_path / "corpus.jsonl", documents=400)
    config = small_config(tmp_path, rows=20_000, part_rows=384)
    path, expected = tmp_path / "store", tmp_path / "whole"
    draw = random.Random(4)
    victims = ["command"] * 3 + ["worker"] * 9
    draw.shuffle(victims)
    command = start(collect_with_four, config, path)
    for victim in victims:
        goal = count(path) + draw.randrange(1, 12)
        wait_for(lambda least=goal: count(path) >= least)
        assert command.is_alive()
        if victim == "worker":
            os.kill(draw.choice(workers_of(command)), signal.SIGKILL)
        else:
            command.kill()
            command.join()
            command = start(collect_with_four, config, path)
    assert count(path) < 150  # work was left until the end
    command.join()
    assert command.exitcode == 0
    assert count(path) == 159
    collect(config, expected)
    assert equal(path, expected)
    assert clean(path)


def test_ctrl_c_ends_all_workers_soon_and_leaves_nothing_behind(
    tmp_path: Path,
    cluster: Client,
    everywhere: CollectParallelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, path = small_config(tmp_path, **ROWS), tmp_path / "store"
    cluster.run(slow_down, 0.1)
    show_done, calls = dask_client._ProgressReports.show_done, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        show_done(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dask_client._ProgressReports, "show_done", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(config, path, everywhere)
    so_far = count(path)
    assert 9 <= so_far <= 21  # of 39
    assert so_far % 3 == 0  # whole parts
    assert not list(path.rglob("*.partial"))
    collect(config, path, everywhere)
    collect(config, tmp_path / "whole")
    assert equal(path, tmp_path / "whole")


# --- commands that run at the same time ---


def test_two_commands_in_the_same_second(tmp_path: Path) -> None:
    config, path = small_config(tmp_path, **ROWS), tmp_path / "store"
    both = [start(collect, config, path) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    collect(config, tmp_path / "whole")
    assert equal(path, tmp_path / "whole")
    assert not verify(path).findings


@pytest.mark.parametrize("through", ["one process", "workers"])
def test_one_command_adds_a_hookpoint_while_another_extends(
    tmp_path: Path, everywhere: CollectParallelConfig, through: str
) -> None:
    path, parallel = (
        tmp_path / "store",
        everywhere if through == "workers" else CollectParallelConfig(),
    )
    collect(small_config(tmp_path, rows=600, hookpoints=("layers.0",)), path)
    both_changes: list[dict[str, object]] = [
        {"hookpoints": ("layers.0",), "rows": 2400},
        {"hookpoints": ("layers.1.mlp",), "rows": 600},
    ]
    both = [
        start(collect, small_config(tmp_path, **changes), path, parallel)
        for changes in both_changes
    ]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert not verify(path).findings
    collect(small_config(tmp_path, rows=2400), path)
    collect(small_config(tmp_path, rows=2400), tmp_path / "whole")
    assert marks_of(path) == marks_of(tmp_path / "whole")


# --- things that go wrong in workers ---


def test_a_full_disk_is_one_message_and_the_collection_continues_once_there_is_space(
    tmp_path: Path, cluster: Client, everywhere: CollectParallelConfig
) -> None:
    config, path = small_config(tmp_path, **ROWS), tmp_path / "store"
    cluster.run(fill_disk, 30)
    with pytest.raises(OSError, match="No space left") as caught:
        collect(config, path, everywhere)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename.startswith(str(path))
    assert clean(path) or {f.fault for f in verify(path).findings} == {"uncommitted"}
    cluster.run(mend)
    assert collect(config, path, everywhere).forward_rows < 2496
    collect(config, tmp_path / "whole")
    assert equal(path, tmp_path / "whole")


def test_a_part_that_fails_three_times_is_reported_and_the_rest_is_collected(
    tmp_path: Path, cluster: Client, everywhere: CollectParallelConfig
) -> None:
    config, path = small_config(tmp_path, **ROWS), tmp_path / "store"
    cluster.run(break_part, 5)
    options = [
        f"--{name.replace('_', '-')}={getattr(config, name)}"
        for name in ("rows", "ctx_len", "part_rows", "chunk_rows", "batch_sequences", "codec")
    ]
    options += ["--validation-every=4", "--model-dtype=float32", "--device=cpu"]
    options += [f"--hookpoints={','.join(config.hookpoints)}"]
    options += [f"--scheduler={everywhere.scheduler}"]
    result = CliRunner().invoke(app, ["collect", config.model, config.dataset, str(path), *options])
    assert result.exit_code == 1
    assert (
        "part 5 was not collected after 3 tries: RuntimeError: the part is broken" in result.stderr
    )
    assert "error: 1 parts are missing" in result.stderr
    assert "2,304 rows in 12 parts" in result.stdout
    assert "dashboard: http://" in result.stderr
    assert clean(path)
    cluster.run(mend)
    assert collect(config, path, everywhere).forward_rows == 192
    collect(config, tmp_path / "whole")
    assert marks_of(path) == marks_of(tmp_path / "whole")


@pytest.mark.parametrize("content", ["nothing", "another store"])
def test_workers_that_see_another_folder_are_left_out_until_none_is_left(
    tmp_path: Path, everywhere: CollectParallelConfig, content: str
) -> None:
    config, path, other = small_config(tmp_path), tmp_path / "store", tmp_path / "other machine"
    if content == "another store":  # of the same parts and sides, in another order
        collect(small_config(tmp_path, seed=1), other)
    before = files_of(other) if other.exists() else {}
    tokenizer = load_tokenizer(config)
    documents = open_documents(config, vocabulary_of(tokenizer))
    with DaskCollector(everywhere, config, open_storage(path), quiet=True) as collector:
        # workers see this folder at the path of the command's store
        collector.spec = dataclasses.replace(collector.spec, address=str(other))
        facts = collector.model_facts()
        collection = Collection(config, path, facts, tokenizer, documents, parallel=everywhere)
        with pytest.raises(UsageError, match="must be the same folder on all machines"):
            collection.run(collector.collect_parts)
    assert count(path) == 0
    assert (files_of(other) if other.exists() else {}) == before


def test_an_unusable_model_is_refused_as_in_one_process(
    tmp_path: Path, everywhere: CollectParallelConfig
) -> None:
    config = small_config(tmp_path, hookpoints=("layer.1.mpl",))
    with pytest.raises(ValueError, match=r"near: layers\.\*\.mlp|layers.*mlp"):
        collect(config, tmp_path / "store", everywhere)
    assert not (tmp_path / "store").exists()


# --- shares ---


def test_shares_are_disjoint_and_make_the_whole(tmp_path: Path) -> None:
    config, path = small_config(tmp_path, **ROWS), tmp_path / "store"
    waits = WaitConfig(for_tokens=0.0)  # the first share comes last
    summaries = [
        collect(config, path, CollectParallelConfig(share=f"{i}/3"), waits=waits) for i in (2, 3, 1)
    ]
    assert [summary.parts for summary in summaries] == [4, 4, 5]
    assert [summary.forward_rows for summary in summaries] == [s.rows for s in summaries]
    collect(config, tmp_path / "whole")
    assert equal(path, tmp_path / "whole")


def test_other_shares_wait_for_the_tokens_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = small_config(tmp_path, **ROWS), tmp_path / "store"
    first = threading.Timer(1.0, collect, [config, path, CollectParallelConfig(share="1/2")])
    first.start()

    def refused(*_: object) -> None:
        assert threading.current_thread() is first

    commit = store_side.commit_tokens
    monkeypatch.setattr(store_side, "commit_tokens", lambda *args: (refused(), commit(*args)))
    assert collect(config, path, CollectParallelConfig(share="2/2")).parts == 6
    first.join()
    assert clean(path)


@pytest.mark.parametrize("parts", [1, 7, 40])
@pytest.mark.parametrize("shares", [1, 2, 3, 50])
def test_every_part_is_in_one_share(parts: int, shares: int) -> None:
    all_shares = [Share(i, shares) for i in range(1, shares + 1)]
    assert all(sum(share.includes(part) for share in all_shares) == 1 for part in range(parts))


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "workers must be at least 1, got 0"),
        (["--workers", "2", "--scheduler", "tcp://h:1"], "cannot be used together"),
        (["--scheduler", "here"], "must be an address such as tcp://host:8786, got 'here'"),
        (["--share", "0/4"], "share must be i/n with i from 1 to n, got '0/4'"),
        (["--share", "5/4"], "for job 2 of 8, give 2/8"),
        (["--share", "half"], "got 'half'"),
    ],
)
def test_invalid_parallel_options_are_refused(
    tmp_path: Path, options: list[str], message: str
) -> None:
    arguments = ["collect", "model", "data", str(tmp_path / "store"), "--hookpoints", "layers.0"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 2, result.output
    assert [message in line for line in result.stderr.splitlines()] == [True]


def test_a_scheduler_that_does_not_answer(tmp_path: Path) -> None:
    message = r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"
    with (
        dask.config.set({CONNECT_TIMEOUT_KEY: "1s"}),
        pytest.raises(ConnectionError, match=message),
    ):
        collect(
            small_config(tmp_path),
            tmp_path / "store",
            CollectParallelConfig(scheduler="tcp://127.0.0.1:9"),
        )
