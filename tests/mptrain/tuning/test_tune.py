"""A search trains each value once, survives interruptions, and chooses on half of the rows."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mpcache.errors import UsageError
from mptrain.config.coder_grid import FitConfig
from mptrain.config.run import ListedConfig
from mptrain.data.loader import open_store
from mptrain.evals.evaluate import evaluate_coder
from mptrain.runs.fit import fit
from mptrain.runs.results import CoderResult
from mptrain.tuning import tune as tune_module
from mptrain.tuning.tune import TunedSetting, tune
from tests.helpers.fits import config, interrupt_at, weights
from tests.helpers.stores import small_store

SETTINGS = ("lr", "auxk_alpha")


def small(store: str, run: Path, **changes: Any) -> FitConfig:
    return config(store, run, **{"kind": ("sae",), "rows": 64 * 8, "lr": (0.1,), **changes})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("tune"))[0])


@pytest.fixture(scope="module")
def tuned(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TunedSetting]]:
    run = tmp_path_factory.mktemp("tuned") / "run"
    return run, tune(small(store, run), SETTINGS)


def without_times(run: Path) -> list[dict[str, Any]]:
    """The content of tuning.json, but for times and where the run lies."""
    tuned = json.loads((run / "tuning.json").read_text())
    for trial in (trial for search in tuned for trial in search["trials"]):
        del trial["train_seconds"]
        trial["folder"] = str(Path(trial["folder"]).relative_to(run))
    return tuned


def test_each_coder_has_its_own_search(tuned: tuple[Path, list[TunedSetting]]) -> None:
    """First the rate, then the loss for dead latents at the best rate."""
    searches = tuned[1]
    assert [(s.coder.arch, s.setting) for s in searches] == [
        (arch, setting) for setting in SETTINGS for arch in ("mp", "topk")
    ]
    for search in searches:
        values = [trial.value for trial in search.trials]
        assert values == sorted(values)
        assert getattr(search.coder, search.setting) == search.best.value
        assert search.best.choice_fvu == min(trial.choice_fvu for trial in search.trials)
        assert search.at_edge == (search.best in (search.trials[0], search.trials[-1]))
        factor = {"lr": math.sqrt(2), "auxk_alpha": 2}[search.setting]
        best = values.index(search.best.value)
        steps = [math.log(high / low, factor) for low, high in itertools.pairwise(values)]
        assert steps == pytest.approx([round(step) for step in steps], abs=1e-4)
        assert {round(step) for step in steps} <= {1, 2}
        if not search.at_edge:
            assert steps[best - 1 : best + 1] == pytest.approx([1, 1], abs=1e-4)
    rates = {s.coder.name.split("-auxk")[0]: s.best.value for s in searches if s.setting == "lr"}
    later = [s.coder for s in searches if s.setting == "auxk_alpha"]
    assert [coder.lr for coder in later] == list(rates.values())


def test_rows_that_choose_are_not_those_that_report(
    tuned: tuple[Path, list[TunedSetting]], store: str
) -> None:
    best = tuned[1][0].best
    sides = [tuned[1][0].coder.input]
    held_out = [part.number for part in open_store(store).parts(sides, "validation")]
    choice, report = (
        evaluate_coder(best.folder, store, parts=parts)[0]
        for parts in (held_out[0::2], held_out[1::2])
    )
    assert (best.choice_fvu, best.report_fvu) == (choice.fvu, report.fvu)
    assert choice.rows + report.rows == evaluate_coder(best.folder, store)[0].rows


def test_a_finished_search_trains_nothing_again(
    tuned: tuple[Path, list[TunedSetting]], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, searches = tuned
    monkeypatch.setattr("mptrain.runs.train_loop.TrainLoop.run", None)
    assert tune(small(store, run), SETTINGS) == searches


def test_interrupted_equals_uninterrupted(
    tuned: tuple[Path, list[TunedSetting]],
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted in each round, once within its training and once before its evaluation."""
    run, real_fit = tmp_path / "run", tune_module.fit
    starts: dict[str, int] = {}

    def fit_that_is_interrupted(round_config: ListedConfig, **options: Any) -> list[CoderResult]:
        name = round_config.run
        starts[name] = starts.get(name, 0) + 1
        if starts[name] == 1:
            real_fit(round_config, **options, on_step=interrupt_at(7))
        results = real_fit(round_config, **options)
        if starts[name] == 2:
            raise KeyboardInterrupt
        return results

    monkeypatch.setattr(tune_module, "fit", fit_that_is_interrupted)
    for _ in range(100):
        try:
            tune(small(store, run), SETTINGS)
        except KeyboardInterrupt:
            continue
        break
    assert set(starts.values()) == {3}
    assert without_times(run) == without_times(tuned[0])
    for folder in (tuned[0] / "tuning").iterdir():
        again = weights(run / "tuning" / folder.name)
        assert again.keys() == weights(folder).keys()
        assert all((again[name] == tensor).all() for name, tensor in weights(folder).items())


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (("k",), {}, "tune must be one of lr, auxk_alpha, sparsity_weight, bandwidth, got k"),
        ((), {}, "tune is empty"),
        (("lr", "lr"), {}, "tune must have each value only once"),
        (("lr",), {"lr": (0.1, 0.2)}, "tune starts from one lr, got 0.1,0.2"),
        (("auxk_alpha",), {"lr": (0.1, 0.2)}, "tune starts from one lr, got 0.1,0.2"),
        (("auxk_alpha",), {"auxk_alpha": 0.0}, "tune=auxk_alpha needs a start above 0"),
        (("sparsity_weight",), {}, "sparsity_weight has no effect on kind=sae with arch=mp,topk"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(
    store: str,
    tmp_path: Path,
    settings: tuple[str, ...],
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        tune(small(store, tmp_path / "run", **changes), settings)
    assert not (tmp_path / "run").exists()


def test_one_held_out_part_is_too_few(tmp_path: Path) -> None:
    store, _ = small_store(tmp_path, rows=700)
    with pytest.raises(UsageError, match="at least 2 validation parts"):
        tune(small(str(store), tmp_path / "run"))


def test_several_processes_are_refused(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    with pytest.raises(UsageError, match="tune runs in one process"):
        tune(small(store, tmp_path / "run"))


def test_a_run_is_not_searched_again(store: str, tmp_path: Path) -> None:
    fit(small(store, tmp_path / "run"))
    with pytest.raises(UsageError, match="holds a run that is no search"):
        tune(small(store, tmp_path / "run"))


def test_a_store_that_grows_gives_a_search_the_rows_that_it_began_with(tmp_path: Path) -> None:
    path = str(small_store(tmp_path)[0])
    grown, once = tmp_path / "grown", tmp_path / "once"
    tune(small(path, once, arch=("topk",)))
    real_fit = tune_module.fit

    def fit_and_stop(round_config: ListedConfig, **options: Any) -> list[CoderResult]:
        real_fit(round_config, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_module, "fit", fit_and_stop)
        with pytest.raises(KeyboardInterrupt):
            tune(small(path, grown, arch=("topk",)))
    small_store(tmp_path, rows=3000)
    tune(small(path, grown, arch=("topk",)))
    assert without_times(grown) == without_times(once)
