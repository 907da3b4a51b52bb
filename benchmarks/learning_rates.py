"""Best learning rates of many coders, from which the default rate is fitted.

`python -m benchmarks.learning_rates STORE --work FOLDER --out docs/data/learning_rates.csv` finds
the best rate of each setting below that the table does not have yet, and adds a row for every rate
that was tried. Stop it or kill it: the same command goes on.
"""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.csv_table import append_rows, read_rows
from mpcache.errors import UsageError
from mptrain.config.architectures import Arch
from mptrain.config.coder_grid import FitConfig
from mptrain.config.coder_settings import Optimizer
from mptrain.config.sides import Kind
from mptrain.data.loader import open_store
from mptrain.tuning.tune import TunedSetting, tune

ARCHS: tuple[Arch, ...] = ("mp", "topk")
LAYERS = {"smollm2": "layers.15", "gemma": "layers.9"}
"of other models, by the name of the store"
MAX_NORM = 10.0
(
    "times the median norm, for rows of models other than the demo's: a few rows of SmolLM2 have "
    "170 times the median norm and nearly all of the variance"
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting whose best learning rate is searched; one search trains all its architectures."""

    hookpoint: str = "layers.3"
    kind: Kind = "sae"
    optimizer: Optimizer = "adam"
    latents: int = 1024
    k: int = 16
    batch_rows: int = 256
    steps: int = 500
    seed: int = 0
    nested: bool = False
    normalise: bool = True
    archs: tuple[Arch, ...] = ARCHS

    @property
    def name(self) -> str:
        """A folder name that tells settings apart."""
        return "-".join(str(getattr(self, f.name)) for f in fields(self) if f.name != "archs")


@dataclass(frozen=True, kw_only=True)
class RateRow:
    """A row of the table: one coder at one rate."""

    store: str
    hookpoint: str
    kind: str
    arch: str
    nested: bool
    normalise: bool
    optimizer: str
    width: int
    "of the input"
    latents: int
    k: int
    "without effect on relu, jumprelu and gated"
    batch_rows: int
    steps: int
    seed: int
    lr: float
    fvu: float
    "on the half of the held-out rows that chooses"
    report_fvu: float
    "on the other half"
    l0: float
    dead_share: float
    train_seconds: float


def settings() -> Iterator[Setting]:
    """The design: each factor alone around one base, from important to less so.

    The base is small, so that a factor of 4 on either side of it is still quick. Searches with
    `normalise=False` are of rows as they are, where the targets of the transcoders have about twice
    the deviation of their inputs, as scaled rows have.
    """
    unscaled = Setting(normalise=False)
    mp, topk = replace(unscaled, archs=("mp",)), Setting(archs=("topk",))
    skip = replace(unscaled, hookpoint="layers.3.mlp", kind="skip-transcoder", optimizer="muon")
    changes: list[dict[str, Any]] = [
        *({"steps": steps} for steps in (125, 2000)),
        *({"latents": latents} for latents in (512, 4096)),
        *({"k": k} for k in (4, 64)),
        *({"batch_rows": batch_rows} for batch_rows in (64, 1024)),
    ]
    for own in (mp, topk, skip):
        yield own
        for change in changes:
            yield replace(own, **change)
    demo: dict[str, Any] = {"latents": 2048, "batch_rows": 1024, "steps": 250}
    for hookpoint in ("layers.3", "layers.5", "layers.3.mlp"):
        yield replace(topk, hookpoint=hookpoint, **demo)
    yield replace(topk, k=32)
    for hookpoint in ("layers.3", "layers.3.mlp"):
        yield replace(topk, hookpoint=hookpoint, k=32, **demo)
        yield Setting(hookpoint=hookpoint, archs=("mp",), **demo)
    yield replace(skip, normalise=True, **demo)
    for steps in (125, 500, 2000):
        yield replace(topk, steps=steps, archs=("batch-topk",))
        yield replace(mp, steps=steps, archs=("batch-mp",))
    yield replace(topk, nested=True, archs=("batch-topk",))
    yield replace(skip, kind="transcoder")
    for own in (mp, topk):
        yield replace(own, hookpoint="layers.5")
        for seed in (1, 2):
            yield replace(own, seed=seed)
    yield replace(unscaled, optimizer="muon")
    yield replace(skip, optimizer="adam")
    for steps in (125, 500, 2000):
        yield replace(unscaled, optimizer="signsgd", steps=steps)
    yield replace(skip, normalise=True)


def checks(store: str) -> Iterator[Setting]:
    """Settings outside the fit, on the demo's store or on the store of another model."""
    archs: tuple[Arch, ...] = ("mp", "topk", "batch-topk")
    base = Setting(archs=archs)
    skip = replace(base, kind="skip-transcoder", optimizer="muon")
    if store == "demo":
        skip = replace(skip, hookpoint="layers.3.mlp", archs=ARCHS)
        yield replace(base, k=8)
        yield replace(base, latents=2048, k=64, batch_rows=512, steps=250)
        yield replace(skip, k=8, steps=250)
        yield replace(base, latents=8192, steps=250, archs=ARCHS)
        yield replace(base, batch_rows=64, steps=8000, archs=ARCHS)
        yield replace(skip, latents=8192, steps=250)
        yield replace(skip, batch_rows=64, steps=8000)
    elif store not in LAYERS:
        raise UsageError(f"checks are of a store named demo, {', '.join(LAYERS)}, got {store}")
    else:
        layer = LAYERS[store]
        yield replace(base, hookpoint=layer, steps=250, archs=ARCHS)
        yield replace(skip, hookpoint=f"{layer}.mlp", steps=250, archs=ARCHS)


def missing_archs(setting: Setting, store: str, rows: Sequence[dict[str, str]]) -> tuple[Arch, ...]:
    """The architectures of a setting that the table does not have."""
    shared = {"store": store, **_shared(setting)}
    known = {
        row["arch"]
        for row in rows
        if all(row[name] == str(value) for name, value in shared.items())
    }
    return tuple(arch for arch in setting.archs if arch not in known)


def fit_config(setting: Setting, store: Path, run: Path) -> FitConfig:
    """The run that trains a setting."""
    rows = setting.steps * setting.batch_rows
    return FitConfig(
        store=str(store),
        run=str(run),
        hookpoints=(setting.hookpoint,),
        kind=(setting.kind,),
        arch=setting.archs,
        k=(setting.k,),
        latents=(setting.latents,),
        optimizer=setting.optimizer,
        nested=setting.nested,
        normalise=setting.normalise,
        seed=(setting.seed,),
        rows=rows,
        batch_rows=setting.batch_rows,
        eval_every=setting.steps,
        eval_rows=1024,
        max_norm=None if store.name == "demo" else MAX_NORM,
    )


def table_rows(setting: Setting, store: str, width: int, tuned: TunedSetting) -> list[RateRow]:
    """A row for each rate that was tried."""
    shared = _shared(setting)
    return [
        RateRow(
            **shared,
            store=store,
            arch=tuned.coder.arch,
            width=width,
            lr=trial.value,
            fvu=trial.choice_fvu,
            report_fvu=trial.report_fvu,
            l0=trial.l0,
            dead_share=trial.dead_share,
            train_seconds=round(trial.train_seconds, 2),
        )
        for trial in tuned.trials
    ]


def _shared(setting: Setting) -> dict[str, Any]:
    """What all architectures of a setting have in common."""
    return {name: value for name, value in asdict(setting).items() if name != "archs"}


def search(setting: Setting, store: Path, work: Path, table: Path) -> None:
    """Find the best rates of a setting, and add them to the table."""
    archs = missing_archs(setting, store.name, read_rows(table))
    if not archs:
        return
    run = work / setting.name
    started = time.monotonic()
    searches = tune(fit_config(replace(setting, archs=archs), store, run))
    rows = [
        row
        for tuned in searches
        for row in table_rows(setting, store.name, _width(store, tuned), tuned)
    ]
    append_rows(table, rows)
    shutil.rmtree(run)
    best = ", ".join(f"{t.coder.arch} {t.best.value:g}: {t.best.report_fvu:.4f}" for t in searches)
    typer.echo(f"{setting.name}: {best} ({time.monotonic() - started:.0f} s)")


def _width(store: Path, tuned: TunedSetting) -> int:
    return open_store(store).width(*tuned.coder.input)


def main(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="store to train on")],
    work: Annotated[Path, typer.Option(help="folder for runs; a finished run is deleted")],
    out: Annotated[Path, typer.Option(help="table to extend, a CSV file")],
    check: Annotated[
        bool, typer.Option("--check", help="search settings outside the fit instead")
    ] = False,
    hours: Annotated[float, typer.Option(help="begin no search after this time")] = math.inf,
) -> None:
    """Find the best learning rates of all settings that the table does not have."""
    started = time.monotonic()
    for setting in checks(store.name) if check else settings():
        if time.monotonic() - started > 3600 * hours:
            break
        search(setting, store, work, out)


if __name__ == "__main__":
    typer.run(main)
