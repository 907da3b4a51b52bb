"""The files of a dataset -> its documents and its digest.

Every file is opened once, digested, read and checked as a whole. Documents then lie in a temporary
file, as large as they are: nothing that happens to the files afterwards changes them. A `.bin` is
too plain to be worth a copy: it stays open, and is watched for changes.
"""

import hashlib
import json
import re
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mpcache.config import CollectConfig
from mpcache.data.data_file import DataFile, is_web_page
from mpcache.data.dataset_files import FileKind, Shards
from mpcache.data.document_codec import Document, Kind
from mpcache.data.json_csv_reader import read_csv, read_json
from mpcache.data.local_documents import DocumentList
from mpcache.data.parquet_arrow_reader import read_arrow, read_parquet
from mpcache.data.token_file import Indices, TokenFile, Vocabulary
from mpcache.errors import UsageError

_OTHER_FILES = 128  # that a collection has open besides its dataset's: a store's, a model's

_READERS: dict[FileKind, Callable[[DataFile, DocumentList], None]] = {
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}


@dataclass(frozen=True)
class Files:
    """What files hold: documents by their index, and the digest of the bytes that were read."""

    digest: str
    count: int
    fetch: Callable[[Indices], Sequence[Document]]
    kind: Kind


def read_files(shards: Shards, config: CollectConfig, vocabulary: Vocabulary) -> Files:
    """Raises UsageError for the first file that is not what its name says, with the place in it."""
    if shards.kind == "bin":
        return _token_files(shards, config, vocabulary)
    documents, digests = DocumentList(config, vocabulary), []
    for path, name in zip(shards.files, shards.names, strict=True):
        documents.begin(name)
        with DataFile(path, name, may_be_empty=_may_be_empty(shards)) as file:
            if shards.kind == "text":
                _read_texts(file, documents, split=shards.form == "file")
            else:
                _refuse_web_page(file, shards.kind)
                _READERS[shards.kind](file, documents)
            file.check_unchanged()
            digests.append(file.digest)
    documents.spool.finish()
    if len(documents) and not documents.spool.size and not vocabulary.has_tokenizer:
        raise UsageError(
            f"dataset must hold a document with token ids, got {len(documents)} empty ones in "
            f"{shards.label}; name another, or another column with --text-column"
        )
    digest = _digest(shards, digests, config)
    return Files(digest, len(documents), documents.fetch, documents.kind or "text")


def _may_be_empty(shards: Shards) -> bool:
    """Whether a file without a byte is a document: a text of a folder."""
    return shards.kind == "text" and shards.form != "file"


def _refuse_web_page(file: DataFile, kind: str) -> None:
    if is_web_page(file):
        raise UsageError(
            f"{file.name} is a web page, not {kind}; download the file itself "
            "(on the Hub its URL has /resolve/, that of its page /blob/)"
        )


def _read_texts(file: DataFile, documents: DocumentList, *, split: bool) -> None:
    """A document a file; of a file that was named alone, a document a paragraph."""
    with file.explained("text"), file.stream() as stream:
        data = stream.read()
    try:
        text = data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"text must be UTF-8, got {file.name}: {error}; convert it") from error
    if split and not text.strip():
        raise UsageError(f"dataset must hold a document, got none in {file.name}; name another")
    for paragraph in re.split(r"\n\s*\n", text.strip()) if split else [text]:
        documents.add_text(paragraph, file.name)


def _token_files(shards: Shards, config: CollectConfig, vocabulary: Vocabulary) -> Files:
    _refuse_too_many(len(shards.files), shards.label)
    files, parts = [], []
    for path, name in zip(shards.files, shards.names, strict=True):
        files.append(DataFile(path, name))
        parts.append(TokenFile(files[-1], vocabulary))
    starts = np.array([0, *accumulate(len(part) for part in parts)])

    def fetch(indices: Indices) -> list[Document]:
        owners = np.searchsorted(starts, indices, side="right") - 1
        return [parts[o][int(i - starts[o])] for o, i in zip(owners, indices, strict=True)]

    digest = _digest(shards, [file.digest for file in files], config)
    return Files(digest, int(starts[-1]), fetch, "tokens")


def _refuse_too_many(count: int, label: str) -> None:
    """Every `.bin` stays open, and a process may have so many files open and no more."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and count + _OTHER_FILES > limit:
        raise UsageError(
            f"{label} has {count} .bin files, too many where {limit} files may be open at once; "
            f"allow more with ulimit -n {count + _OTHER_FILES}, or join some of the files"
        )


# --- digests ---


def _digest(shards: Shards, digests: Sequence[str], config: CollectConfig) -> str:
    """Names the content: the files' bytes in their order, and how they are read.

    One table in a plain file, a folder of texts and an arrow folder have the digests that they
    always had, which in folders are of names too: stores that were made from them keep their
    fingerprints. A `.txt` or `.bin` has its old digest, which does not say how it is read, only
    where an older store is continued.
    """
    compressions = [_compression(name) for name in shards.names]
    if shards.form in ("text folder", "arrow folder"):
        digest = hashlib.sha256()
        for name, own in zip(shards.names, digests, strict=True):
            name = name.split("/")[-1] if shards.form == "arrow folder" else name
            digest.update(f"{name}\0{own}\0".encode())
        return digest.hexdigest()
    continues_older = config.parse_special_tokens and config.keep_empty_documents
    is_old = shards.kind in ("json", "parquet") or (
        shards.form == "file" and shards.kind in ("text", "bin") and continues_older
    )
    if is_old and len(digests) == 1 and not any(compressions):
        return digests[0]
    form = "paragraphs" if shards.kind == "text" and shards.form == "file" else shards.kind
    content = [form, list(zip(compressions, digests, strict=True))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _compression(name: str) -> str:
    suffix = name.lower().rpartition(".")[2]
    return suffix if suffix in ("gz", "zst") else ""
