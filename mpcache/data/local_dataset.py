"""The files of a local dataset -> its documents and its digest.

Each file is opened once, digested, read and checked as a whole. The documents are then kept in a
temporary file of their size, so later changes of the files have no effect. A `.bin` of token ids is
not copied: the file stays open, and changes of it raise an error.
"""

import hashlib
import json
import re
import resource
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np

from mpcache.config import CollectConfig
from mpcache.data.bin_documents import TokenFile
from mpcache.data.dataset_files import DatasetFiles, FileKind
from mpcache.data.digested_file import DataFile, is_web_page
from mpcache.data.document_codec import Document, Kind
from mpcache.data.documents import Documents, Fetch, permuted_documents
from mpcache.data.json_csv_reader import read_csv, read_json
from mpcache.data.local_documents import LocalDocuments
from mpcache.data.parquet_arrow_reader import read_arrow, read_parquet
from mpcache.data.vocabulary import Indices, Vocabulary
from mpcache.errors import UsageError

_OTHER_FILES = 128  # files that a collection opens besides its dataset: of its store and its model

_READERS: dict[FileKind, Callable[[DataFile, LocalDocuments], None]] = {
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}


def open_local_dataset(
    files: DatasetFiles, config: CollectConfig, vocabulary: Vocabulary
) -> Documents:
    """Raises UsageError for the first file with unusable content, and says where in the file."""
    read = _read_token_files if files.kind == "bin" else _read_documents
    fetch, count, kind, digests = read(files, config, vocabulary)
    if not count:
        raise UsageError(
            f"a dataset must hold a document, got none in {files.label}; give another --dataset"
        )
    return Documents(
        _dataset_digest(files, digests, config),
        {
            "dataset": files.label,
            "dataset_revision": None,
            "dataset_config": None,
            "split": config.split,
        },
        partial(permuted_documents, fetch, count, config.seed),
        kind,
        vocabulary.largest_id,
    )


def _read_documents(
    files: DatasetFiles, config: CollectConfig, vocabulary: Vocabulary
) -> tuple[Fetch, int, Kind, list[str]]:
    """The documents, their number and kind, and the digest of each file."""
    documents, digests = LocalDocuments(config, vocabulary), []
    for path, name in zip(files.paths, files.names, strict=True):
        documents.begin_file(name)
        with DataFile(path, name, may_be_empty=_may_be_empty(files)) as file:
            if files.kind == "text":
                _read_text(file, documents, in_paragraphs=files.form == "file")
            else:
                _check_no_web_page(file, files.kind)
                _READERS[files.kind](file, documents)
            file.check_unchanged()
            digests.append(file.digest)
    documents.finish()
    if len(documents) and not documents.records.size and not vocabulary.has_tokenizer:
        raise UsageError(
            f"a dataset must hold a document with token ids, got {len(documents)} empty "
            f"documents in {files.label}; give another --dataset, or another column with "
            "--text-column"
        )
    return documents.fetch, len(documents), documents.kind or "text", digests


def _may_be_empty(files: DatasetFiles) -> bool:
    """Whether an empty file is a document: true for a text in a folder."""
    return files.kind == "text" and files.form != "file"


def _check_no_web_page(file: DataFile, kind: str) -> None:
    if is_web_page(file):
        raise UsageError(
            f"{file.name} is a web page, not {kind}; download the file itself (on the Hub, the "
            "URL of a file contains /resolve/, not /blob/)"
        )


def _read_text(file: DataFile, documents: LocalDocuments, *, in_paragraphs: bool) -> None:
    """Add the whole file as a document, or each of its paragraphs."""
    with file.explained("text"), file.stream() as stream:
        data = stream.read()
    try:
        text = data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"text must be UTF-8, got {file.name}: {error}; convert the file to UTF-8"
        ) from error
    if in_paragraphs and not text.strip():
        raise UsageError(
            f"a dataset must hold a document, got none in {file.name}; give another --dataset"
        )
    for paragraph in re.split(r"\n\s*\n", text.strip()) if in_paragraphs else [text]:
        documents.add_text(paragraph, file.name)


def _read_token_files(
    files: DatasetFiles, config: CollectConfig, vocabulary: Vocabulary
) -> tuple[Fetch, int, Kind, list[str]]:
    """The same as `_read_documents` for `.bin` files, which stay open."""
    _check_open_file_limit(len(files.paths), files.label)
    token_files = [
        TokenFile(DataFile(path, name), vocabulary)
        for path, name in zip(files.paths, files.names, strict=True)
    ]
    starts = np.array([0, *accumulate(len(tokens) for tokens in token_files)])

    def fetch(indices: Indices) -> Sequence[Document]:
        owners = np.searchsorted(starts, indices, side="right") - 1
        return [token_files[o][int(i - starts[o])] for o, i in zip(owners, indices, strict=True)]

    return fetch, int(starts[-1]), "tokens", [tokens.file.digest for tokens in token_files]


def _check_open_file_limit(count: int, label: str) -> None:
    """Raise UsageError where the process may not have all `.bin` files open at once."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and count + _OTHER_FILES > limit:
        raise UsageError(
            f"{label} has {count} .bin files, but only {limit} files may be open at the same "
            f"time; raise that limit with ulimit -n {count + _OTHER_FILES}, or join some of the "
            "files"
        )


# --- digests ---


def _dataset_digest(files: DatasetFiles, digests: Sequence[str], config: CollectConfig) -> str:
    """Names the content: the bytes of the files in their order, and how they are read.

    These forms must never change, because stores have them in their fingerprints:
    a plain file of one table has its own sha256; a folder of texts or of arrow files has a digest
    of names and contents. A lone `.txt` or `.bin` has its own sha256, which does not say how it is
    read, only with the settings of stores that are older than these settings.
    """
    compressions = [_compression(name) for name in files.names]
    if files.form in ("text folder", "arrow folder"):
        folder_digest = hashlib.sha256()
        for name, digest in zip(files.names, digests, strict=True):
            name = name.split("/")[-1] if files.form == "arrow folder" else name
            folder_digest.update(f"{name}\0{digest}\0".encode())
        return folder_digest.hexdigest()
    continues_older = config.parse_special_tokens and config.keep_empty_documents
    is_old = files.kind in ("json", "parquet") or (
        files.form == "file" and files.kind in ("text", "bin") and continues_older
    )
    if is_old and len(digests) == 1 and not any(compressions):
        return digests[0]
    form = "paragraphs" if files.kind == "text" and files.form == "file" else files.kind
    content = [form, list(zip(compressions, digests, strict=True))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _compression(name: str) -> str:
    suffix = name.lower().rpartition(".")[2]
    return suffix if suffix in ("gz", "zst") else ""
