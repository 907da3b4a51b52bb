"""Many workers, lost or not, many commands at once: the store equals that of one process."""

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed.client import Client
from typer.testing import CliRunner

from mpcache.collection import collect as collect_stage
from mpcache.collection import dask_client as crew
from mpcache.collection import producer as station
from mpcache.collection.collect import Collection, collect
from mpcache.collection.dask_client import DaskCollector
from mpcache.data.documents import open_documents
from mpcache.data.token_file import vocabulary_of
from mpcache.maintenance.verify import verify
from mpcache.model.loading import load_tokenizer
from mpcache.parallel import dask_cluster as cluster_stage
from mpcache.parallel.config import CollectParallelConfig, Share
from mpcache.storage import local as folder
from mpcache.storage.base import open_storage
from mpcli.mpcache import app
from tests.helpers.commands import clean, collect_with_four, equal, start, wait_for, workers_of
from tests.helpers.stores import marks_of, small_config, write_corpus

ROWS = {"rows": 2400, "codec": "zstd"}

# Dask's own threads complain of connections that a kill has cut; the store is what is judged
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _workers_start_at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_stage, "START_METHOD", "forkserver")
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    """A Dask cluster that somebody else started, and that outlives commands."""
    with (
        cluster_stage.local_cluster(2, 2, "mpcache.collection.dask_worker") as local,
        Client(local, set_as_default=False) as one,
    ):
        yield one


@pytest.fixture
def everywhere(cluster: Client) -> Iterator[CollectParallelConfig]:
    yield CollectParallelConfig(scheduler=cluster.scheduler.address)
    cluster.run(mend)


def count(path: Path) -> int:
    """Marks of activations."""
    return len([file for file in path.glob("marks/*/*/*.json") if file.parent.name != "rows"])


# --- what workers are told, so that something goes wrong there ---


def slow_down(seconds: float) -> None:
    read = station.capture_part

    def slow(*arguments: Any) -> None:
        time.sleep(seconds)
        read(*arguments)

    mend()
    station.capture_part = slow


def fill_disk(after: int) -> None:
    put, calls = folder.write_temporary_file, 0

    def full(*arguments: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        return put(*arguments)

    folder.write_temporary_file = full


def break_part(rows: int) -> None:
    read = station.ActivationProducer.read

    def broken(self: Any, part: int, *arguments: Any) -> Any:
        if part == rows:
            raise RuntimeError("the part is broken")
        return read(self, part, *arguments)

    station.ActivationProducer.read = broken


_WHOLE = folder.write_temporary_file, station.capture_part, station.ActivationProducer.read


def mend() -> None:
    folder.write_temporary_file, station.capture_part, station.ActivationProducer.read = _WHOLE


# --- lost workers, lost commands ---


def test_a_lost_worker_costs_nothing(tmp_path: Path) -> None:
    config, parallel = small_config(tmp_path, **ROWS), CollectParallelConfig(workers=2)
    path, whole = tmp_path / "store", tmp_path / "whole"
    tokenizer = load_tokenizer(config)
    with DaskCollector(parallel, config, open_storage(path), quiet=True) as staff:
        facts = staff.facts()
        documents = open_documents(config, vocabulary_of(tokenizer))
        staff.client.run(slow_down, 0.05)
        pids = staff.client.run(os.getpid)

        def kill() -> None:
            wait_for(lambda: count(path) > 6)
            os.kill(next(iter(pids.values())), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        collection = Collection(config, path, facts, tokenizer, documents, parallel)
        summary = collection.run(staff.work)
        killer.join()
        staff.client.wait_for_workers(2, timeout=60)
        now = staff.client.run(os.getpid)
    assert len(now) == 2
    assert len(set(now.values()) & set(pids.values())) == 1
    assert not summary.missing
    assert summary.rows == summary.forward_rows
    collect(config, whole)
    assert equal(path, whole)
    assert clean(path)


def test_a_killed_command_is_followed_by_another_while_its_workers_go_on(
    tmp_path: Path, cluster: Client, everywhere: CollectParallelConfig
) -> None:
    config, path, whole = small_config(tmp_path, **ROWS), tmp_path / "store", tmp_path / "whole"
    cluster.run(slow_down, 0.1)
    for seen in (2, 12):
        process = start(collect, config, path, everywhere)
        wait_for(lambda least=seen: count(path) >= least)
        process.kill()
        process.join()
    summary = collect(config, path, everywhere)
    assert not summary.missing
    assert 0 < summary.forward_rows < summary.rows
    collect(config, whole)
    assert equal(path, whole)
    assert clean(path)


@pytest.mark.slow
def test_chaos(tmp_path: Path) -> None:
    """Four workers; SIGKILL to any of them again and again, and to the command three times."""
    write_corpus(tmp_path / "corpus.jsonl", documents=400)
    config = small_config(tmp_path, rows=20_000, part_rows=384)
    path, whole = tmp_path / "store", tmp_path / "whole"
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
    assert count(path) < 150  # there was something to do to the end
    command.join()
    assert command.exitcode == 0
    assert count(path) == 159
    collect(config, whole)
    assert equal(path, whole)
    assert clean(path)


def test_ctrl_c_ends_all_workers_soon_and_leaves_nothing_behind(
    tmp_path: Path,
    cluster: Client,
    everywhere: CollectParallelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, path = small_config(tmp_path, **ROWS), tmp_path / "store"
    cluster.run(slow_down, 0.1)
    done, calls = crew._Shown.done, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        done(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(crew._Shown, "done", interrupted)
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
    wanted: list[dict[str, object]] = [
        {"hookpoints": ("layers.0",), "rows": 2400},
        {"hookpoints": ("layers.1.mlp",), "rows": 600},
    ]
    both = [start(collect, small_config(tmp_path, **one), path, parallel) for one in wanted]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert not verify(path).findings
    collect(small_config(tmp_path, rows=2400), path)
    collect(small_config(tmp_path, rows=2400), tmp_path / "whole")
    assert marks_of(path) == marks_of(tmp_path / "whole")


# --- things that go wrong in workers ---


def test_full_disk_is_one_message_and_space_lets_it_go_on(
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


def test_a_part_that_fails_three_times_is_told_and_the_rest_goes_on(
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
    assert "part 5 is missing, tried 3 times: RuntimeError: the part is broken" in result.stderr
    assert "error: 1 parts are missing" in result.stderr
    assert "2,304 rows in 12 parts" in result.stdout
    assert "dashboard: http://" in result.stderr
    assert clean(path)
    cluster.run(mend)
    assert collect(config, path, everywhere).forward_rows == 192
    collect(config, tmp_path / "whole")
    assert marks_of(path) == marks_of(tmp_path / "whole")


def test_workers_that_see_another_store_are_left_out_until_none_is_left(
    tmp_path: Path, everywhere: CollectParallelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "of another machine"
    from_here = crew.DaskCollector.__init__

    def elsewhere(self: DaskCollector, *arguments: Any, **more: Any) -> None:
        from_here(self, *arguments, **more)
        object.__setattr__(self.orders, "path", str(other))

    monkeypatch.setattr(crew.DaskCollector, "__init__", elsewhere)
    monkeypatch.setattr(crew, "read_store_file", lambda _: {"fingerprint": "x"})
    with pytest.raises(ValueError, match="must be one folder that all machines share"):
        collect(small_config(tmp_path), tmp_path / "store", everywhere)
    assert not other.exists()


def test_a_model_that_cannot_be_used_is_told_as_in_one_process(
    tmp_path: Path, everywhere: CollectParallelConfig
) -> None:
    config = small_config(tmp_path, hookpoints=("layer.1.mpl",))
    with pytest.raises(ValueError, match=r"near: layers\.\*\.mlp|layers.*mlp"):
        collect(config, tmp_path / "store", everywhere)
    assert not (tmp_path / "store").exists()


# --- shares ---


def test_shares_are_disjoint_and_make_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = small_config(tmp_path, **ROWS), tmp_path / "store"
    monkeypatch.setattr(collect_stage, "TOKEN_PATIENCE", 0.0)  # the first share comes last
    found = [collect(config, path, CollectParallelConfig(share=f"{i}/3")) for i in (2, 3, 1)]
    assert [one.parts for one in found] == [4, 4, 5]
    assert [one.forward_rows for one in found] == [one.rows for one in found]
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

    commit = Collection.commit_tokens
    monkeypatch.setattr(
        Collection, "commit_tokens", lambda self, one: (refused(), commit(self, one))
    )
    assert collect(config, path, CollectParallelConfig(share="2/2")).parts == 6
    first.join()
    assert clean(path)


@pytest.mark.parametrize("parts", [1, 7, 40])
@pytest.mark.parametrize("shares", [1, 2, 3, 50])
def test_every_part_is_in_one_share(parts: int, shares: int) -> None:
    found = [Share(i, shares) for i in range(1, shares + 1)]
    assert all(sum(share.has(part) for share in found) == 1 for part in range(parts))


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--workers", "0"], "workers must be at least 1, got 0"),
        (["--workers", "2", "--scheduler", "tcp://h:1"], "exclude each other"),
        (["--scheduler", "here"], "must be an address such as tcp://host:8786, got 'here'"),
        (["--share", "0/4"], "share must be i/n from 1/n to n/n, got '0/4'"),
        (["--share", "5/4"], "number the jobs of an array from 1"),
        (["--share", "half"], "got 'half'"),
    ],
)
def test_useless_options(tmp_path: Path, options: list[str], told: str) -> None:
    arguments = ["collect", "model", "data", str(tmp_path / "store"), "--hookpoints", "layers.0"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 2, result.output
    assert [told in line for line in result.stderr.splitlines()] == [True]


def test_a_scheduler_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_stage, "CONNECT", 1.0)
    with pytest.raises(ConnectionError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        collect(
            small_config(tmp_path),
            tmp_path / "store",
            CollectParallelConfig(scheduler="tcp://127.0.0.1:9"),
        )
