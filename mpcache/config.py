"""Settings of the commands of `mpcache`: frozen dataclasses that the command line is made from.

The literal under a field is its documentation and its line in `--help`. A class attribute `group`
names the heading under which `--help` lists the fields that the class defines.
"""

import types
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from mpcache.errors import UsageError

Codec = Literal["none", "lz4", "zstd"]
Dtype = Literal["bfloat16", "float16", "float32"]
Split = Literal["train", "validation"]


def split_of(number: int, validation_every: int) -> Split:
    """The split of the part, or of the document, with this number.

    Every n-th is validation, and number 1 is the first of these.
    """
    return "validation" if number % validation_every == 1 else "train"


def parts_for(rows: int, part_rows: int) -> int:
    """Parts that hold this many rows; at least two, because each split has a part."""
    return max(2, -(-rows // part_rows))


def check_at_least(config: object, minimum: int, *names: str) -> None:
    """Raise UsageError for the first of these fields that is below the minimum; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise UsageError(f"{name} must be at least {minimum}, got {value}")


def check_types(config: object) -> None:
    """Raise UsageError for the first field whose value is none that its type allows.

    Where a field takes several names, one text alone is refused too: each of its letters would
    count as a name.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        choices = _choices(hint)
        if choices and value not in choices:
            raise UsageError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        if hint is int and type(value) is not int:
            raise UsageError(f"{name} must be a whole number, got {value!r}")
        if get_origin(hint) is tuple and isinstance(value, str):
            raise UsageError(f"{name} must be a tuple of names, got {value!r}; write ({value!r},)")


def _choices(hint: Any) -> tuple[object, ...]:
    """The values that a type names: of `Literal["a"] | None` "a" and None; else none."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (types.UnionType, Union) and any(map(_choices, get_args(hint))):
        return tuple(c for a in get_args(hint) for c in _choices(a) or (None,))
    return ()


# --- groups of settings ---


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The documents to read."""

    group: ClassVar[str] = "Data"

    dataset: str
    "Hugging Face dataset id, or local files, folders or glob patterns, separated by commas"
    dataset_revision: str = "main"
    "branch, tag or commit of a Hugging Face dataset"
    dataset_config: str | None = None
    "configuration (subset) of a Hugging Face dataset, such as sample-10BT"
    split: str = "train"
    "split of the dataset to read"
    text_column: str = "text"
    "column with the text, token ids or chat messages; a.b is the field b of the column a"
    streaming: bool = False
    (
        "stream a Hugging Face dataset instead of downloading it; documents are then shuffled "
        "only within a buffer of 10,000"
    )
    chat_template: str | None = None
    "path of a Jinja file with the template for chat messages; default: the tokenizer's template"
    keep_empty_documents: bool = False
    "keep documents without text (each becomes special tokens only); default: skip them"
    rows: int = 10_000_000
    "rows to collect, rounded up to whole parts; one row holds the activations of one token"
    validation_every: int = 10
    "hold out 1 of every N documents for validation; they fill 1 of every N parts"
    seed: int = 0
    "random seed for the order of documents and for the order of rows in each part"


@dataclass(frozen=True, kw_only=True)
class SequenceSettings:
    """How documents become the sequences that the model sees."""

    group: ClassVar[str] = "Sequences"

    ctx_len: int = 1024
    "tokens per sequence (one input of the model); at most the model's context length"
    one_document_per_sequence: bool = False
    (
        "run the model on each document alone, in pieces of at most --ctx-len tokens; padding is "
        "not stored"
    )
    cross_document_attention: bool = True
    (
        "let tokens attend to earlier documents in the same sequence; no effect with "
        "--one-document-per-sequence"
    )
    bos: Literal["none", "document", "sequence"] = "none"
    (
        "where to add the tokenizer's BOS (or CLS) token: nowhere, before each document, or "
        "before each sequence"
    )
    eos: bool = True
    "add the tokenizer's EOS (or SEP) token after each document"
    parse_special_tokens: bool = False
    (
        "turn names such as <|endoftext|> in a text into special tokens; default: they stay "
        "ordinary text"
    )


@dataclass(frozen=True, kw_only=True)
class PretrainedModelSettings:
    """A pretrained model, and whether its own code may run."""

    group: ClassVar[str] = "Model"

    model: str
    "language model: a Hugging Face id, a local folder, or a .gguf file"
    revision: str = "main"
    "branch, tag or commit of a Hugging Face model"
    trust_remote_code: bool = False
    "run the Python code that comes with the model; read that code first"


@dataclass(frozen=True, kw_only=True)
class ModelSettings(PretrainedModelSettings):
    """How the model computes, and which of its activations are kept."""

    group: ClassVar[str] = "Model"

    hookpoints: tuple[str, ...]
    (
        "modules to collect, such as layers.10 or layers.*.mlp:input; * is any one name between "
        "dots; add :input or :output to collect only that side; without it: the output (MLPs: "
        "both sides)"
    )
    model_dtype: Dtype = "bfloat16"
    "dtype of the model's weights and computation"
    autocast: bool = False
    "keep the weights in float32; torch.autocast runs the suitable operations in --model-dtype"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    "attention implementation of transformers"
    compile: bool = False
    (
        "compile the modules of each layer with torch.compile; the first batches then take "
        "minutes longer"
    )
    batch_sequences: int = 16
    "sequences per forward pass; a smaller number needs less memory"
    device: str = "auto"
    "torch device of the model, such as cuda:1; auto: the first GPU, or the CPU if there is no GPU"


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """How rows are stored."""

    group: ClassVar[str] = "Storage"

    dtype: Dtype = "bfloat16"
    "dtype of the stored activations"
    codec: Codec = "none"
    (
        "lossless compression of the stored activations, after a lossless bit shuffle; none: no "
        "compression"
    )
    part_rows: int = 65_536
    "rows per part; each part is written, or retried, as a whole; a multiple of --ctx-len"
    chunk_rows: int = 1024
    "rows per chunk, the smallest piece that is read; must divide --part-rows"
    write_threads: int | None = None
    (
        "threads that write the store; default: 8 for a bucket, otherwise a quarter of torch's CPU "
        "threads, but at least 2 and at most 8"
    )


# --- commands ---


@dataclass(frozen=True, kw_only=True)
class CollectConfig(ModelSettings, DataSettings, SequenceSettings, StorageSettings):
    """A collection: the model, the dataset, and the activations to keep.

    `model`, `dataset` and `hookpoints` are required. All counts are of rows (one row is one token),
    tokens or sequences, as each field says. Raises UsageError where settings contradict each other.

    Example:
        >>> from mpcache import CollectConfig
        >>> config = CollectConfig(
        ...     model="EleutherAI/pythia-160m",
        ...     dataset="texts.jsonl",
        ...     hookpoints=("layers.5", "layers.*.mlp:input"),
        ...     rows=200_000,
        ...     ctx_len=512,
        ... )
        >>> config.part_rows // config.ctx_len  # sequences in a part
        128
    """

    def __post_init__(self) -> None:
        check_types(self)
        if not self.hookpoints:
            raise UsageError("hookpoints is empty; give at least one, for instance layers.10.mlp")
        check_at_least(self, 1, "rows", "ctx_len", "batch_sequences", "part_rows", "chunk_rows")
        if self.part_rows % self.ctx_len:
            raise UsageError(
                f"part_rows must be a multiple of ctx_len, got part_rows={self.part_rows}, "
                f"ctx_len={self.ctx_len}; use {-(-self.part_rows // self.ctx_len) * self.ctx_len}"
            )
        if self.part_rows % self.chunk_rows:
            raise UsageError(
                f"chunk_rows must divide part_rows, got chunk_rows={self.chunk_rows}, "
                f"part_rows={self.part_rows}; use a divisor of part_rows"
            )
        check_at_least(self, 1, "write_threads")
        if self.autocast and self.model_dtype == "float32":
            raise UsageError(
                "--autocast needs a model_dtype of bfloat16 or float16, got float32; use "
                "--model-dtype bfloat16, or remove --autocast"
            )
        if self.compile and self.one_document_per_sequence:
            raise UsageError(
                "--compile needs batches of one shape, but --one-document-per-sequence makes "
                "batches of many shapes; remove one of the two options"
            )
        check_at_least(self, 2, "validation_every")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What `mpcache.convert` changes. A setting that is not given stays as in the source.

    Counts are of rows.

    Example:
        >>> from mpcache import ConvertConfig
        >>> config = ConvertConfig(codec="zstd", hookpoints=("layers.0",))
        >>> config.dtype is None  # the dtype of the source
        True
    """

    group: ClassVar[str] = "Storage"

    dtype: Dtype | None = None
    "dtype of the stored activations; a narrower dtype rounds to nearest even; default: unchanged"
    codec: Codec | None = None
    "compression of the stored activations; default: unchanged"
    chunk_rows: int | None = None
    "rows per chunk; must divide the rows per part; default: unchanged"
    part_rows: int | None = None
    "rows per part; a multiple of the --part-rows of the collection; default: unchanged"
    hookpoints: tuple[str, ...] = ()
    "hookpoints to keep, written as for `mpcache collect`; default: all"

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """The sources of a repair, and what the repair may do.

    Raises UsageError where `source` is given together with what only the model needs.

    Example:
        >>> from mpcache import RepairConfig
        >>> config = RepairConfig(source="s3://bucket/copy-of-store")  # no model runs
    """

    group: ClassVar[str] = "Run"

    model: str | None = None
    "new location of the model, if it moved: Hugging Face id, local folder, or .gguf file"
    revision: str | None = None
    "new branch, tag or commit of the Hugging Face model, if the old name no longer exists"
    dataset: str | None = None
    "new location of the dataset, if it moved; needed only if stored tokens are damaged"
    source: str | None = None
    (
        "take the rows to repair from this store, without a model: a copy of STORE, or the store "
        "from which STORE was converted"
    )
    device: str = "auto"
    (
        "torch device of the model; hardware different from that of the collection may "
        "compute different bits"
    )
    trust_remote_code: bool = False
    "run the Python code that comes with the model; read that code first"
    accept_other_bits: bool = False
    (
        "write the rows that this machine computes even if they differ from the rows that were "
        "first stored"
    )
    delete_leftovers: bool = False
    "delete the files of interrupted writes; use it only while no process writes to the store"

    def __post_init__(self) -> None:
        if self.source is not None and (self.model or self.dataset):
            raise UsageError(
                "--source copies the rows without a model, so --model and --dataset have no use; "
                "remove --source, or remove --model and --dataset"
            )
        if self.source is not None and self.accept_other_bits:
            raise UsageError(
                "--accept-other-bits applies only to rows that a model computes, but --source "
                "copies the rows; remove --source or --accept-other-bits"
            )


@dataclass(frozen=True, kw_only=True)
class HookpointsConfig(PretrainedModelSettings):
    """The model whose hookpoints `mpcache hookpoints` lists. Its weights are not needed."""

    group: ClassVar[str] = "Model"

    attention: Literal["sdpa", "eager"] | None = None
    (
        "attention implementation of transformers; default: sdpa, or eager if the model does not "
        "support sdpa"
    )

    def __post_init__(self) -> None:
        check_types(self)
