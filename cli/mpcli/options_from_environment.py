"""Options as environment variables: `MPCACHE_ROWS` is `--rows` of every mpcache command."""

import re
from collections.abc import Iterable

import typer

# a variable that was left in a shell must not delete or replace anything unasked
NEVER_FROM_ENVIRONMENT = frozenset({"yes", "delete_leftovers", "accept_other_bits"})


def variable_of(ctx: typer.Context, name: str) -> str:
    """The environment variable of a parameter."""
    return f"{ctx.auto_envvar_prefix}_{name.upper()}"


def is_from_environment(ctx: typer.Context, name: str) -> bool:
    """Whether a parameter has its value from its environment variable."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "ENVIRONMENT"


def with_variables(error: ValueError, ctx: typer.Context, names: Iterable[str]) -> ValueError:
    """The error, with the variables that set the options that it is about."""
    message = str(error)
    variables = [
        variable_of(ctx, name)
        for name in names
        if is_from_environment(ctx, name) and re.search(rf"\b{name}\b", message)
    ]
    if not variables:
        return error
    return type(error)(f"{message} (set by {', '.join(variables)} in the environment)")
