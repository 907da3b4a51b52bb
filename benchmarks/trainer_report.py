"""The report of a table of trainings, in Markdown.

A line is a coder: at the default rate of its tool, and at the best rate of its search.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.trainer_table import TrainingRow, by_fvu, l0_miss


def markdown(rows: Sequence[TrainingRow]) -> str:
    """The report: a table for each hookpoint and length of run."""
    return "\n\n".join(_table(block) for block in _grouped(rows, _block))


def _block(row: TrainingRow) -> tuple[Any, ...]:
    return (-row.batch_rows, row.steps, row.store, row.hookpoint, row.kind, row.latents, row.k)


def _coder(row: TrainingRow) -> tuple[Any, ...]:
    return (row.arch, row.tool != "mptrain", row.tool, row.normalise)


def _grouped(rows: Iterable[TrainingRow], key: Any) -> Iterator[list[TrainingRow]]:
    groups: dict[tuple[Any, ...], list[TrainingRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    yield from (groups[name] for name in sorted(groups))


def _table(rows: Sequence[TrainingRow]) -> str:
    one = rows[0]
    head = (
        f"`{one.hookpoint}`, {one.kind}, {one.latents} latents, K = {one.k}, {one.steps:,} steps "
        f"of {one.batch_rows:,} rows; {one.threads} thread(s)"
    )
    columns = (
        "coder", "trainer", "default lr", "FVU", "L0", "dead",
        "best lr", "FVU", "L0", "dead", "seeds", "train s",
    )  # fmt: skip
    lines = [_line(columns), _line(["---"] * len(columns))]
    lines += [_line(_cells(group)) for group in _grouped(rows, _coder)]
    return "\n".join([head, "", *lines])


def _cells(rows: Sequence[TrainingRow]) -> list[str]:
    first = rows[0]
    default = min(
        (r for r in rows if r.rate == "default" and r.seed == 0), key=l0_miss, default=None
    )
    best = min((r for r in rows if r.seed == 0), key=by_fvu)
    seeds = [best, *_other_seeds(rows, best)]
    trainer = f"{first.tool} {first.version}{', normalised' if first.normalise else ''}"
    return [
        first.arch,
        trainer,
        *(["", "", "", ""] if default is None else [f"{default.lr:.3g}", *_figures([default])]),
        f"{best.lr:.3g}",
        *_figures(seeds),
        str(len(seeds)),
        f"{statistics.mean(r.train_seconds for r in seeds):.0f}",
    ]


def _other_seeds(rows: Sequence[TrainingRow], best: TrainingRow) -> Iterator[TrainingRow]:
    """The training of each other seed at the best rate whose L0 is nearest to K."""
    same = [r for r in rows if r.lr == best.lr and r.seed != best.seed]
    for seed in sorted({r.seed for r in same}):
        yield min((r for r in same if r.seed == seed), key=l0_miss)


def _figures(rows: Sequence[TrainingRow]) -> list[str]:
    """FVU with its deviation over seeds, L0 and the share of dead latents; ! marks a wrong L0."""
    fvus = [r.report_fvu for r in rows]
    deviation = f" ± {statistics.stdev(fvus):.4f}" if len(fvus) > 1 else ""
    mark = "" if all(r.has_k_latents for r in rows) else " !"
    return [
        f"{statistics.mean(fvus):.4f}{deviation}",
        f"{statistics.mean(r.l0 for r in rows):.1f}{mark}",
        f"{statistics.mean(r.dead_share for r in rows):.2f}",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
