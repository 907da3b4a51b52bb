"""An experiment: its figures, their panels, and the coders that the panels compare."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mpcache.errors import UsageError
from mptrain.config.architectures import ARCHITECTURES, Arch
from mptrain.config.checks import check_nonempty, check_unique
from mptrain.config.coder import CoderConfig, k_error
from mptrain.config.presets import PRESETS
from mptrain.config.sides import Kind
from mptrain.experiments.option_tables import tabulate


@dataclass(frozen=True, kw_only=True)
class ExperimentHeader:
    """The keys above the tables of an experiment file."""

    title: str
    "what the figures are about"
    folder: str
    "folder of runs, figures and tables; created if it is missing"
    store: str | None = None
    "store to collect into and to train from"
    root: str | None = None
    "in place of store: folder of stores, in which the fitting one is found or created"

    def __post_init__(self) -> None:
        if (self.store is None) == (self.root is None):
            raise UsageError(
                f"give either store or root (a folder of stores), got store={self.store}, "
                f"root={self.root}"
            )


@dataclass(frozen=True, kw_only=True)
class FigureSettings:
    """A table [figures.NAME]: the panels of a figure, and the lines in each panel."""

    hookpoints: tuple[str, ...]
    "hookpoints of the model; a panel each"
    k: tuple[int, ...]
    "pursuit steps or active latents per row; a panel each"
    variants: tuple[str, ...]
    "lines of each panel: names of [variants.NAME], of architectures or of presets"
    kind: Kind = "sae"
    "kind of coder"
    seeds: tuple[int, ...] = (0,)
    "seeds of the initial weights; several seeds are drawn as a band"
    other_k: tuple[int, ...] = ()
    "also draw the FVU of the trained coders at these K"
    title: str = ""
    "heading of the figure"

    def __post_init__(self) -> None:
        for name in ("hookpoints", "k", "variants", "seeds"):
            check_nonempty(name, getattr(self, name))
            check_unique(name, getattr(self, name))
        for name in ("k", "other_k"):
            for number in getattr(self, name):
                if number < 1:
                    raise UsageError(f"{name} must be at least 1, got {number}")


@dataclass(frozen=True)
class Variant:
    """A recipe that a line of a figure shows."""

    name: str
    label: str | None
    color: str | None
    changes: Mapping[str, Any]
    "coder settings that differ from those of the whole experiment"

    @property
    def arch(self) -> Arch:
        """The architecture of the variant's coders."""
        arch: Arch = self.changes.get("arch", "mp")
        return arch

    @property
    def is_plain(self) -> bool:
        """Whether the variant changes nothing but the architecture."""
        return not self.changes.keys() - {"arch"}


def built_in_variants() -> dict[str, Variant]:
    """The variants that need no table: presets of mp, and plain architectures."""
    presets = {name: Variant(name, None, None, changes) for name, changes in PRESETS.items()}
    return presets | {arch: Variant(arch, None, None, {"arch": arch}) for arch in ARCHITECTURES}


@dataclass(frozen=True)
class VariantCoders:
    """The coders of a variant in a panel, one for each seed: a line of the figure."""

    variant: Variant
    coders: tuple[CoderConfig, ...]


@dataclass(frozen=True)
class PanelPlan:
    """A panel: the lines of one hookpoint, kind and k."""

    figure: str
    hookpoint: str
    kind: Kind
    k: int
    lines: tuple[VariantCoders, ...]

    @property
    def name(self) -> str:
        """FIGURE/HOOKPOINT-KIND-kK."""
        return f"{self.figure}/{self.hookpoint}-{self.kind}-k{self.k}"

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether a pattern matches the name of the panel or of its figure."""
        names = (self.figure, self.name)
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


@dataclass(frozen=True)
class FigurePlan:
    """A figure: its settings, and the panels to draw."""

    name: str
    settings: FigureSettings
    panels: tuple[PanelPlan, ...]

    @property
    def coders(self) -> tuple[CoderConfig, ...]:
        """The coders of all panels, in their order."""
        lines = (line for panel in self.panels for line in panel.lines)
        return tuple(coder for line in lines for coder in line.coders)

    def other_k_error(self, latents_of: Callable[[CoderConfig], int | None]) -> str | None:
        """Why a coder cannot be evaluated at one of `other_k`; None if all coders can."""
        for line in (line for panel in self.panels for line in panel.lines):
            coder = line.coders[0]
            for k in self.settings.other_k:
                if error := k_error(coder, k, latents_of(coder)):
                    return f"has {k}, which {line.variant.name} cannot use: {error}"
        return None


@dataclass(frozen=True)
class Experiment:
    """A checked experiment file."""

    header: ExperimentHeader
    collect: Mapping[str, Any]
    "the table [collect], as it is written"
    run_settings: Mapping[str, Any]
    "fields of RunConfig, except store and run, which a sweep sets"
    coder_settings: Mapping[str, Any]
    "settings of all coders, as far as they apply to a coder"
    variants: tuple[Variant, ...]
    figures: tuple[FigurePlan, ...]

    @property
    def panels(self) -> tuple[PanelPlan, ...]:
        """The panels of all figures."""
        return tuple(panel for figure in self.figures for panel in figure.panels)

    @property
    def coders(self) -> tuple[CoderConfig, ...]:
        """Each coder once, also where several figures show it."""
        coders = (coder for figure in self.figures for coder in figure.coders)
        return tuple({coder.name: coder for coder in coders}.values())

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that the coders read, as `mpcache collect --hookpoints` takes them."""
        targets = [side for coder in self.coders for side in coder.targets]
        inputs = [side for coder in self.coders for side in coder.inputs]
        return tuple(dict.fromkeys([*targets, *inputs]))

    def only(self, patterns: Sequence[str]) -> "Experiment":
        """The part that patterns name: figures, or panels as `figure/hookpoint-kind-kK`.

        Raises:
            UsageError: a pattern matches nothing.
        """
        for pattern in patterns:
            if not any(panel.matches([pattern]) for panel in self.panels):
                known = ", ".join([*(f.name for f in self.figures), *(p.name for p in self.panels)])
                raise UsageError(f"no figure or panel matches {pattern!r}; use one of: {known}")
        if not patterns:
            return self
        chosen = (
            replace(figure, panels=tuple(p for p in figure.panels if p.matches(patterns)))
            for figure in self.figures
        )
        return replace(self, figures=tuple(figure for figure in chosen if figure.panels))

    def check_other_k(self, latents_of: Callable[[CoderConfig], int]) -> None:
        """Check other_k once the number of latents of each coder is known.

        Raises:
            UsageError: a coder cannot be evaluated at one of other_k.
        """
        for figure in self.figures:
            if error := figure.other_k_error(latents_of):
                raise UsageError(f"figures.{figure.name}.other_k {error}")

    def resolved(self, collect: Mapping[str, Any]) -> dict[str, Any]:
        """All tables with every default filled in; as JSON, an experiment file again."""
        own_variants = {
            v.name: {"label": v.label, "color": v.color, **v.changes}
            for v in self.variants
            if v.name not in built_in_variants()
        }
        header = {name: value for name, value in asdict(self.header).items() if value is not None}
        return {
            **header,
            "collect": dict(collect),
            **tabulate({**self.run_settings, **self.coder_settings}),
            "variants": own_variants,
            "figures": {figure.name: asdict(figure.settings) for figure in self.figures},
        }
