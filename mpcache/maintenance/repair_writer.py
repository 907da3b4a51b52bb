"""Put back what was committed, where the values at hand prove to be just that.

The proof is the mark, which holds the digests of what was committed; or, where the mark itself is
damaged, an object of the part that comes out again bit for bit; rows need none. Norms and moments
follow from activations, but for their last bits, which differ between processors and versions:
where the activations are equal it is the same part, and its undamaged objects stay. Anything else
is written only if that was asked for. A new mark says what it replaces. Objects come first and the
mark last, each all or nothing: stopped at any moment, a part is damaged as before, or whole.
"""

import functools
import socket
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mpcache.errors import DamagedStoreError
from mpcache.store.digests import object_matches
from mpcache.store.mark import Mark, ObjectRecord, parse_mark
from mpcache.store.object_paths import POSITION, SEQUENCE, array_specs, mark_path
from mpcache.store.part_encoder import PartValues, encode_object, object_record, utc_now
from mpcache.store.reader import Store
from mpcache.store.sealed_json import digest
from mpcache.store.writer import Writer

Outcome = Literal["mended", "mark rebuilt", "rewritten", "other bits", "left"]
_Objects = Mapping[str, ObjectRecord]
_Pieces = Mapping[str, Callable[[], Iterable[bytes]]]


@dataclass(frozen=True)
class RepairedMark:
    """What became of one damaged mark and its objects."""

    part: int
    array: str
    outcome: Outcome
    reason: str

    @property
    def is_whole(self) -> bool:
        return self.outcome not in ("other bits", "left")


class PartRepair:
    """Takes the values of damaged parts of one store; `outcomes` has what became of each.

    `writer` encodes values for it.
    """

    def __init__(
        self, store: Store, damaged: Iterable[tuple[int, str]], accept_other_bits: bool
    ) -> None:
        self.storage = store.storage
        self.layout = store.layout
        self.fingerprint = store.fingerprint
        self.writer = Writer(store.storage, store.layout, store.fingerprint, sink=self)
        self.accept_other_bits = accept_other_bits
        self.outcomes: dict[tuple[int, str], RepairedMark] = {}
        self._damaged = set(damaged)

    def note(self, part: int, array: str, outcome: Outcome, reason: str) -> None:
        """Record what became of a mark."""
        self.outcomes[part, array] = RepairedMark(part, array, outcome, reason)

    def commit(self, values: PartValues) -> None:
        """Repair a part from its values; nothing to do where the part is not damaged."""
        part = values.part
        if (part, values.array) not in self._damaged:
            return
        objects = {s.object_path(part): object_record(s, v) for s, v in values.values.items()}
        pieces = {
            s.object_path(part): functools.partial(encode_object, s, v)
            for s, v in values.values.items()
        }
        mark = values.mark(self.layout, self.fingerprint, objects, uuid.uuid4().hex)
        self._repair(mark, pieces)

    def adopt(
        self, part: int, array: str, claim: bytes, sources: Mapping[str, Iterable[bytes]]
    ) -> bool:
        """Repair a part from what another store's mark commits."""
        name = mark_path(part, array)
        theirs = parse_mark(claim, part, array, self.layout, self.fingerprint, name)
        mark = replace(
            theirs, host=socket.gethostname(), time=utc_now(), attempt=uuid.uuid4().hex,
            fingerprint=self.fingerprint, replaces=None,
        )  # fmt: skip
        self._repair(mark, {name: functools.partial(iter, data) for name, data in sources.items()})
        return True

    def _repair(self, new: Mark, pieces: _Pieces) -> None:
        part, array, objects = new.part, new.array, new.objects
        main = array_specs(array, self.layout, 1)[0].object_path(part)  # the others follow from it
        old = self._sound_mark(part, array)
        if old is not None and _same_values(old.objects, objects, main):
            objects = {**objects, **self._kept(old.objects, objects)}
            wrong = self._wrong(objects)
            if old.objects == objects:
                self._put(pieces, objects, wrong)
                self.note(part, array, "mended", "equal to what was committed")
                return
            outcome, reason = _of_same_values(old.objects, objects)
        else:
            wrong = self._wrong(objects)
            outcome, reason = self._judge(array, old, objects, wrong, main)
        if outcome != "other bits":
            self._put(pieces, objects, wrong)
            self._put_mark(replace(new, objects=objects, replaces=_replaced(old, reason)))
        self.note(part, array, outcome, reason)

    def _kept(self, committed: _Objects, computed: _Objects) -> dict[str, ObjectRecord]:
        """Objects that are as they were committed, though other bytes were computed here."""
        return {
            name: record
            for name, record in committed.items()
            if record.xxh3_128 != computed[name].xxh3_128
            and object_matches(self.storage, name, record)
        }

    def _wrong(self, objects: _Objects) -> set[str]:
        return {n for n, record in objects.items() if not object_matches(self.storage, n, record)}

    def _judge(
        self, array: str, old: Mark | None, computed: _Objects, wrong: set[str], main: str
    ) -> tuple[Outcome, str]:
        """Whether a new mark may be written where values differ or the mark is damaged, and why."""
        if old is None and array in (SEQUENCE, POSITION):
            return "mark rebuilt", "the mark was damaged; rows are the same everywhere"
        if old is None and len(wrong) < len(computed):
            return "mark rebuilt", "the mark was damaged, its objects equal the computed ones"
        if main not in wrong:
            return "mark rebuilt", "the mark was of other objects than the computed ones"
        committed_by = "an unknown machine" if old is None else old.host
        difference = (
            f"{socket.gethostname()} computes other bits than those that {committed_by} committed"
        )
        return ("rewritten" if self.accept_other_bits else "other bits"), difference

    def _sound_mark(self, part: int, array: str) -> Mark | None:
        try:
            return self.writer.mark(part, array)
        except (DamagedStoreError, FileNotFoundError):
            return None

    def _put(self, pieces: _Pieces, objects: _Objects, names: Iterable[str]) -> None:
        """Put objects over what is there."""
        for name in sorted(names):
            temporary = self.storage.write_temporary(name, uuid.uuid4().hex, pieces[name]())
            self.storage.publish(temporary, name)
            self.storage.delete(temporary)
            self.storage.sync(name)
            if not object_matches(self.storage, name, objects[name]):
                raise DamagedStoreError(
                    f"{self.storage}/{name} was written, but a read returns different bytes; "
                    "check the disk, then repair again"
                )

    def _put_mark(self, mark: Mark) -> None:
        name, data = mark_path(mark.part, mark.array), mark.sealed()
        if not self.storage.create(name, data):
            self.storage.replace(name, data)


def _same_values(some: _Objects, others: _Objects, name: str) -> bool:
    return some[name].values_xxh3_128 == others[name].values_xxh3_128


def _of_same_values(committed: _Objects, objects: _Objects) -> tuple[Outcome, str]:
    """Outcome for activations that are equal, with objects that differ in their bytes."""
    if all(_same_values(committed, objects, name) for name in objects):
        return "rewritten", "the same values, encoded otherwise by other libraries"
    return "rewritten", "the same activations; what follows from them differs in its last bits"


def _replaced(old: Mark | None, reason: str) -> dict[str, Any]:
    """What a new mark says of the mark that it replaces."""
    if old is None:
        return {"reason": reason}
    return {
        "reason": reason,
        "digest": digest(old.as_json()),
        "objects": {name: asdict(record) for name, record in old.objects.items()},
        "host": old.host,
        "time": old.time,
        "replaces": old.replaces,
    }
