"""Reads documents from `.parquet` and `.arrow` files, batch by batch."""

import io
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from mpcache.data.digested_file import DataFile
from mpcache.data.document_codec import check_mask_type
from mpcache.data.local_documents import LocalDocuments, row_positions
from mpcache.data.text_column import Path, array_at, column_path, mask_path, tree_of, value_at
from mpcache.errors import UsageError

_BATCH_ROWS = 512  # rows of a .parquet read at once; few, because a document may be long
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(file: DataFile, documents: LocalDocuments) -> None:
    """Add the documents of a `.parquet`."""
    with file.explained("parquet"), file.seekable() as stream:
        table = pq.ParquetFile(pa.PythonFile(stream, "r"), page_checksum_verification=True)
        columns = _Columns(table.schema_arrow, file, documents)
        batches = table.iter_batches(_BATCH_ROWS, columns=columns.names)
        columns.add(batches)


def read_arrow(file: DataFile, documents: LocalDocuments) -> None:
    """Add the documents of an `.arrow`, a stream or a file in arrow's IPC format."""
    with file.explained("arrow"), file.seekable() as stream:
        native = pa.PythonFile(stream, "r")
        is_file = stream.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        if not is_file:
            _check_stream_end(stream, file)
        stream.seek(0)
        if is_file:
            reader = pa.ipc.open_file(native)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = batches = pa.ipc.open_stream(native)
        _Columns(reader.schema, file, documents).add(batches)


def _check_stream_end(stream: io.BufferedIOBase, file: DataFile) -> None:
    """Raise UsageError for a stream without its end: pyarrow reads it as a shorter stream."""
    size = stream.seek(0, 2)
    stream.seek(max(0, size - 8))
    if stream.read() != _STREAM_END:
        raise UsageError(
            f"{file.name} cannot be read as arrow, because its last bytes are missing; the file "
            "is cut short or damaged: write or download it again"
        )


class _Columns:
    """The columns with the documents of a table: the values, and for token ids a mask."""

    def __init__(self, schema: pa.Schema, file: DataFile, documents: LocalDocuments) -> None:
        self.file, self.documents = file, documents
        try:
            tree = tree_of(schema)
        except KeyError as error:
            raise UsageError(
                f"{file.name} has the column {error.args[0]} twice; rename one of the two columns"
            ) from error
        self.path = column_path(tree, documents.config, file.name)
        self.mask: Path | None = None
        documents.check_type(_type_at(schema, self.path), file.name)
        if documents.kind == "tokens" and _has_path(tree, mask_path(self.path)):
            self.mask = mask_path(self.path)
            check_mask_type(_type_at(schema, self.mask), file.name)

    @property
    def names(self) -> list[str]:
        """The columns to read from a `.parquet`; a field of a struct can be read alone."""
        return [".".join(path) for path in (self.path, self.mask) if path]

    def add(self, batches: Iterable[pa.RecordBatch]) -> None:
        first = 0
        for batch in batches:
            values = array_at(batch, self.path)
            mask = array_at(batch, self.mask) if self.mask else None
            self.documents.add_array(values, mask, row_positions(self.file.name, first))
            first += len(batch)


def _has_path(tree: dict[str, object], path: Path) -> bool:
    try:
        value_at(tree, path)
    except KeyError:
        return False
    return True


def _type_at(schema: pa.Schema, path: Path) -> pa.DataType:
    kind = schema.field(path[0]).type
    for step in path[1:]:
        kind = kind.field(kind.get_field_index(step)).type
    return kind
