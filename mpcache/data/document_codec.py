"""Row values -> byte records, and byte records -> documents.

A text is UTF-8; token ids are little-endian uint32; a chat is the JSON of its messages.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mpcache.data.conversation import Conversation, conversation_of
from mpcache.data.text_column import MASK, NO_MASK
from mpcache.data.vocabulary import Tokens, Vocabulary
from mpcache.errors import UsageError

Kind = Literal["text", "tokens", "conversations"]
Document = str | Tokens | Conversation

RECORD_IDS = np.dtype("<u4")
_KIND_NAMES = {"text": "text", "tokens": "token ids", "conversations": "chat messages"}


def kind_of_value(value: Any) -> Kind | None:
    """The kind of a row's value; None for a null or an empty list.

    Raises TypeError, which names the type, for a value that is no document.
    """
    if value is None or (isinstance(value, list) and not value):
        return None
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and type(value[0]) is int:
        return "tokens"
    if isinstance(value, list) and isinstance(value[0], dict):
        return "conversations"
    name = f"a list of {_type_name(value[0])}" if isinstance(value, list) else _type_name(value)
    raise TypeError(name)


def kind_of_type(kind: pa.DataType) -> Kind | None:
    """The kind of an arrow column; None for a column of nulls.

    Raises TypeError, which names the type, for a column that holds no documents.
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return None
    if _is_text(kind):
        return "text"
    if is_list(kind):
        if pa.types.is_null(kind.value_type):
            return None
        if pa.types.is_integer(kind.value_type):
            return "tokens"
        if pa.types.is_struct(kind.value_type):
            return "conversations"
    raise TypeError(str(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether each row of a column is a list, of fixed or variable length."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def check_mask_type(kind: pa.DataType, name: str) -> None:
    """Raise UsageError for a column that cannot be an attention mask."""
    values = kind.value_type if is_list(kind) else kind
    if not is_list(kind) or not (
        pa.types.is_integer(values) or pa.types.is_boolean(values) or pa.types.is_null(values)
    ):
        raise UsageError(
            f"the column {MASK} in {name} must hold lists of 0 and 1, got {kind}; write such "
            "lists, or rename the column if it is not an attention mask"
        )


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _type_name(value: Any) -> str:
    return {"dict": "an object", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)


# --- one value ---


def encode_record(
    value: Any, mask: Any, kind: Kind, vocabulary: Vocabulary, where: object
) -> bytes:
    """The byte record of a row's value. Raises UsageError, which starts with `where`."""
    if value is None or (isinstance(value, list) and not value):
        return b""
    if kind == "text" and isinstance(value, str):
        return _text_bytes(value, where)
    if kind == "tokens" and isinstance(value, list) and set(map(type, value)) == {int}:
        return _token_bytes(value, mask, vocabulary, where)
    if kind == "conversations" and isinstance(value, list):
        messages = [dict(message) for message in conversation_of(value, where).messages]
        return _text_bytes(json.dumps(messages, default=str, ensure_ascii=False), where)
    raise UsageError(
        f"{where} must hold {_KIND_NAMES[kind]}, as the rows before it do, got "
        f"{_description(value)}; correct the row, or remove it from the data"
    )


def _description(value: Any) -> str:
    kinds = dict.fromkeys(map(_type_name, value)) if isinstance(value, list) else ()
    return f"a list of {', '.join(kinds)}" if kinds else _type_name(value)


def _text_bytes(text: str, where: object) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} must hold valid Unicode text, got half a surrogate pair, "
            f"{error.object[error.start]!r}; correct the row, or remove it from the data"
        ) from error


def _token_bytes(ids: list[int], mask: Any, vocabulary: Vocabulary, where: object) -> bytes:
    for extreme in (min(ids), max(ids)):
        if not 0 <= extreme <= vocabulary.largest_id:
            raise UsageError(_outside_message(vocabulary, extreme, where))
    if mask is not NO_MASK:
        ids = list(itertools.compress(ids, _checked_mask(mask, len(ids), where)))
    return np.array(ids, RECORD_IDS).tobytes()


def _checked_mask(mask: Any, count: int, where: object) -> list[Any]:
    if not isinstance(mask, list) or not all(isinstance(m, int) for m in mask):
        raise UsageError(
            f"{MASK} in {where} must be a list of 0 and 1, got {_description(mask)}; correct the "
            "row, or rename the column if it is not an attention mask"
        )
    if len(mask) != count:
        raise UsageError(
            f"attention_mask in {where} must have as many values as there are tokens, {count}, "
            f"got {len(mask)}; correct the row"
        )
    return mask


def _outside_message(vocabulary: Vocabulary, wrong: int, where: object) -> str:
    return (
        f"{where} must hold token ids from 0 to {vocabulary.largest_id} for this model, got "
        f"{wrong}; tokenise the data with the model's own tokenizer"
    )


def decode_document(record: bytes, kind: Kind | None, where: object) -> Document:
    """The document of a byte record; `where` names its row."""
    if kind == "tokens":
        return np.frombuffer(record, RECORD_IDS).astype(np.uint32, copy=False)
    if kind == "conversations":
        return Conversation(tuple(json.loads(record)) if record else (), str(where))
    return record.decode()


# --- many values of an arrow column ---

Where = Callable[[int], object]
"position of a row, from its index in an array"


def text_records(array: pa.Array) -> tuple[memoryview, np.ndarray]:
    """The records of a column of texts, joined, and the bytes of each; none for a null."""
    texts = array.cast(pa.large_string())
    if texts.null_count:
        texts = texts.fill_null("")
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return memoryview(b""), np.zeros(len(texts), np.int64)
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return memoryview(data)[bounds[0] : bounds[-1]], np.diff(bounds)


def token_records(
    array: pa.Array, mask: pa.Array | None, vocabulary: Vocabulary, where: Where
) -> tuple[bytes, np.ndarray]:
    """The records of a column of token ids, joined, and the bytes of each.

    Tokens with mask 0 are left out.
    """
    ids, lengths = _flat(array, where)
    ends = np.cumsum(lengths)
    for value in (ids.min(), ids.max()) if len(ids) else ():
        if not 0 <= value <= vocabulary.largest_id:
            row = np.searchsorted(ends, np.flatnonzero(ids == value)[0], side="right")
            raise UsageError(_outside_message(vocabulary, int(value), where(int(row))))
    if mask is not None:
        is_null = pc.is_null(mask).to_numpy(zero_copy_only=False)
        if (wrong := np.flatnonzero(is_null & (lengths > 0))).size:
            _checked_mask(None, 0, where(int(wrong[0])))
        kept, mask_lengths = _flat(mask, lambda index: f"{MASK} in {where(index)}")
        if (wrong := np.flatnonzero(mask_lengths != lengths)).size:
            row = int(wrong[0])
            raise UsageError(
                f"attention_mask in {where(row)} must have as many values as there are tokens, "
                f"{lengths[row]}, got {mask_lengths[row]}; correct the row"
            )
        ids = ids[kept != 0]
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept != 0)])
        lengths = np.diff(before[np.concatenate([np.zeros(1, np.int64), ends])])
    return ids.astype(RECORD_IDS).tobytes(), lengths * RECORD_IDS.itemsize


def _flat(array: pa.Array, where: Where) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all lists, joined, and the length of each list."""
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    lengths = lengths.astype(np.int64)
    numbers = pc.list_flatten(array)
    if numbers.null_count:
        first = pc.index(pc.is_null(numbers), True).as_py()
        row = int(np.searchsorted(np.cumsum(lengths), first, side="right"))
        raise UsageError(f"{where(row)} must hold numbers only, got null; correct the row")
    return numbers.to_numpy(zero_copy_only=False), lengths
