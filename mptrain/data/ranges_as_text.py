"""Part numbers as text: {0, 1, 2, 8} is "0-2, 8"."""

from collections.abc import Collection


def format_ranges(numbers: Collection[int]) -> str:
    """Return the numbers as ascending ranges."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n for n in numbers if n + 1 not in numbers)
    pairs = zip(starts, ends, strict=True)
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in pairs)


def parse_ranges(text: str) -> set[int]:
    """Return the numbers that `format_ranges` wrote."""
    ranges = (item.partition("-") for item in text.split(", ") if item)
    return {n for first, _, last in ranges for n in range(int(first), int(last or first) + 1)}
