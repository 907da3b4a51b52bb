"""A collection that is killed, interrupted or out of disk loses nothing that was committed."""

import errno
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from mpcache.collection import producer as producer_module
from mpcache.collection.collect import collect
from mpcache.config import CollectConfig
from mpcache.maintenance.verify import verify
from mpcache.storage import atomic_files
from mpcache.store import commit
from tests.helpers.stores import files_of, marks_of, small_config

ROWS = {"rows": 1200, "codec": "zstd"}


class Killer:
    """Kills its own process, by SIGKILL, at the n-th call of the functions that it wraps."""

    def __init__(self, moment: int, log: Path) -> None:
        self.left, self.log = moment, log

    def reach(self, name: str) -> bool:
        """Whether the process must be killed now."""
        self.left -= 1
        return self.left == 0

    def kill(self, name: str) -> None:
        with self.log.open("a") as file:
            file.write(name + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def before(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*args: Any, **kwargs: Any) -> Any:
            if self.reach(name):
                self.kill(name)
            return function(*args, **kwargs)

        return killed

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Leave half of the bytes in a temporary file, like an interrupted write."""

        def killed(path: Path, pieces: Iterable[bytes]) -> Any:
            if self.reach(name):
                data = b"".join(pieces)
                path.with_name(f"{path.name}.cut.partial").write_bytes(data[: len(data) // 2])
                self.kill(name)
            return function(path, pieces)

        return killed


def collect_until_killed(config: CollectConfig, path: Path, moment: int, log: Path) -> None:
    """Runs in a separate process."""
    killer = Killer(moment, log)
    atomic_files.write_temporary_file = killer.within("write", atomic_files.write_temporary_file)
    atomic_files.sync_folders = killer.before("sync", atomic_files.sync_folders)
    commit.values_digest = killer.before("digest after the read back", commit.values_digest)
    producer_module.capture_part = killer.before("forward pass", producer_module.capture_part)
    collect(config, path)


def run(config: CollectConfig, path: Path, moment: int, log: Path) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mpcache.collection.collect"])
    process = context.Process(target=collect_until_killed, args=(config, path, moment, log))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.slow
def test_killed_ten_times_equals_never_killed(tmp_path: Path) -> None:
    config, log = small_config(tmp_path, **ROWS), tmp_path / "log"
    uninterrupted, killed = tmp_path / "whole", tmp_path / "killed"
    collect(config, uninterrupted)
    draw = random.Random(2)
    for _ in range(10):
        assert run(config, killed, draw.randrange(1, 45), log) == -signal.SIGKILL
        assert not killed.exists() or not (killed / "store.json").exists() or verify(killed).intact
    assert run(config, killed, 0, log) == 0
    moments = log.read_text().splitlines()
    assert len(moments) == 10
    assert sum(name.startswith("write") for name in moments) >= 3, moments
    assert marks_of(killed) == marks_of(uninterrupted)
    finished = {name: data for name, data in files_of(killed).items() if ".partial" not in name}
    assert finished == files_of(uninterrupted)
    assert verify(killed).intact


def test_ctrl_c_finishes_the_part_in_hand_and_the_next_call_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, **ROWS)
    capture, calls = producer_module.capture_part, 0

    def interrupted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        capture(*args)

    monkeypatch.setattr(producer_module, "capture_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(config, tmp_path / "store")
    done = [name for name in marks_of(tmp_path / "store") if "layers.0" in name]
    assert len(done) == 3  # what the model had read was committed before the command ended
    summary = collect(config, tmp_path / "store")
    assert summary.forward_rows == summary.rows - 3 * 192
    collect(config, tmp_path / "whole")
    assert marks_of(tmp_path / "store") == marks_of(tmp_path / "whole")


@pytest.mark.parametrize("fails_at", [2, 20, 90])
def test_full_disk_keeps_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    config = small_config(tmp_path, **ROWS)
    put, calls = atomic_files.write_temporary_file, 0

    def full(*args: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls >= fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return put(*args)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "write_temporary_file", full)
        with pytest.raises(OSError, match="No space left"):
            collect(config, tmp_path / "store")
    assert verify(tmp_path / "store").intact
    collect(config, tmp_path / "store")
    collect(config, tmp_path / "whole")
    assert marks_of(tmp_path / "store") == marks_of(tmp_path / "whole")
