"""Rules of the best learning rate, fitted to the table of `benchmarks.learning_rates`.

`python -m benchmarks.learning_rate_rule docs/data/learning_rates.csv --figure FILE.png`
prints the constants of `mptrain.training.learning_rate`, how far the rule is from each optimum, and
what that costs in FVU, and draws the figure.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.csv_table import read_rows
from mptrain.config.architectures import ARCHITECTURES, Arch
from mptrain.config.coder_settings import Optimizer
from mptrain.config.sides import Kind
from mptrain.training.learning_rate import (
    REFERENCE,
    RuleKey,
    counted_k,
    encoder_class,
    family_of,
)

FACTORS = ("latents", "k", "batch_rows", "steps", "without_skip")
("what the rule is a power of; without_skip is e for transcoders without a skip and 1 for others")
NEAR = 2.1
"rates within this factor of the best one determine the optimum"
PUBLISHED: Mapping[str, Sequence[tuple[str, Callable[[float], float], str]]] = {
    "adam": (
        ("2e-4 / sqrt(latents / 2^14)", lambda latents: 2e-4 * (latents / 2**14) ** -0.5, "x"),
        ("SAELens: 3e-4", lambda _: 3e-4, "+"),
    ),
    "muon": (("sparsify: 2e-3", lambda _: 2e-3, "x"),),
    "signsgd": (
        ("5e-3 / sqrt(latents / 2^14)", lambda latents: 5e-3 * (latents / 2**14) ** -0.5, "x"),
    ),
}
"rules in the number of latents: name, rule, marker"
_COLUMNS = ("latents", "k", "batch_rows", "steps")


@dataclass(frozen=True, kw_only=True)
class SearchedCoder:
    """A coder whose rate was searched."""

    setting: Mapping[str, str]
    "a row of the table"

    @property
    def arch(self) -> Arch:
        """The architecture, whose coders share a constant."""
        return cast(Arch, self.setting["arch"])

    @property
    def group(self) -> RuleKey:
        """The coders that share a rule."""
        family = family_of(cast(Kind, self.setting["kind"]))
        return cast(Optimizer, self.setting["optimizer"]), family, encoder_class(self.arch)

    @property
    def is_nested(self) -> bool:
        """Whether it is Matryoshka, whose loss is another."""
        return self.setting["nested"] == "True"

    @property
    def description(self) -> str:
        """The setting in a line."""
        names = ("arch", "kind", "optimizer", "store", "hookpoint")
        words = [*(self.setting[name] for name in names), *(["nested"] * self.is_nested)]
        words += ["unscaled"] * (self.setting["normalise"] == "False")
        sizes = [f"{name} {self.setting[name]}" for name in (*_COLUMNS, "seed")]
        return " ".join([*words, *sizes])

    def features(self) -> list[float]:
        """Logarithms of what the rule depends on, relative to the reference."""
        sizes = {name: float(self.setting[name]) for name in _COLUMNS}
        sizes["k"] = counted_k(int(self.setting["k"]), encoder_class(self.arch))
        logs = {name: math.log(size / REFERENCE[name]) for name, size in sizes.items()}
        logs["without_skip"] = float(self.setting["kind"] == "transcoder")
        return [logs[name] for name in FACTORS]


@dataclass(frozen=True, kw_only=True)
class Optimum(SearchedCoder):
    """The best rate of a coder: the lowest point of a parabola through the rates near the best."""

    log_lr: float
    "natural logarithm of the best rate"
    curvature: float
    "second derivative of ln FVU by ln rate at the best rate"

    @property
    def scaled(self) -> float:
        """`log_lr` without the effect of the input's width, which the rule takes as 1 / sqrt."""
        return self.log_lr + 0.5 * math.log(float(self.setting["width"]) / REFERENCE["width"])

    def cost(self, log_lr: float) -> float:
        """Relative increase of FVU at another rate, by the parabola."""
        return math.exp(0.5 * self.curvature * (log_lr - self.log_lr) ** 2) - 1


def read_optima(table: Path) -> list[Optimum]:
    """The optimum of each coder of the table; none where the best rate is at an edge."""
    optima = (optimum_of(rows) for rows in coders_of(table))
    return [optimum for optimum in optima if optimum is not None]


def coders_of(table: Path) -> list[list[dict[str, str]]]:
    """The rows of each coder of the table."""
    coders: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    names = (
        "store",
        "hookpoint",
        "kind",
        "arch",
        "nested",
        "normalise",
        "optimizer",
        *_COLUMNS,
        "seed",
    )
    for row in read_rows(table):
        coders[tuple(row[name] for name in names)].append(row)
    return list(coders.values())


def optimum_of(rows: Sequence[Mapping[str, str]]) -> Optimum | None:
    """The optimum of one coder from its tried rates; None where the best is at an edge."""
    points = sorted((math.log(float(row["lr"])), math.log(float(row["fvu"]))) for row in rows)
    best = min(range(len(points)), key=lambda i: points[i][1])
    if best in (0, len(points) - 1) or not math.isfinite(points[best + 1][1]):
        return None
    x, y = np.array([p for p in points if abs(p[0] - points[best][0]) < math.log(NEAR)]).T
    a, b, _ = np.polyfit(x, y, 2)
    return Optimum(setting=rows[0], log_lr=-b / (2 * a), curvature=2 * a)


@dataclass(frozen=True)
class FittedRule:
    """`lr = constant[arch] * product of factor ** exponent`, all relative to the reference."""

    exponents: Mapping[str, float]
    constants: Mapping[Arch, float]

    def log_lr(self, coder: SearchedCoder) -> float:
        """Natural logarithm of the rate of a coder."""
        value = math.log(self.constants[coder.arch])
        value += sum(
            self.exponents[name] * x for name, x in zip(FACTORS, coder.features(), strict=True)
        )
        return value - 0.5 * math.log(float(coder.setting["width"]) / REFERENCE["width"])


def fit_rule(optima: Sequence[Optimum]) -> FittedRule:
    """Least squares in logarithms, weighted by curvature: the rule of the least mean cost.

    Exponents are shared by all architectures, and each has a constant.
    """
    archs = sorted({optimum.arch for optimum in optima})
    rows = [
        [*optimum.features(), *(float(optimum.arch == arch) for arch in archs)]
        for optimum in optima
    ]
    weights = np.sqrt([optimum.curvature for optimum in optima])
    rates = np.array([optimum.scaled for optimum in optima])
    solution, *_ = np.linalg.lstsq(weights[:, None] * np.array(rows), weights * rates, rcond=None)
    exponents = dict(zip(FACTORS, map(float, solution), strict=False))
    constants = {
        arch: math.exp(value) for arch, value in zip(archs, solution[len(FACTORS) :], strict=True)
    }
    return FittedRule(exponents, constants)


def fit_rules(optima: Sequence[Optimum]) -> dict[RuleKey, FittedRule]:
    """A rule for each group of coders that has searches of every factor."""
    groups: dict[RuleKey, list[Optimum]] = defaultdict(list)
    for optimum in optima:
        groups[optimum.group].append(optimum)
    rules = {
        group: fit_rule([optimum for optimum in own if not optimum.is_nested])
        for group, own in groups.items()
        if all(len({o.setting[name] for o in own}) > 1 for name in _COLUMNS)
    }
    return dict(sorted(rules.items()))


def draw(optima: Sequence[Optimum], rules: Mapping[RuleKey, FittedRule], path: Path) -> None:
    """Draw each best rate over the rate of the rule, and the rates of published rules."""
    columns = math.ceil(len(rules) / 2)
    figure = Figure((4.4 * columns, 8.4), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False).T.flatten()
    for ax, (group, rule) in zip(axes, rules.items(), strict=False):
        _draw_group(ax, group, [o for o in optima if o.group == group], rule)
    figure.savefig(path, dpi=150)


def _draw_group(ax: Axes, group: RuleKey, optima: Sequence[Optimum], rule: FittedRule) -> None:
    for arch in rule.constants:
        own = [optimum for optimum in optima if optimum.arch == arch]
        x = [math.exp(rule.log_lr(optimum)) for optimum in own]
        y = [math.exp(optimum.log_lr) for optimum in own]
        architecture = ARCHITECTURES[arch]
        ax.loglog(x, y, "o", color=architecture.color, label=architecture.label, markersize=5)
    ends = [math.exp(edge(map(rule.log_lr, optima))) for edge in (min, max)]
    ax.loglog(ends, ends, color="#444444", linewidth=0.8, label="rule")
    by_rule = [math.exp(rule.log_lr(optimum)) for optimum in optima]
    for name, published, marker in PUBLISHED[group[0]]:
        rates = [published(float(optimum.setting["latents"])) for optimum in optima]
        ax.loglog(by_rule, rates, marker, color="#9a9a9a", label=name, markersize=5)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    ax.set_title(", ".join(group), fontsize=9)
    ax.set_xlabel("peak learning rate by the rule")
    ax.set_ylabel("best peak learning rate")
    ax.legend(frameon=False, fontsize=7)


def main(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="table of tried rates (CSV)")],
    figure: Annotated[Path, typer.Option(help="figure to write (PNG)")],
    check: Annotated[Path | None, typer.Option(help="table of settings outside the fit")] = None,
) -> None:
    """Fit the rules, and print their constants and their errors."""
    optima = read_optima(table)
    rules = fit_rules(optima)
    for group, rule in rules.items():
        exponents = ", ".join(f"{name} {value:.3f}" for name, value in rule.exponents.items())
        typer.echo(f"{' '.join(group)}: exponents {exponents}")
        for arch, value in rule.constants.items():
            typer.echo(f"  {arch:12s} {value:.4g}")
    for optimum in optima:
        if optimum.group in rules and optimum.arch in rules[optimum.group].constants:
            typer.echo(_compared(optimum, rules[optimum.group]))
        else:
            rate = math.exp(optimum.log_lr)
            typer.echo(f"{optimum.description}: best {rate:.4g}")
    draw(optima, rules, figure)
    for rows in coders_of(check) if check else ():
        typer.echo(f"outside the fit: {_checked(rows, rules)}")


def _compared(optimum: Optimum, rule: FittedRule) -> str:
    """One optimum beside the rule, and what the rule costs there."""
    by_rule = rule.log_lr(optimum)
    rates = f"best {math.exp(optimum.log_lr):.4g}, rule {math.exp(by_rule):.4g}"
    return f"{optimum.description}: {rates}, FVU +{optimum.cost(by_rule):.1%}"


def _checked(rows: Sequence[Mapping[str, str]], rules: Mapping[RuleKey, FittedRule]) -> str:
    """The rule on one coder: how far its FVU is above the best that was tried.

    The FVU at the rate of the rule is interpolated between the rates that were tried.
    """
    coder = SearchedCoder(setting=rows[0])
    by_rule = rules[coder.group].log_lr(coder)
    points = sorted((math.log(float(row["lr"])), float(row["fvu"])) for row in rows)
    rates, fvus = zip(*points, strict=True)
    best_rate, best_fvu = min(points, key=lambda point: point[1])
    cost = float(np.interp(by_rule, rates, fvus)) / best_fvu - 1
    text = f"best of those tried {math.exp(best_rate):.4g}, rule {math.exp(by_rule):.4g}"
    outside = "" if rates[0] <= by_rule <= rates[-1] else ", outside the rates that were tried"
    return f"{coder.description}: {text}, FVU +{cost:.1%}{outside}"


if __name__ == "__main__":
    typer.run(main)
