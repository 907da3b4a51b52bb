"""Read activations, their norms and their moments.

Shapes: W width of one side of a hookpoint.
"""

import functools

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mpcache.config import Split
from mpcache.errors import UsageError
from mpcache.store.moments import Moments, empty_moments, merge_moments
from mpcache.store.object_paths import acts_array, array_specs, hookpoint_of
from mpcache.store.part_layout import ZARR_DTYPE
from mpcache.store.part_reader import PartReader
from mpcache.untrusted_names import SIDES


class ActsReader:
    """Activations of all sides of all hookpoints. Threads may share it.

    `chunk` counts the chunks of a part. Every method raises UsageError for a hookpoint or side that
    the store does not have, and DamagedStoreError where bytes are not those that were committed.
    """

    def __init__(self, reader: PartReader) -> None:
        self.reader = reader
        self.index = reader.index
        self.layout = reader.layout

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Hookpoints with a committed part, in natural order."""
        arrays = (array for array in self.index.parts if array.startswith("acts/"))
        return tuple(dict.fromkeys(hookpoint_of(array)[0] for array in arrays))

    def sides(self, hookpoint: str) -> tuple[str, ...]:
        """Collected sides of a hookpoint: `input`, `output`, or both."""
        sides = tuple(s for s in SIDES if acts_array(hookpoint, s) in self.index.parts)
        if not sides:
            raise UsageError(
                f"{self.index.storage} has no hookpoint {hookpoint!r}; use one of: "
                f"{', '.join(self.hookpoints) or 'none'}"
            )
        return sides

    def array(self, hookpoint: str, side: str) -> str:
        """Name of the array of one side of a hookpoint."""
        sides = self.sides(hookpoint)
        if side not in sides:
            raise UsageError(
                f"{self.index.storage} has no {side} of {hookpoint}, only its "
                f"{' and '.join(sides)}; collect the {side} with --hookpoints {hookpoint}:{side}"
            )
        return acts_array(hookpoint, side)

    def parse_side(self, name: str) -> tuple[str, str]:
        """Hookpoint and side of `HOOKPOINT:SIDE`, or of `HOOKPOINT` with only one side."""
        if not isinstance(name, str):
            raise UsageError(
                f"a side must be named as HOOKPOINT:SIDE, got {name!r}; "
                f"{self.index.storage} has the hookpoints {', '.join(self.hookpoints) or 'none'}"
            )
        hookpoint, colon, side = name.partition(":")
        sides = self.sides(hookpoint)
        if colon and side not in SIDES:
            raise UsageError(
                f"a side must be {' or '.join(SIDES)}, got {name!r}; "
                f"{hookpoint} has {' and '.join(f'{hookpoint}:{side}' for side in sides)}"
            )
        if not side and len(sides) > 1:
            raise UsageError(
                f"{hookpoint} has both an input and an output in the store, got {name!r}; write "
                f"{hookpoint}:input or {hookpoint}:output"
            )
        return hookpoint, side or sides[0]

    def width(self, hookpoint: str, side: str) -> int:
        """Dimensions of one side of a hookpoint."""
        array = self.array(hookpoint, side)
        return self.index.mark(min(self.index.parts[array]), array).width

    def read_chunk(
        self, hookpoint: str, side: str, part: int, chunk: int, out: Tensor | None = None
    ) -> Float[Tensor, "rows W"]:
        """The true rows of one chunk, in the storage dtype; `out`, filled, if it is given."""
        array, dtype = self.array(hookpoint, side), getattr(torch, self.layout.dtype)
        stored = getattr(torch, ZARR_DTYPE[self.layout.dtype])
        memory = None if out is None else out.view(stored).numpy()
        return torch.from_numpy(self.reader.read_rows(array, part, chunk, memory)).view(dtype)

    def read_norms(
        self, hookpoint: str, side: str, part: int, chunk: int | None = None
    ) -> Float[Tensor, " rows"]:
        """Euclidean norm of each row of one chunk, or of a whole part, float32."""
        array = self.array(hookpoint, side)
        _, spec, _ = array_specs(array, self.layout, self.width(hookpoint, side))
        rows = self.reader.row_range(array, part, chunk)
        return torch.from_numpy(self.reader.read_object(array, spec, part, *rows))

    def moments(
        self, hookpoint: str, side: str, split: Split | None = None
    ) -> tuple[Float64[Tensor, " W"], Float64[Tensor, " W"]]:
        """Mean and variance per dimension over the finite rows of a split; None: of both."""
        array = self.array(hookpoint, side)
        numbers = self.index.part_numbers(array)
        parts = [part for part in numbers if split in (None, self.layout.split_of(part))]
        total = empty_moments(self.width(hookpoint, side))
        # one after the other, so that the last bits do not depend on how many are read at a time
        for moments in self.index.map_parts(functools.partial(self.part_moments, array), parts):
            total = merge_moments([total, moments])
        return total.mean_W, total.variance_W

    def part_moments(self, array: str, part: int) -> Moments:
        """Moments of one part of an `acts` array, over its finite rows."""
        statistics = self.index.mark(part, array).statistics
        assert statistics is not None, array
        _, _, spec = array_specs(array, self.layout, statistics.width)
        values = self.reader.read_object(array, spec, part, 0, 1)[0]
        mean_W, variance_W = torch.from_numpy(values)
        return Moments(statistics.finite_rows, mean_W, variance_W)

    def nonfinite(self, hookpoint: str, side: str) -> int:
        """Values of one side that are infinite or not a number, in all committed parts."""
        return sum(mark.nonfinite for mark in self.index.marks(self.array(hookpoint, side)))
