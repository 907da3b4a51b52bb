"""Store format, versions 1 and 2: every name, path, array and file form of a store is decided here.

How the values of an array become bytes, and these values again, is decided in
mpcache.store.zarr_codec.

    STORE/store.json                              what the store is made from, sealed
    STORE/arrays.zarr/<array>                     one Zarr v3 group
    STORE/marks/<part>/<array>.json               commit mark of one array's part, sealed

A mark's array is `tokens`, `rows/sequence`, `rows/position` or `acts/<hookpoint>/<side>`; the last
has two companions, `norms/...` and `moments/...`, that are committed by the same mark. So is
`token_flags` by the mark of `tokens`, in stores of version 2.
"""

import functools
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, get_args

from mpcache.config import Codec, Split, split_of
from mpcache.errors import DamagedStoreError
from mpcache.storage.base import Storage
from mpcache.store.zarr_codec import ArraySpec
from mpcache.validation import is_acts_array, is_part

PLAIN_VERSION = 1
FLAGS_VERSION = 2  # with token_flags
FORMAT_VERSIONS = (PLAIN_VERSION, FLAGS_VERSION)
STORE_FILE = "store.json"
_CLAIM = ".claim.partial"
MARKS = "marks"
TOKENS = "tokens"
TOKEN_FLAGS = "token_flags"
STARTS_DOCUMENT = 1  # bit of token_flags: a document, or a piece of one, starts with this token
BY_ASSISTANT = 2  # bit of token_flags: the assistant wrote this token
SEQUENCE = "rows/sequence"
POSITION = "rows/position"
ZARR_DTYPE = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}
_TOKEN_DTYPES = ("uint8", "uint16", "uint32", "uint64")
_LARGEST = 1 << 31  # of any count in a layout; rows/sequence is uint32

Sealed = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a store cuts rows into parts, chunks and sequences. Fixed when the store is made."""

    ctx_len: int
    part_rows: int
    chunk_rows: int
    validation_every: int
    dtype: str
    codec: Codec
    token_dtype: str
    token_flags: bool = False
    "token_flags is stored beside tokens; parts may then end within a sequence"

    def __post_init__(self) -> None:
        for name in ("ctx_len", "part_rows", "chunk_rows", "validation_every"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < _LARGEST:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        choices = {"dtype": tuple(ZARR_DTYPE), "codec": get_args(Codec)}
        for name, allowed in (choices | {"token_dtype": _TOKEN_DTYPES}).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}")
        if type(self.token_flags) is not bool:
            raise ValueError(f"token_flags must be true or false, got {self.token_flags!r}")
        if self.part_rows % self.ctx_len or self.part_rows % self.chunk_rows:
            raise ValueError("part_rows must be a multiple of ctx_len and of chunk_rows")

    @property
    def part_sequences(self) -> int:
        return self.part_rows // self.ctx_len

    def parts_for(self, rows: int) -> int:
        """Parts that hold this many rows; each of the two splits has at least one part."""
        return max(2, -(-rows // self.part_rows))

    @property
    def format_version(self) -> int:
        """The oldest version whose readers understand such a store."""
        return FLAGS_VERSION if self.token_flags else PLAIN_VERSION

    def as_json(self) -> dict[str, Any]:
        """The fields as `store.json` names them; version 1 does not know token_flags."""
        fields = asdict(self)
        return fields if self.token_flags else {k: fields[k] for k in fields if k != "token_flags"}

    def split_of(self, part: int) -> Split:
        return split_of(part, self.validation_every)


def check_metadata(place: Storage, spec: ArraySpec) -> int:
    """Compare an array's `zarr.json` with what the layout implies; gives the parts it spans."""
    file = f"{place}/{spec.metadata_path}"
    try:
        data = place.read(spec.metadata_path)
        found = json.loads(data)
        parts, rest = divmod(found["shape"][0], spec.part_shape[0])
        implied = json.loads(spec.metadata(parts)[spec.metadata_path])
    except (
        FileNotFoundError, ValueError, KeyError, TypeError, IndexError, RecursionError
    ) as error:  # fmt: skip
        raise DamagedStoreError(f"{file} is damaged or missing: {error}") from error
    # spelled again as Zarr spells it: a changed blank would otherwise go unseen
    spellings = {json.dumps(found, indent=indent).encode() for indent in (None, 2)}
    if rest or found != implied or data not in spellings:
        raise DamagedStoreError(f"{file} is damaged: it is not what {place} needs")
    return int(parts)


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
    place = array.removeprefix("acts/")
    return (
        ArraySpec(
            name=array,
            dtype=ZARR_DTYPE[layout.dtype],
            part_shape=(rows, width),
            chunk=chunk,
            codec=layout.codec,
            attributes=(("logical_dtype", layout.dtype),),
        ),
        ArraySpec(name=f"norms/{place}", dtype="float32", part_shape=(rows,), chunk=rows),
        ArraySpec(name=f"moments/{place}", dtype="float64", part_shape=(1, 2, width), chunk=1),
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
    top, *place = path.parts
    if top != MARKS or len(place) < 2 or not is_part(place[0]) or path.suffix != ".json":
        return None
    array = "/".join(place[1:]).removesuffix(".json")
    if array not in (TOKENS, SEQUENCE, POSITION):
        array = f"acts/{array}"
        if not is_acts_array(array):
            return None
    return int(place[0]), array


def committed_length(spec: ArraySpec, array: str, rows: int, ctx_len: int) -> int:
    """Entries along the first axis that a mark of `rows` rows vouches for."""
    if spec.name.startswith("moments/"):
        return 1
    return -(-rows // ctx_len) if array == TOKENS else rows


def check_mark(
    content: Sealed, part: int, array: str, layout: Layout, fingerprint: str, file: str
) -> None:
    """Compare a mark with what its place implies; its own digest only tells that it is whole.

    Raises:
        DamagedStoreError: it is another part's or store's, or says what no writer says.
    """
    found = (content.get("part"), content.get("array"), content.get("split"))
    if found != (part, array, layout.split_of(part)):
        raise DamagedStoreError(f"{file} is the mark of another part")
    if (
        content.get("fingerprint", fingerprint) != fingerprint
    ):  # older marks do not name their store
        raise DamagedStoreError(f"{file} is the mark of another store")
    counts: dict[str, tuple[int, Any]] = {"rows": (1, layout.part_rows)}
    if is_acts_array(array):
        counts |= {"width": (1, _LARGEST), "finite_rows": (0, content.get("rows"))}
        counts |= {"nonfinite": (0, _LARGEST * _LARGEST)}
    try:
        good = all(type(content[k]) is int and a <= content[k] <= b for k, (a, b) in counts.items())
        good = good and (array != TOKENS or _is_progress(content, layout))
        good = good and (not is_acts_array(array) or 0 <= content["largest"] < float("inf"))
        if good:
            names = {
                s.object_path(part) for s in array_specs(array, layout, content.get("width", 0))
            }
            good = content["objects"].keys() == names
            good = good and all(_is_told(one) for one in content["objects"].values())
    except (KeyError, TypeError, AttributeError, OverflowError):
        good = False
    if not good:
        raise DamagedStoreError(f"{file} is damaged: no writer says what it says")


def _is_progress(content: Sealed, layout: Layout) -> bool:
    """Whether a mark of tokens says where its part and the next one start."""
    cursors = [content["cursor"], content["next_cursor"]]
    return (
        (layout.token_flags or content["rows"] % layout.ctx_len == 0)
        and type(content["last"]) is bool
        and all(len(c) == 2 and all(type(n) is int and n >= 0 for n in c) for c in cursors)
    )


def _is_told(one: Sealed) -> bool:
    """Whether an object's description in a mark is complete."""
    digests = (one["xxh3_128"], one["values_xxh3_128"])
    return (
        type(one["bytes"]) is int
        and one["bytes"] > 0
        and all(type(d) is str and re.fullmatch("[0-9a-f]{32}", d) for d in digests)
    )


def canonical_json(content: Sealed) -> bytes:
    """The one spelling of a JSON file of ours."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def digest(content: Sealed) -> str:
    """SHA-256 over the canonical spelling, in hexadecimal."""
    return hashlib.sha256(canonical_json(content)).hexdigest()


def seal(content: Sealed) -> bytes:
    """JSON with a digest of itself."""
    return canonical_json({**content, "digest": digest(content)})


def unseal(data: bytes, name: str) -> Sealed:
    """Content of sealed JSON, which must be spelled exactly as `seal` spells it."""
    try:
        content: Sealed = json.loads(data)
        claimed = content.pop("digest")
        intact = claimed == digest(content) and seal(content) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedStoreError(f"{name} is damaged: its content does not match its own digest")
    return content


def is_store(place: Storage) -> bool:
    """Whether a store was made there."""
    return place.exists(STORE_FILE)


def read_store_file(place: Storage) -> Sealed:
    """Content of `store.json`; refuses what is no store and an unknown format version."""
    if not is_store(place):
        raise ValueError(
            f"{place} is no store: it has no {STORE_FILE}; fill one with mpcache collect"
        )
    return parse_store_file(place.read(STORE_FILE), f"{place}/{STORE_FILE}")


def parse_store_file(data: bytes, file: str) -> Sealed:
    """What the bytes of a `store.json` say, checked as far as it can be without the rest."""
    check_format_version(data, file)
    content = unseal(data, file)
    try:
        layout = Layout(**content["layout"])
        if content["format_version"] != layout.format_version:
            raise ValueError("format_version and layout contradict each other")
        good = content["fingerprint"] == digest(content["identity"])
        good = good and all(isinstance(content[key], dict) for key in ("config", "provenance"))
        good = good and all(content["provenance"][key][key] for key in ("model", "dataset"))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedStoreError(f"{file} is damaged: {error}") from error
    if not good:
        raise DamagedStoreError(f"{file} is damaged: no writer says what it says")
    return content


def check_format_version(data: bytes, file: str) -> None:
    # looked at before the seal: a later version may be sealed in another way
    try:
        version = json.loads(data)["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # no version to speak of: the seal will say that it is damaged
    if version not in FORMAT_VERSIONS or type(version) is not int:
        raise ValueError(
            f"{file} has format version {version}, this mpcache reads versions "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}; use the mpcache that made it"
        )
