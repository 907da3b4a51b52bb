"""Objects in a store's folder that no mark and no array accounts for."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from mpcache.maintenance.findings import Finding
from mpcache.maintenance.metadata_check import all_specs
from mpcache.storage.temporary_names import is_temporary
from mpcache.store.array_spec import GROUP
from mpcache.store.object_paths import STORE_FILE, parse_mark_path
from mpcache.store.reader import Store
from mpcache.untrusted_names import is_part


def find_strays(store: Store) -> Iterator[Finding]:
    """A finding for each object that no mark commits."""
    names = _KnownNames(store)
    for name in store.storage.object_names():
        if names.is_known(name):
            continue
        if store.storage.is_link(name):
            yield Finding("foreign", name, "a symbolic link, which mpcache does not follow")
        elif is_temporary(name):
            yield Finding("leftover", name, "a temporary file of an interrupted write")
        elif names.is_expected(name):
            yield Finding(
                "uncommitted", name, "written by a collection that has not finished this part"
            )
        else:
            yield Finding("foreign", name, "does not belong to a store")


class _KnownNames:
    """The names that marks and arrays account for. It lists none: there may be millions."""

    def __init__(self, store: Store) -> None:
        specs = list(all_specs(store))
        self._files = {STORE_FILE, *(name for _, spec in specs for name in spec.metadata(1))}
        self._arrays = {spec.name: (array, spec) for array, spec in specs}
        self._parts = {array: set(store.part_numbers(array)) for array in store.arrays}

    def is_known(self, name: str) -> bool:
        """Whether the store needs this object: a mark, an object of a mark, or metadata."""
        if name in self._files or parse_mark_path(PurePosixPath(name)) is not None:
            return True
        owner = self._array_and_part(name)
        return owner is not None and owner[1] in self._parts[owner[0]]

    def is_expected(self, name: str) -> bool:
        """Whether a collection that has not committed yet may have written it."""
        array, _, _ = name.removeprefix(f"{GROUP}/").rpartition("/c/")
        is_new = name.startswith(f"{GROUP}/") and array not in self._arrays
        return is_new or self._array_and_part(name) is not None

    def _array_and_part(self, name: str) -> tuple[str, int] | None:
        """Array and part of an object, if it has the name that an array gives it."""
        zarr_name, _, indices = name.removeprefix(f"{GROUP}/").rpartition("/c/")
        number = indices.split("/")[0]
        if zarr_name not in self._arrays or not is_part(number):
            return None
        array, spec = self._arrays[zarr_name]
        return (array, int(number)) if spec.object_path(int(number)) == name else None
