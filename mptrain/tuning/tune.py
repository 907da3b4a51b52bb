"""Train coders at several values of a setting, until the best value has a worse one on each side.

A search runs in rounds. A round is a run of its own, in `RUN/tuning/SETTING-ROUND`: one pass over
the store trains what every coder needs next. Rounds that are finished are not trained again, and
an interrupted round continues bit for bit, as every run does.

The best value is chosen on one half of the held-out parts and reported on the other half.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mpcache.errors import UsageError
from mptrain.config.checks import check_nonempty, check_unique
from mptrain.config.coder import CoderConfig, all_sides, applies_to, inapplicable_message
from mptrain.config.coder_grid import FitConfig
from mptrain.config.run import ListedConfig, RunConfig
from mptrain.data.atomic_files import NONFINITE, json_safe, read_json, write_json
from mptrain.data.loader import Store
from mptrain.data.preflight import common_parts, open_trainable_store
from mptrain.data.ranges_as_text import format_ranges, parse_ranges
from mptrain.evals.evaluate import evaluate_coder
from mptrain.runs.fit import fit
from mptrain.runs.results import CoderResult
from mptrain.runs.run_dir import check_same_run
from mptrain.training.distributed import is_distributed
from mptrain.training.learning_rate import learning_rate
from mptrain.training.setup import train_steps
from mptrain.tuning.bracket import best_position, is_at_edge, next_positions, value_at

FACTORS = {
    "lr": math.sqrt(2),
    "auxk_alpha": 2.0,
    "sparsity_weight": math.sqrt(2),
    "bandwidth": math.sqrt(2),
}
"settings that can be tuned, and the factor between the best value and its neighbours"
_STRIDE = 2  # a search begins with values that are this power of the factor apart


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trained value of a setting."""

    setting: str
    value: float
    position: int
    "the value is the start times the setting's factor to this power"
    round: int
    "in which pass over the store it was trained, from 1"
    folder: str
    "folder of the coder; it was not saved if it diverged"
    diverged: bool
    choice_fvu: float
    "FVU on the half of the held-out rows that chooses; infinite if the coder diverged"
    report_fvu: float
    "FVU on the other half"
    l0: float
    dead_share: float
    "share of latents that were inactive on all held-out rows"
    train_seconds: float


@dataclass(frozen=True, kw_only=True)
class TunedSetting:
    """The search of one setting of one coder."""

    name: str
    "the coder's name without a learning rate"
    coder: CoderConfig
    "the coder at the best value"
    setting: str
    trials: tuple[Trial, ...]
    "in the order of their values"
    best: Trial
    at_edge: bool
    "whether the best value is the lowest or highest that was trained"

    def to_json(self) -> dict[str, Any]:
        """Return the search as plain values."""
        trials = [
            {name: json_safe(value) for name, value in asdict(trial).items()}
            for trial in self.trials
        ]
        return {
            "name": self.name,
            "setting": self.setting,
            "coder": asdict(self.coder),
            "best": self.best.value,
            "at_edge": self.at_edge,
            "trials": trials,
        }


def tune(
    config: FitConfig, settings: tuple[str, ...] = ("lr",), *, quiet: bool = True
) -> list[TunedSetting]:
    """Find the best values of some settings for each coder of a grid, one setting after the other.

    The first pass over the store trains each coder at its own value of the first setting (given
    or default), at half and at twice that value (a quarter and four times for `auxk_alpha`). While
    the best value is at an edge, another pass trains two values beyond it. The last pass trains two
    values between the best one and its neighbours. Later settings are searched at the best values
    of the earlier ones.

    Example:
        >>> from mptrain import FitConfig, tune
        >>> config = FitConfig(
        ...     store="store", run="tuned", hookpoints=("layers.1.mlp",), arch=("topk",), k=(3,),
        ...     expansion=(2,), rows=640, batch_rows=64,
        ... )
        >>> (tuned,) = tune(config, ("lr",))
        >>> min(trial.choice_fvu for trial in tuned.trials) == tuned.best.choice_fvu
        True

    Args:
        config: coders and rows, as for `fit`.
        settings: names in `FACTORS`.
        quiet: whether to show no progress bars on stderr.

    Returns:
        For each coder of the grid, a search for each setting that applies to it.

    Raises:
        UsageError: a setting cannot be tuned, several rates are given, the store has fewer than
            two held-out parts, or torchrun started several processes.
    """
    _check(config, settings)
    store = _open_same_parts(config, quiet)
    coders = {replace(coder, lr=None).name: coder for coder in config.coders()}
    halves = _halves(store, list(coders.values()))
    tuned: list[TunedSetting] = []
    for setting in settings:
        searches = [
            _Search(name, coder, setting, _start(setting, coder, config, store))
            for name, coder in coders.items()
            if _takes(coder, setting)
        ]
        number = 0
        while wanted := [coder for search in searches for coder in search.wanted()]:
            number += 1
            run = round_config(config, Path(config.run) / "tuning" / f"{setting}-{number}", wanted)
            outcomes = _train_round(run, store, halves, quiet)
            for search in searches:
                search.add_(outcomes, number)
        results = [search.result() for search in searches]
        coders.update({s.name: r.coder for s, r in zip(searches, results, strict=True)})
        tuned += results
    write_json(Path(config.run) / "tuning.json", [search.to_json() for search in tuned])
    return tuned


def round_config(config: RunConfig, folder: Path, coders: Sequence[CoderConfig]) -> ListedConfig:
    """A run of these coders in another folder, with the other settings of a run."""
    settings = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    return ListedConfig(**{**settings, "run": str(folder)}, listed=tuple(coders))


class _Search:
    """The search of one setting of one coder."""

    def __init__(self, name: str, coder: CoderConfig, setting: str, start: float) -> None:
        self.name, self.setting = name, setting
        self._coder, self._start = coder, start
        self._trials: dict[int, Trial] = {}

    def wanted(self) -> list[CoderConfig]:
        """The coders to train in the next round; none where the search is over."""
        return [self._coder_at(position) for position in next_positions(self._fvus(), _STRIDE)]

    def add_(self, outcomes: Mapping[str, "_Outcome"], number: int) -> None:
        """Add a round's outcomes, by the name of the coder."""
        for position in next_positions(self._fvus(), _STRIDE):
            coder = self._coder_at(position)
            self._trials[position] = Trial(
                setting=self.setting,
                value=getattr(coder, self.setting),
                position=position,
                round=number,
                **asdict(outcomes[coder.name]),
            )

    def result(self) -> TunedSetting:
        fvus = self._fvus()
        best = best_position(fvus)
        if best is None:
            raise UsageError(
                f"{self.name} diverged at every {self.setting} from {self._value(min(fvus)):g} to "
                f"{self._value(max(fvus)):g}; check the rows of the store with mpcache stats"
            )
        return TunedSetting(
            name=self.name,
            coder=self._coder_at(best),
            setting=self.setting,
            trials=tuple(self._trials[position] for position in sorted(self._trials)),
            best=self._trials[best],
            at_edge=is_at_edge(best, fvus),
        )

    def _fvus(self) -> dict[int, float]:
        return {position: trial.choice_fvu for position, trial in self._trials.items()}

    def _value(self, position: int) -> float:
        return value_at(self._start, FACTORS[self.setting], position)

    def _coder_at(self, position: int) -> CoderConfig:
        changes: dict[str, Any] = {self.setting: self._value(position)}
        return replace(self._coder, **changes)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What a round says of one coder; the fields are those of `Trial`."""

    folder: str
    diverged: bool
    choice_fvu: float
    report_fvu: float
    l0: float
    dead_share: float
    train_seconds: float


def _train_round(
    run: ListedConfig, store: Store, halves: tuple[Sequence[int], Sequence[int]], quiet: bool
) -> dict[str, _Outcome]:
    """Train the coders of a round, if they are not trained yet, and evaluate each on both halves.

    The outcomes are written beside the coders, so that a repeated command reads them.
    """
    file = Path(run.run) / "halves.json"
    known = read_json(file) if file.exists() else {}
    check_same_run(run, store.fingerprint)
    is_finished = {coder.name for coder in run.listed} <= known.keys()
    parts = common_parts(store, all_sides(run.listed))
    for result in () if is_finished else fit(run, quiet=quiet, parts=parts):
        if result.coder not in known:
            outcome = asdict(_outcome(run, result, halves))
            known[result.coder] = {field: json_safe(value) for field, value in outcome.items()}
            write_json(file, known)
    return {
        name: _Outcome(**{field: _number(value) for field, value in outcome.items()})
        for name, outcome in known.items()
    }


def _number(value: Any) -> Any:
    """A value that JSON gives back; it holds an infinite number as text."""
    return float(value) if value in NONFINITE else value


def _outcome(
    run: ListedConfig, result: CoderResult, halves: tuple[Sequence[int], Sequence[int]]
) -> _Outcome:
    folder = Path(run.run) / "coders" / result.coder
    if result.diverged:
        fvus = [math.inf, math.inf]
    elif result.validation is None:
        raise UsageError(
            f"no validation row passes the filters of {result.coder}, so no value can be chosen; "
            "use other filters"
        )
    else:
        fvus = [
            evaluate_coder(
                folder,
                run.store,
                parts=parts,
                device=run.device,
                cache_dir=run.cache_dir,
                cache_bytes=run.cache_bytes,
            )[0].fvu
            for parts in halves
        ]
    return _Outcome(
        folder=str(folder),
        diverged=result.diverged,
        choice_fvu=fvus[0],
        report_fvu=fvus[1],
        l0=result.validation.l0 if result.validation else 0.0,
        dead_share=result.validation.dead_share if result.validation else 1.0,
        train_seconds=result.train_seconds,
    )


def _start(setting: str, coder: CoderConfig, config: FitConfig, store: Store) -> float:
    """The value that a coder has without tuning."""
    if setting == "lr":
        width, steps = store.width(*coder.input), train_steps(config)
        return learning_rate(coder, width, config.batch_rows, steps).value
    return float(getattr(coder, setting))


def _open_same_parts(config: FitConfig, quiet: bool) -> Store:
    """Open the store with the parts that the search began with, also if it has grown since."""
    file = Path(config.run) / "tuning" / "parts.json"
    began_with = parse_ranges(read_json(file)) if file.exists() else None
    store = open_trainable_store(config, all_sides(config.coders()), began_with, quiet=quiet)
    parts = common_parts(store, all_sides(config.coders()))
    if began_with is not None and parts != began_with:
        raise UsageError(
            f"{store.storage} lacks parts {format_ranges(began_with - parts)}, with which the "
            "search began; collect these parts again, or give a new folder with --run"
        )
    if began_with is None:
        _halves(store, config.coders())
        write_json(file, format_ranges(parts))
    return store


def _halves(store: Store, coders: Sequence[CoderConfig]) -> tuple[Sequence[int], Sequence[int]]:
    numbers = [part.number for part in store.parts(all_sides(coders), "validation")]
    if len(numbers) < 2:
        raise UsageError(
            f"tuning needs at least 2 validation parts, one to choose by and one to report, got "
            f"{len(numbers)} in {store.storage}; collect more rows, or use a smaller --part-rows"
        )
    return numbers[0::2], numbers[1::2]


def _check(config: FitConfig, settings: tuple[str, ...]) -> None:
    if is_distributed():
        raise UsageError(
            "tune runs in one process, but torchrun started several; start mptrain without torchrun"
        )
    if (Path(config.run) / "config.json").exists():
        raise UsageError(
            f"{config.run} holds a run that is no search; give a new or empty folder with --run"
        )
    if len(config.lr) > 1:
        rates = ",".join(map(str, config.lr))
        raise UsageError(f"tune starts from one lr, got {rates}; give one of them, or remove tune")
    check_nonempty("tune", settings)
    check_unique("tune", settings)
    for setting in settings:
        if setting not in FACTORS:
            raise UsageError(f"tune must be one of {', '.join(FACTORS)}, got {setting}")
        if setting != "lr" and not getattr(config, setting) > 0:
            raise UsageError(
                f"tune={setting} needs a start above 0, got {setting}={getattr(config, setting)}; "
                "give another start, or remove it"
            )
        if not any(_takes(coder, setting) for coder in config.coders()):
            raise UsageError(
                inapplicable_message(setting, ",".join(config.kind), ",".join(config.arch))
            )


def _takes(coder: CoderConfig, setting: str) -> bool:
    return setting == "lr" or applies_to(setting, coder.kind, coder.arch)
