"""A settings file: TOML whose keys and types are those of dataclasses. Errors name file and key."""

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from mpcache.errors import UsageError

_Config = TypeVar("_Config")
Key = tuple[str, ...]
EXTENDS = "extends"
_HEADER = re.compile(r"\s*\[([^\[\]]+)\]")
_ENTRY = re.compile(r"\s*([\w.\"'-]+)\s*=")


@dataclass(frozen=True)
class Layer:
    """Settings of one origin; those of a later layer stand for those of an earlier one."""

    origin: str
    tables: Mapping[str, Any]
    text: str = ""

    def place(self, key: Key) -> str:
        """Where a key is set, with its line in a TOML file."""
        line = next((number for number, found in _keys(self.text) if found == key), None)
        return self.origin if line is None else f"{self.origin}, line {line}"


class Settings:
    """The tables of a file, over those of the file that it extends, under single changes."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.tables: dict[str, Any] = {}
        for layer in layers:
            self.tables = _merged(self.tables, layer.tables)
        self.tables.pop(EXTENDS, None)

    def wrong(self, key: Key, told: str) -> ValueError:
        """The error to raise about a key, or about the table that should have it."""
        for place in (key[:length] for length in range(len(key), -1, -1)):
            for layer in reversed(self.layers):
                if _has(layer.tables, place):
                    return ValueError(f"{layer.place(place)}: {'.'.join(key) or 'it'} {told}")
        raise AssertionError("every layer has the empty key")

    def table(self, key: Key) -> Mapping[str, Any]:
        """A table, empty where there is none."""
        found: Any = self.tables
        for part in key:
            found = found.get(part, {})
            if not isinstance(found, dict):
                raise self.wrong(key, f"must be a table, got {found!r}; write [{'.'.join(key)}]")
        return typing.cast(Mapping[str, Any], found)

    def values(
        self, key: Key, hints: Mapping[str, Any], *, beside: Sequence[str] = ()
    ) -> dict[str, Any]:
        """What a table sets, each key known and of its type; but for the keys `beside` them."""
        found = {}
        for name, value in self.table(key).items():
            if name in beside:
                continue
            if name not in hints:
                raise self.wrong((*key, name), unknown(name, [*hints, *beside]))
            try:
                found[name] = _typed(value, hints[name])
            except TypeError as error:
                raise self.wrong((*key, name), str(error)) from None
        return found

    def build(
        self, key: Key, config_type: type[_Config], *, beside: Sequence[str] = (), **given: Any
    ) -> _Config:
        """A config from a table; fields in `given` are not the file's to set."""
        hints = typing.get_type_hints(config_type)
        own = [f for f in dataclasses.fields(config_type) if f.name not in given]  # type: ignore[arg-type]  # a dataclass
        own_hints = {field.name: hints[field.name] for field in own}
        values = self.values(key, own_hints, beside=beside)
        for field in own:
            is_required = field.default is MISSING and field.default_factory is MISSING
            if is_required and field.name not in values:
                told = f"is missing; it takes {_words(own_hints[field.name])}"
                raise self.wrong((*key, field.name), told)
        try:
            return config_type(**values, **given)
        except ValueError as error:
            raise self.wrong(key, f"cannot be so: {error}") from None


def read_settings(path: Path, changes: Sequence[str] = ()) -> Settings:
    """A TOML file (or JSON of the same tables) with what it extends, and changes `table.key=value`.

    Raises:
        ValueError: no such file, one that cannot be read, or a change that is none.
    """
    return Settings([*_layers(path, ()), *map(_change, changes)])


def _layers(path: Path, above: tuple[Path, ...]) -> list[Layer]:
    """The file after those that it extends, which are beside it."""
    if path.resolve() in above:
        raise UsageError(f"{path} extends itself; take the key {EXTENDS} out of one of its files")
    try:
        text = path.read_text(encoding="utf-8")
        tables = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}; name a TOML file") from None
    layer = Layer(str(path), tables, "" if path.suffix == ".json" else text)
    base = tables.get(EXTENDS)
    if base is None:
        return [layer]
    if not isinstance(base, str):
        raise UsageError(f"{layer.place((EXTENDS,))}: {EXTENDS} takes a file's name, got {base!r}")
    return [*_layers(path.parent / base, (*above, path.resolve())), layer]


def _change(text: str) -> Layer:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set takes table.key=value, for instance fit.rows=100000, got {text!r}")
    tables: Any = _toml_value(value)
    for part in reversed(key.split(".")):
        tables = {part: tables}
    return Layer(f"--set {text}", tables)


def _toml_value(text: str) -> Any:
    """The value as TOML would read it; what it could not read is text without its quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(below[name], value)
        for name, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(name), dict)
    }
    return {**below, **above, **both}


def _has(tables: Any, key: Key) -> bool:
    for part in key:
        if not isinstance(tables, dict) or part not in tables:
            return False
        tables = tables[part]
    return True


def _keys(text: str) -> Iterator[tuple[int, Key]]:
    """Each key that a TOML text sets on a line of its own, and each table that it opens."""
    table: Key = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = _split(header[1])
            yield number, table
        elif entry := _ENTRY.match(line):
            yield number, (*table, *_split(entry[1]))


def _split(dotted: str) -> Key:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def unknown(name: str, known: Sequence[str]) -> str:
    """What to tell of a name that is none of those known."""
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"is unknown; {meant}known: {', '.join(known)}"


def _typed(value: Any, hint: Any) -> Any:
    """The value as the type wants it: lists become tuples, whole numbers floats. Else TypeError."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        found = _as_one(value, option)
        if found is not MISSING:
            return found
    raise TypeError(f"takes {_words(hint)}, got {value!r}")


def _as_one(value: Any, hint: Any) -> Any:
    """The value as this type; MISSING where it is of another one."""
    if typing.get_origin(hint) is Literal:
        return value if value in typing.get_args(hint) else MISSING
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            return MISSING
        found = tuple(_as_one(one, typing.get_args(hint)[0]) for one in value)
        return MISSING if MISSING in found else found
    if hint is float and type(value) is int:
        return float(value)
    return value if type(value) is hint else MISSING


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _words(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_words(h) for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if typing.get_origin(hint) is tuple:
        return f"a list, each of it {_words(typing.get_args(hint)[0])}"
    words = {str: "text in quotes", int: "a whole number such as 10_000_000", float: "a number"}
    return words.get(hint, "true or false")
