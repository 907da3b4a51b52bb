"""The text beside a figure: caption, rows of its tables, and the page with its verdicts."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from mptrain.data.atomic_files import json_safe
from mptrain.experiments.ahead import describe_lead
from mptrain.experiments.figures import FvuByK, XQuantity
from mptrain.experiments.runs import TrainedCoder
from mptrain.experiments.spec import Experiment, FigurePlan
from mptrain.experiments.tables import Row
from mptrain.experiments.verdicts import CodersByName, Verdict, panel_verdicts, plain_line
from mptrain.runs.convergence import describe_convergence


def caption(
    experiment: Experiment,
    plan: FigurePlan,
    coders: CodersByName,
    hardware: Sequence[str],
    x_quantity: XQuantity,
) -> str:
    """What a figure shows, in words: model, data, training, and what its times include."""
    shown = [coder for _, coder in _shown_coders(plan, coders)]
    collect, run = experiment.collect, experiment.run_settings
    subject = (
        f"{collect.get('model', 'unknown model')} on {collect.get('dataset', 'unknown dataset')}; "
        f"trained on {run['rows']:,} rows in batches of {run['batch_rows']:,}"
    )
    evaluation = _evaluation(x_quantity, run["eval_rows"], shown, hardware)
    ends = _ends(plan, shown, coders)
    return ". ".join([subject, _training(shown), _seeds(plan), *evaluation, *ends])


def point_rows(plan: FigurePlan, coders: CodersByName) -> list[Row]:
    """A row for each validation of each coder of the figure."""
    return [
        {**position, **{name: json_safe(value) for name, value in asdict(record).items()}}
        for position, coder in _shown_coders(plan, coders)
        for record in coder.records
        if record.validation_fvu is not None
    ]


def other_k_rows(plan: FigurePlan, coders: CodersByName, fvu_by_k: FvuByK) -> list[Row]:
    """A row for each K at which a coder of the figure was evaluated."""
    return [
        {**position, "coder": coder.config.name, "evaluated_k": k, "fvu": json_safe(fvu)}
        for position, coder in _shown_coders(plan, coders)
        for k, fvu in fvu_by_k.get(coder.config.name, {}).items()
    ]


def page(plan: FigurePlan, pictures: Sequence[tuple[str, str]], verdicts: Sequence[Verdict]) -> str:
    """Markdown page of a figure: pictures (file, caption), then a table of verdicts."""
    title = plan.settings.title or plan.name
    shown = [f"![{title}]({file})\n\n{text}.\n" for file, text in pictures]
    return "\n".join([f"# {title}\n", *shown, _verdict_table(verdicts)])


def _verdict_table(verdicts: Sequence[Verdict]) -> str:
    head = (
        "| panel | variant | FVU | lowest to highest | L0 | dead | train s "
        "| FVU with twice the rows | FVU at plain coder's train s | passes below plain coder after "
        "| stays below it from: share of rows | share of train time |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(_verdict_line(verdict) for verdict in verdicts)


def _verdict_line(verdict: Verdict) -> str:
    spread = "-" if verdict.fvu_low is None else f"{verdict.fvu_low:.4f} to {verdict.fvu_high:.4f}"
    diverged = f" ({verdict.diverged} of {verdict.seeds} diverged)" if verdict.diverged else ""
    cells = [
        verdict.panel.partition("/")[2],
        verdict.variant + diverged,
        _number(verdict.fvu, ".4f"),
        spread,
        _number(verdict.l0, ".1f"),
        _number(verdict.dead_share, ".3f"),
        _number(verdict.train_seconds, ".1f"),
        _gain(verdict),
        _number(verdict.fvu_at_plain_seconds, ".4f"),
        passing_time(verdict),
        _share(verdict.ahead_from_rows_share, verdict.seeds_ahead_by_rows, verdict),
        _share(verdict.ahead_from_seconds_share, verdict.seeds_ahead_by_seconds, verdict),
    ]
    return f"| {' | '.join(cells)} |\n"


def passing_time(verdict: Verdict) -> str:
    """The train time after which a line passes below the plain coder, in words."""
    if verdict.seeds_below_plain is None:
        return "-"
    if verdict.below_plain_after_seconds is None:
        return "never"
    return (
        f"{verdict.below_plain_after_seconds:.1f} s{_of_seeds(verdict.seeds_below_plain, verdict)}"
    )


def _share(share: float | None, seeds: int | None, verdict: Verdict) -> str:
    """The share of the training from which a line stays below the plain coder, in words."""
    if seeds is None:
        return "-"
    if share is None:
        return "never"
    return (f"{share:.0%}" if share else "the start") + _of_seeds(seeds, verdict)


def _of_seeds(seeds: int, verdict: Verdict) -> str:
    return "" if seeds == verdict.seeds else f" ({seeds} of {verdict.seeds} seeds)"


def _gain(verdict: Verdict) -> str:
    """The change of FVU that is extrapolated for twice the rows."""
    if verdict.gain_of_doubling is None:
        return "-"
    return f"{-100 * verdict.gain_of_doubling:+.1f} %"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _shown_coders(plan: FigurePlan, coders: CodersByName) -> Iterator[tuple[Row, TrainedCoder]]:
    """The coders of a figure, each with its panel and line."""
    for panel in plan.panels:
        for line in panel.lines:
            for config in line.coders:
                if config.name in coders:
                    position = {
                        "panel": panel.name,
                        "hookpoint": panel.hookpoint,
                        "kind": panel.kind,
                        "k": panel.k,
                        "variant": line.variant.name,
                        "seed": config.seed,
                    }
                    yield position, coders[config.name]


def _training(shown: Sequence[TrainedCoder]) -> str:
    latents = sorted({coder.latents for coder in shown if coder.latents is not None})
    optimizers = dict.fromkeys(coder.config.resolved_optimizer for coder in shown)
    counts = " or ".join(f"{count:,}" for count in latents) or "unknown"
    return f"{counts} latents, {' or '.join(optimizers)}, {_rates(shown)}"


def _rates(shown: Sequence[TrainedCoder]) -> str:
    """The peak learning rates, and whether they are those of the rule."""
    rates = {rate for coder in shown if (rate := coder.peak_lr or coder.config.lr) is not None}
    if not rates:
        return "default lr"
    low, high = min(rates), max(rates)
    text = f"lr {low:g}" if low == high else f"lr {low:g} to {high:g}"
    return f"{text} by rule" if any(coder.config.lr is None for coder in shown) else text


def _seeds(plan: FigurePlan) -> str:
    seeds = plan.settings.seeds
    if len(seeds) == 1:
        return f"One seed ({seeds[0]})"
    return f"{len(seeds)} seeds: line their mean, band from lowest to highest"


def _ends(plan: FigurePlan, shown: Sequence[TrainedCoder], coders: CodersByName) -> Iterator[str]:
    """Whether the coders were still falling, and from which share on MP is ahead of TopK."""
    finished = [coder for coder in shown if coder.validation is not None]
    if text := describe_convergence([coder.convergence for coder in finished]):
        yield text
    verdicts = [
        verdict
        for panel in plan.panels
        if (line := plain_line(panel, "mp")) is not None
        for verdict in panel_verdicts(panel, coders)
        if verdict.variant == line.variant.name
    ]
    if mp := [verdict for verdict in verdicts if verdict.seeds_ahead_by_rows is not None]:
        # a panel counts if all of its seeds are ahead
        yield describe_lead(
            [v.ahead_from_rows_share if v.seeds_ahead_by_rows == v.seeds else None for v in mp],
            [
                v.ahead_from_seconds_share if v.seeds_ahead_by_seconds == v.seeds else None
                for v in mp
            ],
        )


def _evaluation(
    x_quantity: XQuantity, eval_rows: int, shown: Sequence[TrainedCoder], hardware: Sequence[str]
) -> Iterator[str]:
    held_out = [coder.validation["rows"] for coder in shown if coder.validation is not None]
    rows = min(eval_rows, max(held_out, default=eval_rows))
    subject = "FVU of the trained coders" if x_quantity == "other-k" else "FVU"
    yield f"{subject} on {rows:,} held-out rows"
    if x_quantity == "time":
        last_records = [(coder.folder, coder.records[-1]) for coder in shown if coder.records]
        runs = {folder for folder, _ in last_records}
        waited, validated = (
            sum(max(getattr(last, name) for at, last in last_records if at == run) for run in runs)
            for name in ("wait_seconds", "validation_seconds")
        )
        yield (
            "Train time is that of the coder's own train steps; waiting for data took "
            f"{waited:,.0f} s and validation {validated:,.0f} s of the whole run, beside it"
        )
    yield f"Hardware: {'; '.join(hardware)}"
