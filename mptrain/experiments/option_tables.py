"""The tables of an experiment file: the groups of the options of `mptrain fit`."""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from mptrain.config.coder import CoderConfig
from mptrain.config.coder_grid import FitConfig
from mptrain.config.run import RunConfig


def _table_of_option() -> dict[str, str]:
    """The table of each option: the group of the class that defines its field."""
    tables: dict[str, str] = {}
    for cls in FitConfig.__mro__:
        for name in inspect.get_annotations(cls):
            if "group" in cls.__dict__ and name != "group":
                tables.setdefault(name, cls.__dict__["group"].lower())
    return tables


TABLE_OF_OPTION: Mapping[str, str] = _table_of_option()
OPTION_TABLES = tuple(dict.fromkeys(TABLE_OF_OPTION.values()))

# where an option of `fit` is set that is not in a table of options
SET_ELSEWHERE: Mapping[str, str] = {
    "hookpoints": "hookpoints in [figures.NAME]",
    "input": "hookpoints in [figures.NAME]",
    "inputs": "hookpoints in [figures.NAME]",
    "target": "hookpoints in [figures.NAME]",
    "targets": "hookpoints in [figures.NAME]",
    "kind": "kind in [figures.NAME]",
    "k": "k in [figures.NAME]",
    "seed": "seeds in [figures.NAME]",
    "arch": "arch in [variants.NAME], or its name in variants of a figure",
    "preset": "its name in variants of a figure",
    "store": "store above the tables",
    "run": "folder above the tables",
}
_UNSUPPORTED = {"spread"}  # divides work between the processes of torchrun; a sweep is one process

RUN_OPTIONS: Mapping[str, Any] = {
    name: hint
    for name, hint in get_type_hints(RunConfig).items()
    if name in {f.name for f in fields(RunConfig)} - SET_ELSEWHERE.keys() - _UNSUPPORTED
}
CODER_OPTIONS: Mapping[str, Any] = {
    name: hint
    for name, hint in get_type_hints(CoderConfig).items()
    if name in {f.name for f in fields(CoderConfig)} - SET_ELSEWHERE.keys()
}


def options_in(table: str) -> dict[str, Any]:
    """The options that are set in a table, with their types."""
    options = {**RUN_OPTIONS, **CODER_OPTIONS}
    return {name: hint for name, hint in options.items() if TABLE_OF_OPTION[name] == table}


def tabulate(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values of options, each in its table."""
    tables: dict[str, dict[str, Any]] = {table: {} for table in OPTION_TABLES}
    for name, value in values.items():
        tables[TABLE_OF_OPTION[name]][name] = value
    return tables
