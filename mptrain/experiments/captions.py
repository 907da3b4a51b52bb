"""What stands beside a figure: its caption, the tables behind it, and its verdicts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mptrain.data.atomic_files import json_safe
from mptrain.experiments.figures import FvuByK, XQuantity
from mptrain.experiments.runs import Trained
from mptrain.experiments.spec import Experiment, FigurePlan
from mptrain.experiments.tables import Row
from mptrain.experiments.verdicts import Coders, Verdict


def caption(
    experiment: Experiment,
    collect: Mapping[str, Any],
    plan: FigurePlan,
    coders: Coders,
    hardware: Sequence[str],
    x_quantity: XQuantity,
) -> str:
    """What the figure is of, in words; what its time holds, and what it does not."""
    shown = [one for _, one in _shown(plan, coders)]
    fit = experiment.fit
    what = (
        f"{collect['model']} on {collect['dataset']}; trained on {fit['rows']:,} rows in batches "
        f"of {fit['batch_rows']:,}"
    )
    return ". ".join(
        [what, _how(plan, shown), _seeds(plan), *_where(x_quantity, fit, shown, hardware)]
    )


def point_rows(plan: FigurePlan, coders: Coders) -> list[Row]:
    """A row for each validation of each coder of the figure."""
    return [
        {**place, **{name: json_safe(value) for name, value in asdict(record).items()}}
        for place, one in _shown(plan, coders)
        for record in one.records
        if record.validation_fvu is not None
    ]


def other_k_rows(plan: FigurePlan, coders: Coders, fvu_by_k: FvuByK) -> list[Row]:
    """A row for each K at which a coder of the figure was evaluated."""
    return [
        {**place, "coder": one.config.name, "evaluated_k": k, "fvu": json_safe(fvu)}
        for place, one in _shown(plan, coders)
        for k, fvu in fvu_by_k.get(one.config.name, {}).items()
    ]


def page(plan: FigurePlan, pictures: Sequence[tuple[str, str]], verdicts: Sequence[Verdict]) -> str:
    """Markdown of a figure: pictures (file, caption), then a table of its verdicts."""
    title = plan.table.title or plan.name
    shown = [f"![{title}]({file})\n\n{text}.\n" for file, text in pictures]
    return "\n".join([f"# {title}\n", *shown, _verdict_table(verdicts)])


def _verdict_table(verdicts: Sequence[Verdict]) -> str:
    head = (
        "| panel | variant | FVU | lowest to highest | L0 | dead | train s "
        "| FVU at plain coder's train s | passes below plain coder after |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(_verdict_line(one) for one in verdicts)


def _verdict_line(one: Verdict) -> str:
    spread = "-" if one.fvu_low is None else f"{one.fvu_low:.4f} to {one.fvu_high:.4f}"
    diverged = f" ({one.diverged} of {one.seeds} diverged)" if one.diverged else ""
    cells = [
        one.panel.partition("/")[2],
        one.variant + diverged,
        _number(one.fvu, ".4f"),
        spread,
        _number(one.l0, ".1f"),
        _number(one.dead_share, ".3f"),
        _number(one.train_seconds, ".1f"),
        _number(one.fvu_at_plain_seconds, ".4f"),
        passing(one),
    ]
    return f"| {' | '.join(cells)} |\n"


def passing(one: Verdict) -> str:
    """After how long a line passes below the plain coder, in words."""
    if one.seeds_below_plain is None:
        return "-"
    if one.below_plain_after_seconds is None:
        return "never"
    some = "" if one.seeds_below_plain == one.seeds else f" ({one.seeds_below_plain} seeds)"
    return f"{one.below_plain_after_seconds:.1f} s{some}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _shown(plan: FigurePlan, coders: Coders) -> Iterator[tuple[Row, Trained]]:
    """The figure's coders, each with its place in it."""
    for panel in plan.panels:
        for line in panel.lines:
            for config in line.coders:
                if config.name in coders:
                    place = {
                        "panel": panel.name,
                        "hookpoint": panel.hookpoint,
                        "kind": panel.kind,
                        "k": panel.k,
                        "variant": line.variant.name,
                        "seed": config.seed,
                    }
                    yield place, coders[config.name]


def _how(plan: FigurePlan, shown: Sequence[Trained]) -> str:
    latents = sorted({one.latents for one in shown if one.latents is not None})
    optimizers = dict.fromkeys(one.config.optimizer for one in shown)
    lrs = dict.fromkeys(one.config.lr for one in shown)
    rates = ["default lr" if lr is None else f"lr {lr:g}" for lr in lrs]
    counts = " or ".join(f"{count:,}" for count in latents) or "unknown"
    return f"{counts} latents, {' or '.join(optimizers)}, {' or '.join(rates)}"


def _seeds(plan: FigurePlan) -> str:
    seeds = plan.table.seeds
    if len(seeds) == 1:
        return f"One seed ({seeds[0]})"
    return f"{len(seeds)} seeds: line their mean, band from lowest to highest"


def _where(
    x_quantity: XQuantity, fit: Mapping[str, Any], shown: Sequence[Trained], hardware: Sequence[str]
) -> Iterator[str]:
    there = [one.validation["rows"] for one in shown if one.validation is not None]
    rows = min(fit["eval_rows"], max(there, default=fit["eval_rows"]))
    what = "FVU of the trained coders" if x_quantity == "other-k" else "FVU"
    yield f"{what} on {rows:,} held-out rows"
    if x_quantity == "time":
        lasts = [(one.folder, one.records[-1]) for one in shown if one.records]
        waited, validated = (
            sum(max(getattr(last, name) for at, last in lasts if at == run) for run in runs)
            for runs in [{folder for folder, _ in lasts}]
            for name in ("wait_seconds", "validation_seconds")
        )
        yield (
            "Train time is that of the coder's own train steps; waiting for data took "
            f"{waited:,.0f} s and validation {validated:,.0f} s of the whole run, beside it"
        )
    yield f"Hardware: {'; '.join(hardware)}"
