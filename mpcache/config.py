"""What `mpcache collect` can be told: one frozen dataclass, from which the options are derived."""

from dataclasses import dataclass
from typing import Literal

from mpcache.errors import UsageError

Codec = Literal["none", "lz4", "zstd"]
Split = Literal["train", "validation"]


def split_of(number: int, validation_every: int) -> Split:
    """The split of a part, or of the document at a place: every n-th is validation, 1 the first."""
    return "validation" if number % validation_every == 1 else "train"


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """A collection: which model reads which dataset, and what of it is kept."""

    model: str
    "Hugging Face model id, a local folder, or a .gguf file"
    dataset: str
    "Hugging Face dataset id, or local files and folders: paths or globs, joined by commas"
    hookpoints: tuple[str, ...]
    "module paths inside the base model, `*` for one segment, `:input` or `:output` for one side"
    rows: int = 10_000_000
    "rows wanted (one row is one token), rounded up to whole parts"
    ctx_len: int = 1024
    "tokens in a sequence"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    "storage dtype of activations"
    model_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    "computation dtype of the model"
    autocast: bool = False
    "keep weights in float32, and let torch's autocast choose what is computed in model_dtype"
    compile: bool = False
    "compile the parts of each layer with torch.compile; the first batches take minutes more"
    codec: Codec = "none"
    "compression of activation chunks (with bit shuffle); every codec is lossless"
    seed: int = 0
    "seed of the order of documents and of the rows in a part"
    revision: str = "main"
    "revision of a Hugging Face model"
    dataset_revision: str = "main"
    "revision of a Hugging Face dataset"
    dataset_config: str | None = None
    "configuration of a Hugging Face dataset"
    split: str = "train"
    "split of the dataset that is read"
    text_column: str = "text"
    "column that holds the documents: text, token ids or chat messages; a.b is field b of column a"
    chat_template: str | None = None
    "file with the chat template for messages; default the tokenizer's own"
    parse_special_tokens: bool = False
    "read the name of a special token in a text, such as <|endoftext|>, as that token"
    keep_empty_documents: bool = False
    "keep documents without text, which are lone special tokens, instead of leaving them out"
    one_document_per_sequence: bool = False
    "run the model on each document alone, in pieces of ctx_len tokens; padding is not stored"
    streaming: bool = False
    "stream a Hugging Face dataset instead of downloading it; order is a seeded buffer shuffle"
    bos: Literal["none", "document", "sequence"] = "none"
    "what the tokenizer's begin token (BOS or CLS) begins"
    eos: bool = True
    "end each document with the tokenizer's end token (EOS or SEP)"
    cross_document_attention: bool = True
    "let tokens see an earlier document of their sequence; never with one_document_per_sequence"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    "attention implementation of the model"
    trust_remote_code: bool = False
    "run model code that comes with the model"
    device: str = "auto"
    "torch device of the model; auto takes the first GPU, else the CPU"
    batch_sequences: int = 16
    "sequences in a forward pass"
    write_threads: int | None = None
    "threads that write a part's arrays; default one for four that compute, 2 to 8; 8 to a bucket"
    part_rows: int = 65_536
    "rows in a part, the unit of commit and retry; a multiple of ctx_len"
    chunk_rows: int = 1024
    "rows in a chunk, the unit of read; divides part_rows"
    validation_every: int = 10
    "every n-th part is held out for validation"

    def __post_init__(self) -> None:
        if not self.hookpoints:
            raise UsageError("hookpoints is empty; name at least one, for instance layers.10.mlp")
        for name in ("rows", "ctx_len", "batch_sequences", "part_rows", "chunk_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.part_rows % self.ctx_len:
            raise UsageError(
                f"part_rows must be a multiple of ctx_len, got part_rows={self.part_rows}, "
                f"ctx_len={self.ctx_len}; use {-(-self.part_rows // self.ctx_len) * self.ctx_len}"
            )
        if self.part_rows % self.chunk_rows:
            raise UsageError(
                f"chunk_rows must divide part_rows, got chunk_rows={self.chunk_rows}, "
                f"part_rows={self.part_rows}"
            )
        if self.write_threads is not None and self.write_threads < 1:
            raise UsageError(f"write_threads must be at least 1, got {self.write_threads}")
        if self.autocast and self.model_dtype == "float32":
            raise UsageError(
                "autocast must have a model_dtype to cast to, got float32; use bfloat16 or float16"
            )
        if self.compile and self.one_document_per_sequence:
            raise UsageError(
                "compile needs batches of one shape, and one_document_per_sequence makes many; "
                "leave compile out"
            )
        if self.validation_every < 2:
            raise UsageError(f"validation_every must be at least 2, got {self.validation_every}")


@dataclass(frozen=True, kw_only=True)
class StoreBenchConfig:
    """What `mpcache bench-store` writes and reads: every combination of parts, chunks and codec."""

    rows: int = 262_144
    "rows of one array, rounded up to whole parts; its values are random"
    width: int = 384
    "dimensions of a row"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    "dtype of the rows"
    part_rows: tuple[int, ...] = (65_536,)
    "rows in a part"
    chunk_rows: tuple[int, ...] = (1024,)
    "rows in a chunk"
    codec: tuple[Codec, ...] = ("none",)
    "compression of chunks"
    threads: int = 4
    "threads that write parts and read chunks, of ours and of Zarr's"
    peers: tuple[str, ...] = ("zarr", "zarrs", "sae-lens")
    "other ways to measure beside ours, where they are installed"
    repeats: int = 3
    "rounds, one more warms up"

    def __post_init__(self) -> None:
        known = ("zarr", "zarrs", "sae-lens")
        if unknown := [name for name in self.peers if name not in known]:
            raise UsageError(f"peers must be of {', '.join(known)}, got {unknown[0]}")
        for name in ("rows", "width", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("part_rows", "chunk_rows", "codec"):
            if not getattr(self, name):
                raise UsageError(f"{name} is empty; name at least one")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What `mpcache convert` changes; what is not given stays as it is in the source."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    "storage dtype of activations; a narrower one rounds to nearest even"
    codec: Codec | None = None
    "compression of activation chunks"
    chunk_rows: int | None = None
    "rows in a chunk; divides part_rows"
    part_rows: int | None = None
    "rows in a part; a multiple of the part_rows that the rows were collected with"
    hookpoints: tuple[str, ...] = ()
    "hookpoints to keep, written as for collect; all without this option"


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """Where `mpcache repair` finds what it needs, and what it may do."""

    model: str | None = None
    "model, if it is elsewhere now: Hugging Face id, a local folder, or a .gguf file"
    revision: str | None = None
    "revision of a Hugging Face model, if it is another name now"
    dataset: str | None = None
    "dataset, if it is elsewhere now; read only where tokens are damaged"
    source: str | None = None
    "take rows from this copy of the store, or the store it was converted from; no model is run"
    device: str = "auto"
    "torch device of the model; the one it was collected on computes the same bits"
    trust_remote_code: bool = False
    "run model code that comes with the model"
    accept_other_bits: bool = False
    "where this machine computes other bits than were committed, commit those instead"
    delete_leftovers: bool = False
    "delete the rests of interrupted writes; only when nothing writes to the store"

    def __post_init__(self) -> None:
        if self.source is not None and (self.model or self.dataset):
            raise UsageError("source needs neither model nor dataset; leave them out")
        if self.source is not None and self.accept_other_bits:
            raise UsageError("accept_other_bits is for what is computed anew; leave source out")


@dataclass(frozen=True, kw_only=True)
class HookpointsConfig:
    """The model whose hookpoints `mpcache hookpoints` lists."""

    model: str
    "Hugging Face model id, a local folder, or a .gguf file; its weights are not needed"
    revision: str = "main"
    "revision of a Hugging Face model"
    attention: Literal["sdpa", "eager"] | None = None
    "attention implementation of the model; default sdpa, else eager"
    trust_remote_code: bool = False
    "run model code that comes with the model"
