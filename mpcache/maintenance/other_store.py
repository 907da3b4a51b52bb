"""A copy of a damaged store, or the store that it was converted from, as the source of a repair."""

from collections.abc import Sequence

from mpcache.errors import UsageError
from mpcache.maintenance.convert import write_converted
from mpcache.maintenance.copy import copy_part
from mpcache.maintenance.repartition import Repartition
from mpcache.store.reader import Store, open_store
from mpcache.store.writer import Writer


class OtherStore:
    """Reads parts of a store from another store of the same rows.

    Raises:
        UsageError: the other store has other rows, or lacks an array.
    """

    def __init__(self, store: Store, where: str, arrays: Sequence[str]) -> None:
        self.source = open_store(where)
        if self.source.fingerprint != store.fingerprint:
            raise UsageError(
                f"{where} must hold the same rows as {store.storage}, got other rows; give a "
                f"copy of {store.storage}, or the store from which it was converted"
            )
        if missing := [array for array in arrays if array not in self.source.arrays]:
            raise UsageError(
                f"{where} must hold {missing[0]}, got no such array; give another copy, or "
                "remove --source so that the model computes the rows again"
            )
        self.repartition = Repartition(self.source, store.layout, arrays)

    def write_part(self, part: int, arrays: Sequence[str], writer: Writer) -> None:
        """Give some arrays of a part to a writer.

        Raises:
            DamagedStoreError: the other store is damaged too.
        """
        for array in arrays:
            if self.repartition.is_copy(array):
                copy_part(self.source, writer, (part, array))
            else:
                write_converted(self.repartition, writer, part, array)

    def close(self) -> None:
        """Nothing stays open."""
