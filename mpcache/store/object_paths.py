"""Names and paths in a store, and the Zarr arrays that its layout implies.

The values of an array become bytes, and these values again, in mpcache.store.zarr_codec.

    STORE/store.json                              what the store is made from, sealed
    STORE/arrays.zarr/<array>                     one Zarr v3 group
    STORE/marks/<part>/<array>.json               commit mark of one array's part, sealed

A mark's array is `tokens`, `rows/sequence`, `rows/position` or `acts/<hookpoint>/<side>`; the last
has two companions, `norms/...` and `moments/...`, that are committed by the same mark. So is
`token_flags` by the mark of `tokens`, in stores of version 2.
"""

import functools
from pathlib import PurePosixPath

from mpcache.store.array_spec import ArraySpec
from mpcache.store.part_layout import ZARR_DTYPE, Layout
from mpcache.untrusted_names import is_acts_array, is_part

STORE_FILE = "store.json"
_CLAIM = ".claim.partial"
MARKS = "marks"
TOKENS = "tokens"
TOKEN_FLAGS = "token_flags"
STARTS_DOCUMENT = 1  # bit of token_flags: a document, or a piece of one, starts with this token
BY_ASSISTANT = 2  # bit of token_flags: the assistant wrote this token
SEQUENCE = "rows/sequence"
POSITION = "rows/position"


def acts_array(hookpoint: str, side: str) -> str:
    """Name of the array that holds one side of a hookpoint."""
    return f"acts/{hookpoint}/{side}"


def hookpoint_of(array: str) -> tuple[str, str]:
    """Hookpoint and side of an `acts` array."""
    _, hookpoint, side = array.split("/")
    return hookpoint, side


@functools.lru_cache(maxsize=4096)
def array_specs(array: str, layout: Layout, width: int = 0) -> tuple[ArraySpec, ...]:
    """The Zarr arrays that one mark commits; `width` is that of an `acts` array."""
    if array == TOKENS:
        shape = (layout.part_sequences, layout.ctx_len)
        dtypes = {TOKENS: layout.token_dtype}
        dtypes |= {TOKEN_FLAGS: "uint8"} if layout.token_flags else {}
        return tuple(
            ArraySpec(name=name, dtype=dtype, part_shape=shape, chunk=shape[0])
            for name, dtype in dtypes.items()
        )
    rows, chunk = layout.part_rows, layout.chunk_rows
    assert array in (SEQUENCE, POSITION) or is_acts_array(array), array
    if array in (SEQUENCE, POSITION):
        return (ArraySpec(name=array, dtype="uint32", part_shape=(rows,), chunk=chunk),)
    name = array.removeprefix("acts/")
    return (
        ArraySpec(
            name=array,
            dtype=ZARR_DTYPE[layout.dtype],
            part_shape=(rows, width),
            chunk=chunk,
            codec=layout.codec,
            attributes=(("logical_dtype", layout.dtype),),
        ),
        ArraySpec(name=f"norms/{name}", dtype="float32", part_shape=(rows,), chunk=rows),
        ArraySpec(name=f"moments/{name}", dtype="float64", part_shape=(1, 2, width), chunk=1),
    )


def mark_path(part: int, array: str) -> str:
    """Path in the store of the mark of one array's part."""
    return f"{MARKS}/{part}/{array.removeprefix('acts/')}.json"


def claim_path(part: int, array: str, number: int) -> str:
    """Path in the store of a claim that is to become that mark; named as temporary files are."""
    return f"{mark_path(part, array)}.{number}{_CLAIM}"


def is_claim(name: str) -> bool:
    """Whether an object is a claim."""
    return name.startswith(f"{MARKS}/") and name.endswith(_CLAIM)


def parse_mark_path(path: PurePosixPath) -> tuple[int, str] | None:
    """Part and array of a mark's path, the inverse of `mark_path`; None for any other path."""
    top, *steps = path.parts
    if top != MARKS or len(steps) < 2 or not is_part(steps[0]) or path.suffix != ".json":
        return None
    array = "/".join(steps[1:]).removesuffix(".json")
    if array not in (TOKENS, SEQUENCE, POSITION):
        array = f"acts/{array}"
        if not is_acts_array(array):
            return None
    return int(steps[0]), array


def committed_length(spec: ArraySpec, array: str, rows: int, ctx_len: int) -> int:
    """Entries along the first axis that a mark of `rows` rows vouches for."""
    if spec.name.startswith("moments/"):
        return 1
    return -(-rows // ctx_len) if array == TOKENS else rows
