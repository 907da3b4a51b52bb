"""What a collection wants of a store, and which of it is missing. Nothing here writes."""

from dataclasses import dataclass

from mpcache.collection.jobs import Job
from mpcache.model.hookpoint_patterns import Side
from mpcache.parallel.config import ALL_PARTS, Share
from mpcache.store.object_paths import TOKENS, acts_array
from mpcache.store.reader import Store


def side_array(side: Side) -> str:
    """The name of the array that holds the activations of a side."""
    return acts_array(side.hookpoint, side.side)


@dataclass(frozen=True)
class CollectionPlan:
    """The sides and parts that a collection wants. Its methods look at a store's marks only."""

    sides: tuple[Side, ...]
    parts_wanted: int
    "parts that hold the rows wanted, if the dataset has as many"
    share: Share = ALL_PARTS
    "the parts that this job collects"

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays of activations."""
        return tuple(side_array(side) for side in self.sides)

    def parts(self, store: Store) -> tuple[int, ...]:
        """Wanted parts whose tokens are committed, in order."""
        return tuple(part for part in store.part_numbers(TOKENS) if part < self.parts_wanted)

    def parts_of_share(self, store: Store) -> tuple[int, ...]:
        return tuple(part for part in self.parts(store) if self.share.includes(part))

    def missing_sides(self, store: Store, part: int) -> tuple[Side, ...]:
        return tuple(
            side for side in self.sides if part not in store.part_numbers(side_array(side))
        )

    def complete_parts(self, store: Store) -> tuple[int, ...]:
        """Parts of the share that have all wanted sides."""
        return tuple(p for p in self.parts_of_share(store) if not self.missing_sides(store, p))

    def jobs(self, store: Store) -> tuple[Job, ...]:
        """What the parts of the share lack, in the order of parts."""
        missing = {part: self.missing_sides(store, part) for part in self.parts_of_share(store)}
        return tuple(
            Job(part, store.mark(part, TOKENS).rows, sides)
            for part, sides in missing.items()
            if sides
        )

    def uncommitted(self, store: Store, jobs: tuple[Job, ...]) -> tuple[Job, ...]:
        """Jobs that still miss a side."""
        return tuple(
            job for job in jobs if set(job.sides) & set(self.missing_sides(store, job.part))
        )

    def is_complete(self, store: Store) -> bool:
        """Whether the store holds all that is wanted, as far as the dataset has it."""
        return store.index.has_planned(self.parts_wanted) and not self.jobs(store)
