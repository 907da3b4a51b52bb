"""Command-line options from a config dataclass, and the config back from the options.

Typer knows functions, not dataclasses: a command's signature is built here from the fields' types,
defaults and docs, so that no default and no help text is written twice.
"""

import ast
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from mpcache.errors import UsageError
from mpcli.environment import with_variables

FIRST_GROUP = "Set these first"
DEFAULT_GROUP = "Run"
"the group of options that no config defines, such as --json"
GROUPS = (
    "Arguments",
    FIRST_GROUP,
    "Data",
    "Sequences",
    "Model",
    "Coder",
    "Optimizer",
    "Loss",
    "Storage",
    "Evaluation",
    DEFAULT_GROUP,
    "Parallel",
)
"all groups, in the order of help"
ON = "[default: on]"
"how the help of a switch says that it is on by default"
_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_FACTORS |= {f"{letter}B": _FACTORS[letter] for letter in "kMGT"}  # of bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadConfigFrom:
    """An option that names where a whole config is, in place of the config's own options."""

    name: str
    metavar: str
    doc: str
    load: Callable[[str, dict[str, Any]], Any]
    "gives the config from the option's value and the fields that were given beside it"

    @property
    def parameter(self) -> inspect.Parameter:
        told = typer.Option(help=self.doc, metavar=self.metavar)
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, kind, default=None, annotation=Annotated[str, told])


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
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in list(inspect.signature(function).parameters.values())[len(groups) :]
        ]
        required = {
            p.name: p.name.upper() if p.name in arguments else _spelled(p.name)
            for p in fields
            if p.default is inspect.Parameter.empty
        }
        if load_from:
            own.append(load_from.parameter)
            # whether they are there is looked at once it is known that they are needed
            fields = [p.replace(default=None) if p.name in required else p for p in fields]
        _refuse_twins(*groups, own)

        def command(ctx: typer.Context, **values: Any) -> None:
            chosen = [_given(values, group) for group in groups]
            source = values.pop(load_from.name) if load_from else None
            try:
                if load_from and source is not None:
                    configs = [load_from.load(source, chosen[0])]
                else:
                    if load_from:
                        _refuse_missing(
                            [option for n, option in required.items() if n not in chosen[0]],
                            load_from,
                        )
                    configs = [t(**c) for t, c in zip(config_types, chosen, strict=True)]
            except ValueError as error:
                raise with_variables(error, ctx, [p.name for p in fields]) from error
            function(*configs, **values)

        positional = [p for p in fields if p.name in arguments]
        options = [p for p in fields if p.name not in arguments]
        options.sort(key=lambda p: _rank(p, tuple(first or ())))
        context = inspect.Parameter("ctx", _KEYWORD, annotation=typer.Context)
        parameters = [context, *positional, *options, *own]
        command.__name__ = function.__name__
        command.__doc__ = function.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by Typer
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def field_docs(config_type: type) -> dict[str, str]:
    """The literal under each field of a dataclass: its own fields first, then inherited ones."""
    docs: dict[str, str] = {}
    for cls in filter(dataclasses.is_dataclass, config_type.__mro__):
        docs = {**docs, **{n: doc for n, doc in _own_docs(cls).items() if n not in docs}}
    return docs


def field_groups(config_type: type) -> dict[str, str]:
    """The group of each field: the `group` of the class that defines it."""
    groups: dict[str, str] = {}
    for cls in filter(dataclasses.is_dataclass, config_type.__mro__):
        for name in _own_docs(cls):
            groups.setdefault(name, cls.__dict__.get("group", DEFAULT_GROUP))
    return groups


def _own_docs(config_type: type) -> dict[str, str]:
    """The literal under each field that this very class defines."""
    definition = _classes(sys.modules[config_type.__module__])[config_type.__name__]
    docs = {}
    for field, doc in zip(definition.body, definition.body[1:], strict=False):
        match field, doc:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(text))
            ):
                docs[name] = text
    return docs


@functools.cache
def _classes(module: types.ModuleType) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(module))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def count(text: str) -> int:
    """A whole number that may end in k, M, G, B or T, with a B for bytes: 200k, 1.5M, 20GB."""
    suffix = text.lstrip("0123456789._eE+-")
    try:
        value = float(text.removesuffix(suffix).replace("_", "")) * _FACTORS[suffix]
    except (ValueError, KeyError):
        value = 0.5
    if not value.is_integer():
        raise typer.BadParameter(f"takes a whole number such as 4096, 200k or 10M, got {text!r}")
    return int(value)


def option(name: str, value: Any) -> str:
    """How a field is set to a value on the command line."""
    if isinstance(value, bool):
        return _spelled(name) if value else f"--no-{_spelled(name)[2:]}"
    return f"{_spelled(name)} {_shown(value)}"


def _rank(parameter: inspect.Parameter, first: tuple[str, ...]) -> tuple[int, bool]:
    """The place of an option in help: those in `first`, then required ones, then the others."""
    index = first.index(parameter.name) if parameter.name in first else len(first)
    return index, parameter.default is not inspect.Parameter.empty


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


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
            text += f"; example: {_spelled(name)} {first[name]}"
            parameters.append(_option(field, hint, text, FIRST_GROUP))
        else:
            parameters.append(_option(field, hint, text, groups[name]))
    return parameters


def _argument(field: "dataclasses.Field[Any]", hint: Any, text: str) -> inspect.Parameter:
    parser = _parser(_element(hint), several=False)
    info = typer.Argument(help=text, parser=parser, metavar=field.name.upper())
    return _parameter(field, Annotated[str, info])


def _option(field: "dataclasses.Field[Any]", hint: Any, text: str, group: str) -> inspect.Parameter:
    element, several = _element(hint), typing.get_origin(hint) is tuple
    if element is bool:
        return _parameter(field, Annotated[bool, typer.Option(help=text, rich_help_panel=group)])
    info = typer.Option(
        help=text,
        parser=_parser(element, several),
        metavar=_metavar(element, several),
        rich_help_panel=group,
    )
    return _parameter(field, Annotated[list[str] if several else str, info])


def _parameter(field: "dataclasses.Field[Any]", annotation: Any) -> inspect.Parameter:
    # Typer gets None as the default and the config fills in its own: so options that were given
    # can be told apart from those that were not, as `LoadConfigFrom` needs.
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else None
    return inspect.Parameter(field.name, _KEYWORD, default=default, annotation=annotation)


def _default(field: "dataclasses.Field[Any]") -> str:
    """The default as help shows it; where it is None, the field's doc says what that means."""
    value = field.default
    if value is dataclasses.MISSING or value is None or value is False or value == ():
        return ""
    return f" {ON}" if value is True else f" [default: {_shown(value)}]"


def _element(hint: Any) -> Any:
    """The type of one value: of `tuple[int, ...]` int, of `float | None` float."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return typing.get_args(hint)[0] if origin is tuple else hint


def _parser(element: Any, several: bool) -> Callable[[str], Any]:
    one = _one_parser(element)
    return (
        (lambda text: tuple(one(t.strip()) for t in text.split(",") if t.strip()))
        if several
        else one
    )


def _one_parser(element: Any) -> Callable[[str], Any]:
    if typing.get_origin(element) is Literal:
        return lambda text: _choice(text, typing.get_args(element))
    parsers: dict[Any, Callable[[str], Any]] = {int: count, float: _number, str: str}
    return parsers[element]


def _choice(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise typer.BadParameter(f"takes one of {', '.join(choices)}, got {text!r}")
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"takes a number, got {text!r}") from None


def _metavar(element: Any, several: bool) -> str:
    if typing.get_origin(element) is Literal:
        name = "|".join(typing.get_args(element))
    else:
        name = {int: "COUNT", float: "NUMBER", str: "TEXT"}[element]
    return f"{name},..." if several else name


def _shown(value: Any) -> str:
    """A value as a user writes it: `a,b`, `10M`."""
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    if isinstance(value, int) and value >= 10_000:
        for letter, factor in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
            if value % factor == 0:
                return f"{value // factor}{letter}"
    return str(value)


def _refuse_twins(*groups: Sequence[inspect.Parameter]) -> None:
    counts = Counter(p.name for group in groups for p in group)
    twins = [name for name, count in counts.items() if count > 1]
    assert not twins, f"options defined twice: {sorted(twins)}"


def _given(values: dict[str, Any], group: Sequence[inspect.Parameter]) -> dict[str, Any]:
    """Take a config's fields out of the values: those that were given."""
    given = {}
    for name in (parameter.name for parameter in group):
        value = values.pop(name)
        if value is None or value == []:
            continue  # not given; an empty list that was given is for the config to judge
        if isinstance(value, list):  # --k 16,32 --k 64 arrives as [(16, 32), (64,)]
            value = tuple(x for group in value for x in group)
        given[name] = value
    return given


def _refuse_missing(missing: Sequence[str], load_from: LoadConfigFrom) -> None:
    if missing:
        raise UsageError(
            f"{', '.join(missing)} must be given, or --{load_from.name} {load_from.metavar}"
        )
