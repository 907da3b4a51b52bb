"""Train the same coders with our trainer, SAELens' and sparsify's on the same rows of a store.

\b
    python -m benchmarks.compare_trainers train STORE --stage search
    python -m benchmarks.compare_trainers train STORE --stage seeds --only sae-lens,topk
    python -m benchmarks.compare_trainers table

Every training is a row of a CSV file. Stop the command or kill it: the same command goes on.
"""

import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, assert_never

import torch
import typer

from benchmarks import own_trainer, saelens_trainer, sparsify_trainer
from benchmarks.csv_table import append_rows
from benchmarks.trainer_rates import default_rate, start_rate
from benchmarks.trainer_report import markdown
from benchmarks.trainer_rows import HeldOut, StoreRows
from benchmarks.trainer_search import best_of_search, in_long_runs, with_all_seeds
from benchmarks.trainer_settings import Setting, Tool, chosen, coders
from benchmarks.trainer_table import TrainingRow, read_table
from mpcli.errors import guarded, run_app
from mptrain.data.loader import open_store

Stage = Literal["search", "seeds", "long"]

_TRAINERS = {
    "mptrain": own_trainer.train,
    "sae-lens": saelens_trainer.train,
    "eai-sparsify": sparsify_trainer.train,
}
_PACKAGES: dict[Tool, str] = {"mptrain": "mpcache"}
_DIVERGED = HeldOut(fvu=float("inf"), report_fvu=float("inf"), l0=0.0, dead_share=1.0)
TABLE = Path("docs/data/trainers.csv")

app = typer.Typer(
    help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


class StoredTrainings:
    """Trainings on a store, each a row of a table; one that the table has is not repeated."""

    def __init__(self, store: Path, table: Path) -> None:
        self._path, self._table = store, table
        self._store = open_store(store)
        # rows of one store, and as many of them, whatever its folder is called
        self._name = f"{self._store.fingerprint[:12]} {len(self._store.planned_parts)} parts"

    def rows(self) -> list[TrainingRow]:
        return [row for row in read_table(self._table) if row.store == self._name]

    def start_rate(self, setting: Setting) -> float:
        return start_rate(setting, self._width(setting))

    def resolved(self, setting: Setting) -> Setting:
        if setting.lr is not None:
            return setting
        return replace(setting, lr=default_rate(setting, self._width(setting)))

    def train(self, setting: Setting) -> TrainingRow:
        resolved = self.resolved(setting)
        known = [row for row in self.rows() if row.setting == resolved]
        if known:
            return known[0]
        row = self._trained(resolved)
        append_rows(self._table, [row])
        typer.echo(
            f"{row.coder}, {row.steps} steps, seed {row.seed}, lr {row.lr:g}"
            f"{'' if row.sparsity is None else f', sparsity {row.sparsity:g}'}: FVU "
            f"{row.report_fvu:.4f}, L0 {row.l0:.1f}, dead {row.dead_share:.2f}, "
            f"{row.train_seconds:.0f} s"
        )
        return row

    def _trained(self, resolved: Setting) -> TrainingRow:
        is_default = resolved == self.resolved(replace(resolved, lr=None))
        # at the default, the tool's own rule has the last word
        setting = replace(resolved, lr=None) if is_default else resolved
        rows = StoreRows(setting, self._store)
        with tempfile.TemporaryDirectory() as work:
            coder = _TRAINERS[setting.tool](setting, rows, self._path, Path(work))
            held_out = _DIVERGED if coder is None else rows.evaluate(coder)
        return TrainingRow(
            **vars(resolved),
            **vars(held_out),
            store=self._name,
            version=version(_PACKAGES.get(setting.tool, setting.tool)),
            rate="default" if is_default else "searched",
            train_seconds=0.0 if coder is None else round(coder.train_seconds, 2),
            threads=torch.get_num_threads(),
        )

    def _width(self, setting: Setting) -> int:
        return StoreRows(setting, self._store).widths[0]


def run_stage(stage: Stage, setting: Setting, trainings: StoredTrainings) -> None:
    """Train what a stage needs of a coder; later stages begin with the search."""
    best = best_of_search(setting, trainings)
    match stage:
        case "search":
            pass
        case "seeds":
            with_all_seeds(best, trainings)
        case "long":
            in_long_runs(best, trainings)
        case _:
            assert_never(stage)


@app.command()
@guarded
def train(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="store to train on")],
    stage: Annotated[Stage, typer.Option(help="search the rate; more seeds; 12 000 steps")],
    out: Annotated[Path, typer.Option(help="table to extend, a CSV file")] = TABLE,
    only: Annotated[
        str, typer.Option(help="tools, architectures and kinds to train, with commas")
    ] = "",
) -> None:
    """Train the coders that the table does not have."""
    trainings = StoredTrainings(store, out)
    words = tuple(word for word in only.split(",") if word)
    for setting in chosen(list(coders()), words):
        run_stage(stage, setting, trainings)


@app.command()
@guarded
def table(out: Annotated[Path, typer.Option(help="table to show, a CSV file")] = TABLE) -> None:
    """Print the table in Markdown."""
    typer.echo(markdown(read_table(out)))


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
