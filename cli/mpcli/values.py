"""Values of options: read from text, and written as a user writes them."""

import types
import typing
from collections.abc import Callable
from typing import Any, Literal

import typer

_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_FACTORS |= {f"{letter}B": _FACTORS[letter] for letter in "kMGT"}  # of bytes


def count(text: str) -> int:
    """A whole number that may end in k, M, G, B or T, with a B for bytes: 200k, 1.5M, 20GB."""
    suffix = text.lstrip("0123456789._eE+-")
    try:
        value = float(text.removesuffix(suffix).replace("_", "")) * _FACTORS[suffix]
    except (ValueError, KeyError):
        value = 0.5
    if not value.is_integer():
        raise typer.BadParameter(f"must be a whole number such as 4096, 200k or 10M, got {text!r}")
    return int(value)


def option(name: str, value: Any) -> str:
    """How the command line sets a field to a value: `--k 16`, `--no-bias`."""
    if isinstance(value, bool):
        return spelled(name) if value else f"--no-{spelled(name)[2:]}"
    return f"{spelled(name)} {shown(value)}"


def spelled(name: str) -> str:
    """The option of a field: `--batch-rows`."""
    return "--" + name.replace("_", "-")


def is_list(hint: Any) -> bool:
    """Whether an option takes several values."""
    return typing.get_origin(hint) is tuple


def element_of(hint: Any) -> Any:
    """The type of one value: of `tuple[int, ...]` int, of `float | None` float."""
    if _is_union(hint):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return typing.get_args(hint)[0] if is_list(hint) else hint


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def parser_of(hint: Any) -> Callable[[str], Any]:
    """What turns an option's text into a value; for a tuple, the text is `a,b`."""
    parse = _element_parser(element_of(hint))
    if not is_list(hint):
        return parse
    return lambda text: tuple(parse(part.strip()) for part in text.split(",") if part.strip())


def _element_parser(element: Any) -> Callable[[str], Any]:
    if _is_union(element):  # a word, or a number
        number, word = typing.get_args(element)
        parse, words = _element_parser(number), typing.get_args(word)
        return lambda text: text if text in words else parse(text)
    if typing.get_origin(element) is Literal:
        return lambda text: _choice(text, typing.get_args(element))
    parsers: dict[Any, Callable[[str], Any]] = {int: count, float: _number, str: str}
    return parsers[element]


def _choice(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise typer.BadParameter(f"must be one of {', '.join(choices)}, got {text!r}")
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a number such as 0.5 or 1e-3, got {text!r}") from None


def metavar_of(hint: Any) -> str:
    """How help writes the values of an option: COUNT, TEXT,... or the choices."""
    element = element_of(hint)
    kinds = typing.get_args(element) if _is_union(element) else (element,)
    name = "|".join(map(_metavar_of_kind, kinds))
    return f"{name},..." if is_list(hint) else name


def _metavar_of_kind(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    return {int: "COUNT", float: "NUMBER", str: "TEXT"}[kind]


def shown(value: Any) -> str:
    """A value as a user writes it: `a,b`, `10M`."""
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    if isinstance(value, int) and value >= 10_000:
        for letter, factor in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
            if value % factor == 0:
                return f"{value // factor}{letter}"
    return str(value)
