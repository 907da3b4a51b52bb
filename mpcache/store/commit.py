"""The commit protocol: write objects, sync them, read them back, then create their mark.

Many processes may commit the same part at once, on unlike machines, without locks, clocks or
waiting:

1. Each prepares its objects under temporary names, which hold the attempt of its mark-to-be.
2. Each tries to create the claim, which is that mark under another name: one process succeeds.
3. Whoever finds a claim carries it out, its author, another, or a later run: gives the objects that
   it names their own names, then creates the mark from it, then deletes it and what is temporary.
   Where an object has neither its temporary name nor its own, the claim is lost: none is touched.

A folder renames: a step of 3 that was done already finds nothing left to do. A bucket copies, and
whoever does a step again copies the same bytes: what is temporary stays until the mark is there. So
nobody can put anything else over what is marked. The mark exists before its claim goes.
"""

import contextlib
import itertools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import xxhash

from mpcache.errors import DamagedStoreError, UsageError
from mpcache.storage.base import Storage
from mpcache.storage.temporary_names import temporary_name
from mpcache.store.array_metadata import ensure_spans
from mpcache.store.array_spec import GROUP, ArraySpec
from mpcache.store.digests import digest_pieces, object_matches, values_digest
from mpcache.store.mark import Mark, ObjectRecord, parse_mark
from mpcache.store.object_paths import array_specs, claim_path, mark_path
from mpcache.store.part_encoder import PartValues, encode_object
from mpcache.store.part_layout import Layout


class Committer:
    """Commits parts of one store (steps 1 and 2 of the protocol). Threads may share it."""

    def __init__(self, storage: Storage, layout: Layout, fingerprint: str) -> None:
        self.storage = storage
        self.layout = layout
        self.fingerprint = fingerprint
        self._claims = _Claims(storage, layout, fingerprint)

    def commit(self, values: PartValues) -> None:
        """Commit one array's part, unless it is committed already: marked data never changes."""
        part, array = values.part, values.array
        if self._claims.is_settled(part, array):
            return
        attempt, objects = uuid.uuid4().hex, {}
        with self._temporary_objects(part, array, attempt) as temporaries:
            for spec, data in values.values.items():
                temporary, record = self._write_temporary(spec, part, attempt, data)
                temporaries.append(temporary)
                objects[spec.object_path(part)] = record
            mark = values.mark(self.layout, self.fingerprint, objects, attempt)
            ensure_spans(self.storage, self.layout, array, part, values.width)
            if not self._claims.settle(part, array, mark.sealed()):
                raise DamagedStoreError(
                    f"part {part} of {array} in {self.storage} cannot be recorded in the store, "
                    "because its files disappeared or changed while they were written; run the "
                    "same command again"
                )

    def adopt(
        self, part: int, array: str, claim: bytes, sources: Mapping[str, Iterable[bytes]]
    ) -> bool:
        """Commit what another store's mark commits, mark and bytes alike; False: it was there.

        `claim` holds the bytes of that mark, `sources` those of its objects by path. Raises
        UsageError where the part is committed with other objects.
        """
        mark = mark_path(part, array)
        is_new = not self._claims.is_settled(part, array)
        if is_new:
            attempt = _attempt(claim)
            with self._temporary_objects(part, array, attempt) as temporaries:
                theirs = parse_mark(claim, part, array, self.layout, self.fingerprint, mark)
                for name, pieces in sources.items():
                    temporaries.append(self.storage.write_temporary(name, attempt, pieces))
                    if self._is_other(temporaries[-1], theirs.objects[name]):
                        raise DamagedStoreError(
                            f"{self.storage}/{name} was copied, but a read returns different "
                            "bytes; check the disk, then copy again"
                        )
                if not self._claims.settle(part, array, claim):
                    raise DamagedStoreError(
                        f"{self.storage}/{mark} cannot be written, because files of the part "
                        "disappeared or changed during the copy; copy again"
                    )
        if self.storage.read(mark) != claim:
            raise UsageError(
                f"{self.storage} already has part {part} of {array}, with values that differ "
                f"from those that are copied (by {mark}); copy to a new or empty folder"
            )
        return is_new

    def _is_other(self, temporary: str, record: ObjectRecord) -> bool:
        """Whether a temporary object has other bytes; who copies the same may have taken it."""
        try:
            is_other = not object_matches(self.storage, temporary, record)
            return is_other and self.storage.size(temporary) is not None
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _temporary_objects(self, part: int, array: str, attempt: str) -> Iterator[list[str]]:
        """Names of temporary objects, deleted in the end unless a claim still needs them."""
        names: list[str] = []
        try:
            yield names
        except BaseException:
            if not self._claims.is_claimed(
                part, array, attempt
            ):  # else the next one carries it out
                _delete(self.storage, names)
            raise
        _delete(self.storage, names)

    def _write_temporary(
        self, spec: ArraySpec, part: int, attempt: str, values: np.ndarray
    ) -> tuple[str, ObjectRecord]:
        """Write one object under a temporary name, sync it, and record what a read gives."""
        name = spec.object_path(part)
        written = xxhash.xxh3_128()
        pieces = _digesting(encode_object(spec, values), written)
        temporary = self.storage.write_temporary(name, attempt, pieces)
        digest = digest_pieces(self.storage.read_pieces(temporary))
        size = self.storage.size(temporary)
        if digest != written.hexdigest() or size is None:
            self.storage.delete(temporary)
            raise DamagedStoreError(
                f"{self.storage}/{name} was written, but a read returns different bytes; check "
                "the disk, then run the same command again"
            )
        record = ObjectRecord(bytes=size, xxh3_128=digest, values_xxh3_128=values_digest([values]))
        return temporary, record


class _Claims:
    """Carries out claims (step 3 of the protocol)."""

    def __init__(self, storage: Storage, layout: Layout, fingerprint: str) -> None:
        self.storage = storage
        self.layout = layout
        self.fingerprint = fingerprint

    def is_settled(self, part: int, array: str) -> bool:
        """Whether the part is marked, once the claim that may be there is carried out."""
        return self._is_marked(part, array) or self.settle(part, array)

    def is_claimed(self, part: int, array: str, attempt: str) -> bool:
        """Whether there is a claim of this attempt."""
        with contextlib.suppress(FileNotFoundError):
            for number in itertools.count():
                if _attempt(self.storage.read(claim_path(part, array, number))) == attempt:
                    return True
        return False

    def settle(self, part: int, array: str, own: bytes = b"") -> bool:
        """Carry out the claim that is there, else our own; whether the part is marked then."""
        mark = mark_path(part, array)
        for number in itertools.count():  # a claim that cannot be kept stays; the next one counts
            claim = claim_path(part, array, number)
            if own:
                self.storage.create(claim, own)
            try:
                data = self.storage.read(claim)
            except FileNotFoundError:
                return self._is_marked(part, array)
            # only now, because whoever claims what is marked shall find the mark
            if self._is_marked(part, array) or self._publish(part, array, data, data == own):
                break
            if data == own:
                return False
        with contextlib.suppress(FileNotFoundError):  # another has cleared the claims by now
            self.storage.create_copy(claim, mark)
        self.storage.sync(mark)
        content = self._parse(part, array, data)
        names = () if content is None else tuple(content.objects)
        _delete(self.storage, (temporary_name(name, _attempt(data)) for name in names))
        _delete(self.storage, (claim_path(part, array, n) for n in range(number + 1)))
        return True

    def _is_marked(self, part: int, array: str) -> bool:
        return self.storage.size(mark_path(part, array)) is not None

    def _publish(self, part: int, array: str, data: bytes, is_own: bool) -> bool:
        """Give the objects of a claim their names; whether all are as it says."""
        claim = self._parse(part, array, data)
        if claim is None:
            return False
        key, objects = _attempt(data), claim.objects
        lost = (name for name in objects if self.storage.size(temporary_name(name, key)) is None)
        if not all(object_matches(self.storage, name, objects[name]) for name in lost):
            # the next claim counts; publishing a part of this one might overwrite what is marked
            return False
        published = [n for n in objects if self.storage.publish(temporary_name(n, key), n)]
        for spec in array_specs(array, self.layout, claim.width):
            self.storage.sync(spec.object_path(part), f"{GROUP}/{spec.name}")
        return all(
            (is_own and name in published) or object_matches(self.storage, name, record)
            for name, record in objects.items()
        )

    def _parse(self, part: int, array: str, data: bytes) -> Mark | None:
        """The mark that a claim holds; None if the claim is damaged, as by a power cut."""
        try:
            return parse_mark(data, part, array, self.layout, self.fingerprint, "")
        except DamagedStoreError:
            return None


def _attempt(claim: bytes) -> str:
    """Key in the temporary names of a claim's objects: its attempt, or else its digest."""
    try:
        attempt = json.loads(claim)["attempt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        attempt = None
    is_key = isinstance(attempt, str) and re.fullmatch("[0-9a-f]{32}", attempt)
    return attempt if is_key else xxhash.xxh3_128_hexdigest(claim)


def _digesting(pieces: Iterator[bytes], digest: xxhash.xxh3_128) -> Iterator[bytes]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _delete(storage: Storage, names: Iterable[str]) -> None:
    for name in names:
        storage.delete(name)
