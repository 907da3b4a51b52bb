"""Checks that several configs share; each raises ValueError with field, value and remedy."""

from collections.abc import Mapping

from mpcache.errors import UsageError


def check_at_least(config: object, minima: Mapping[str, int]) -> None:
    """Refuse a field that is below its minimum; None is allowed."""
    for name, minimum in minima.items():
        if (value := getattr(config, name)) is not None and value < minimum:
            raise UsageError(f"{name} must be at least {minimum}, got {value}")


def check_cache_limit(tier: str | None, tier_bytes: int | None) -> None:
    """Refuse a limit of a read cache that is not there, and one below 1 byte."""
    if tier_bytes is not None and (tier is None or tier_bytes < 1):
        raise UsageError(
            f"tier_bytes must be at least 1, and goes with a tier, got tier_bytes={tier_bytes}, "
            f"tier={tier}; name the tier's folder too"
        )


def check_nonempty(name: str, values: tuple[object, ...]) -> None:
    """Refuse a list without values."""
    if not values:
        raise UsageError(f"{name} is empty; name at least one value")


def check_unique(name: str, values: tuple[object, ...]) -> None:
    """Refuse a list that has a value twice."""
    if len(set(values)) < len(values):
        listed = ",".join(map(str, values))
        raise UsageError(f"{name} must name each value once, got {listed}")
