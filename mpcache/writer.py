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
from mpcache.objects import digest_file, put_new, replace, sync_folders

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
        (spec,) = specs(TOKENS, self.layout)
        self._commit(part, TOKENS, tokens.size, {spec: tokens}, progress)

    def commit_rows(self, part: int, token_of_row: np.ndarray) -> None:
        """Commit which token each row of a part is, given as its place in the part."""
        sequence, position = np.divmod(token_of_row, self.layout.ctx_len)
        sequence += part * self.layout.part_sequences
        for array, values in ((SEQUENCE, sequence), (POSITION, position)):
            (spec,) = specs(array, self.layout)
            self._commit(part, array, len(values), {spec: values.astype(np.uint32)}, {})

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

    def _commit(
        self,
        part: int,
        array: str,
        rows: int,
        values: dict[ArraySpec, np.ndarray],
        more: Mapping[str, Any],
    ) -> None:
        mark = self.path / mark_path(part, array)
        if mark.exists():
            return  # somebody was faster; what is marked is never written again
        content = {
            "array": array,
            "part": part,
            "rows": rows,
            "split": self.layout.split_of(part),
            "objects": {
                spec.object_path(part): self._write(spec, part, data)
                for spec, data in values.items()
            },
            "host": socket.gethostname(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **more,
        }
        if not put_new(mark, seal(content)):
            self._refuse_other_values(mark, content["objects"])
        sync_folders(mark.parent, self.path)

    def _refuse_other_values(self, mark: Path, objects: Any) -> None:
        """Somebody marked this part while we wrote it: harmless if both wrote the same."""
        if unseal(mark.read_bytes(), str(mark))["objects"] != objects:
            raise DamagedStoreError(
                f"another collection committed other values to {mark} at the same time; "
                "run mpcache verify, delete the marks that it names, and collect again with one"
            )

    def _write(self, spec: ArraySpec, part: int, data: np.ndarray) -> dict[str, Any]:
        """Write one object, sync it, and describe what a fresh read finds."""
        file = self.path / spec.object_path(part)
        written = xxhash.xxh3_128()
        pieces = spec.encode(_padded(data, spec.part_shape[0]))
        replace(file, _digested(pieces, written))
        sync_folders(file.parent.parent, self.path / GROUP / spec.name)
        if (found := digest_file(file)) != written.hexdigest():
            raise DamagedStoreError(f"{file} does not read back as it was written; check the disk")
        return {
            "bytes": file.stat().st_size,
            "xxh3_128": found,
            "values_xxh3_128": values_digest(data),
        }


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
