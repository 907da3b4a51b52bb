"""What an experiment's coders came to: a verdict for each line, and what is wrong with them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from mptrain.experiments.runs import Trained
from mptrain.experiments.spec import Line, Panel
from mptrain.runs.metrics import Record

Coders = Mapping[str, Trained]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One line of a panel, over its seeds. FVU: of all held-out rows, at the end of training."""

    panel: str
    variant: str
    seeds: int
    diverged: int
    "seeds that diverged; the rest is of the others"
    fvu: float | None
    "mean"
    fvu_low: float | None
    fvu_high: float | None
    l0: float | None
    dead_share: float | None
    train_seconds: float | None
    "mean"
    fvu_at_plain_seconds: float | None
    "mean FVU of validations at the train time that the panel's plain coder took"
    seeds_below_plain: int | None
    "seeds whose validations pass below the last one of the plain coder, mean over its seeds"
    below_plain_after_seconds: float | None
    "mean train time of those seeds until then; None: never"


def judge(panel: Panel, coders: Coders) -> list[Verdict]:
    """A verdict for each line, in their order."""
    plain = plain_line(panel, "topk")
    target = None if plain is None else _end(_seeds(plain, coders))
    return [_verdict(panel, line, _seeds(line, coders), target) for line in panel.lines]


def faults(panels: Sequence[Panel], coders: Coders) -> list[str]:
    """Lines without a curve, and variants that train as plain MP does."""
    return [told for panel in panels for told in (*_missing(panel, coders), *_idle(panel, coders))]


def plain_line(panel: Panel, arch: str) -> Line | None:
    """The panel's line of an architecture as it is."""
    return next((ln for ln in panel.lines if ln.variant.is_plain and ln.variant.arch == arch), None)


def validations(trained: Trained) -> list[Record]:
    """Records of finite validations."""
    return [r for r in trained.records if _is_finite(r.validation_fvu)]


def _seeds(line: Line, coders: Coders) -> list[Trained]:
    return [coders[coder.name] for coder in line.coders if coder.name in coders]


def _verdict(
    panel: Panel, line: Line, seeds: Sequence[Trained], target: tuple[float, float] | None
) -> Verdict:
    ends = [one.validation for one in seeds if one.validation is not None]
    fvus = [end["fvu"] for end in ends]
    curves = [curve for one in seeds if (curve := validations(one))]
    whole = [one for one in seeds if one.validation is not None]
    seconds, fvu = target or (math.nan, math.nan)
    crossings = [_first_below(curve, fvu) for curve in curves]
    found = [crossing for crossing in crossings if crossing is not None]
    is_compared = target is not None and not (line.variant.is_plain and line.variant.arch == "topk")
    return Verdict(
        panel=panel.name,
        variant=line.variant.name,
        seeds=len(seeds),
        diverged=sum(one.result is not None and one.result["diverged"] for one in seeds),
        fvu=_mean(fvus),
        fvu_low=min(fvus, default=None),
        fvu_high=max(fvus, default=None),
        l0=_mean([end["l0"] for end in ends]),
        dead_share=_mean([end["dead_share"] for end in ends]),
        train_seconds=_mean([one.records[-1].train_seconds for one in whole]),
        fvu_at_plain_seconds=(
            _mean([_at(curve, seconds) for curve in curves]) if is_compared else None
        ),
        seeds_below_plain=len(found) if is_compared else None,
        below_plain_after_seconds=_mean(found) if is_compared else None,
    )


def _end(seeds: Sequence[Trained]) -> tuple[float, float] | None:
    """Train seconds and FVU of the last validations, mean over the seeds."""
    ends = [curve[-1] for one in seeds if (curve := validations(one))]
    if not ends:
        return None
    fvus = [float(end.validation_fvu or 0) for end in ends]
    return sum(end.train_seconds for end in ends) / len(ends), sum(fvus) / len(fvus)


def _first_below(curve: Sequence[Record], fvu: float) -> float | None:
    return next((r.train_seconds for r in curve if float(r.validation_fvu or 0) < fvu), None)


def _at(curve: Sequence[Record], seconds: float) -> float:
    """FVU at a train time, linear between validations, constant beyond them."""
    points = [(r.train_seconds, float(r.validation_fvu or 0)) for r in curve]
    before = [p for p in points if p[0] <= seconds]
    after = [p for p in points if p[0] > seconds]
    if not before or not after:
        return after[0][1] if after else before[-1][1]
    (x, y), (x_after, y_after) = before[-1], after[0]
    return y + (y_after - y) * (seconds - x) / (x_after - x)


def _missing(panel: Panel, coders: Coders) -> Iterator[str]:
    for line in panel.lines:
        for coder in line.coders:
            if coder.name not in coders or not validations(coders[coder.name]):
                yield (
                    f"{panel.name} has no curve of {line.variant.name}, seed {coder.seed}: it "
                    "diverged before its first validation; leave it out, or lower its lr"
                )


def _idle(panel: Panel, coders: Coders) -> Iterator[str]:
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
                f"{panel.name}: {line.variant.name} equals plain MP to the bit, so what it sets "
                "does nothing here; leave it out, or change it"
            )


def _same_metrics(one: Trained, other: Trained) -> bool:
    def of(trained: Trained) -> list[str]:
        return [repr((r.step, r.fvu, r.validation_fvu, r.l0)) for r in trained.records]

    return bool(one.records) and of(one) == of(other)


def _same_weights(one: Trained, other: Trained) -> bool:
    """Whether all tensors that both have are the same bits."""
    if one.validation is None or other.validation is None:
        return False
    tensors, others = load_file(_weights(one)), load_file(_weights(other))
    shared = tensors.keys() & others.keys()
    return bool(shared) and all(tensors[name].equal(others[name]) for name in shared)


def _weights(trained: Trained) -> Path:
    return trained.folder / "coders" / trained.config.name / "coder.safetensors"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
