"""The verdict on each line of a panel, and problems of an experiment's coders."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file

from mptrain.experiments.plain_comparison import PlainComparison, compare_with_plain, mean
from mptrain.experiments.runs import TrainedCoder, validations
from mptrain.experiments.spec import PanelPlan, VariantCoders

CodersByName = Mapping[str, TrainedCoder]


@dataclass(frozen=True, kw_only=True)
class SeedFigures:
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
    slope: float | None
    "exponent of validation FVU over rows in the last fifth of the rows, mean over the seeds"
    gain_of_doubling: float | None
    (
        "share by which twice the rows would lower FVU, extrapolated from the middle of the run; "
        "mean over the seeds"
    )
    seeds_still_falling: int | None
    "seeds with a gain over 1 %; None: no seed has a slope"


@dataclass(frozen=True, kw_only=True)
class Verdict(PlainComparison, SeedFigures):  # the fields of the last base come first
    """One line of a panel, alone and beside the plain coder of the panel."""


def panel_verdicts(panel: PanelPlan, coders: CodersByName) -> list[Verdict]:
    """A verdict for each line of a panel, in the order of the lines."""
    plain = plain_line(panel, "topk")
    plain_seeds = [] if plain is None else _seeds(plain, coders)
    return [_verdict(panel, line, _seeds(line, coders), plain_seeds) for line in panel.lines]


def find_problems(panels: Sequence[PanelPlan], coders: CodersByName) -> list[str]:
    """Lines without a curve, and variants that train to the same bits as plain MP."""
    return [
        problem for panel in panels for problem in (*_missing(panel, coders), *_idle(panel, coders))
    ]


def plain_line(panel: PanelPlan, arch: str) -> VariantCoders | None:
    """The line of a plain architecture in a panel."""
    return next((ln for ln in panel.lines if ln.variant.is_plain and ln.variant.arch == arch), None)


def _seeds(line: VariantCoders, coders: CodersByName) -> list[TrainedCoder]:
    return [coders[coder.name] for coder in line.coders if coder.name in coders]


def _verdict(
    panel: PanelPlan,
    line: VariantCoders,
    seeds: Sequence[TrainedCoder],
    plain_seeds: Sequence[TrainedCoder],
) -> Verdict:
    is_compared = not (line.variant.is_plain and line.variant.arch == "topk")
    comparison = compare_with_plain(seeds, plain_seeds) if is_compared else PlainComparison()
    return Verdict(**asdict(_seed_figures(panel, line, seeds)), **asdict(comparison))


def _seed_figures(
    panel: PanelPlan, line: VariantCoders, seeds: Sequence[TrainedCoder]
) -> SeedFigures:
    ends = [coder.validation for coder in seeds if coder.validation is not None]
    fvus = [end["fvu"] for end in ends]
    finished = [coder for coder in seeds if coder.validation is not None]
    convergences = [c for coder in finished if (c := coder.convergence) is not None]
    return SeedFigures(
        panel=panel.name,
        variant=line.variant.name,
        seeds=len(seeds),
        diverged=sum(coder.diverged for coder in seeds),
        fvu=mean(fvus),
        fvu_low=min(fvus, default=None),
        fvu_high=max(fvus, default=None),
        l0=mean([end["l0"] for end in ends]),
        dead_share=mean([end["dead_share"] for end in ends]),
        train_seconds=mean([coder.records[-1].train_seconds for coder in finished]),
        slope=mean([c.slope for c in convergences]),
        gain_of_doubling=mean([c.gain_of_doubling for c in convergences]),
        seeds_still_falling=sum(c.still_falling for c in convergences) if convergences else None,
    )


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
