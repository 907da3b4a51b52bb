"""Lengths of documents in the trials of document separation."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedConfig

CHUNK = 64  # tokens in the usual chunk of linear attention


def fit_to_context(lengths: Sequence[int], ctx_len: int) -> tuple[int, ...]:
    """The lengths, with the longest shortened so that all fit into a sequence."""
    kept = [*lengths[:ctx_len]]
    while sum(kept) > ctx_len:
        longest = kept.index(max(kept))
        rest = max(kept[:longest] + kept[longest + 1 :], default=1)
        kept[longest] = max(kept[longest] - (sum(kept) - ctx_len), min(rest, kept[longest] - 1))
    return tuple(kept)


def longest_setting(config: PreTrainedConfig, words: Sequence[str], ctx_len: int) -> int:
    """Tokens of the longest chunk or window that is shorter than `ctx_len`; at least CHUNK.

    Settings are chosen by the words in their names.
    """
    settings = config.get_text_config().to_dict()
    lengths = [
        length
        for name, value in settings.items()
        if any(word in name for word in words)
        for length in (value if isinstance(value, list | tuple) else [value])
        if type(length) is int and length < ctx_len
    ]
    return max([CHUNK, *lengths])


def length_dependent_rotary(settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Types of rotary embedding that change with the longest sequence, and from which length on."""
    rope: dict[str, Any] = settings.get("rope_parameters") or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        name = "original_max_position_embeddings"
        limit = parameters.get(name) or settings.get(name)
        if parameters.get("rope_type") == "dynamic":
            limit = limit or settings.get("max_position_embeddings")
        if parameters.get("rope_type") in ("dynamic", "longrope") and limit:
            yield parameters["rope_type"], int(limit)
