"""JSON files that hold a digest of themselves."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mpcache.errors import DamagedStoreError


def canonical_json(content: Mapping[str, Any]) -> bytes:
    """The one spelling of a JSON file in a store."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def json_round_trip(content: Any) -> Any:
    """Content as JSON gives it back: tuples become lists."""
    return json.loads(canonical_json(content))


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical spelling, in hexadecimal."""
    return hashlib.sha256(canonical_json(content)).hexdigest()


def seal(content: Mapping[str, Any]) -> bytes:
    """JSON with a digest of itself."""
    return canonical_json({**content, "digest": digest(content)})


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """Content of sealed JSON, without its digest.

    Raises DamagedStoreError where the digest differs, or the spelling is not that of `seal`.
    """
    try:
        content: dict[str, Any] = json.loads(data)
        claimed = content.pop("digest")
        is_intact = claimed == digest(content) and seal(content) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        is_intact = False
    if not is_intact:
        raise DamagedStoreError(f"{name} is damaged: its content does not match its own checksum")
    return content
