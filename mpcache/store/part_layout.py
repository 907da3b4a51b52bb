"""How a store cuts its rows into parts, chunks and sequences, and the format versions."""

from dataclasses import asdict, dataclass
from typing import Any, get_args

from mpcache.config import Codec, Split, parts_for, split_of
from mpcache.errors import UsageError

PLAIN_VERSION = 1
FLAGS_VERSION = 2  # with token_flags
FORMAT_VERSIONS = (PLAIN_VERSION, FLAGS_VERSION)
ZARR_DTYPE = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}
MAX_COUNT = 1 << 31  # of any count in a layout; rows/sequence is uint32
_TOKEN_DTYPES = ("uint8", "uint16", "uint32", "uint64")


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
            if type(value) is not int or not 1 <= value < MAX_COUNT:
                raise UsageError(
                    f"{name} must be an integer from 1 to {MAX_COUNT - 1}, got {value!r}"
                )
        choices = {"dtype": tuple(ZARR_DTYPE), "codec": get_args(Codec)}
        for name, allowed in (choices | {"token_dtype": _TOKEN_DTYPES}).items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if type(self.token_flags) is not bool:
            raise UsageError(f"token_flags must be true or false, got {self.token_flags!r}")
        if self.part_rows % self.ctx_len or self.part_rows % self.chunk_rows:
            raise UsageError(
                "part_rows must be a multiple of ctx_len and of chunk_rows, got "
                f"part_rows={self.part_rows}, ctx_len={self.ctx_len}, chunk_rows={self.chunk_rows}"
            )

    @property
    def part_sequences(self) -> int:
        return self.part_rows // self.ctx_len

    def parts_for(self, rows: int) -> int:
        """Parts that hold this many rows; each of the two splits has at least one part."""
        return parts_for(rows, self.part_rows)

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
