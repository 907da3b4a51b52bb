"""A run survives full disks and damaged files, and does not depend on the process's state."""

import errno
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mpcache.errors import UsageError
from mpcli.mptrain import app as mptrain
from mptrain.coders import checkpoint
from mptrain.runs import fit as fit_module
from mptrain.runs import metrics_file
from mptrain.runs.fit import fit
from mptrain.runs.metrics_file import MetricsFile, read_records
from tests.helpers.fits import config, equal, interrupt_at, lasting, state, weights
from tests.helpers.records import RECORD
from tests.helpers.stores import small_store

SMALL_RUN = {"kind": ("sae",), "eval_rows": 64}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("fit"))[0])


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_from(first: int, last: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Let the disk be full from the n-th call of a function to a later call."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return full() if first <= calls <= last else function(*args, **kwargs)

    return called


def test_a_full_disk_while_saving_is_a_warning_and_the_next_save_tries_again(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(config(store, tmp_path / "whole", **SMALL_RUN))
    # saves after 5, 10, 15, 20 and 24 steps; the second and the third find a full disk
    monkeypatch.setattr(checkpoint, "save_file", full_from(2, 3, checkpoint.save_file))
    with pytest.warns(RuntimeWarning, match="after train step") as warned:
        fit(config(store, tmp_path / "full", **SMALL_RUN))
    wanted = "the state after train step {} is not saved (No space left on device); the previous "
    for warning, step in zip(warned, (10, 15), strict=True):
        assert str(warning.message).startswith(wanted.format(step))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "full"))
    assert equal(state(tmp_path / "whole"), state(tmp_path / "full"))
    assert lasting(tmp_path / "whole") == lasting(tmp_path / "full")


def test_the_last_complete_state_continues_after_a_full_disk(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(config(store, tmp_path / "whole", **SMALL_RUN))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_from(2, 99, checkpoint.save_file))
        with (
            pytest.warns(RuntimeWarning, match="the previous state is kept"),
            pytest.raises(OSError, match="No space left on device"),
        ):
            fit(config(store, tmp_path / "full", **SMALL_RUN))
    assert [f.name for f in (tmp_path / "full/state").iterdir()] == ["5"], "no room is wasted"
    assert not list((tmp_path / "full/coders").iterdir())
    fit(config(store, tmp_path / "full", **SMALL_RUN))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "full"))
    assert lasting(tmp_path / "whole") == lasting(tmp_path / "full")


def test_the_system_s_error_of_a_tensor_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory") as error:
        checkpoint.save_tensors({"x": torch.zeros(1)}, tmp_path / "none" / "x")
    assert error.value.errno == errno.ENOENT


class Cut:
    """A file on a disk that takes half of a write and then no more."""

    def __init__(self, file: Any) -> None:
        self.file, self.writes = file, 0

    def write(self, data: bytes) -> int:
        self.writes += 1
        if self.writes > 1:
            full()
        return int(self.file.write(data[: len(data) // 2]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Cut":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def test_lines_that_a_full_disk_refuses_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.add(RECORD)
    with monkeypatch.context() as patch:
        open_ = Path.open
        patch.setattr(metrics_file.Path, "open", lambda *args, **more: Cut(open_(*args, **more)))
        with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl cannot be written"):
            file.add(RECORD)
        file.add(RECORD)  # warns once
        with pytest.raises(OSError, match="No space left"):
            file.flush()
    assert len(read_records(file.path)) == 1
    assert file.path.read_bytes().endswith(b"\n"), "half a line would spoil the next one"
    file.add(RECORD)
    assert read_records(file.path) == [RECORD] * 4


def test_no_state_is_kept_without_its_lines(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a killed run would continue after lines that were never written."""
    monkeypatch.setattr(MetricsFile, "_write", full)
    with (
        pytest.warns(RuntimeWarning, match="No space left"),
        pytest.raises(OSError, match="No space left"),
    ):
        fit(config(store, tmp_path / "run", **SMALL_RUN))
    assert not (tmp_path / "run/state").exists()


def test_a_damaged_state_is_named_with_a_remedy(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "run", **SMALL_RUN))
    expected = weights(tmp_path / "run")
    (folder,) = (tmp_path / "run/state").iterdir()
    for name in ("state.safetensors", "state.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-9])
        with pytest.raises(
            ValueError, match=r"state/24 is damaged, .* or delete .*/state to start the run"
        ):
            fit(config(store, tmp_path / "run", **SMALL_RUN))
        (folder / name).unlink()
        with pytest.raises(ValueError, match="state/24 is damaged"):
            fit(config(store, tmp_path / "run", **SMALL_RUN))
        (folder / name).write_bytes(before)
    shutil.rmtree(folder.parent)
    fit(config(store, tmp_path / "run", **SMALL_RUN))
    assert equal(expected, weights(tmp_path / "run"))


def test_a_state_of_an_older_version_is_refused(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "run", **SMALL_RUN))
    (file,) = (tmp_path / "run/state").glob("*/state.json")
    values = json.loads(file.read_text())
    assert values.pop("format_version") == 2
    file.write_text(json.dumps(values))
    with pytest.raises(
        UsageError, match=r"version \(its format version is 1, not 2\); use the version"
    ):
        fit(config(store, tmp_path / "run", **SMALL_RUN))


def test_a_saved_coder_is_complete_at_every_moment_of_its_replacement(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(config(store, tmp_path / "run", arch=("mp",), **SMALL_RUN))
    (folder,) = (tmp_path / "run/coders").iterdir()
    coder, trained = checkpoint.load_coder(folder)
    seen = 0

    def looked_at(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            checkpoint.load_coder(folder)
            done = function(*args, **kwargs)
            checkpoint.load_coder(folder)
            return done

        return called

    for name in ("rename", "replace", "rmdir"):
        monkeypatch.setattr(Path, name, looked_at(getattr(Path, name)))
    checkpoint.save_coder(folder, coder, {**trained, "again": True})
    assert seen == 3
    assert checkpoint.load_coder(folder)[1]["again"]
    assert len(list(folder.parent.iterdir())) == 1


def test_how_often_is_saved_may_change_between_commands(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "run", rows=64, **SMALL_RUN))
    fit(config(store, tmp_path / "run", rows=64, save_every=1, **SMALL_RUN))


def test_sigterm_saves_and_prints_a_message(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(fit_module, "fit", partial(fit, on_step=terminate))
    fitted = ["fit", store, "--run", str(tmp_path / "run"), "--hookpoints", "layers.0", "--k", "3",
              "--expansion", "2", "--rows", "800", "--batch-rows", "64"]  # fmt: skip
    result = CliRunner().invoke(mptrain, fitted)
    assert result.exit_code == 143
    assert "run the same command again to continue after train step 1" in result.stderr


def test_a_full_disk_is_one_line_of_warning(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", full_from(1, 1, checkpoint.save_file))
    fitted = ["fit", store, "--run", str(tmp_path / "run"), "--hookpoints", "layers.0", "--k", "3",
              "--expansion", "2", "--rows", "800", "--batch-rows", "64",
              "--save-every", "5"]  # fmt: skip
    result = CliRunner().invoke(mptrain, fitted)
    assert result.exit_code == 0
    assert "warning: the state after train step 5 is not saved (No space left" in result.stderr
    assert ".py:" not in result.stderr


def test_randomness_comes_from_seeds_alone(store: str, tmp_path: Path) -> None:
    """Therefore no state of a random generator has to be saved."""
    drawn = {**SMALL_RUN, "arch": ("mp",), "rows": 64 * 6}
    for number in range(2):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        fit(config(store, tmp_path / str(number), **drawn))
    assert equal(weights(tmp_path / "0"), weights(tmp_path / "1"))


def test_differences_are_written_as_on_the_command_line(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "run", rows=64, **SMALL_RUN))
    before = json.loads((tmp_path / "run/config.json").read_text())
    with pytest.raises(ValueError, match="a different config") as error:
        fit(config(store, tmp_path / "run", rows=128, k=(2, 3), lr=(0.1,), **SMALL_RUN))
    message = str(error.value)
    for difference in (
        "k: 3 there, 2,3 asked",
        "lr: auto there, 0.1 asked",
        "rows: 64 there, 128 ",
    ):
        assert difference in message
    assert json.loads((tmp_path / "run/config.json").read_text()) == before


def test_the_bar_shows_fvu_speed_waiting_and_time_left(
    store: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    fit(config(store, tmp_path / "run", **SMALL_RUN), quiet=False)
    bar = capfd.readouterr().err
    assert re.search(
        r"fit 2 coders: +\d+%.*k/1\.54k \[\d\d:\d\d<\d\d:\d\d, +[\d.]+k?row/s, "
        r"FVU [\d.]+ to [\d.]+, wait \d+%\]",
        bar,
    )


def test_a_run_of_an_earlier_version_continues(store: str, tmp_path: Path) -> None:
    """The old config lacks newer settings, and the old state lacks the rows of each coder."""
    fit(config(store, tmp_path / "whole", **SMALL_RUN))
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "run", **SMALL_RUN), on_step=interrupt_at(13))
    file = tmp_path / "run/config.json"
    started = json.loads(file.read_bytes())
    assert started["fit"].pop("only_tokens") == "all"
    file.write_text(json.dumps(started))
    fit(config(store, tmp_path / "run", **SMALL_RUN))
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    with pytest.raises(ValueError, match="skip_positions: 1 there, 2 asked"):
        fit(config(store, tmp_path / "run", **SMALL_RUN, skip_positions=2))


@pytest.mark.parametrize(
    "content", [{}, [], {"model_type": "llama"}, {"fit": {}, "coders": []}], ids=str
)
def test_another_tools_folder_is_no_run(store: str, tmp_path: Path, content: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    for command in (
        ["fit", store, "--run", str(tmp_path), "--hookpoints", "layers.0", "--k", "3"],
        ["fit", "--resume", str(tmp_path)],
        ["save-coders", str(tmp_path)],
        ["plot", str(tmp_path)],
    ):
        done = CliRunner().invoke(mptrain, command)
        assert done.exit_code == 2, done.output
        assert "holds no run" in done.stderr


def test_settings_of_a_newer_version_are_named(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "run", **SMALL_RUN, rows=64 * 5))
    file = tmp_path / "run/config.json"
    started = json.loads(file.read_bytes())
    started["fit"]["novelty"] = 1
    file.write_text(json.dumps(started))
    done = CliRunner().invoke(mptrain, ["save-coders", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "novelty" in done.stderr
    assert "use the version that began the run" in done.stderr
