"""Commit one array's part: write its objects, sync them, read them back, then create its mark.

Many may write the same part at once, on unlike machines, without locks, clocks or waiting:

1. Each prepares its objects under temporary names, which hold a key of its mark-to-be.
2. Each tries to create the claim, which is that mark under another name: one of them succeeds.
3. Whoever finds a claim carries it out, its author, another, or a later run: gives the objects that
   it names their own names, then creates the mark from it, then removes it and what is temporary.
   Where an object has neither its temporary name nor its own, the claim is lost: none is touched.

A folder renames: a step of 3 that was done already finds nothing left to do. A bucket copies, and
whoever does a step again copies the same bytes: what is temporary stays until the mark is there. So
nobody can put anything else over what is marked. The mark exists before its claim goes.
"""

import contextlib
import datetime
import itertools
import json
import re
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from mpcache.errors import DamagedStoreError, UsageError
from mpcache.storage.base import Storage
from mpcache.storage.tempfiles import digest_pieces, temporary_name
from mpcache.store.format import (
    POSITION,
    SEQUENCE,
    TOKENS,
    Layout,
    array_specs,
    check_mark,
    check_metadata,
    claim_path,
    mark_path,
    seal,
    unseal,
)
from mpcache.store.moments import measure_rows
from mpcache.store.zarr_codec import GROUP, ArraySpec

_INTEGER_VIEW = {torch.bfloat16: torch.uint16}  # NumPy and Zarr have no bfloat16: its 16 bits


class Writer:
    """Writes parts of one store. Parts are independent; one writer may serve several threads."""

    def __init__(self, place: Storage, layout: Layout, fingerprint: str) -> None:
        self.storage = place
        self.layout = layout
        self.fingerprint = fingerprint

    def grow(self, array: str, parts: int, width: int = 0) -> None:
        """Make the Zarr metadata of an array for `parts` parts; what is longer stays so."""
        for spec in array_specs(array, self.layout, width):
            files = spec.metadata(parts)
            is_new = [self.storage.create(name, data) for name, data in files.items()]
            if not is_new[-1] and check_metadata(self.storage, spec) < parts:
                self.storage.replace(spec.metadata_path, files[spec.metadata_path])

    def commit_tokens(
        self,
        part: int,
        tokens: np.ndarray,
        flags: np.ndarray | None,
        progress: Mapping[str, Any],
        rows: int | None = None,
    ) -> None:
        """Commit the tokens `[sequences, ctx_len]` of a part, with where the next part starts.

        `flags`, of the same shape, are given where the layout has token_flags. `rows` counts the
        true tokens, where the last sequence is filled up with zeros.
        """
        arrays = [tokens] if flags is None else [tokens, flags]
        values = dict(zip(array_specs(TOKENS, self.layout), arrays, strict=True))
        self._commit(part, TOKENS, tokens.size if rows is None else rows, values, progress)

    def commit_rows(self, part: int, token_of_row: np.ndarray) -> None:
        """Commit which token each row of a part is, given as its place in the part."""
        sequence, position = np.divmod(token_of_row, self.layout.ctx_len)
        sequence += part * self.layout.part_sequences
        self.commit_index(part, SEQUENCE, sequence.astype(np.uint32))
        self.commit_index(part, POSITION, position.astype(np.uint32))

    def commit_index(self, part: int, array: str, values: np.ndarray) -> None:
        """Commit the sequence or the position of each row of a part."""
        (spec,) = array_specs(array, self.layout)
        self._commit(part, array, len(values), {spec: values}, {})

    def commit_acts(self, part: int, array: str, x_RW: Float[Tensor, "R W"]) -> None:
        """Commit one side of a hookpoint, rows in the order of the part, in the storage dtype."""
        rows, width = x_RW.shape
        found = measure_rows(x_RW)
        stored = x_RW.view(_INTEGER_VIEW.get(x_RW.dtype, x_RW.dtype)).numpy()
        both = torch.stack([found.moments.mean_W, found.moments.variance_W])[None].numpy()
        arrays = (stored, found.norms_R.numpy(), both)
        values = dict(zip(array_specs(array, self.layout, width), arrays, strict=True))
        checks = {
            "width": width,
            "finite_rows": found.moments.rows,
            "largest": found.largest,
            "nonfinite": found.nonfinite,
        }
        self._commit(part, array, rows, values, checks)

    def mark(self, part: int, array: str) -> dict[str, Any]:
        """The mark of what was committed."""
        name = mark_path(part, array)
        return unseal(self.storage.read(name), f"{self.storage}/{name}")

    def _commit(
        self,
        part: int,
        array: str,
        rows: int,
        values: dict[ArraySpec, np.ndarray],
        more: Mapping[str, Any],
    ) -> None:
        if self._is_marked(part, array) or self._settle(part, array):
            return  # somebody was faster; what is marked is never written again
        key, told = uuid.uuid4().hex, {}
        with self._preparing(part, array, key) as prepared:
            for spec, data in values.items():
                temporary, told[spec.object_path(part)] = self._prepare(spec, part, key, data)
                prepared.append(temporary)
            content = self._described(part, array, rows, told, {**more, "attempt": key})
            self._span(part, array, more.get("width", 0))
            if not self._settle(part, array, seal(content)):
                raise DamagedStoreError(
                    f"part {part} of {array} in {self.storage} cannot be marked"
                )

    def _described(
        self,
        part: int,
        array: str,
        rows: int,
        objects: Mapping[str, Any],
        more: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What a mark says."""
        return {
            "array": array,
            "part": part,
            "rows": rows,
            "split": self.layout.split_of(part),
            "fingerprint": self.fingerprint,
            "objects": objects,
            "host": socket.gethostname(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **more,
        }

    def adopt(
        self, part: int, array: str, claim: bytes, sources: Mapping[str, Iterable[bytes]]
    ) -> bool:
        """Commit what another store's mark commits, mark and bytes alike; False: it was there.

        Raises ValueError where the part is marked with other objects.
        """
        mark = mark_path(part, array)
        is_new = not self._is_marked(part, array) and not self._settle(part, array)
        if is_new:
            key = _key(claim)
            with self._preparing(part, array, key) as prepared:
                told = unseal(claim, mark)["objects"]
                for name, pieces in sources.items():
                    prepared.append(self.storage.write_temporary(name, key, pieces))
                    if self._is_spoilt(prepared[-1], told[name]):
                        raise DamagedStoreError(
                            f"{self.storage}/{name} does not read back as its mark says; copy again"
                        )
                if not self._settle(part, array, claim):
                    raise DamagedStoreError(f"{self.storage}/{mark} cannot be made; copy again")
        if self.storage.read(mark) != claim:
            raise ValueError(
                f"{self.storage}/{mark} is of other values; name a new or empty folder"
            )
        return is_new

    def _is_spoilt(self, temporary: str, told: Mapping[str, Any]) -> bool:
        """Whether something else was prepared; it may be gone: who copies the same shares it."""
        try:
            is_wrong = not object_matches(self.storage, temporary, told)
            return is_wrong and self.storage.size(temporary) is not None
        except FileNotFoundError:
            return False

    def _is_marked(self, part: int, array: str) -> bool:
        return self.storage.size(mark_path(part, array)) is not None

    @contextlib.contextmanager
    def _preparing(self, part: int, array: str, key: str) -> Iterator[list[str]]:
        """Temporary objects that are deleted in the end, unless a claim may still want them."""
        prepared: list[str] = []
        try:
            yield prepared
        except BaseException:
            if not self._is_claimed(part, array, key):  # else whoever comes next carries it out
                self._delete(prepared)
            raise
        self._delete(prepared)

    def _is_claimed(self, part: int, array: str, key: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            for number in itertools.count():
                if _key(self.storage.read(claim_path(part, array, number))) == key:
                    return True
        return False

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.storage.delete(name)

    def _span(self, part: int, array: str, width: int) -> None:
        """Let the metadata span the part, should another have made it shorter since."""
        for spec in array_specs(array, self.layout, width):
            is_there = self.storage.size(spec.metadata_path) is not None
            if not is_there or check_metadata(self.storage, spec) <= part:
                self.grow(array, part + 1, width)

    def _settle(self, part: int, array: str, ours: bytes = b"") -> bool:
        """Carry out the claim there is, else our own; whether the part is marked then."""
        mark = mark_path(part, array)
        for number in itertools.count():  # a claim that cannot be kept stays; the next one counts
            claim = claim_path(part, array, number)
            if ours:
                self.storage.create(claim, ours)
            try:
                data = self.storage.read(claim)
            except FileNotFoundError:
                return self._is_marked(part, array)
            # only now, because whoever claims what is marked shall find the mark
            if self._is_marked(part, array) or self._publish(part, array, data, data == ours):
                break
            if data == ours:
                return False
        with contextlib.suppress(FileNotFoundError):  # another has cleared the claims by now
            self.storage.create_copy(claim, mark)
        self.storage.sync(mark)
        content = self._content(part, array, data) or {"objects": ()}
        self._delete(temporary_name(name, _key(data)) for name in content["objects"])
        self._delete(claim_path(part, array, one) for one in range(number + 1))
        return True

    def _publish(self, part: int, array: str, data: bytes, is_ours: bool) -> bool:
        """Give the objects of a claim their names; whether all are as it says."""
        content = self._content(part, array, data)
        if content is None:
            return False
        key, told = _key(data), content["objects"]
        lost = (name for name in told if self.storage.size(temporary_name(name, key)) is None)
        if not all(object_matches(self.storage, name, told[name]) for name in lost):
            # the next claim counts; had we begun with this one, we might end over what is marked
            return False
        published = [n for n in told if self.storage.publish(temporary_name(n, key), n)]
        for spec in array_specs(array, self.layout, content.get("width", 0)):
            self.storage.sync(spec.object_path(part), f"{GROUP}/{spec.name}")
        return all(
            (is_ours and name in published) or object_matches(self.storage, name, one)
            for name, one in told.items()
        )

    def _content(self, part: int, array: str, data: bytes) -> dict[str, Any] | None:
        """What a claim says; None if it is damaged, as in a power cut."""
        try:
            content = unseal(data, "")
            check_mark(content, part, array, self.layout, self.fingerprint, "")
        except DamagedStoreError:
            return None
        return content

    def _prepare(
        self, spec: ArraySpec, part: int, key: str, data: np.ndarray
    ) -> tuple[str, dict[str, Any]]:
        """Write one object under a temporary name, sync it, and describe what a read finds."""
        name = spec.object_path(part)
        written = xxhash.xxh3_128()
        pieces = encode_object(spec, data)
        temporary = self.storage.write_temporary(name, key, _digested(pieces, written))
        if (found := digest_pieces(self.storage.read_pieces(temporary))) != written.hexdigest():
            self.storage.delete(temporary)
            raise DamagedStoreError(
                f"{self.storage}/{name} does not read back as it was written; check the disk"
            )
        return temporary, {
            "bytes": self.storage.size(temporary),
            "xxh3_128": found,
            "values_xxh3_128": values_digest([data]),
        }


def check_object_size(storage: Storage, layout: Layout, widths: Iterable[int]) -> None:
    """Raise UsageError where a part of the widest array is too large for one object."""
    limit = storage.max_object_bytes
    row = max(widths, default=0) * getattr(torch, layout.dtype).itemsize
    if limit is not None and row * layout.part_rows > limit:
        raise UsageError(
            f"an object in {storage} must be at most {limit / 1e9:.0f} GB, the largest part "
            f"would be {row * layout.part_rows / 1e9:.1f} GB; "
            f"use smaller part_rows, at most {limit // row}"
        )


def object_matches(place: Storage, name: str, told: Mapping[str, Any]) -> bool:
    """Whether an object has the size and the bytes that a mark names."""
    size, digest = told["bytes"], told["xxh3_128"]
    return bool(place.size(name) == size and digest_pieces(place.read_pieces(name)) == digest)


def _key(claim: bytes) -> str:
    """What the temporary names of a claim's objects hold: its attempt, or else its digest."""
    try:
        attempt = json.loads(claim)["attempt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        attempt = None
    is_key = isinstance(attempt, str) and re.fullmatch("[0-9a-f]{32}", attempt)
    return attempt if is_key else xxhash.xxh3_128_hexdigest(claim)


def _digested(pieces: Iterator[bytes], digest: xxhash.xxh3_128) -> Iterator[bytes]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def values_digest(pieces: Iterable[np.ndarray]) -> str:
    """XXH3 of decoded values: little-endian, C order, without padding."""
    digest = xxhash.xxh3_128()
    for values in pieces:
        little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
        digest.update(little.data.cast("B"))
    return digest.hexdigest()


def encode_object(spec: ArraySpec, data: np.ndarray) -> Iterator[bytes]:
    """The bytes of the object that holds a part's true values."""
    return spec.encode(_padded(data, spec.part_shape[0]))


def _padded(data: np.ndarray, rows: int) -> np.ndarray:
    if len(data) == rows:
        return data
    whole = np.zeros((rows, *data.shape[1:]), data.dtype)
    whole[: len(data)] = data
    return whole
