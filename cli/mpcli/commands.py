"""Commands that are imported when they run, and their help in groups of options."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mpcache.version import __version__
from mpcli.errors import guarded
from mpcli.option_groups import DEFAULT_GROUP, GROUPS, ON
from mpcli.options_from_environment import (
    NEVER_FROM_ENVIRONMENT,
    is_from_environment,
    variable_of,
)

_WIDEST = 120  # columns of help; longer lines are hard to read
_PLAIN: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,  # rich doubles the time of --help and squeezes long choices
    "pretty_exceptions_enable": False,
}


@dataclass(frozen=True)
class Subcommand:
    """A command of an app, as its list shows it before it is imported."""

    target: str
    "where its function is: `module:function`"
    summary: str
    "one sentence; the function's docstring continues after it"
    examples: tuple[str, ...]
    "command lines that end its help"


class _LightHelp:
    """A --help option that Typer does not have to coerce: that would import pydantic."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]  # of the class beside it
        if option is not None:
            option.default = False
        return option


def lazy_app(help: str, prefix: str, subcommands: Mapping[str, Subcommand]) -> typer.Typer:
    """An app that imports the module of a command when that command runs or shows its help.

    Each option can also be given as an environment variable: `prefix` and the option's name.
    """

    class Group(_LightHelp, TyperGroup):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.commands = dict.fromkeys(subcommands)  # type: ignore[assignment]  # names only

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            subcommand = subcommands.get(cmd_name)
            return None if subcommand is None else _load(cmd_name, subcommand, prefix)

        def format_commands(self, ctx: Any, formatter: Any) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, sub.summary) for name, sub in subcommands.items()])

    app = typer.Typer(cls=Group, no_args_is_help=True, **_PLAIN)

    @app.callback(
        help=help, invoke_without_command=True, context_settings={"max_content_width": _WIDEST}
    )
    def version(
        show: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
    ) -> None:
        if show:
            typer.echo(__version__)
            raise typer.Exit

    return app


def _load(name: str, subcommand: Subcommand, prefix: str) -> Any:
    module, _, function = subcommand.target.partition(":")
    run: Callable[..., None] = getattr(importlib.import_module(module), function)
    app = typer.Typer(**_PLAIN)
    app.command(
        name,
        cls=GroupedCommand,
        help="\n\n".join(filter(None, (subcommand.summary, inspect.getdoc(run)))),
        epilog="\n".join(subcommand.examples),
        context_settings={"max_content_width": _WIDEST, "auto_envvar_prefix": prefix},
    )(guarded(run))
    command: Any = typer.main.get_command(app)
    for parameter in command.params:
        if parameter.name in NEVER_FROM_ENVIRONMENT:
            parameter.allow_from_autoenv = False
    return command


class GroupedCommand(_LightHelp, TyperCommand):
    """A command whose help shows options in groups and ends with examples.

    The group of an option is its `rich_help_panel`, which `from_config` takes from the class that
    defines the field. The error for a wrong value names the environment variable that gave it.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            name = getattr(error.param, "name", None)
            if name is not None and is_from_environment(ctx, name):
                error.param_hint = f"environment variable {variable_of(ctx, name)}"
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`STORE`, where Typer writes `{STORE}` for an argument that is required."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        parameters: list[Any] = self.get_params(ctx)
        for parameter in parameters:
            parameter.show_envvar = False  # the epilog explains it once
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(_group(parameter), []).append(
                    (_name(parameter, record), record[1])
                )
        for name in sorted(groups, key=GROUPS.index):
            with formatter.section(name):
                formatter.write_dl(groups[name])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        parameters: list[Any] = self.get_params(ctx)
        option = next(
            p
            for p in parameters
            if p.param_type_name == "option" and p.name not in NEVER_FROM_ENVIRONMENT
        )
        formatter.write_paragraph()
        formatter.write_text(
            f"Options can also be set by environment variables, for example {option.opts[0]} by "
            f"{variable_of(ctx, option.name)}. The command line takes precedence."
        )
        with formatter.section("Examples"):
            for example in (self.epilog or "").splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")


def _group(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or DEFAULT_GROUP


def _name(parameter: Any, record: tuple[str, str]) -> str:
    """An argument by its metavar, without the Python type that Typer adds; a switch that is off by
    default without its `--no-` form.
    """
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    if parameter.secondary_opts and ON not in (parameter.help or ""):
        return str(parameter.opts[0])
    return record[0]
