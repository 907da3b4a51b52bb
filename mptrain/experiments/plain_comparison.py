"""A line of a panel beside the plain coder: who is ahead at equal rows and equal train time."""

from collections.abc import Sequence
from dataclasses import dataclass

from mptrain.experiments.ahead import Curve, ahead_from, fvu_at
from mptrain.experiments.runs import TrainedCoder, validations
from mptrain.runs.metrics_file import Record


@dataclass(frozen=True, kw_only=True)
class PlainComparison:
    """Validation FVU of a line beside that of the plain coder of its panel.

    Fields are None where no seed has a value, and all fields for the plain coder itself.
    """

    fvu_at_plain_seconds: float | None = None
    "mean validation FVU at the train time that the plain coder of the panel took in all"
    seeds_below_plain: int | None = None
    "seeds whose validation FVU passes below the last one of the plain coder (its mean over seeds)"
    below_plain_after_seconds: float | None = None
    "mean train time of those seeds up to that point"
    seeds_ahead_by_rows: int | None = None
    (
        "seeds whose validation FVU stays below that of the plain coder of the same seed, at equal "
        "rows, until the end; seeds that diverged are not compared"
    )
    ahead_from_rows_share: float | None = None
    "mean share of the rows from which those seeds stay below; 0: from the first validation on"
    seeds_ahead_by_seconds: int | None = None
    "the same at equal train time; after its training, the plain coder has its last FVU"
    ahead_from_seconds_share: float | None = None
    "mean share of their own train time from which those seeds stay below"


def compare_with_plain(
    seeds: Sequence[TrainedCoder], plain_seeds: Sequence[TrainedCoder]
) -> PlainComparison:
    """Compare the seeds of a line with those of the plain coder."""
    ends = [curve[-1] for coder in plain_seeds if (curve := validations(coder))]
    if not ends:
        return PlainComparison()
    seconds = sum(end.train_seconds for end in ends) / len(ends)
    fvu = sum(float(end.validation_fvu or 0) for end in ends) / len(ends)
    curves = [curve for coder in seeds if (curve := validations(coder))]
    passed = [after for curve in curves if (after := _first_below(curve, fvu)) is not None]
    plain = {coder.config.seed: validations(coder) for coder in plain_seeds if not coder.diverged}
    pairs = [
        (curve, other)
        for coder in seeds
        if not coder.diverged
        and (curve := validations(coder))
        and (other := plain.get(coder.config.seed))
    ]
    by_rows, by_seconds = shares_ahead(pairs)
    rows_shares = [share for share in by_rows if share is not None]
    seconds_shares = [share for share in by_seconds if share is not None]
    return PlainComparison(
        fvu_at_plain_seconds=mean([fvu_at(seconds_curve(curve), seconds) for curve in curves]),
        seeds_below_plain=len(passed),
        below_plain_after_seconds=mean(passed),
        seeds_ahead_by_rows=len(rows_shares) if pairs else None,
        ahead_from_rows_share=mean(rows_shares),
        seeds_ahead_by_seconds=len(seconds_shares) if pairs else None,
        ahead_from_seconds_share=mean(seconds_shares),
    )


def shares_ahead(
    pairs: Sequence[tuple[Sequence[Record], Sequence[Record]]],
) -> tuple[list[float | None], list[float | None]]:
    """The shares of rows, and of train time, from which each first coder stays below its partner.

    Each coder is given by its finite validations. None where it does not stay below.
    """
    by_rows = [ahead_from(_rows_curve(own), _rows_curve(other)) for own, other in pairs]
    by_seconds = [ahead_from(seconds_curve(own), seconds_curve(other)) for own, other in pairs]
    return by_rows, by_seconds


def _rows_curve(records: Sequence[Record]) -> Curve:
    """FVU of validations over rows."""
    return [(float(r.rows), float(r.validation_fvu or 0)) for r in records]


def seconds_curve(records: Sequence[Record]) -> Curve:
    """FVU of validations over train seconds."""
    return [(r.train_seconds, float(r.validation_fvu or 0)) for r in records]


def mean(values: Sequence[float]) -> float | None:
    """Mean over seeds; None without a value."""
    return sum(values) / len(values) if values else None


def _first_below(curve: Sequence[Record], fvu: float) -> float | None:
    return next((r.train_seconds for r in curve if float(r.validation_fvu or 0) < fvu), None)
