"""Reads documents from `.jsonl`, `.json` and `.csv` files; errors name the line."""

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any, cast

from mpcache.data.digested_file import DataFile
from mpcache.data.local_documents import LocalDocuments, Row
from mpcache.data.text_column import MASK, NO_MASK, Path, column_path, mask_of, value_at
from mpcache.errors import UsageError

_PIECE = 1 << 20  # characters of a .json read at once
_BOM = b"\xef\xbb\xbf"


def read_json(file: DataFile, documents: LocalDocuments) -> None:
    """Add the documents of a file: one JSON object per line, or in a `.json` also an array."""
    with file.explained("JSON"), file.stream() as stream:
        is_json = ".json" in map(str.lower, file.path.suffixes)
        is_array = is_json and _begins_array(file)
        rows = _array(stream, file) if is_array else _lines(stream, file)
        path: Path | None = None
        has_mask: bool | None = None
        for where, row in rows:
            if not isinstance(row, dict):
                raise UsageError(
                    f"{where} must be a JSON object, got {type(row).__name__}; write each "
                    "document as an object with named fields"
                )
            path = path or column_path(row, documents.config, file.name)
            _check_no_repeated_field(row, path, where)
            try:
                value = value_at(row, path)
            except KeyError as error:
                raise UsageError(
                    f"{where} has no field {documents.config.text_column}, but the rows before "
                    "it have; add the field, or remove the row from the data"
                ) from error
            mask = mask_of(row, path)
            documents.add(value, mask, where)
            if documents.kind == "tokens" and value:
                has_mask = _check_mask_in_all_rows(has_mask, mask is not NO_MASK, where)


def _check_mask_in_all_rows(before: bool | None, now: bool, where: object) -> bool:
    """Raise UsageError where only some rows have a mask, as no other table format can.

    Returns whether rows have one.
    """
    if before not in (None, now):
        raise UsageError(
            f"{where} has {'an' if now else 'no'} {MASK}, unlike the rows before it; write that "
            "field in all rows or in none"
        )
    return now


class _Object(dict[str, Any]):
    """A JSON object, and the names that appear in it more than once."""

    repeated: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    result = _Object(row)
    names = [name for name, _ in pairs]
    result.repeated = tuple(name for name in row if names.count(name) > 1)
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _check_no_repeated_field(row: Any, path: Path, where: object) -> None:
    """Raise UsageError for a field that appears twice: one of its values would be lost."""
    for step in path:
        beside, row = row, row.get(step) if isinstance(row, dict) else None
        is_ids = isinstance(row, list) and row and type(row[0]) is int
        names = [step, MASK] if is_ids else [step]
        if repeated := [
            name for name in names if isinstance(beside, _Object) and name in beside.repeated
        ]:
            raise UsageError(f"{where} has the field {repeated[0]} twice; remove one of the two")
    is_chat = isinstance(row, list) and row and isinstance(row[0], dict)
    for message in row if is_chat else ():
        if isinstance(message, _Object):
            raise UsageError(
                f"{where} has the field {message.repeated[0]} twice; remove one of the two"
            )


def _lines(stream: io.BufferedIOBase, file: DataFile) -> Iterator[tuple[Row, Any]]:
    is_first = True
    for number, line in enumerate(stream, 1):
        where = Row(file.name, number)
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.strip():
            continue
        yield where, _decoded(_utf8(line, where), where, is_first=is_first)
        is_first = False


def _utf8(data: bytes, where: object) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}; "
            "convert the file, for instance with iconv -f latin1 -t utf-8"
        ) from error


def _decoded(text: str, where: object, *, is_first: bool) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        message = _not_json(where, error)
        if is_first and text.lstrip()[:1] in "{[":  # perhaps an object over several lines
            message += "; a file holds one object a line, or in a .json an array of objects"
        raise UsageError(message) from error


def _not_json(where: object, error: BaseException) -> str:
    why = (
        error.msg.removesuffix(" at")
        if isinstance(error, json.JSONDecodeError)
        else str(error).splitlines()[0]
    )
    return (
        f"{where} is not JSON: {why}; the row may be cut short: correct it, or remove it from the "
        "data"
    )


def _begins_array(file: DataFile) -> bool:
    with file.stream() as stream:
        head = stream.read(_PIECE).removeprefix(_BOM).lstrip()
    return head.startswith(b"[")


def _array(stream: io.BufferedIOBase, file: DataFile) -> Iterator[tuple[Row, Any]]:
    """The elements of a JSON array, one at a time, so that only one must fit in memory."""
    text = _JsonText(stream, file)
    text.skip_space()
    text.expect("[")
    if text.skip_space() == "]":
        text.expect("]")
    else:
        while True:
            yield Row(file.name, text.line), text.value()
            if text.skip_space() == "]":
                text.expect("]")
                break
            text.expect(",")
            text.skip_space()
    if text.skip_space():
        raise UsageError(
            "the file must end after the JSON array, got more text at "
            f"{Row(file.name, text.line)}; remove that text"
        )


class _JsonText:
    """A JSON text, read piece by piece; `buffer` is the unparsed part, `line` where it starts."""

    def __init__(self, stream: io.BufferedIOBase, file: DataFile) -> None:
        self.text = _text_of(stream)
        self.file, self.buffer, self.line = file, "", 1

    def read_more(self, count: int = _PIECE) -> bool:
        """Add characters to the buffer. Returns False at the end of the file."""
        try:
            piece = self.text.read(count)
        except UnicodeDecodeError as error:
            near = Row(self.file.name, self.line + self.buffer.count("\n"))
            raise UsageError(
                f"{near} or a line after it is not UTF-8; convert the file, for instance with "
                "iconv -f latin1 -t utf-8"
            ) from error
        self.buffer += piece
        return bool(piece)

    def drop(self, count: int) -> None:
        self.line += self.buffer.count("\n", 0, count)
        self.buffer = self.buffer[count:]

    def skip_space(self) -> str:
        """Skip white space. Returns the next character, or an empty text at the end."""
        while True:
            self.drop(len(self.buffer) - len(self.buffer.lstrip()))
            if self.buffer or not self.read_more():
                return self.buffer[:1]

    def expect(self, character: str) -> None:
        if self.buffer[:1] != character:
            got = self.buffer[:1] or "the end of the file"
            raise UsageError(
                f"{Row(self.file.name, self.line)} is not JSON: expected {character}, got {got}; "
                "the file may be cut short: correct the line, or download the file again"
            )
        self.drop(1)

    def value(self) -> Any:
        """The JSON value at the start of the buffer."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer)
            except (ValueError, RecursionError) as error:
                # doubling the buffer keeps the total work linear
                if self.read_more(max(_PIECE, len(self.buffer))):
                    continue
                raise UsageError(_not_json(Row(self.file.name, self.line), error)) from error
            self.drop(end)
            return value


def _text_of(stream: io.BufferedIOBase) -> io.TextIOWrapper:
    """UTF-8 with or without a byte order mark, and with line breaks unchanged."""
    return io.TextIOWrapper(cast(io.BufferedReader, stream), "utf-8-sig", newline="")


# --- csv ---


def read_csv(file: DataFile, documents: LocalDocuments) -> None:
    """Add the texts of a column of a `.csv` with a header; a text may have line breaks."""
    csv.field_size_limit(sys.maxsize)
    with file.explained("CSV"), file.stream() as stream:
        reader = csv.reader(_text_of(stream), strict=True)
        where = Row(file.name, 1)
        header: list[str] | None = None
        index = 0
        for where, row in _csv_rows(reader, file):
            if header is None:
                header = row
                (name,) = column_path(dict.fromkeys(header, ""), documents.config, file.name)
                if header.count(name) > 1:
                    raise UsageError(
                        f"{where} names the column {name} twice; rename one of the two columns"
                    )
                index = header.index(name)
            elif len(row) != len(header):
                raise UsageError(
                    f"{where} must have {len(header)} fields, as the header has, got {len(row)}; "
                    "the row may be cut short: correct it, or remove it from the data"
                )
            else:
                documents.add_text(row[index], where)


def _csv_rows(reader: Any, file: DataFile) -> Iterator[tuple[Row, list[str]]]:
    for _ in itertools.count():
        where = Row(file.name, reader.line_num + 1)
        try:
            row = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{where} or a line after it is not UTF-8; convert the file, for instance with "
                "iconv -f latin1 -t utf-8"
            ) from error
        except csv.Error as error:
            raise UsageError(
                f"{where} is not CSV: {error}; the row may be cut short: correct it, or remove "
                "it from the data"
            ) from error
        if row:
            yield where, row
