"""Trainers of other tools on the rows of our runs; each test of a tool needs it installed."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import (
    compare_trainers,
    own_trainer,
    saelens_trainer,
    sparsify_trainer,
)
from benchmarks.trainer_rates import default_rate
from benchmarks.trainer_rows import StoreRows, TimedBatches, TrainedCoder
from benchmarks.trainer_settings import Setting, coders, fit_config
from benchmarks.trainer_table import read_table
from mptrain.data.loader import open_store
from mptrain.evals.evaluate import evaluate_coder
from mptrain.runs.fit import fit
from mptrain.training.train_step import CoderTrainer
from tests.helpers.stores import small_store

MODULES = {"sae-lens": "sae_lens", "eai-sparsify": "sparsify"}
TRAINERS = {
    "mptrain": own_trainer, "sae-lens": saelens_trainer, "eai-sparsify": sparsify_trainer,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("trainers"))[0]


def small(setting: Setting, **changes: Any) -> Setting:
    """The setting for the small store."""
    hookpoint = "layers.0" if setting.kind == "sae" else "layers.1.mlp"
    sizes: dict[str, Any] = {
        "latents": 64, "k": 4, "batch_rows": 64, "steps": 60, "hookpoint": hookpoint,
        "sparsity": 0.01 if setting.arch == "jumprelu" else None,
    }  # fmt: skip
    return replace(setting, **{**sizes, **changes})


def parameters() -> Iterator[Any]:
    for setting in coders():
        module = MODULES.get(setting.tool)
        is_absent = module is not None and find_spec(module) is None
        marks = pytest.mark.skipif(is_absent, reason=f"needs {module}")
        yield pytest.param(small(setting, lr=0.01), id=setting.coder, marks=marks)


def train(setting: Setting, store: Path, work: Path) -> tuple[TrainedCoder, StoreRows]:
    rows = StoreRows(setting, open_store(store))
    coder = TRAINERS[setting.tool].train(setting, rows, store, work)
    assert coder is not None
    return coder, rows


@pytest.mark.parametrize("setting", list(parameters()))
def test_longer_training_has_a_lower_fvu(setting: Setting, store: Path, tmp_path: Path) -> None:
    short = replace(setting, steps=2)
    before, after = (
        rows.evaluate(coder)
        for coder, rows in (
            train(short, store, tmp_path / "short"), train(setting, store, tmp_path / "long"),
        )
    )  # fmt: skip
    if setting.arch in ("topk", "mp"):
        assert after.l0 == pytest.approx(4, rel=0.1)
    assert 0 <= after.dead_share < 1
    assert after.fvu < 0.95 * before.fvu
    assert after.report_fvu < 0.95 * before.report_fvu


@pytest.mark.parametrize("setting", [p for p in parameters() if "mptrain" not in str(p.id)])
def test_a_tool_trains_on_the_rows_of_our_run(
    setting: Setting, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches that our train steps get are those that the tool gets, with all filters."""
    ours: list[tuple[Tensor, Tensor]] = []
    original = CoderTrainer.step

    def step(trainer: CoderTrainer, x_BD: Tensor, y_BE: Tensor) -> Any:
        ours.append((x_BD.clone(), y_BE.clone()))
        return original(trainer, x_BD, y_BE)

    monkeypatch.setattr(CoderTrainer, "step", step)
    setting = replace(setting, steps=5)
    fit(fit_config(setting, store, tmp_path / "run"))
    theirs: list[tuple[Tensor, Tensor]] = []

    class Recorded(TimedBatches):
        def __next__(self) -> tuple[Tensor, Tensor]:
            theirs.append(super().__next__())
            return theirs[-1]

    monkeypatch.setattr(TRAINERS[setting.tool], "TimedBatches", Recorded)
    train(setting, store, tmp_path / "theirs")
    assert len(ours) == len(theirs) == 5
    assert sum(len(x_BD) for x_BD, _ in ours) < 5 * 64  # first positions are left out
    for own, other in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, own, other))


@pytest.mark.parametrize("arch", ["mp", "topk", "batch-topk", "jumprelu"])
def test_our_coders_are_evaluated_as_by_our_commands(
    arch: Any, store: Path, tmp_path: Path
) -> None:
    setting = small(Setting(tool="mptrain", arch=arch))
    coder, rows = train(setting, store, tmp_path)
    held_out = rows.evaluate(coder)
    (folder,) = (tmp_path / "run" / "coders").iterdir()
    (expected,) = evaluate_coder(folder, store)
    assert held_out.l0 == pytest.approx(expected.l0)
    assert held_out.dead_share == pytest.approx(expected.dead_share)
    numbers = [part.number for part in open_store(store).parts(rows.sides, "validation")]
    for fvu, parts in ((held_out.fvu, numbers[0::2]), (held_out.report_fvu, numbers[1::2])):
        assert fvu == pytest.approx(evaluate_coder(folder, store, parts=parts)[0].fvu)


@pytest.mark.skipif(find_spec("sae_lens") is None, reason="needs sae_lens")
def test_the_default_rate_is_that_of_saelens(store: Path) -> None:
    setting = small(Setting(tool="sae-lens", arch="topk"))
    rows = StoreRows(setting, open_store(store))
    sae = saelens_trainer.make_coder(setting, 16)
    trainer = saelens_trainer.make_trainer(setting, sae, rows, iter(()))
    assert trainer.optimizer.param_groups[0]["lr"] == default_rate(setting, 16)


@pytest.mark.skipif(find_spec("sparsify") is None, reason="needs sparsify")
def test_the_default_rate_is_that_of_sparsify(store: Path, tmp_path: Path) -> None:
    setting = small(Setting(tool="eai-sparsify", arch="topk"))
    trainer = sparsify_trainer.make_trainer(
        setting, sparsify_trainer.StoreModel(TimedBatches(iter(())), (16, 16)), [], tmp_path
    )
    rates = {group["lr"] for o in trainer.optimizers for group in o.param_groups}
    assert list(rates) == [pytest.approx(default_rate(setting, 16), rel=1e-5)]


def test_time_is_counted_between_batches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal now
        for _ in range(3):
            now += 100  # reading
            yield torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr("benchmarks.trainer_rows.time.perf_counter", lambda: now)
    batches = TimedBatches(rows())
    for _ in batches:
        now += 1  # training
    batches.stop()
    assert batches.seconds == 3


def test_an_interrupted_command_goes_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainings that the table has are not repeated; the table is then shown."""
    first = small(Setting(tool="mptrain", arch="topk"), steps=10)
    monkeypatch.setattr(compare_trainers, "coders", lambda: iter([first]))
    table = tmp_path / "table.csv"
    options = ["train", str(store), "--stage", "seeds", "--out", str(table)]
    trained: list[Setting] = []

    def counted(setting: Setting, *rest: Any) -> TrainedCoder | None:
        if len(trained) == 2 and not table.with_suffix(".done").exists():
            raise KeyboardInterrupt
        trained.append(setting)
        return own_trainer.train(setting, *rest)

    monkeypatch.setitem(compare_trainers._TRAINERS, "mptrain", counted)
    stopped = CliRunner().invoke(compare_trainers.app, options)
    assert stopped.exit_code == 130
    assert len(read_table(table)) == 2
    table.with_suffix(".done").touch()
    result = CliRunner().invoke(compare_trainers.app, options)
    assert result.exit_code == 0, result.output
    assert len({(s.lr, s.seed) for s in trained}) == len(trained) >= 5
    count = len(trained)
    assert CliRunner().invoke(compare_trainers.app, options).stdout == ""
    assert len(trained) == count
    shown = CliRunner().invoke(compare_trainers.app, ["table", "--out", str(table)])
    assert "| topk | mptrain" in shown.stdout
    assert "| 3 |" in shown.stdout


def test_an_unknown_word_is_refused(store: Path) -> None:
    options = ["train", str(store), "--stage", "search", "--only", "saelens"]
    result = CliRunner().invoke(compare_trainers.app, options)
    assert result.exit_code == 2
    assert "got 'saelens'" in result.stderr
