"""Coder configs in the JSON of coders and runs, those of version 1 included."""

from collections.abc import Mapping
from typing import Any

from mpcache.errors import UsageError
from mptrain.config.coder import CoderConfig
from mptrain.config.sides import hookpoint_sides

# options of version 1 that do not exist any more, with the value that turned them off
_REMOVED_OPTIONS = {"ban_chosen": False, "atom_dropout": 0.0}


def coder_config_from_json(fields: Mapping[str, Any]) -> CoderConfig:
    """The config that `dataclasses.asdict` and JSON made these fields of; a `name` is ignored.

    Raises:
        UsageError: the coder was trained with an option that does not exist any more.
        TypeError: fields are missing, or unknown.
    """
    values = {name: value for name, value in fields.items() if name != "name"}
    if "hookpoint" in values:
        values = _from_version_1(values)
    for name in ("inputs", "targets"):
        values[name] = tuple(values.get(name, ()))
    return CoderConfig(**values)


def _from_version_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 named one hookpoint, whose sides the kind implied."""
    kept = dict(values)
    for name, off in _REMOVED_OPTIONS.items():
        if kept.pop(name, off) != off:
            raise UsageError(
                f"the coder was trained with {name}, which this mptrain does not have; "
                "use the mptrain that made it"
            )
    return {**hookpoint_sides(kept.pop("hookpoint"), kept["kind"]), **kept}
