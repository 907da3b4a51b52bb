"""TensorBoard and Weights & Biases show the values of metrics.jsonl, also for interrupted runs."""

import dataclasses
import importlib.util
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mptrain.config.run import Log
from mptrain.runs import loggers
from mptrain.runs.fit import fit
from mptrain.runs.loggers import MetricLoggers
from mptrain.runs.metrics_file import Record, read_records
from tests.helpers.fits import config, equal, interrupt_at, weights
from tests.helpers.records import RECORD
from tests.helpers.stores import small_store

SMALL_RUN: dict[str, Any] = {"kind": ("sae",), "rows": 64 * 12, "eval_every": 4, "eval_rows": 64}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("follow"))[0])


def numbers(record: Record) -> dict[str, Any]:
    values = {n: v for n, v in dataclasses.asdict(record).items() if n not in ("coder", "step")}
    return {n: v for n, v in values.items() if v is not None}


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each curve, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_records_of_a_run_that_was_stopped_twice(
    store: str, tmp_path: Path
) -> None:
    settings = config(store, tmp_path / "run", log=("tensorboard",), **SMALL_RUN)
    for stops_at in (8, 4):
        with pytest.raises(KeyboardInterrupt):
            fit(settings, on_step=interrupt_at(stops_at))
    results = fit(settings)
    records = read_records(tmp_path / "run/metrics.jsonl")
    for result in results:
        curves = shown(tmp_path / "run/tensorboard" / result.coder)
        own = [record for record in records if record.coder == result.coder]
        wanted: dict[str, list[tuple[int, float]]] = {}
        for record in own:
            for name, value in numbers(record).items():
                wanted.setdefault(name, []).append((record.step, value))
        assert curves.keys() == wanted.keys()
        for name, points in wanted.items():
            assert [step for step, _ in curves[name]] == [step for step, _ in points]
            assert [v for _, v in curves[name]] == pytest.approx([v for _, v in points], rel=1e-6)


def test_following_changes_no_bit_and_may_begin_later(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "alone", **SMALL_RUN))
    fit(config(store, tmp_path / "followed", **{**SMALL_RUN, "log": ("tensorboard",)}))
    assert equal(weights(tmp_path / "alone"), weights(tmp_path / "followed"))
    results = fit(config(store, tmp_path / "alone", log=("tensorboard",), **SMALL_RUN))
    curves = shown(tmp_path / "alone/tensorboard" / results[0].coder)
    # every second step is logged; steps 3, 5, 7, 10 and 11 are validated for the slopes
    assert [step for step, _ in curves["fvu"]] == [2, 3, 4, 5, 6, 7, 8, 10, 11, 12]


@pytest.mark.parametrize("log", ["tensorboard", "wandb"])
def test_an_absent_package_is_an_error_before_the_run_begins(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        loggers.importlib.util, "find_spec", lambda name: None if name == log else find(name)
    )
    with pytest.raises(ValueError, match=rf"log {log} needs .* pip install 'mpcache\[{log}\]'"):
        fit(config(store, tmp_path / "run", log=(log,), **SMALL_RUN))
    assert not (tmp_path / "run").exists()


def test_a_follower_that_fails_ends_no_training(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("connection lost")

    monkeypatch.setattr(loggers.TensorBoard, "add", fails)
    with pytest.warns(RuntimeWarning, match="tensorboard failed .* connection lost"):
        fit(config(store, tmp_path / "run", log=("tensorboard",), **SMALL_RUN))
    assert len(read_records(tmp_path / "run/metrics.jsonl")) == 2 * 10  # two coders


def test_a_follower_that_fails_is_closed_and_may_fail_in_it(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = 0

    def fails(*_: object) -> None:
        raise RuntimeError("connection lost")

    def fails_to_close(self: loggers.TensorBoard) -> None:
        nonlocal closed
        closed += 1
        close(self)
        raise RuntimeError("nobody there")

    close = loggers.TensorBoard.close
    monkeypatch.setattr(loggers.TensorBoard, "close", fails_to_close)
    with pytest.warns(RuntimeWarning, match="tensorboard failed .* nobody there"):
        fit(config(store, tmp_path / "run", log=("tensorboard",), **SMALL_RUN))
    assert (tmp_path / "run/results.json").exists()
    monkeypatch.setattr(loggers.TensorBoard, "add", fails)
    with pytest.warns(RuntimeWarning, match="connection lost"):
        fit(config(store, tmp_path / "other", log=("tensorboard",), **SMALL_RUN))
    assert closed == 2


class FakeRun:
    """A run of Weights & Biases refuses steps that it already has."""

    kept: dict[str, dict[int, dict[str, float]]]

    def __init__(self, kept: dict[int, dict[str, float]]) -> None:
        self.steps = kept
        self.resumed = bool(kept)
        self.step = max(kept) + 1 if kept else 0

    def log(self, values: dict[str, float], *, step: int) -> None:
        assert step >= self.step, "would be dropped with a warning"
        self.steps[step] = values

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for the package, whose server keeps what it receives under each run's id."""
    fake: Any = types.ModuleType("wandb")
    fake.server, fake.asked, fake.runs = {}, [], []

    def init(**asked: Any) -> FakeRun:
        fake.asked.append(asked)
        fake.runs.append(FakeRun(fake.server.setdefault(asked["id"], {})))
        return fake.runs[-1]  # type: ignore[no-any-return]

    fake.init = init
    fake.errors = types.SimpleNamespace(Error=ConnectionError)
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_each_coder_as_a_run_and_resumes_it(
    store: str, tmp_path: Path, wandb: Any
) -> None:
    settings = config(store, tmp_path / "run", log=("wandb",), **SMALL_RUN)
    with pytest.raises(KeyboardInterrupt):
        fit(settings, on_step=interrupt_at(8))  # after seven train steps; five were saved
    results = fit(settings)
    assert len(wandb.server) == 2
    assert [arguments["name"] for arguments in wandb.asked] == [r.coder for r in results] * 2
    assert wandb.asked[0]["config"]["arch"] == "mp"
    assert len({arguments["group"] for arguments in wandb.asked}) == 1
    assert all(run.finished for run in wandb.runs)
    records = read_records(tmp_path / "run/metrics.jsonl")
    for asked in wandb.asked[:2]:
        kept = wandb.server[asked["id"]]
        own = {record.step: record for record in records if record.coder == asked["name"]}
        assert list(kept) == list(own)
        assert all(kept[step]["fvu"] == own[step].fvu for step in own)
    fit(dataclasses.replace(settings, run=str(tmp_path / "other")))
    assert len(wandb.server) == 4, "another run has other ids"


def test_wandb_that_does_not_start_is_an_error(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any
) -> None:
    def refuses(**_: object) -> None:
        raise ConnectionError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuses)
    with pytest.raises(
        ValueError, match="api_key not configured; run `wandb login`, or set WANDB_"
    ):
        fit(config(store, tmp_path / "run", log=("wandb",), **SMALL_RUN))


def test_the_real_wandb_takes_it_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed package accepts the calls of the tests above."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    coders = [
        dataclasses.replace(coder_config)
        for coder_config in config("store", tmp_path, **SMALL_RUN).coders()
    ]
    following = MetricLoggers(("wandb",), tmp_path, coders)
    for coder in coders:
        following.add(dataclasses.replace(RECORD, coder=coder.name, fvu=math.nan))
    following.close()
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 2
    assert json.loads((tmp_path / "wandb.json").read_text())["group"]
