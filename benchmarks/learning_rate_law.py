"""The law of the best learning rate, fitted to the table of `benchmarks.learning_rates`.

`python -m benchmarks.learning_rate_law docs/data/learning_rates.csv --figure FILE.png`
prints the constants of `mptrain.training.learning_rate`, how far the law is from each optimum, and
what that costs in FVU, and draws the figure.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.csv_table import read_rows
from mptrain.config.architectures import ARCHITECTURES, Arch
from mptrain.training.learning_rate import REFERENCE

FACTORS = ("latents", "k_pursuit", "k_linear", "batch_rows", "steps")
"what the law is a power of; K has another exponent for pursuits than for linear encoders"
_SPARSIFY_MUON = 2e-3
_COLUMNS = ("latents", "k", "batch_rows", "steps")


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best rate of a coder: the lowest point of a parabola through the best three rates."""

    setting: Mapping[str, str]
    log_lr: float
    "natural logarithm of the best rate"
    curvature: float
    "second derivative of ln FVU by ln rate at the best rate"

    @property
    def arch(self) -> Arch:
        """The architecture, whose coders share a constant."""
        return cast(Arch, self.setting["arch"])

    def features(self) -> list[float]:
        """Logarithms of what the law depends on, relative to the reference."""
        logs = {name: math.log(float(self.setting[name]) / REFERENCE[name]) for name in _COLUMNS}
        is_pursuit = ARCHITECTURES[self.arch].is_pursuit
        logs |= {"k_pursuit": logs["k"] * is_pursuit, "k_linear": logs["k"] * (not is_pursuit)}
        return [logs[name] for name in FACTORS]

    @property
    def scaled(self) -> float:
        """`log_lr` without the effect of the input's width, which the law takes as 1 / sqrt."""
        return self.log_lr + 0.5 * math.log(float(self.setting["width"]) / REFERENCE["width"])

    def cost(self, log_lr: float) -> float:
        """Relative increase of FVU at another rate, by the parabola."""
        return math.exp(0.5 * self.curvature * (log_lr - self.log_lr) ** 2) - 1


def read_optima(table: Path) -> list[Optimum]:
    """The optimum of each coder of the table; none where the best rate is at an edge."""
    coders: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    names = ("store", "hookpoint", "kind", "arch", "nested", "optimizer", *_COLUMNS, "seed")
    for row in read_rows(table):
        coders[tuple(row[name] for name in names)].append(row)
    optima = (optimum_of(rows) for rows in coders.values())
    return [optimum for optimum in optima if optimum is not None]


def optimum_of(rows: Sequence[Mapping[str, str]]) -> Optimum | None:
    """The optimum of one coder from its tried rates; None where the best is at an edge."""
    points = sorted((math.log(float(row["lr"])), math.log(float(row["fvu"]))) for row in rows)
    best = min(range(len(points)), key=lambda i: points[i][1])
    if best in (0, len(points) - 1) or not math.isfinite(points[best + 1][1]):
        return None
    x, y = zip(*points[best - 1 : best + 2], strict=True)
    a, b, _ = np.polyfit(x, y, 2)
    return Optimum(setting=rows[0], log_lr=-b / (2 * a), curvature=2 * a)


@dataclass(frozen=True)
class Law:
    """`lr = constant[arch] * product of factor ** exponent`, all relative to the reference."""

    exponents: Mapping[str, float]
    constants: Mapping[Arch, float]

    def log_lr(self, optimum: Optimum) -> float:
        value = math.log(self.constants[optimum.arch])
        value += sum(
            self.exponents[name] * x for name, x in zip(FACTORS, optimum.features(), strict=True)
        )
        return value - 0.5 * math.log(float(optimum.setting["width"]) / REFERENCE["width"])


def fit_law(optima: Sequence[Optimum]) -> Law:
    """Least squares in logarithms: exponents shared by all architectures, a constant for each."""
    archs = sorted({optimum.arch for optimum in optima})
    rows = [
        [*optimum.features(), *(float(optimum.arch == arch) for arch in archs)]
        for optimum in optima
    ]
    solution, *_ = np.linalg.lstsq(
        np.array(rows), np.array([optimum.scaled for optimum in optima]), rcond=None
    )
    exponents = dict(zip(FACTORS, map(float, solution), strict=False))
    constants = {
        arch: math.exp(value) for arch, value in zip(archs, solution[len(FACTORS) :], strict=True)
    }
    return Law(exponents, constants)


def fit_laws(optima: Sequence[Optimum]) -> dict[str, Law]:
    """A law for each optimizer."""
    optimizers = sorted({optimum.setting["optimizer"] for optimum in optima})
    return {
        name: fit_law([optimum for optimum in optima if optimum.setting["optimizer"] == name])
        for name in optimizers
    }


def draw(optima: Sequence[Optimum], law: Law, path: Path) -> None:
    """Draw each best rate over the rate of the law, and the fixed rate of sparsify."""
    figure = Figure((4.6, 4.2), layout="constrained")
    ax = figure.subplots()
    for arch in law.constants:
        own = [optimum for optimum in optima if optimum.arch == arch]
        architecture = ARCHITECTURES[arch]
        x, y = (
            [math.exp(v) for v in values]
            for values in (map(law.log_lr, own), (optimum.log_lr for optimum in own))
        )
        ax.loglog(x, y, "o", color=architecture.color, label=architecture.label, markersize=5)
    ends = [math.exp(edge(map(law.log_lr, optima))) for edge in (min, max)]
    ax.loglog(ends, ends, color="#444444", linewidth=0.8, label="law")
    ax.axhline(_SPARSIFY_MUON, color="#9a9a9a", linestyle="--", label="sparsify, for all: 2e-3")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("peak learning rate by the law")
    ax.set_ylabel("best peak learning rate")
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="table of tried rates (CSV)")],
    figure: Annotated[Path, typer.Option(help="figure to write (PNG)")],
) -> None:
    """Fit the law for each optimizer, and print its constants and its errors."""
    optima = read_optima(table)
    laws = fit_laws(optima)
    for optimizer, law in laws.items():
        exponents = ", ".join(f"{name} {value:.3f}" for name, value in law.exponents.items())
        typer.echo(f"{optimizer}: exponents {exponents}")
        for arch, value in law.constants.items():
            typer.echo(f"  {arch:12s} {value:.4g}")
        for optimum in optima:
            if optimum.setting["optimizer"] == optimizer:
                typer.echo("  " + _compared(optimum, law))
    own = [optimum for optimum in optima if optimum.setting["optimizer"] == "muon"]
    draw(own, laws["muon"], figure)


def _compared(optimum: Optimum, law: Law) -> str:
    """One optimum beside the law, and what the law costs there."""
    by_law = law.log_lr(optimum)
    sizes = " ".join(f"{name} {optimum.setting[name]}" for name in _COLUMNS)
    where = f"{optimum.setting['arch']} {optimum.setting['kind']} {optimum.setting['hookpoint']}"
    rates = f"best {math.exp(optimum.log_lr):.4g}, law {math.exp(by_law):.4g}"
    return f"{where:40s} {sizes:50s} {rates}, FVU +{optimum.cost(by_law):.1%}"


if __name__ == "__main__":
    typer.run(main)
