"""Which parts still lack their tokens. Each split gets its parts one after the other."""

from collections.abc import Callable, Collection

from mpcache.config import split_of

_FIRST_PARTS = (0, 1)  # of the training and of the validation split


def next_part(part: int, validation_every: int) -> int:
    """The next part of the same split."""
    if split_of(part, validation_every) == "validation":
        return part + validation_every
    return part + 1 if split_of(part + 1, validation_every) == "train" else part + 2


def first_missing_parts(
    committed: Collection[int],
    parts_wanted: int,
    validation_every: int,
    ends_split: Callable[[int], bool],
) -> dict[int, int | None]:
    """The first wanted part of each split that lacks tokens -> the part before it in that split.

    The token plan is complete when nothing is missing. A split has fewer parts than are wanted when
    the dataset ended: `ends_split(part)` says so of a committed part, and is asked at most once for
    each split, because the answer takes a read. The first part of a split follows None.
    """
    missing: dict[int, int | None] = {}
    for first in _FIRST_PARTS:
        previous, part = None, first
        while part in committed:
            previous, part = part, next_part(part, validation_every)
        is_wanted = part < parts_wanted
        if is_wanted and not (previous is not None and ends_split(previous)):
            missing[part] = previous
    return missing
