"""Command-line options from a config dataclass, and the config back from the options.

Typer knows functions, not dataclasses: a command's signature is built here from the fields' types,
defaults and docs, so that no default and no help text is written twice.
"""

import dataclasses
import inspect
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from mpcache.errors import UsageError
from mpcli.field_docs import field_docs, field_groups
from mpcli.option_groups import FIRST_GROUP, ON
from mpcli.options_from_environment import with_variables
from mpcli.values import is_list, metavar_of, parser_of, shown, spelled

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadConfigFrom:
    """An option that says where to load a config from, in place of the config's own options."""

    name: str
    metavar: str
    doc: str
    load: Callable[[str, dict[str, Any]], Any]
    "returns the config; gets the option's value and the fields that were given beside it"

    @property
    def parameter(self) -> inspect.Parameter:
        info = typer.Option(help=self.doc, metavar=self.metavar)
        annotation = Annotated[str, info]
        return inspect.Parameter(self.name, _KEYWORD, default=None, annotation=annotation)

    def check_complete(self, required: Mapping[str, str], given: Mapping[str, Any]) -> None:
        """Refuse a config that is not loaded and lacks a required field."""
        missing = [spelling for name, spelling in required.items() if name not in given]
        if missing:
            raise UsageError(f"give {' and '.join(missing)}, or give --{self.name} {self.metavar}")


def from_config(
    *config_types: type,
    arguments: Sequence[str] = (),
    first: Mapping[str, str] | None = None,
    load_from: LoadConfigFrom | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make `function(config..., own options...)` a command whose options are the configs' fields.

    Fields named in `arguments` become positional arguments; the rest become options. Help shows
    each option in the group of the class that defines its field, except that the options in
    `first`, which almost every user sets, come before the groups, each with the example value that
    `first` gives. With `load_from`, which is for one config, no field is required where that
    option is given.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        groups = [_parameters(config_type, arguments, first or {}) for config_type in config_types]
        fields = [parameter for group in groups for parameter in group]
        own = [
            p.replace(kind=_KEYWORD)
            for p in list(inspect.signature(function).parameters.values())[len(groups) :]
        ]
        required = {
            p.name: p.name.upper() if p.name in arguments else spelled(p.name)
            for p in fields
            if p.default is inspect.Parameter.empty
        }
        if load_from:
            own.append(load_from.parameter)
            # the command checks these itself, once it knows that the config is not loaded
            fields = [p.replace(default=None) if p.name in required else p for p in fields]
        _refuse_twins(*groups, own)

        def command(ctx: typer.Context, **values: Any) -> None:
            given = [_pop_given(values, group) for group in groups]
            source = values.pop(load_from.name) if load_from else None
            try:
                if load_from and source is not None:
                    configs = [load_from.load(source, given[0])]
                else:
                    if load_from:
                        load_from.check_complete(required, given[0])
                    configs = [cls(**own) for cls, own in zip(config_types, given, strict=True)]
            except ValueError as error:
                raise with_variables(error, ctx, [p.name for p in fields]) from error
            function(*configs, **values)

        positional = [p for p in fields if p.name in arguments]
        options = [p for p in fields if p.name not in arguments]
        options.sort(key=lambda p: _rank(p, tuple(first or ())))
        context = inspect.Parameter("ctx", _KEYWORD, annotation=typer.Context)
        parameters = [context, *positional, *options, *own]
        return _with_signature(command, function, parameters)

    return decorate


def _with_signature(
    command: Callable[..., None],
    function: Callable[..., None],
    parameters: Sequence[inspect.Parameter],
) -> Callable[..., None]:
    """Give a command the name and doc of a function, and the parameters that Typer reads."""
    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Typer's
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _rank(parameter: inspect.Parameter, first: tuple[str, ...]) -> tuple[int, bool]:
    """The position of an option in help: those in `first`, then required ones, then the others."""
    index = first.index(parameter.name) if parameter.name in first else len(first)
    return index, parameter.default is not inspect.Parameter.empty


def _parameters(
    config_type: type, arguments: Sequence[str], first: Mapping[str, str]
) -> list[inspect.Parameter]:
    docs, hints = field_docs(config_type), typing.get_type_hints(config_type)
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    assert docs.keys() == fields.keys(), f"no doc: {fields.keys() ^ docs.keys()}"
    groups = field_groups(config_type)
    parameters = []
    for name, doc in docs.items():
        field, hint = fields[name], hints[name]
        text = doc + _default(field)
        if name in arguments:
            parameters.append(_argument(field, hint, text))
        elif name in first:
            text += f"; example: {spelled(name)} {first[name]}"
            parameters.append(_option(field, hint, text, FIRST_GROUP))
        else:
            parameters.append(_option(field, hint, text, groups[name]))
    return parameters


def _argument(field: "dataclasses.Field[Any]", hint: Any, text: str) -> inspect.Parameter:
    info = typer.Argument(help=text, parser=parser_of(hint), metavar=field.name.upper())
    return _parameter(field, Annotated[str, info])


def _option(field: "dataclasses.Field[Any]", hint: Any, text: str, group: str) -> inspect.Parameter:
    if hint is bool:
        return _parameter(field, Annotated[bool, typer.Option(help=text, rich_help_panel=group)])
    info = typer.Option(
        help=text,
        parser=parser_of(hint),
        metavar=metavar_of(hint),
        rich_help_panel=group,
    )
    return _parameter(field, Annotated[list[str] if is_list(hint) else str, info])


def _parameter(field: "dataclasses.Field[Any]", annotation: Any) -> inspect.Parameter:
    # Typer gets None as the default and the config fills in its own: so options that were given
    # can be distinguished from those that were not, as `LoadConfigFrom` needs.
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else None
    return inspect.Parameter(field.name, _KEYWORD, default=default, annotation=annotation)


def _default(field: "dataclasses.Field[Any]") -> str:
    """The default as help shows it; where it is None, the field's doc says what that means."""
    value = field.default
    if value is dataclasses.MISSING or value is None or value is False or value == ():
        return ""
    return f" {ON}" if value is True else f" [default: {shown(value)}]"


def _refuse_twins(*groups: Sequence[inspect.Parameter]) -> None:
    counts = Counter(p.name for group in groups for p in group)
    twins = [name for name, count in counts.items() if count > 1]
    assert not twins, f"options defined twice: {sorted(twins)}"


def _pop_given(values: dict[str, Any], group: Sequence[inspect.Parameter]) -> dict[str, Any]:
    """Take a config's fields out of the values, and return those that were given."""
    given = {}
    for name in (parameter.name for parameter in group):
        value = values.pop(name)
        if value is None or value == []:
            continue  # not given; an empty list that was given is for the config to judge
        if isinstance(value, list):  # --k 16,32 --k 64 arrives as [(16, 32), (64,)]
            value = tuple(x for group in value for x in group)
        given[name] = value
    return given
