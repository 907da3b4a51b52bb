"""Reads what version 1 of a coder's files wrote, in the terms of version 2."""

from collections.abc import Mapping
from typing import Any

from mpcache.errors import UsageError
from mptrain.config.sides import hookpoint_sides

# options that do not exist any more, with the value that turned them off
_REMOVED_OPTIONS = {"ban_chosen": False, "atom_dropout": 0.0}
_TENSORS = {
    "W_MD": "encoder.W_MD",
    "U_MD": "encoder.U_MD",
    "encoder_MD": "encoder.encoder_MD",
    "encoder_bias_M": "encoder.bias_M",
    "V_ME": "decoder.V_ME",
    "S_ED": "decoder.S_ED",
    "threshold": "batch_threshold.threshold",
}


def upgrade_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A coder's config, which named one hookpoint; the kind implied its sides.

    Raises:
        UsageError: the coder was trained with an option that does not exist any more.
    """
    kept = dict(fields)
    for name, off in _REMOVED_OPTIONS.items():
        if kept.pop(name, off) != off:
            raise UsageError(
                f"the coder was trained with {name}, which this version of mptrain does not "
                "have; use the version that trained the coder"
            )
    return {**hookpoint_sides(kept.pop("hookpoint"), kept["kind"]), **kept}


def upgrade_description(description: Mapping[str, Any]) -> dict[str, Any]:
    """What `coder.json` held."""
    kept = dict(description)
    widths = {f"{side}_widths": [kept.pop(f"{side}_width")] for side in ("input", "target")}
    return {**kept, **widths, "format_version": 2}


def upgrade_tensor_name(name: str) -> str:
    """The name of a tensor in `coder.safetensors`, when a coder had no parts yet."""
    return _TENSORS.get(name, name)
