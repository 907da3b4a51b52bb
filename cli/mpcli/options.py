"""Command-line options from a config dataclass, and the config back from the options.

Typer knows functions, not dataclasses: a command's signature is built here from the fields' types,
defaults and docs, so that no default and no help text is written twice.
"""

import ast
import dataclasses
import inspect
import types
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import typer

from mpcache.errors import UsageError

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
    *config_types: type, arguments: Sequence[str] = (), instead: LoadConfigFrom | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make `function(config..., own options...)` a command whose options are the configs' fields.

    Fields named in `arguments` become positional arguments; the rest become options. With
    `instead`, which is for one config, no field is required where that option is given.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        groups = [_parameters(config_type, arguments) for config_type in config_types]
        fields = [parameter for group in groups for parameter in group]
        own = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in list(inspect.signature(function).parameters.values())[len(groups) :]
        ]
        required = {
            p.name: p.name.upper() if p.name in arguments else f"--{p.name.replace('_', '-')}"
            for p in fields
            if p.default is inspect.Parameter.empty
        }
        if instead:
            own.append(instead.parameter)
            # whether they are there is looked at once it is known that they are needed
            fields = [p.replace(default=None) if p.name in required else p for p in fields]
        _refuse_twins(*groups, own)

        def command(**values: Any) -> None:
            chosen = [_given(values, group) for group in groups]
            place = values.pop(instead.name) if instead else None
            if instead and place is not None:
                function(instead.load(place, chosen[0]), **values)
                return
            if instead:
                _refuse_missing(
                    [told for n, told in required.items() if n not in chosen[0]], instead
                )
            function(*(t(**c) for t, c in zip(config_types, chosen, strict=True)), **values)

        positional = [p for p in fields if p.name in arguments]
        options = [p for p in fields if p.name not in arguments]
        options.sort(key=lambda p: p.default is not inspect.Parameter.empty)  # required ones first
        parameters = [*positional, *own, *options]
        command.__name__ = function.__name__
        command.__doc__ = function.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by Typer
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def field_docs(config_type: type) -> dict[str, str]:
    """The literal under each field of a dataclass: its own fields first, then inherited ones."""
    classes = [one for one in config_type.__mro__ if dataclasses.is_dataclass(one)]
    return {name: doc for one in classes for name, doc in _own_docs(one).items()}


def _own_docs(config_type: type) -> dict[str, str]:
    (definition,) = ast.parse(inspect.getsource(config_type)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, doc in zip(definition.body, definition.body[1:], strict=False):
        match field, doc:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(text))
            ):
                docs[name] = text
    return docs


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


def counts(texts: Sequence[str]) -> list[int]:
    """The whole numbers of an option that takes several: `a,b`, or the option repeated."""
    parse = _parser(int, several=True)
    return [number for text in texts for number in parse(text)]


def choices(texts: Sequence[str], literal: Any) -> list[Any]:
    """The values of a Literal in an option that takes several, as for `counts`."""
    parse = _parser(literal, several=True)
    return [value for text in texts for value in parse(text)]


def option(name: str, value: Any) -> str:
    """How a field is set to a value on the command line."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed} {_shown(value)}"


def _parameters(config_type: type, arguments: Sequence[str]) -> list[inspect.Parameter]:
    docs, hints = field_docs(config_type), typing.get_type_hints(config_type)
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    assert docs.keys() == fields.keys(), f"no doc: {fields.keys() ^ docs.keys()}"
    return [
        _parameter(fields[name], hints[name], doc, name in arguments) for name, doc in docs.items()
    ]


def _parameter(
    field: "dataclasses.Field[Any]", hint: Any, doc: str, positional: bool
) -> inspect.Parameter:
    required = field.default is dataclasses.MISSING
    element, several = _element(hint), typing.get_origin(hint) is tuple
    info = typer.Argument if positional else typer.Option
    # a default is only shown, and filled in by the config: so what was given is told apart from it
    shown = "" if required or field.default in (None, ()) else _default(field.name, field.default)
    annotation: Any
    if element is bool:
        annotation = Annotated[bool, info(help=doc + shown)]
    else:
        metavar = field.name.upper() if positional else _metavar(element, several)
        told = info(help=doc + shown, parser=_parser(element, several), metavar=metavar)
        annotation = Annotated[list[str] if several else str, told]
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=annotation,
    )


def _default(name: str, value: Any) -> str:
    shown = option(name, value).removeprefix("--") if isinstance(value, bool) else _shown(value)
    return f" [default: {shown}]"


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


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


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


def _refuse_missing(missing: Sequence[str], instead: LoadConfigFrom) -> None:
    if missing:
        raise UsageError(
            f"{', '.join(missing)} must be given, or --{instead.name} {instead.metavar}"
        )
