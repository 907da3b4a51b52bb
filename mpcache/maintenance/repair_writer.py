"""A writer that puts back what was committed, where what it is given proves to be just that.

The proof is the mark, which holds the digests of what was committed; or, where the mark itself is
damaged, an object of it that is given again bit for bit; rows need none. Norms and moments follow
from activations, but for their last bits, which differ between processors and versions: where the
activations are equal it is the same part, and what is undamaged of it stays. Anything else is
written only if that was asked for. A new mark says what it replaces. Objects come first and the
mark last, each all or nothing: stopped at any moment, a part is damaged as before, or whole.
"""

import functools
import socket
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xxhash

from mpcache.errors import DamagedStoreError
from mpcache.store.format import (
    POSITION,
    SEQUENCE,
    array_specs,
    check_mark,
    digest,
    mark_path,
    seal,
    unseal,
)
from mpcache.store.reader import Store
from mpcache.store.writer import Writer, encode_object, object_matches, values_digest
from mpcache.store.zarr_codec import ArraySpec

Outcome = Literal["mended", "mark rebuilt", "rewritten", "other bits", "left"]
_Given = Mapping[str, Callable[[], Iterable[bytes]]]

_OWN = ("objects", "host", "time", "attempt", "replaces")  # what each mark says of itself


@dataclass(frozen=True)
class Mended:
    """What became of one damaged mark and its objects."""

    part: int
    array: str
    outcome: Outcome
    told: str

    @property
    def is_whole(self) -> bool:
        return self.outcome not in ("other bits", "left")


class RepairWriter(Writer):
    """Writes damaged parts of one store; `outcomes` has what became of each."""

    def __init__(
        self, store: Store, damaged: Iterable[tuple[int, str]], accept_other_bits: bool
    ) -> None:
        super().__init__(store.storage, store.layout, store.fingerprint)
        self.accepts = accept_other_bits
        self.outcomes: dict[tuple[int, str], Mended] = {}
        self._damaged = set(damaged)

    def note(self, part: int, array: str, outcome: Outcome, told: str) -> None:
        """Keep what became of a mark."""
        self.outcomes[part, array] = Mended(part, array, outcome, told)

    def _commit(
        self,
        part: int,
        array: str,
        rows: int,
        values: dict[ArraySpec, np.ndarray],
        more: Mapping[str, Any],
    ) -> None:
        if (part, array) in self._damaged:
            given = {
                s.object_path(part): functools.partial(encode_object, s, v)
                for s, v in values.items()
            }
            told = {s.object_path(part): _told(s, v) for s, v in values.items()}
            self._mend(part, array, rows, told, given, more)

    def adopt(
        self, part: int, array: str, claim: bytes, sources: Mapping[str, Iterable[bytes]]
    ) -> bool:
        """Put back what another store's mark commits, bytes alike."""
        name = mark_path(part, array)
        theirs = unseal(claim, name)
        check_mark(theirs, part, array, self.layout, self.fingerprint, name)
        told, more = theirs["objects"], {k: v for k, v in theirs.items() if k not in _OWN}
        given = {name: functools.partial(iter, pieces) for name, pieces in sources.items()}
        self._mend(part, array, theirs["rows"], told, given, more)
        return True

    def _mend(
        self,
        part: int,
        array: str,
        rows: int,
        told: Mapping[str, Any],
        given: _Given,
        more: Mapping[str, Any],
    ) -> None:
        main = array_specs(array, self.layout, 1)[0].object_path(part)  # the others follow from it
        mark = self._sound_mark(part, array)
        if mark is not None and _values(mark["objects"], main) == _values(told, main):
            objects = {**told, **self._kept(mark["objects"], told)}
            wrong = self._wrong(objects)
            if mark["objects"] == objects:
                self._put(given, objects, wrong)
                self.note(part, array, "mended", "equal to what was committed")
                return
            outcome, reason = _of_same_values(mark["objects"], objects)
        else:
            objects, wrong = dict(told), self._wrong(told)
            outcome, reason = self._ground(array, mark, objects, wrong, main)
        if outcome != "other bits":
            self._put(given, objects, wrong)
            former = self._former(part, array, mark, reason)
            new = self._described(part, array, rows, objects, {**more, "attempt": uuid.uuid4().hex})
            self._put_mark(part, array, seal({**new, "replaces": former}))
        self.note(part, array, outcome, reason)

    def _kept(self, committed: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
        """Objects that are as they were committed, though they come out otherwise here."""
        return {
            name: one
            for name, one in committed.items()
            if one["xxh3_128"] != told[name]["xxh3_128"] and object_matches(self.storage, name, one)
        }

    def _wrong(self, objects: Mapping[str, Any]) -> set[str]:
        return {
            name for name, one in objects.items() if not object_matches(self.storage, name, one)
        }

    def _ground(
        self,
        array: str,
        mark: Mapping[str, Any] | None,
        told: Mapping[str, Any],
        wrong: set[str],
        main: str,
    ) -> tuple[Outcome, str]:
        """Whether there is ground to write a new mark, and which."""
        if mark is None and array in (SEQUENCE, POSITION):
            return "mark rebuilt", "the mark was damaged; rows are the same everywhere"
        if mark is None and len(wrong) < len(told):
            return "mark rebuilt", "the mark was damaged, its objects are what is computed anew"
        if main not in wrong:
            return "mark rebuilt", "the mark was of other objects than those that are computed anew"
        committed_by = "nobody knows whom" if mark is None else mark.get("host")
        difference = (
            f"{socket.gethostname()} computes other bits than were committed by {committed_by}"
        )
        return ("rewritten" if self.accepts else "other bits"), difference

    def _sound_mark(self, part: int, array: str) -> dict[str, Any] | None:
        name = mark_path(part, array)
        try:
            mark = unseal(self.storage.read(name), name)
            check_mark(mark, part, array, self.layout, self.fingerprint, name)
        except (DamagedStoreError, FileNotFoundError):
            return None
        return mark

    def _former(
        self, part: int, array: str, mark: Mapping[str, Any] | None, reason: str
    ) -> dict[str, Any]:
        """What a new mark says of the one that it replaces."""
        if mark is None:
            return {"reason": reason}
        kept = {name: mark.get(name) for name in ("objects", "host", "time", "replaces")}
        return {"reason": reason, "digest": digest(dict(mark)), **kept}

    def _put(self, given: _Given, told: Mapping[str, Any], names: Iterable[str]) -> None:
        """Put objects in place of what is there."""
        for name in sorted(names):
            temporary = self.storage.write_temporary(name, uuid.uuid4().hex, given[name]())
            self.storage.publish(temporary, name)
            self.storage.delete(temporary)
            self.storage.sync(name)
            if not object_matches(self.storage, name, told[name]):
                raise DamagedStoreError(
                    f"{self.storage}/{name} does not read back as it was written; check the disk"
                )

    def _put_mark(self, part: int, array: str, data: bytes) -> None:
        name = mark_path(part, array)
        if not self.storage.create(name, data):
            self.storage.replace(name, data)


def _told(spec: ArraySpec, data: np.ndarray) -> dict[str, Any]:
    """What a mark says of an object."""
    written, size = xxhash.xxh3_128(), 0
    for piece in encode_object(spec, data):
        written.update(piece)
        size += len(piece)
    return {
        "bytes": size,
        "xxh3_128": written.hexdigest(),
        "values_xxh3_128": values_digest([data]),
    }


def _values(objects: Mapping[str, Any], name: str) -> str:
    return str(objects[name]["values_xxh3_128"])


def _of_same_values(
    committed: Mapping[str, Any], objects: Mapping[str, Any]
) -> tuple[Outcome, str]:
    """What to say of objects that are put back otherwise than they were committed."""
    if all(_values(committed, name) == _values(objects, name) for name in objects):
        return "rewritten", "the same values, encoded otherwise by other libraries"
    return "rewritten", "the same activations; what follows from them differs in its last bits"
