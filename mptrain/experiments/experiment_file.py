"""An experiment file -> a checked experiment. Nothing runs here."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from mpcache.errors import UsageError
from mptrain.config.architectures import ARCHITECTURES
from mptrain.config.coder import CoderConfig, applies_to, inapplicable_message
from mptrain.config.run import RunConfig
from mptrain.config.sides import Kind, hookpoint_sides
from mptrain.experiments.option_tables import (
    CODER_OPTIONS,
    OPTION_TABLES,
    RUN_OPTIONS,
    SET_ELSEWHERE,
    TABLE_OF_OPTION,
    options_in,
)
from mptrain.experiments.spec import (
    Experiment,
    ExperimentHeader,
    FigurePlan,
    FigureSettings,
    PanelPlan,
    Variant,
    VariantCoders,
    built_in_variants,
)
from mptrain.experiments.toml_config import TomlSettings, read_settings, unknown_name_message

TABLES = ("collect", *OPTION_TABLES, "variants", "figures")


def read_experiment(file: Path | str, changes: Sequence[str] = ()) -> Experiment:
    """Read and check an experiment file, TOML or JSON.

    Args:
        file: path of the file.
        changes: `table.key=value`, each in place of a value of the file.

    Raises:
        UsageError: names the file, the line, the key, what is wrong, and a remedy.
    """
    return parse_experiment(read_settings(Path(file), changes))


def parse_experiment(settings: TomlSettings) -> Experiment:
    """The experiment that settings describe; whoever collects checks the table [collect].

    Raises:
        UsageError: names the file, the line, the key, what is wrong, and a remedy.
    """
    _check_places(settings)
    header = settings.build((), ExperimentHeader, beside=TABLES)
    options = {
        name: value
        for table in OPTION_TABLES
        for name, value in settings.values((table,), options_in(table)).items()
    }
    coder_settings = {n: v for n, v in options.items() if n in CODER_OPTIONS}
    variants = built_in_variants() | {
        name: _parse_variant(settings, name) for name in settings.table(("variants",))
    }
    if not settings.table(("figures",)):
        raise settings.error(("figures",), "is missing; add a table [figures.NAME]")
    figures = tuple(
        _parse_figure(settings, name, coder_settings, variants)
        for name in settings.table(("figures",))
    )
    lines = (line for figure in figures for panel in figure.panels for line in panel.lines)
    used_variants = {line.variant.name: line.variant for line in lines}
    _check_all_apply(settings, coder_settings, figures)
    return Experiment(
        header=header,
        collect=dict(settings.table(("collect",))),
        run_settings=_run_settings(
            settings, {n: v for n, v in options.items() if n in RUN_OPTIONS}
        ),
        coder_settings=coder_settings,
        variants=tuple(used_variants.values()),
        figures=figures,
    )


def _check_places(settings: TomlSettings) -> None:
    """Refuse a setting in a table that is not its own, and name its table."""
    places = {
        **{name: f"{name} in [{TABLE_OF_OPTION[name]}]" for name in (*RUN_OPTIONS, *CODER_OPTIONS)},
        **{f.name: f"{f.name} in [figures.NAME]" for f in fields(FigureSettings)},
        **{f.name: f"{f.name} above the tables" for f in fields(ExperimentHeader)},
        **SET_ELSEWHERE,
    }
    for table, content in settings.tables.items():
        if table in OPTION_TABLES and not isinstance(content, dict):
            remedy = f"; write {places[table]}" if table in places else ""
            raise settings.error((table,), f"is a table of options{remedy}")
        if table in ("collect", "variants", "figures") or not isinstance(content, dict):
            continue
        allowed = options_in(table)
        for name in content:
            if name in places and name not in allowed:
                raise settings.error((table, name), f"is not set here, but by {places[name]}")
    # an option of a run may have the name of an option of collect; hookpoints are of figures
    if "hookpoints" in settings.table(("collect",)):
        raise settings.error(
            ("collect", "hookpoints"), f"is not set here, but by {places['hookpoints']}"
        )
    figure_fields = {f.name for f in fields(FigureSettings)}
    for table, allowed_names in (
        ("variants", {*CODER_OPTIONS, "arch", "label", "color"}),
        ("figures", figure_fields),
    ):
        for item in settings.table((table,)):
            for name in settings.table((table, item)):
                if name in places and name not in allowed_names:
                    raise settings.error(
                        (table, item, name), f"is not set here, but by {places[name]}"
                    )


def _run_settings(settings: TomlSettings, options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        config = RunConfig(**options, store="", run="")
    except UsageError as error:
        name = str(error).split()[0]  # the message starts with the option
        if name not in RUN_OPTIONS:
            raise
        message = str(error).removeprefix(name).lstrip()
        raise settings.error((TABLE_OF_OPTION[name], name), message) from None
    return {name: value for name, value in asdict(config).items() if name in RUN_OPTIONS}


def _parse_variant(settings: TomlSettings, name: str) -> Variant:
    key = ("variants", name)
    if name in built_in_variants():
        message = (
            "is the name of a built-in variant; use another name, or list the built-in one "
            "in a figure"
        )
        raise settings.error(key, message)
    hints = {**CODER_OPTIONS, "arch": get_type_hints(CoderConfig)["arch"]}
    hints |= {"label": str | None, "color": str | None}
    changes = {n: v for n, v in settings.values(key, hints).items() if v is not None}
    label, color = changes.pop("label", None), changes.pop("color", None)
    if color is not None and not re.fullmatch("#[0-9a-fA-F]{6}", color):
        raise settings.error((*key, "color"), f"must be a color such as #7d0a14, got {color!r}")
    if not changes:
        raise settings.error(key, "changes nothing; set arch, or an option of coders")
    return Variant(name, label, color, changes)


def _parse_figure(
    settings: TomlSettings,
    name: str,
    coder_settings: Mapping[str, Any],
    variants: Mapping[str, Variant],
) -> FigurePlan:
    key = ("figures", name)
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise settings.error(key, "must be usable as a folder name; use letters, digits, - and _")
    figure = settings.build(key, FigureSettings)
    for variant in figure.variants:
        if variant not in variants:
            message = unknown_name_message(variant, list(variants))
            raise settings.error((*key, "variants", variant), message)
    chosen = [variants[variant] for variant in figure.variants]
    if not all({"expansion", "latents"} & {*coder_settings, *v.changes} for v in chosen):
        message = "is missing; set it, or latents, to say how many latents coders have"
        raise settings.error((TABLE_OF_OPTION["expansion"], "expansion"), message)
    try:
        panels = tuple(
            PanelPlan(
                name, hookpoint, figure.kind, k,
                tuple(_panel_lines(hookpoint, k, figure, coder_settings, chosen)),
            )
            for k, hookpoint in itertools.product(figure.k, figure.hookpoints)
        )  # fmt: skip
    except UsageError as error:
        raise settings.error((*key, "variants"), str(error)) from None
    plan = FigurePlan(name, figure, panels)
    if error_message := plan.other_k_error(lambda coder: coder.latents):
        raise settings.error((*key, "other_k"), error_message)
    return plan


def _panel_lines(
    hookpoint: str,
    k: int,
    figure: FigureSettings,
    coder_settings: Mapping[str, Any],
    variants: Sequence[Variant],
) -> Iterator[VariantCoders]:
    """The lines of a panel; UsageError for a variant that is impossible, or equal to another."""
    variant_of_coder: dict[str, str] = {}
    sides = hookpoint_sides(hookpoint, figure.kind)
    for variant in variants:
        values = _variant_settings(variant, figure.kind, coder_settings)
        own_k = k if ARCHITECTURES[variant.arch].needs_k else None
        try:
            coders = tuple(
                CoderConfig(**sides, kind=figure.kind, k=own_k, seed=seed, **values)
                for seed in figure.seeds
            )
        except UsageError as error:
            raise UsageError(
                f"has {variant.name}, but {error} (or remove {variant.name} from the variants)"
            ) from None
        twin = variant_of_coder.setdefault(coders[0].name, variant.name)
        if twin != variant.name:
            raise UsageError(
                f"has {twin} and {variant.name}, which are the same coder; remove one of them"
            )
        yield VariantCoders(variant, coders)


def _variant_settings(
    variant: Variant, kind: Kind, coder_settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of all coders, as far as they apply, with the variant's changes."""
    changes = {"arch": variant.arch, **variant.changes}
    sizes = {"expansion", "latents"}
    replaced = sizes if sizes & changes.keys() else set()
    common = {n: v for n, v in coder_settings.items() if applies_to(n, kind, variant.arch)}
    return {**{n: v for n, v in common.items() if n not in replaced}, **changes}


def _check_all_apply(
    settings: TomlSettings, coder_settings: Mapping[str, Any], figures: Iterable[FigurePlan]
) -> None:
    """Refuse a setting of all coders that applies to none of them."""
    lines = [(p.kind, line.variant.arch) for f in figures for p in f.panels for line in p.lines]
    kinds, archs = (",".join(dict.fromkeys(names)) for names in zip(*lines, strict=True))
    for name in coder_settings:
        if not any(applies_to(name, *pair) for pair in lines):
            message = f"does nothing: {inapplicable_message(name, kinds, archs)}"
            raise settings.error((TABLE_OF_OPTION[name], name), message)
