"""Commit one array's part: write its objects, sync them, read them back, then create its mark.

Many may write the same part at once, on unlike machines, without locks, clocks or waiting:

1. Each prepares its objects under temporary names, which hold the digest of its mark-to-be.
2. Each tries to create the claim, which is that mark under another name: one of them succeeds.
3. Whoever finds a claim carries it out, its author, another, or a later run: renames the objects
   that it names into place, then links it as the mark, then removes it.

A step of 3 that was done already finds nothing left to do, and the mark exists before its claim
goes: so nobody can rename anything over what is marked.
"""

import contextlib
import datetime
import itertools
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from mpcache.arrays import GROUP, ArraySpec
from mpcache.format import (
    POSITION,
    SEQUENCE,
    TOKENS,
    Layout,
    check_mark,
    check_metadata,
    claim_path,
    mark_path,
    seal,
    specs,
    unseal,
)
from mpcache.guard import DamagedStoreError, locate
from mpcache.moments import measure
from mpcache.objects import (
    digest_file,
    link_new,
    prepare,
    put_new,
    replace,
    sync_folders,
    temporary_name,
)

_INTEGER_VIEW = {torch.bfloat16: torch.uint16}  # NumPy and Zarr have no bfloat16: its 16 bits


class Writer:
    """Writes parts of one store. Parts are independent; one writer may serve several threads."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout

    def grow(self, array: str, parts: int, width: int = 0) -> None:
        """Make the Zarr metadata of an array for `parts` parts; what is longer stays so."""
        for spec in specs(array, self.layout, width):
            files = spec.metadata(parts)
            is_new = [put_new(locate(self.path, name), data) for name, data in files.items()]
            if not is_new[-1] and check_metadata(self.path, spec) < parts:
                replace(self.path / spec.metadata_path, [files[spec.metadata_path]])

    def commit_tokens(self, part: int, tokens: np.ndarray, progress: Mapping[str, Any]) -> None:
        """Commit the tokens `[sequences, ctx_len]` of a part, with where the next one starts."""
        (spec,) = specs(TOKENS, self.layout)
        self._commit(part, TOKENS, tokens.size, {spec: tokens}, progress)

    def commit_rows(self, part: int, token_of_row: np.ndarray) -> None:
        """Commit which token each row of a part is, given as its place in the part."""
        sequence, position = np.divmod(token_of_row, self.layout.ctx_len)
        sequence += part * self.layout.part_sequences
        self.commit_index(part, SEQUENCE, sequence.astype(np.uint32))
        self.commit_index(part, POSITION, position.astype(np.uint32))

    def commit_index(self, part: int, array: str, values: np.ndarray) -> None:
        """Commit the sequence or the position of each row of a part."""
        (spec,) = specs(array, self.layout)
        self._commit(part, array, len(values), {spec: values}, {})

    def commit_acts(self, part: int, array: str, x_RW: Float[Tensor, "R W"]) -> None:
        """Commit one side of a hookpoint, rows in the order of the part, in the storage dtype."""
        rows, width = x_RW.shape
        found = measure(x_RW)
        stored = x_RW.view(_INTEGER_VIEW.get(x_RW.dtype, x_RW.dtype)).numpy()
        both = torch.stack([found.moments.mean_W, found.moments.variance_W])[None].numpy()
        arrays = (stored, found.norms_R.numpy(), both)
        values = dict(zip(specs(array, self.layout, width), arrays, strict=True))
        checks = {
            "width": width,
            "finite_rows": found.moments.rows,
            "largest": found.largest,
            "nonfinite": found.nonfinite,
        }
        self._commit(part, array, rows, values, checks)

    def mark(self, part: int, array: str) -> dict[str, Any]:
        """The mark of what was committed."""
        file = locate(self.path, mark_path(part, array))
        return unseal(file.read_bytes(), str(file))

    def _commit(
        self,
        part: int,
        array: str,
        rows: int,
        values: dict[ArraySpec, np.ndarray],
        more: Mapping[str, Any],
    ) -> None:
        if locate(self.path, mark_path(part, array)).exists() or self._settle(part, array):
            return  # somebody was faster; what is marked is never written again
        prepared, told = {}, {}
        try:
            for spec, data in values.items():
                name = spec.object_path(part)
                prepared[name], told[name] = self._prepare(spec, part, data)
            content = {
                "array": array,
                "part": part,
                "rows": rows,
                "split": self.layout.split_of(part),
                "objects": told,
                "host": socket.gethostname(),
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "attempt": uuid.uuid4().hex,  # so that no two claims are alike
                **more,
            }
            claim = seal(content)
            for name, temporary in prepared.items():
                prepared[name] = temporary.replace(self._claimed(name, claim))
            self._span(part, array, more.get("width", 0))
            if not self._settle(part, array, claim):
                raise DamagedStoreError(f"part {part} of {array} in {self.path} cannot be marked")
        finally:
            for temporary in prepared.values():
                temporary.unlink(missing_ok=True)  # of one who came too late, or was interrupted

    def adopt(
        self, part: int, array: str, claim: bytes, sources: Mapping[str, Iterable[bytes]]
    ) -> bool:
        """Commit what another store's mark commits, mark and bytes alike; False: it was there.

        Raises ValueError where the part is marked with other objects.
        """
        mark = locate(self.path, mark_path(part, array))
        is_new = not mark.exists() and not self._settle(part, array)
        prepared = []
        try:
            if is_new:
                for name, pieces in sources.items():
                    temporary = prepare(locate(self.path, name), pieces)
                    prepared.append(temporary.replace(self._claimed(name, claim)))
                if not self._settle(part, array, claim):
                    raise DamagedStoreError(f"{mark} cannot be made; copy again")
        finally:
            for temporary in prepared:
                temporary.unlink(missing_ok=True)
        if mark.read_bytes() != claim:
            raise ValueError(f"{mark} is of other values; name a new or empty folder")
        return is_new

    def _span(self, part: int, array: str, width: int) -> None:
        """Let the metadata span the part, should another have made it shorter since."""
        for spec in specs(array, self.layout, width):
            is_there = locate(self.path, spec.metadata_path).exists()
            if not is_there or check_metadata(self.path, spec) <= part:
                self.grow(array, part + 1, width)

    def _settle(self, part: int, array: str, ours: bytes = b"") -> bool:
        """Carry out the claim there is, else our own; whether the part is marked then."""
        mark = locate(self.path, mark_path(part, array))
        for number in itertools.count():  # a claim that cannot be kept stays; the next one counts
            claim = locate(self.path, claim_path(part, array, number))
            if ours:
                put_new(claim, ours)
            try:
                data = claim.read_bytes()
            except FileNotFoundError:
                return mark.exists()
            # only now, because whoever claims what is marked shall find the mark
            if mark.exists() or self._publish(part, array, data, data == ours):
                break
            if data == ours:
                return False
        with contextlib.suppress(FileNotFoundError):  # another has cleared the claims by now
            link_new(claim, mark)
        sync_folders(mark.parent, self.path)
        for one in range(number + 1):
            locate(self.path, claim_path(part, array, one)).unlink(missing_ok=True)
        return True

    def _publish(self, part: int, array: str, data: bytes, is_ours: bool) -> bool:
        """Give the objects of a claim their names; whether all are as it says."""
        place = self.path / mark_path(part, array)
        try:
            content = unseal(data, str(place))
            check_mark(content, part, array, self.layout, place)
        except DamagedStoreError:
            return False  # written in a power cut
        renamed = [name for name in content["objects"] if self._rename(name, data)]
        for spec in specs(array, self.layout, content.get("width", 0)):
            file = self.path / spec.object_path(part)
            if file.parent.is_dir():
                sync_folders(file.parent, self.path / GROUP / spec.name)
        return all(
            (is_ours and name in renamed) or is_as_told(locate(self.path, name), told)
            for name, told in content["objects"].items()
        )

    def _rename(self, name: str, data: bytes) -> bool:
        """Give one object of a claim its name; False if that was done, or it is not there."""
        try:
            self._claimed(name, data).replace(locate(self.path, name))
        except FileNotFoundError:
            return False
        return True

    def _claimed(self, name: str, data: bytes) -> Path:
        """Temporary name of an object that a claim of these bytes is for."""
        return temporary_name(locate(self.path, name), xxhash.xxh3_128_hexdigest(data))

    def _prepare(self, spec: ArraySpec, part: int, data: np.ndarray) -> tuple[Path, dict[str, Any]]:
        """Write one object under a temporary name, sync it, and describe what a read finds."""
        file = locate(self.path, spec.object_path(part))
        written = xxhash.xxh3_128()
        pieces = spec.encode(_padded(data, spec.part_shape[0]))
        temporary = prepare(file, _digested(pieces, written))
        if (found := digest_file(temporary)) != written.hexdigest():
            temporary.unlink()
            raise DamagedStoreError(f"{file} does not read back as it was written; check the disk")
        return temporary, {
            "bytes": temporary.stat().st_size,
            "xxh3_128": found,
            "values_xxh3_128": values_digest(data),
        }


def is_as_told(file: Path, told: Mapping[str, Any]) -> bool:
    """Whether an object has the size and the bytes that a mark names."""
    return (
        file.is_file()
        and file.stat().st_size == told["bytes"]
        and digest_file(file) == told["xxh3_128"]
    )


def _digested(pieces: Iterator[bytes], digest: xxhash.xxh3_128) -> Iterator[bytes]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def values_digest(values: np.ndarray) -> str:
    """XXH3 of decoded values: little-endian, C order, without padding."""
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    return xxhash.xxh3_128(little.data.cast("B")).hexdigest()


def _padded(data: np.ndarray, rows: int) -> np.ndarray:
    if len(data) == rows:
        return data
    whole = np.zeros((rows, *data.shape[1:]), data.dtype)
    whole[: len(data)] = data
    return whole
