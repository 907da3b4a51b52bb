"""Checks that several configs share; each raises UsageError with field, value and remedy."""

from collections.abc import Mapping

from mpcache.errors import UsageError


def check_at_least(config: object, minima: Mapping[str, int]) -> None:
    """Refuse a field that is below its minimum; None is allowed."""
    for name, minimum in minima.items():
        if (value := getattr(config, name)) is not None and value < minimum:
            raise UsageError(f"{name} must be at least {minimum}, got {value}")


def check_cache_limit(cache_dir: str | None, cache_bytes: int | None) -> None:
    """Raise UsageError for cache_bytes without cache_dir, or below 1."""
    if cache_bytes is None:
        return
    if cache_bytes < 1:
        raise UsageError(f"cache_bytes must be at least 1, got {cache_bytes}")
    if cache_dir is None:
        raise UsageError("cache_bytes needs cache_dir, got none; give both, or remove cache_bytes")


def check_nonempty(name: str, values: tuple[object, ...]) -> None:
    """Refuse a list without values."""
    if not values:
        raise UsageError(f"{name} is empty; give at least one value")


def check_unique(name: str, values: tuple[object, ...]) -> None:
    """Refuse a list that has a value twice."""
    if len(set(values)) < len(values):
        listed = ",".join(map(str, values))
        raise UsageError(
            f"{name} must have each value only once, got {listed}; remove the repeated value"
        )
