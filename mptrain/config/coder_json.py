"""Coder configs in the JSON of coders and runs."""

from collections.abc import Mapping
from typing import Any

from mptrain.config.coder import CoderConfig
from mptrain.config.coder_version_1 import upgrade_config


def coder_config_from_json(fields: Mapping[str, Any]) -> CoderConfig:
    """The config that `dataclasses.asdict` and JSON made these fields of; a `name` is ignored.

    Raises:
        UsageError: the coder was trained with an option that does not exist any more.
        TypeError: fields are missing, or unknown.
    """
    values = {name: value for name, value in fields.items() if name != "name"}
    if "hookpoint" in values:
        values = upgrade_config(values)
    for name in ("inputs", "targets"):
        values[name] = tuple(values.get(name, ()))
    return CoderConfig(**values)
