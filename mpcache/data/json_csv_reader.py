"""Tables that are text, `.jsonl`, `.json` and `.csv`, read row by row with the lines of each."""

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any, cast

from mpcache.data.data_file import DataFile
from mpcache.data.local_documents import DocumentList, Row
from mpcache.data.text_column import MASK, NO_MASK, Path, mask_of, path_in, value_at
from mpcache.errors import UsageError

_PIECE = 1 << 20  # characters of a .json read at once
_BOM = b"\xef\xbb\xbf"


def read_json(file: DataFile, documents: DocumentList) -> None:
    """Add the documents of a file with one JSON object a line, or of a `.json` with an array."""
    with file.explained("JSON"), file.stream() as stream:
        is_json = ".json" in map(str.lower, file.path.suffixes)
        is_array = is_json and _begins_array(file)
        rows = _array(stream, file) if is_array else _lines(stream, file)
        path: Path | None = None
        has_mask: bool | None = None
        for where, row in rows:
            if not isinstance(row, dict):
                raise UsageError(
                    f"{where} must be a JSON object, got {type(row).__name__}; "
                    "give an object with named fields for each document"
                )
            path = path or path_in(row, documents.config, file.name)
            _refuse_twins(row, path, where)
            try:
                value = value_at(row, path)
            except KeyError as error:
                raise UsageError(
                    f"{where} has no {documents.config.text_column}, as the rows before it have; "
                    "give it that field, or leave it out"
                ) from error
            mask = mask_of(row, path)
            documents.add(value, mask, where)
            if documents.kind == "tokens" and value:
                has_mask = _same_for_all(has_mask, mask is not NO_MASK, where)


def _same_for_all(before: bool | None, now: bool, where: object) -> bool:
    """Whether rows have a mask: in a table of another kind, a row that lacks it has a null."""
    if before not in (None, now):
        raise UsageError(
            f"{where} has {'an' if now else 'no'} {MASK}, unlike the rows before it; "
            "give it in all rows, or in none"
        )
    return now


class _Object(dict[str, Any]):
    """A JSON object, with the names that it gives twice."""

    twins: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    result = _Object(row)
    names = [name for name, _ in pairs]
    result.twins = tuple(name for name in row if names.count(name) > 1)
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _refuse_twins(row: Any, path: Path, where: object) -> None:
    """A field given twice would lose one of its values without a word."""
    for step in path:
        beside, row = row, row.get(step) if isinstance(row, dict) else None
        is_ids = isinstance(row, list) and row and type(row[0]) is int
        names = [step, MASK] if is_ids else [step]
        if twins := [
            name for name in names if isinstance(beside, _Object) and name in beside.twins
        ]:
            raise UsageError(f"{where} gives {twins[0]} twice; leave one of them out")
    is_chat = isinstance(row, list) and row and isinstance(row[0], dict)
    for message in row if is_chat else ():
        if isinstance(message, _Object):
            raise UsageError(f"{where} gives {message.twins[0]} twice; leave one of them out")


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
            f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}; convert it, "
            "for instance with iconv -f latin1 -t utf-8"
        ) from error


def _decoded(text: str, where: object, *, is_first: bool) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        message = _not_json(where, error)
        if is_first and text.lstrip()[:1] in "{[":  # perhaps over several lines
            message += "; a file holds one object a line, or in a .json an array of objects"
        raise UsageError(message) from error


def _not_json(where: object, error: BaseException) -> str:
    why = (
        error.msg.removesuffix(" at")
        if isinstance(error, json.JSONDecodeError)
        else str(error).splitlines()[0]
    )
    return f"{where} is not JSON: {why}; it may be cut short: repair it, or leave it out"


def _begins_array(file: DataFile) -> bool:
    with file.stream() as stream:
        head = stream.read(_PIECE).removeprefix(_BOM).lstrip()
    return head.startswith(b"[")


def _array(stream: io.BufferedIOBase, file: DataFile) -> Iterator[tuple[Row, Any]]:
    """The elements of a JSON array, one after the other: only one has to fit memory."""
    text = _Window(stream, file)
    text.skip()
    text.take("[")
    if text.skip() == "]":
        text.take("]")
    else:
        while True:
            yield Row(file.name, text.line), text.value()
            if text.skip() == "]":
                text.take("]")
                break
            text.take(",")
            text.skip()
    if text.skip():
        raise UsageError(f"{Row(file.name, text.line)} must be the array's end, got more text")


class _Window:
    """The part of a text that is looked at, and the line where it starts."""

    def __init__(self, stream: io.BufferedIOBase, file: DataFile) -> None:
        self.text = _text_of(stream)
        self.file, self.buffer, self.line = file, "", 1

    def more(self, count: int = _PIECE) -> bool:
        """Look at more characters; False at the end."""
        try:
            piece = self.text.read(count)
        except UnicodeDecodeError as error:
            near = Row(self.file.name, self.line + self.buffer.count("\n"))
            raise UsageError(
                f"{near} or one after it is not UTF-8; convert the file, "
                "for instance with iconv -f latin1 -t utf-8"
            ) from error
        self.buffer += piece
        return bool(piece)

    def drop(self, count: int) -> None:
        self.line += self.buffer.count("\n", 0, count)
        self.buffer = self.buffer[count:]

    def skip(self) -> str:
        """Go to the next character that is no white space, and give it; nothing at the end."""
        while True:
            self.drop(len(self.buffer) - len(self.buffer.lstrip()))
            if self.buffer or not self.more():
                return self.buffer[:1]

    def take(self, character: str) -> None:
        if self.buffer[:1] != character:
            there = self.buffer[:1] or "the end of the file"
            raise UsageError(
                f"{Row(self.file.name, self.line)} is not JSON: expected {character}, got {there}; "
                "it may be cut short: repair it, or download it again"
            )
        self.drop(1)

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer)
            except (ValueError, RecursionError) as error:
                if self.more(max(_PIECE, len(self.buffer))):  # twice as much: linear in all
                    continue
                raise UsageError(_not_json(Row(self.file.name, self.line), error)) from error
            self.drop(end)
            return value


def _text_of(stream: io.BufferedIOBase) -> io.TextIOWrapper:
    """UTF-8 with or without a mark at the start, and line breaks as they are."""
    return io.TextIOWrapper(cast(io.BufferedReader, stream), "utf-8-sig", newline="")


# --- csv ---


def read_csv(file: DataFile, documents: DocumentList) -> None:
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
                (name,) = path_in(dict.fromkeys(header, ""), documents.config, file.name)
                if header.count(name) > 1:
                    raise UsageError(f"{where} names the column {name} twice; rename one")
                index = header.index(name)
            elif len(row) != len(header):
                raise UsageError(
                    f"{where} must have {len(header)} fields, got {len(row)}; "
                    "it may be cut short: repair it, or leave it out"
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
                f"{where} or one after it is not UTF-8; convert the file, "
                "for instance with iconv -f latin1 -t utf-8"
            ) from error
        except csv.Error as error:
            raise UsageError(
                f"{where} is not CSV: {error}; it may be cut short: repair it, or leave it out"
            ) from error
        if row:
            yield where, row
