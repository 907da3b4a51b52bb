"""Dataclasses from a TOML file, with types checked; errors name the file, the line and the key."""

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
AUTO = "auto"
_HEADER = re.compile(r"\s*\[([^\[\]]+)\]")
_ENTRY = re.compile(r"\s*([\w.\"'-]+)\s*=")


@dataclass(frozen=True)
class SettingsLayer:
    """Settings from one origin: a file, or a change on the command line."""

    origin: str
    tables: Mapping[str, Any]
    text: str = ""
    "the TOML text; empty where lines cannot be named"

    def location(self, key: Key) -> str:
        """Where a key is set: the origin, with the line in a TOML file."""
        lines = (number for number, key_there in _keys_by_line(self.text) if key_there == key)
        line = next(lines, None)
        return self.origin if line is None else f"{self.origin}, line {line}"


class TomlSettings:
    """Tables of a file, merged with those of the file that it extends and with single changes.

    A value of a later layer replaces the value of an earlier layer.
    """

    def __init__(self, layers: Sequence[SettingsLayer]) -> None:
        self.layers = tuple(layers)
        self.tables: dict[str, Any] = {}
        for layer in layers:
            self.tables = _merged(self.tables, layer.tables)
        self.tables.pop(EXTENDS, None)

    def error(self, key: Key, message: str) -> UsageError:
        """An error about a key, located where the key is set, or the table that should have it."""
        for prefix in (key[:length] for length in range(len(key), -1, -1)):
            for layer in reversed(self.layers):
                if _has_key(layer.tables, prefix):
                    subject = ".".join(key) or "the file"
                    return UsageError(f"{layer.location(prefix)}: {subject} {message}")
        raise AssertionError("every layer has the empty key")

    def table(self, key: Key) -> Mapping[str, Any]:
        """A table; empty if it is missing.

        Raises:
            UsageError: the key has a value that is no table.
        """
        table: Any = self.tables
        for part in key:
            table = table.get(part, {})
            if not isinstance(table, dict):
                raise self.error(key, f"must be a table, got {table!r}; write [{'.'.join(key)}]")
        return typing.cast(Mapping[str, Any], table)

    def values(
        self, key: Key, hints: Mapping[str, Any], *, beside: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The values of a table, each checked against its type; keys in `beside` are left out.

        Raises:
            UsageError: a key is unknown, or a value has another type.
        """
        values = {}
        for name, value in self.table(key).items():
            if name in beside:
                continue
            if name not in hints:
                raise self.error((*key, name), unknown_name_message(name, [*hints, *beside]))
            try:
                values[name] = _converted(value, hints[name])
            except TypeError as error:
                raise self.error((*key, name), str(error)) from None
        return values

    def build(
        self, key: Key, config_type: type[_Config], *, beside: Sequence[str] = (), **fixed: Any
    ) -> _Config:
        """A config from a table; the fields in `fixed` cannot be set in the file.

        Raises:
            UsageError: a key is unknown or missing, or the config refuses the values.
        """
        hints = typing.get_type_hints(config_type)
        fields = [f for f in dataclasses.fields(config_type) if f.name not in fixed]  # type: ignore[arg-type]  # a dataclass
        field_hints = {field.name: hints[field.name] for field in fields}
        values = self.values(key, field_hints, beside=beside)
        for field in fields:
            is_required = field.default is MISSING and field.default_factory is MISSING
            if is_required and field.name not in values:
                message = f"is missing; set it to {_type_in_words(field_hints[field.name])}"
                raise self.error((*key, field.name), message)
        try:
            return config_type(**values, **fixed)
        except UsageError as error:
            raise self.error(key, f"is invalid: {error}") from None


def read_settings(path: Path, changes: Sequence[str] = ()) -> TomlSettings:
    """Read a TOML file, or JSON of the same tables, and the file that it extends.

    Each change `table.key=value` replaces a value.

    Raises:
        UsageError: a file is missing or unreadable, or a change has another form.
    """
    return TomlSettings([*_layers(path, ()), *map(_parse_change, changes)])


def _layers(path: Path, above: tuple[Path, ...]) -> list[SettingsLayer]:
    """The layer of a file, after those of the files that it extends."""
    if path.resolve() in above:
        raise UsageError(
            f"{path} extends itself; remove the key {EXTENDS} from it or from a file that it "
            "extends"
        )
    try:
        text = path.read_text(encoding="utf-8")
        tables = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}; give a readable TOML file") from None
    layer = SettingsLayer(str(path), tables, "" if path.suffix == ".json" else text)
    base = tables.get(EXTENDS)
    if base is None:
        return [layer]
    if not isinstance(base, str):
        raise UsageError(
            f"{layer.location((EXTENDS,))}: {EXTENDS} must be a file name in quotes, got {base!r}"
        )
    return [*_layers(path.parent / base, (*above, path.resolve())), layer]


def _parse_change(text: str) -> SettingsLayer:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(
            f"--set must be TABLE.KEY=VALUE, got {text!r}; write for example --set data.rows=100000"
        )
    tables: Any = _toml_value(value)
    for part in reversed(key.split(".")):
        tables = {part: tables}
    return SettingsLayer(f"--set {text}", tables)


def _toml_value(text: str) -> Any:
    """The value as TOML reads it; text that is not TOML stands for itself, without quotes."""
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


def _has_key(tables: Any, key: Key) -> bool:
    for part in key:
        if not isinstance(tables, dict) or part not in tables:
            return False
        tables = tables[part]
    return True


def _keys_by_line(text: str) -> Iterator[tuple[int, Key]]:
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


def unknown_name_message(name: str, known: Sequence[str]) -> str:
    """The message about an unknown name, with the most similar known name."""
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"is unknown; {meant}known: {', '.join(known)}"


def _converted(value: Any, hint: Any) -> Any:
    """The value in the type; lists become tuples, whole numbers floats. TypeError: another type.

    TOML has no null: where the type has None, "auto" is None, which leaves the choice to mptrain.
    """
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if value == AUTO and _has_auto(options):
        return None
    for option in options:
        converted = _convert(value, option)
        if converted is not MISSING:
            return converted
    raise TypeError(f"must be {_type_in_words(hint)}, got {value!r}")


def _convert(value: Any, hint: Any) -> Any:
    """The value in this type, which is no union; MISSING if it has another type."""
    if typing.get_origin(hint) is Literal:
        return value if value in typing.get_args(hint) else MISSING
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            return MISSING
        items = tuple(_convert(item, typing.get_args(hint)[0]) for item in value)
        return MISSING if MISSING in items else items
    if hint is float and type(value) is int:
        return float(value)
    return value if type(value) is hint else MISSING


def _has_auto(options: Sequence[Any]) -> bool:
    return type(None) in options and str not in options


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _type_in_words(hint: Any) -> str:
    if _is_union(hint):
        options = typing.get_args(hint)
        words = [_type_in_words(option) for option in options if option is not type(None)]
        return " or ".join([*words, f'"{AUTO}"'] if _has_auto(options) else words)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if typing.get_origin(hint) is tuple:
        return f"a list, each item {_type_in_words(typing.get_args(hint)[0])}"
    words_of = {str: "text in quotes", int: "a whole number such as 10_000_000", float: "a number"}
    return words_of.get(hint, "true or false")
