"""Commit one array's part: write its objects, sync them, read them back, then create its mark."""

import datetime
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from mpcache.format import (
    GROUP,
    POSITION,
    SEQUENCE,
    TOKENS,
    ArraySpec,
    DamagedStoreError,
    Layout,
    check_metadata,
    mark_path,
    seal,
    specs,
    unseal,
)
from mpcache.moments import measure
from mpcache.objects import create, digest_file, put_new, replace, sync_folders

# a part on a CPU and on a GPU differs by a few per cent of its norm, in bfloat16 and deep layers
_ROUNDING = 0.1
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
            is_new = [put_new(self.path / name, data) for name, data in files.items()]
            if not is_new[-1] and check_metadata(self.path, spec) < parts:
                replace(self.path / spec.metadata_path, [files[spec.metadata_path]])

    def commit_tokens(self, part: int, tokens: np.ndarray, progress: Mapping[str, Any]) -> None:
        """Commit the tokens `[sequences, ctx_len]` of a part, with where the next one starts."""
        self._commit(part, TOKENS, tokens.size, tokens, progress)

    def commit_rows(self, part: int, token_of_row: np.ndarray) -> None:
        """Commit which token each row of a part is, given as its place in the part."""
        sequence, position = np.divmod(token_of_row, self.layout.ctx_len)
        sequence += part * self.layout.part_sequences
        for array, values in ((SEQUENCE, sequence), (POSITION, position)):
            self._commit(part, array, len(values), values.astype(np.uint32), {})

    def commit_acts(self, part: int, array: str, x_RW: Float[Tensor, "R W"]) -> None:
        """Commit one side of a hookpoint, rows in the order of the part, in the storage dtype."""
        if (self.path / mark_path(part, array)).exists():
            return  # somebody was faster; what is marked is never written again
        rows, width = x_RW.shape
        acts, norms, moments = specs(array, self.layout, width)
        stored = x_RW.view(_INTEGER_VIEW.get(x_RW.dtype, x_RW.dtype)).numpy()
        objects = {}
        objects[acts.object_path(part)], kept = self._write(part, array, acts, stored)
        found = measure(torch.from_numpy(kept).view(x_RW.dtype))  # of what lies there now
        both = torch.stack([found.moments.mean_W, found.moments.variance_W])[None].numpy()
        objects[norms.object_path(part)], _ = self._write(part, array, norms, found.norms_R.numpy())
        objects[moments.object_path(part)], _ = self._write(part, array, moments, both)
        checks = {
            "width": width,
            "finite_rows": found.moments.rows,
            "largest": found.largest,
            "nonfinite": found.nonfinite,
        }
        self._mark(part, array, rows, objects, checks)

    def _commit(
        self, part: int, array: str, rows: int, values: np.ndarray, more: Mapping[str, Any]
    ) -> None:
        """Commit an array of one object."""
        if (self.path / mark_path(part, array)).exists():
            return
        (spec,) = specs(array, self.layout)
        told, _ = self._write(part, array, spec, values)
        self._mark(part, array, rows, {spec.object_path(part): told}, more)

    def _mark(
        self, part: int, array: str, rows: int, objects: dict[str, Any], more: Mapping[str, Any]
    ) -> None:
        mark = self.path / mark_path(part, array)
        content = {
            "array": array,
            "part": part,
            "rows": rows,
            "split": self.layout.split_of(part),
            "objects": objects,
            "host": socket.gethostname(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **more,
        }
        if not put_new(mark, seal(content)):
            self._refuse_other_values(mark, objects)
        sync_folders(mark.parent, self.path)

    def _refuse_other_values(self, mark: Path, objects: Any) -> None:
        """Somebody marked this part while we wrote it: harmless if both wrote the same."""
        if unseal(mark.read_bytes(), str(mark))["objects"] != objects:
            raise _other_values(mark)

    def _refuse_marked(self, part: int, array: str) -> None:
        """The last look before an object is written over."""
        if (mark := self.path / mark_path(part, array)).exists():
            raise _other_values(mark)

    def _write(
        self, part: int, array: str, spec: ArraySpec, values: np.ndarray
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Put one object there, sync it, and describe what a fresh read finds, with its values.

        An object that is there already, of a stopped collection or of one beside us, stays: its
        owner may be about to mark it. Its values are then those of the part; on another machine
        they may differ from ours by rounding. Only what nobody can have meant is written over.
        """
        file = self.path / spec.object_path(part)
        whole = _padded(values, spec.part_shape[0])
        written = xxhash.xxh3_128()
        is_new = create(file, _digested(spec.encode(whole), written))
        if not is_new and (kept := _same_but_rounding(spec, file, whole)) is not None:
            sync_folders(file.parent, self.path / GROUP / spec.name)
            return _described(file, digest_file(file), kept[: len(values)])
        if not is_new:
            self._refuse_marked(part, array)
            replace(file, _digested(spec.encode(whole), written := xxhash.xxh3_128()))
        sync_folders(file.parent.parent, self.path / GROUP / spec.name)
        if (found := digest_file(file)) != written.hexdigest():
            raise DamagedStoreError(f"{file} does not read back as it was written; check the disk")
        return _described(file, found, values)


def _other_values(mark: Path) -> DamagedStoreError:
    return DamagedStoreError(
        f"another collection committed other values to {mark} at the same time; "
        "run mpcache verify, delete the marks that it names, and collect again with one"
    )


def _described(file: Path, found: str, values: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    size = file.stat().st_size
    told = {"bytes": size, "xxh3_128": found, "values_xxh3_128": values_digest(values)}
    return told, values


def _same_but_rounding(spec: ArraySpec, file: Path, values: np.ndarray) -> np.ndarray | None:
    """The values of an object that is there, unless it is damaged or holds something else."""
    try:
        there = spec.decode(file.read_bytes())
    except DamagedStoreError:
        return None
    if there.dtype.kind == "u" and not dict(spec.attributes):
        return there if np.array_equal(there, values) else None  # tokens and rows are exact
    difference = total = 0.0
    for mine, other in zip(*(_floats(spec, v) for v in (values, there)), strict=True):
        finite = torch.isfinite(mine)
        if not torch.equal(finite, torch.isfinite(other)):
            return None
        difference += float((mine - other)[finite].square().sum())
        total += float(mine[finite].square().sum())
    return there if difference <= _ROUNDING**2 * total else None


def _floats(spec: ArraySpec, values: np.ndarray) -> Iterator[Tensor]:
    """Values in float64, a chunk at a time."""
    for start in range(0, len(values), spec.chunk):
        chunk = torch.from_numpy(np.ascontiguousarray(values[start : start + spec.chunk]))
        logical = dict(spec.attributes).get("logical_dtype")
        yield (chunk.view(getattr(torch, logical)) if logical else chunk).double()


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
