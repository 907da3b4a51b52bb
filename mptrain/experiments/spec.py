"""An experiment file -> the coders that its figures need. Nothing runs here."""

import fnmatch
import itertools
import re
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mpcache.errors import UsageError
from mptrain.config.architectures import ARCHITECTURES, Arch
from mptrain.config.checks import check_nonempty, check_unique
from mptrain.config.coder import CoderConfig, applies_to, inapplicable_message, k_error
from mptrain.config.presets import PRESETS
from mptrain.config.run import RunConfig
from mptrain.config.sides import Kind, hookpoint_sides
from mptrain.experiments.toml_config import Settings, unknown

TABLES = ("collect", "fit", "coders", "variants", "figures")
_OF_PANELS = ("inputs", "targets", "kind", "k", "seed")  # of a coder: its panel and line say them
# of a run: its places, which the sweep gives, and that it is torchrun's, which a sweep is not
_NOT_OF_A_FILE: Mapping[str, Any] = {"store": "", "run": "", "spread": None}


@dataclass(frozen=True, kw_only=True)
class Head:
    """The keys above an experiment file's tables."""

    title: str
    "what the figures are of"
    run: str
    "folder of coders, figures and tables; made if it is missing"
    store: str | None = None
    "store to collect into and train from"
    root: str | None = None
    "in place of store: folder of stores, in which the right one is found or made"

    def __post_init__(self) -> None:
        if (self.store is None) == (self.root is None):
            raise UsageError(f"give store or root, got store={self.store}, root={self.root}")


@dataclass(frozen=True, kw_only=True)
class FigureTable:
    """A table [figures.NAME]: a panel for each hookpoint and k, and what is drawn in each."""

    hookpoints: tuple[str, ...]
    "hookpoints of the model, a panel each"
    k: tuple[int, ...]
    "pursuit steps or active latents per row, a panel each"
    variants: tuple[str, ...]
    "lines of each panel: names of [variants.NAME], of architectures or of presets"
    kind: Kind = "sae"
    "kind of coder"
    seeds: tuple[int, ...] = (0,)
    "seeds of the initial weights; several are drawn as a band"
    other_k: tuple[int, ...] = ()
    "also draw FVU of the trained coders at these K"
    title: str = ""
    "heading of the figure"

    def __post_init__(self) -> None:
        for name in ("hookpoints", "k", "variants", "seeds"):
            check_nonempty(name, getattr(self, name))
            check_unique(name, getattr(self, name))
        for number in (*self.k, *self.other_k):
            if number < 1:
                raise UsageError(f"k and other_k must be at least 1, got {number}")


@dataclass(frozen=True)
class Variant:
    """A way to train that a line of a figure shows."""

    name: str
    label: str | None
    color: str | None
    changes: Mapping[str, Any]
    "of what all coders share"

    @property
    def arch(self) -> Arch:
        found: Arch = self.changes.get("arch", "mp")
        return found

    @property
    def is_plain(self) -> bool:
        """Whether only its architecture sets it apart: what the others are compared with."""
        return not self.changes.keys() - {"arch"}


@dataclass(frozen=True)
class Line:
    """A variant in a panel, a coder for each seed."""

    variant: Variant
    coders: tuple[CoderConfig, ...]


@dataclass(frozen=True)
class Panel:
    """Coders of one hookpoint, kind and k, side by side."""

    figure: str
    hookpoint: str
    kind: Kind
    k: int
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        return f"{self.figure}/{self.hookpoint}-{self.kind}-k{self.k}"


@dataclass(frozen=True)
class FigurePlan:
    """A figure: its table, and the panels that are to be drawn."""

    name: str
    table: FigureTable
    panels: tuple[Panel, ...]

    def other_k_fault(self, latents_of: Callable[[CoderConfig], int | None]) -> str | None:
        """Why a coder cannot be evaluated at one of other_k; None where all can."""
        for line in (line for panel in self.panels for line in panel.lines):
            for k in self.table.other_k:
                if fault := k_error(line.coders[0], k, latents_of(line.coders[0])):
                    return f"has {k}, which is not for {line.variant.name}: {fault}"
        return None


@dataclass(frozen=True)
class Experiment:
    """A checked experiment file."""

    head: Head
    fit: Mapping[str, Any]
    "fields of a run, without its places"
    shared: Mapping[str, Any]
    "settings of all coders, as far as they are for them"
    variants: tuple[Variant, ...]
    figures: tuple[FigurePlan, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for figure in self.figures for panel in figure.panels)

    @property
    def coders(self) -> tuple[CoderConfig, ...]:
        """Each coder once, whichever figures show it."""
        lines = (line for panel in self.panels for line in panel.lines)
        return tuple({coder.name: coder for line in lines for coder in line.coders}.values())

    @property
    def sides(self) -> tuple[str, ...]:
        """What is read of the model, as `collect` takes it."""
        targets = [side for coder in self.coders for side in coder.targets]
        inputs = [side for coder in self.coders for side in coder.inputs]
        return tuple(dict.fromkeys([*targets, *inputs]))

    def only(self, patterns: Sequence[str]) -> "Experiment":
        """The part that patterns name: figures, or panels as `figure/hookpoint-kind-kK`.

        Raises:
            ValueError: a pattern matches nothing.
        """
        for pattern in patterns:
            if not any(_matches(panel, [pattern]) for panel in self.panels):
                known = ", ".join([*(f.name for f in self.figures), *(p.name for p in self.panels)])
                raise UsageError(f"no figure or panel is called {pattern}; there are: {known}")
        if not patterns:
            return self
        chosen = (
            replace(figure, panels=tuple(p for p in figure.panels if _matches(p, patterns)))
            for figure in self.figures
        )
        return replace(self, figures=tuple(figure for figure in chosen if figure.panels))

    def refuse_other_k(self, latents_of: Callable[[CoderConfig], int]) -> None:
        """Check other_k once it is known how many latents each coder has."""
        for figure in self.figures:
            if fault := figure.other_k_fault(latents_of):
                raise UsageError(f"figures.{figure.name}.other_k {fault}")

    def resolved(self, collect: Mapping[str, Any]) -> dict[str, Any]:
        """The tables with every default filled in; as JSON, an experiment file again."""
        named = {
            v.name: {"label": v.label, "color": v.color, **v.changes}
            for v in self.variants
            if v.name not in _built_in()
        }
        head = {name: value for name, value in asdict(self.head).items() if value is not None}
        return {
            **head,
            "collect": dict(collect),
            "fit": dict(self.fit),
            "coders": dict(self.shared),
            "variants": named,
            "figures": {figure.name: asdict(figure.table) for figure in self.figures},
        }


def experiment_of(settings: Settings) -> Experiment:
    """The experiment that a file describes; `[collect]` is left to whoever collects.

    Raises:
        ValueError: names file, key, what is wrong with it, and a remedy.
    """
    head = settings.build((), Head, beside=TABLES)
    hints = {n: h for n, h in typing.get_type_hints(CoderConfig).items() if n not in _OF_PANELS}
    _refuse_misplaced(settings, hints)
    run = settings.build(("fit",), RunConfig, **_NOT_OF_A_FILE)
    shared = settings.values(("coders",), {n: h for n, h in hints.items() if n != "arch"})
    told = {"label": str | None, "color": str | None}
    variants = {
        name: _variant(settings, name, hints | told) for name in settings.table(("variants",))
    }
    variants = _built_in() | variants
    if not settings.table(("figures",)):
        raise settings.wrong(("figures",), "is missing; add a table [figures.NAME]")
    figures = tuple(
        _figure(settings, name, shared, variants) for name in settings.table(("figures",))
    )
    lines = (line for figure in figures for panel in figure.panels for line in panel.lines)
    used = {line.variant.name: line.variant for line in lines}
    _refuse_useless(settings, shared, figures)
    return Experiment(
        head=head,
        fit={n: v for n, v in asdict(run).items() if n not in _NOT_OF_A_FILE},
        shared=shared,
        variants=tuple(used.values()),
        figures=figures,
    )


def _refuse_misplaced(settings: Settings, of_coders: Collection[str]) -> None:
    """Refuse a setting in the wrong table, and say what sets it in the right one."""
    of_run = [field.name for field in fields(RunConfig) if field.name not in _NOT_OF_A_FILE]
    of_figure = [field.name for field in fields(FigureTable)]
    right = {
        **{name: f"{name} in [fit]" for name in of_run},
        **{name: f"{name} in [coders]" for name in of_coders},
        **{name: f"{name} in [figures.NAME]" for name in of_figure},
        **dict.fromkeys(("inputs", "targets"), "hookpoints in [figures.NAME]"),
        "seed": "seeds in [figures.NAME]",
        "arch": "arch in [variants.NAME], or its name in variants of a figure",
    }
    own: dict[tuple[str, ...], set[str]] = {
        ("collect",): set(right) - {"hookpoints"},
        ("fit",): set(of_run),
        ("coders",): {*of_coders} - {"arch"},
        **{("variants", name): {*of_coders} for name in settings.table(("variants",))},
        **{("figures", name): {*of_figure} for name in settings.table(("figures",))},
    }
    for table, allowed in own.items():
        for name in settings.table(table):
            if name in right and name not in allowed:
                raise settings.wrong((*table, name), f"is not set here, but by {right[name]}")


def _built_in() -> dict[str, Variant]:
    """The variants that need no table: presets of mp, and architectures as they are."""
    presets = {name: Variant(name, None, None, changes) for name, changes in PRESETS.items()}
    return presets | {arch: Variant(arch, None, None, {"arch": arch}) for arch in ARCHITECTURES}


def _variant(settings: Settings, name: str, hints: Mapping[str, Any]) -> Variant:
    key = ("variants", name)
    if name in _built_in():
        told = "is there without a table; use another name, or name it in variants of a figure"
        raise settings.wrong(key, told)
    changes = {n: v for n, v in settings.values(key, hints).items() if v is not None}
    label, color = changes.pop("label", None), changes.pop("color", None)
    if color is not None and not re.fullmatch("#[0-9a-fA-F]{6}", color):
        raise settings.wrong((*key, "color"), f"takes a color such as #7d0a14, got {color!r}")
    if not changes:
        raise settings.wrong(key, "sets nothing that it differs by; set arch, or a field of coders")
    return Variant(name, label, color, changes)


def _figure(
    settings: Settings, name: str, shared: Mapping[str, Any], variants: Mapping[str, Variant]
) -> FigurePlan:
    key = ("figures", name)
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise settings.wrong(key, "becomes a folder's name; use letters, digits, - and _")
    table = settings.build(key, FigureTable)
    for one in table.variants:
        if one not in variants:
            raise settings.wrong((*key, "variants", one), unknown(one, list(variants)))
    chosen = [variants[one] for one in table.variants]
    if not all({"expansion", "latents"} & {*shared, *one.changes} for one in chosen):
        told = "is missing; set it, or latents, to say how many latents coders have"
        raise settings.wrong(("coders", "expansion"), told)
    try:
        panels = tuple(
            Panel(name, place, table.kind, k, tuple(_lines(place, k, table, shared, chosen)))
            for k, place in itertools.product(table.k, table.hookpoints)
        )
    except ValueError as error:
        raise settings.wrong((*key, "variants"), str(error)) from None
    plan = FigurePlan(name, table, panels)
    if fault := plan.other_k_fault(lambda coder: coder.latents):
        raise settings.wrong((*key, "other_k"), fault)
    return plan


def _lines(
    hookpoint: str,
    k: int,
    table: FigureTable,
    shared: Mapping[str, Any],
    variants: Sequence[Variant],
) -> Iterator[Line]:
    """The lines of one panel; ValueError for a variant that cannot be, or that is another one."""
    names: dict[str, str] = {}
    for variant in variants:
        settings = {
            **hookpoint_sides(hookpoint, table.kind),
            "kind": table.kind,
            "k": k,
            **_settings_of(variant, table.kind, shared),
        }
        try:
            coders = tuple(CoderConfig(**settings, seed=seed) for seed in table.seeds)
        except ValueError as error:
            raise UsageError(f"has {variant.name}, but {error}; leave it out") from None
        twin = names.setdefault(coders[0].name, variant.name)
        if twin != variant.name:
            raise UsageError(f"has {twin} and {variant.name}, the same coder; leave one out")
        yield Line(variant, coders)


def _settings_of(variant: Variant, kind: Kind, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What all coders share, as far as it is for this one, with the variant's changes."""
    changes = {"arch": variant.arch, **variant.changes}
    sizes = {"expansion", "latents"}
    replaced = sizes if sizes & changes.keys() else set()
    common = {n: v for n, v in shared.items() if applies_to(n, kind, variant.arch)}
    return {**{n: v for n, v in common.items() if n not in replaced}, **changes}


def _refuse_useless(
    settings: Settings, shared: Mapping[str, Any], figures: Iterable[FigurePlan]
) -> None:
    """Refuse what is set for all coders and is for none of them."""
    lines = [(p.kind, line.variant.arch) for f in figures for p in f.panels for line in p.lines]
    kinds, archs = (",".join(dict.fromkeys(names)) for names in zip(*lines, strict=True))
    for name in shared:
        if not any(applies_to(name, *pair) for pair in lines):
            raise settings.wrong(
                ("coders", name), f"does nothing: {inapplicable_message(name, kinds, archs)}"
            )


def _matches(panel: Panel, patterns: Sequence[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
        for name in (panel.figure, panel.name)
    )
