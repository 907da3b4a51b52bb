"""What can be wrong with a store, and what mends it."""

from dataclasses import dataclass
from typing import Literal

Fault = Literal[
    "missing", "truncated", "overlong", "flipped", "mark", "metadata", "settings", "linked",
    "uncommitted", "foreign", "leftover",
]  # fmt: skip
_HARMLESS = ("uncommitted", "foreign", "leftover")
_REPAIR = "mpcache repair STORE"
REMEDIES: dict[Fault, str] = {
    "missing": _REPAIR,
    "truncated": _REPAIR,
    "overlong": _REPAIR,
    "flipped": _REPAIR,
    "mark": _REPAIR,
    "metadata": _REPAIR,
    "settings": "take store.json from a copy of the store: it never changes",
    "linked": f"move the link away, then {_REPAIR}",
    "uncommitted": "the mpcache collect command that wrote it commits it anew",
    "foreign": "move it out of the store",
    "leftover": f"{_REPAIR} --delete-leftovers, when nothing writes to the store",
}


@dataclass(frozen=True)
class Finding:
    """One thing in a store that is not as it should be."""

    fault: Fault
    path: str
    told: str
    mark: tuple[int, str] | None = None
    "part and array of the mark that is damaged, or whose object is"

    @property
    def damaging(self) -> bool:
        """Whether committed data is affected; the rest of an interrupted run is not damage."""
        return self.fault not in _HARMLESS

    @property
    def remedy(self) -> str:
        """What mends it."""
        return REMEDIES[self.fault]
