"""Optimizers, warm-ups and remedies for dead latents, each at its best learning rate.

`python -m benchmarks.coder_options train STORE --work FOLDER --out TABLE` trains what the table
docs/data/coder_options.csv does not have yet; `python -m benchmarks.coder_options table TABLE`
prints each variant at its best rate. Stop it or kill it: the same command goes on.
"""

import itertools
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.csv_table import append_rows, read_rows
from mptrain.config.architectures import Arch
from mptrain.config.coder import CoderConfig
from mptrain.config.run import ListedConfig
from mptrain.config.sides import Kind
from mptrain.runs.fit import fit

LATENTS, K, BATCH_ROWS = 1024, 16, 512
_SIDES = {
    "sae": ("layers.3:output",) * 2,
    "skip-transcoder": ("layers.3.mlp:input", "layers.3.mlp:output"),
}
_RATES: dict[tuple[Arch, int], tuple[float, ...]] = {  # of an architecture and a number of steps
    ("topk", 250): (8e-3, 1.6e-2, 3.2e-2),
    ("mp", 250): (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    ("topk", 1000): (4e-3, 8e-3, 1.6e-2),
    ("mp", 1000): (8e-3, 1.6e-2, 3.2e-2),
}
_NO_AUXK = {"auxk_alpha": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "muon": {"optimizer": "muon"},
    "adam, warm-up .02, no AuxK": {"optimizer": "adam", "warmup_share": 0.02, **_NO_AUXK},
    "adam, no AuxK": {"optimizer": "adam", **_NO_AUXK},
    "adam, warm-up .02": {"optimizer": "adam", "warmup_share": 0.02},
    "adam, warm-up .3": {"optimizer": "adam", "warmup_share": 0.3},
    "adam, AuxK 1/32": {"optimizer": "adam", "auxk_alpha": 1 / 32},
    "adam, AuxK 1/2": {"optimizer": "adam", "auxk_alpha": 0.5},
    "adam, dead after 1/8 of the rows": {"optimizer": "adam", "dead_rows": 250 * BATCH_ROWS // 8},
    "adam, K from 2 K in half of the steps": {
        "optimizer": "adam",
        "k_factor": 2.0,
        "k_decay_share": 0.5,
    },
    "adam, start at the median": {"optimizer": "adam", "start": "median"},
    "muon, no AuxK": {"optimizer": "muon", **_NO_AUXK},
    "muon, warm-up .2": {"optimizer": "muon", "warmup_share": 0.2},
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training of the comparison; `changes` are those of the defaults of a coder."""

    variant: str
    kind: Kind
    arch: Arch
    steps: int
    lr: float
    changes: Mapping[str, Any] = field(default_factory=dict)

    def coder(self) -> CoderConfig:
        source, target = _SIDES[self.kind]
        return CoderConfig(
            inputs=(source,), targets=(target,), kind=self.kind, arch=self.arch, k=K,
            latents=LATENTS, lr=self.lr, **self.changes,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OptionRow:
    """A row of the table."""

    variant: str
    kind: str
    arch: str
    steps: int
    lr: float
    fvu: float
    "on all held-out rows"
    dead_share: float
    "of latents, on all held-out rows"
    train_seconds: float


def trainings() -> Iterator[Training]:
    """All variants for TopK, which loses latents; the optimizers for MP and for transcoders."""
    yield from _each("sae", "topk", 250, list(VARIANTS))
    optimizers = ["adam", "muon", "adam, warm-up .02", "adam, warm-up .3", "muon, warm-up .2"]
    yield from _each("sae", "mp", 250, optimizers)
    transcoders = ["adam", "muon", "muon, no AuxK", "adam, warm-up .3"]
    yield from _each("skip-transcoder", "topk", 250, transcoders)
    yield from _each("skip-transcoder", "mp", 250, transcoders)
    yield from _each("sae", "topk", 1000, ["adam", "adam, no AuxK", "muon"])
    yield from _each("sae", "mp", 1000, ["adam", "muon"])


def _each(kind: Kind, arch: Arch, steps: int, variants: Sequence[str]) -> Iterator[Training]:
    for variant, lr in itertools.product(variants, _RATES[arch, steps]):
        changes = VARIANTS[variant]
        yield Training(variant=variant, kind=kind, arch=arch, steps=steps, lr=lr, changes=changes)


def train(training: Training, store: Path, work: Path) -> OptionRow:
    """Train a coder in a folder that is deleted afterwards."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    config = ListedConfig(
        store=str(store), run=str(run), listed=(training.coder(),),
        rows=training.steps * BATCH_ROWS, batch_rows=BATCH_ROWS,
        eval_every=training.steps, eval_rows=1024,
    )  # fmt: skip
    (result,) = fit(config)
    shutil.rmtree(run)
    evaluation = result.validation
    return OptionRow(
        variant=training.variant, kind=training.kind, arch=training.arch, steps=training.steps,
        lr=training.lr, fvu=evaluation.fvu if evaluation else float("nan"),
        dead_share=evaluation.dead_share if evaluation else 1.0,
        train_seconds=round(result.train_seconds, 2),
    )  # fmt: skip


app = typer.Typer(add_completion=False, help=__doc__)


@app.command("train")
def train_all(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="the demo's store")],
    work: Annotated[Path, typer.Option(help="folder for runs; a finished run is deleted")],
    out: Annotated[Path, typer.Option(help="table to extend, a CSV file")],
) -> None:
    """Train what the table does not have."""
    for training in trainings():
        key = (
            training.variant,
            training.kind,
            training.arch,
            str(training.steps),
            str(training.lr),
        )
        known = {(r["variant"], r["kind"], r["arch"], r["steps"], r["lr"]) for r in read_rows(out)}
        if key not in known:
            row = train(training, store, work)
            append_rows(out, [row])
            typer.echo(f"{' '.join(key)}: FVU {row.fvu:.4f}, dead {row.dead_share:.3f}")


@app.command("table")
def print_table(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="table of trainings (CSV)")],
) -> None:
    """Print each variant at its best rate, as Markdown."""
    variants: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in read_rows(table):
        variants[row["kind"], row["arch"], row["steps"], row["variant"]].append(row)
    typer.echo("| coder | steps | variant | best rate | FVU | dead |\n|---|---|---|---|---|---|")
    for (kind, arch, steps, variant), rows in variants.items():
        best = min(rows, key=lambda row: float(row["fvu"]))
        rates = sorted(float(row["lr"]) for row in rows)
        edge = " (edge)" if float(best["lr"]) in (rates[0], rates[-1]) else ""
        typer.echo(
            f"| {arch} {kind} | {steps} | {variant} | {float(best['lr']):g}{edge} "
            f"| {float(best['fvu']):.4f} | {float(best['dead_share']):.3f} |"
        )


if __name__ == "__main__":
    app()
