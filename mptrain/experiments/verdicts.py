"""The verdict on each line of a panel, and problems of an experiment's coders."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from mptrain.experiments.runs import TrainedCoder
from mptrain.experiments.spec import PanelPlan, VariantCoders
from mptrain.runs.metrics_file import Record

CodersByName = Mapping[str, TrainedCoder]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One line of a panel, over its seeds. FVU is that of all held-out rows after training."""

    panel: str
    variant: str
    seeds: int
    diverged: int
    "seeds that diverged; all other fields are of the other seeds"
    fvu: float | None
    "mean over the seeds"
    fvu_low: float | None
    fvu_high: float | None
    l0: float | None
    dead_share: float | None
    train_seconds: float | None
    "mean over the seeds"
    fvu_at_plain_seconds: float | None
    "mean validation FVU at the train time that the plain coder of the panel took in all"
    seeds_below_plain: int | None
    "seeds whose validation FVU passes below the last one of the plain coder (its mean over seeds)"
    below_plain_after_seconds: float | None
    "mean train time of those seeds up to that point; None: no seed passes below"


def panel_verdicts(panel: PanelPlan, coders: CodersByName) -> list[Verdict]:
    """A verdict for each line of a panel, in the order of the lines."""
    plain = plain_line(panel, "topk")
    target = None if plain is None else _end(_seeds(plain, coders))
    return [_verdict(panel, line, _seeds(line, coders), target) for line in panel.lines]


def find_problems(panels: Sequence[PanelPlan], coders: CodersByName) -> list[str]:
    """Lines without a curve, and variants that train to the same bits as plain MP."""
    return [
        problem for panel in panels for problem in (*_missing(panel, coders), *_idle(panel, coders))
    ]


def plain_line(panel: PanelPlan, arch: str) -> VariantCoders | None:
    """The line of a plain architecture in a panel."""
    return next((ln for ln in panel.lines if ln.variant.is_plain and ln.variant.arch == arch), None)


def validations(trained: TrainedCoder) -> list[Record]:
    """The records with a finite validation FVU."""
    return [r for r in trained.records if _is_finite(r.validation_fvu)]


def _seeds(line: VariantCoders, coders: CodersByName) -> list[TrainedCoder]:
    return [coders[coder.name] for coder in line.coders if coder.name in coders]


def _verdict(
    panel: PanelPlan,
    line: VariantCoders,
    seeds: Sequence[TrainedCoder],
    target: tuple[float, float] | None,
) -> Verdict:
    ends = [coder.validation for coder in seeds if coder.validation is not None]
    fvus = [end["fvu"] for end in ends]
    curves = [curve for coder in seeds if (curve := validations(coder))]
    finished = [coder for coder in seeds if coder.validation is not None]
    seconds, fvu = target or (math.nan, math.nan)
    crossings = [_first_below(curve, fvu) for curve in curves]
    passed = [crossing for crossing in crossings if crossing is not None]
    is_compared = target is not None and not (line.variant.is_plain and line.variant.arch == "topk")
    return Verdict(
        panel=panel.name,
        variant=line.variant.name,
        seeds=len(seeds),
        diverged=sum(c.result is not None and c.result["diverged"] for c in seeds),
        fvu=_mean(fvus),
        fvu_low=min(fvus, default=None),
        fvu_high=max(fvus, default=None),
        l0=_mean([end["l0"] for end in ends]),
        dead_share=_mean([end["dead_share"] for end in ends]),
        train_seconds=_mean([coder.records[-1].train_seconds for coder in finished]),
        fvu_at_plain_seconds=(
            _mean([_at(curve, seconds) for curve in curves]) if is_compared else None
        ),
        seeds_below_plain=len(passed) if is_compared else None,
        below_plain_after_seconds=_mean(passed) if is_compared else None,
    )


def _end(seeds: Sequence[TrainedCoder]) -> tuple[float, float] | None:
    """Train seconds and FVU of the last validations, mean over the seeds."""
    ends = [curve[-1] for coder in seeds if (curve := validations(coder))]
    if not ends:
        return None
    fvus = [float(end.validation_fvu or 0) for end in ends]
    return sum(end.train_seconds for end in ends) / len(ends), sum(fvus) / len(fvus)


def _first_below(curve: Sequence[Record], fvu: float) -> float | None:
    return next((r.train_seconds for r in curve if float(r.validation_fvu or 0) < fvu), None)


def _at(curve: Sequence[Record], seconds: float) -> float:
    """FVU at a train time: linear between two validations, constant outside."""
    points = [(r.train_seconds, float(r.validation_fvu or 0)) for r in curve]
    before = [p for p in points if p[0] <= seconds]
    after = [p for p in points if p[0] > seconds]
    if not before or not after:
        return after[0][1] if after else before[-1][1]
    (x, y), (x_after, y_after) = before[-1], after[0]
    return y + (y_after - y) * (seconds - x) / (x_after - x)


def _missing(panel: PanelPlan, coders: CodersByName) -> Iterator[str]:
    for line in panel.lines:
        for coder in line.coders:
            if coder.name not in coders or not validations(coders[coder.name]):
                yield (
                    f"{panel.name} has no curve of {line.variant.name}, seed {coder.seed}: the "
                    "coder diverged before its first validation; remove the variant from the "
                    "figure, or use a lower lr"
                )


def _idle(panel: PanelPlan, coders: CodersByName) -> Iterator[str]:
    mp = plain_line(panel, "mp")
    if mp is None:
        return
    for line in panel.lines:
        if line is mp:
            continue
        pairs = [
            (coders[a.name], coders[b.name])
            for a, b in zip(line.coders, mp.coders, strict=True)
            if a.name in coders and b.name in coders
        ]
        if any(_same_metrics(*pair) or _same_weights(*pair) for pair in pairs):
            yield (
                f"{panel.name}: {line.variant.name} gives exactly the same results as plain MP, "
                "so its settings have no effect; remove the variant, or change its settings"
            )


def _same_metrics(coder: TrainedCoder, other: TrainedCoder) -> bool:
    def metrics(trained: TrainedCoder) -> list[str]:
        return [repr((r.step, r.fvu, r.validation_fvu, r.l0)) for r in trained.records]

    return bool(coder.records) and metrics(coder) == metrics(other)


def _same_weights(coder: TrainedCoder, other: TrainedCoder) -> bool:
    """Whether all tensors that both coders have are equal to the bit."""
    if coder.validation is None or other.validation is None:
        return False
    tensors, others = load_file(_weights(coder)), load_file(_weights(other))
    shared = tensors.keys() & others.keys()
    return bool(shared) and all(tensors[name].equal(others[name]) for name in shared)


def _weights(trained: TrainedCoder) -> Path:
    return trained.path / "coder.safetensors"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
