"""What can be wrong with a store, and how to repair each fault."""

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
    "settings": "copy store.json from a copy of the store; the file never changes",
    "linked": f"move the link out of the store, then run {_REPAIR}",
    "uncommitted": "to complete the part, run its mpcache collect command again",
    "foreign": "move the object out of the store",
    "leftover": f"run {_REPAIR} --delete-leftovers while nothing writes to the store",
}


@dataclass(frozen=True)
class Finding:
    """One fault of a store."""

    fault: Fault
    path: str
    "name of the object in the store"
    message: str
    mark: tuple[int, str] | None = None
    "part and array of the mark that is damaged, or whose object is damaged"

    @property
    def is_damage(self) -> bool:
        """Whether committed data is affected. Leftovers of an interrupted run are no damage."""
        return self.fault not in _HARMLESS

    @property
    def remedy(self) -> str:
        """A command, or what to do by hand."""
        return REMEDIES[self.fault]
