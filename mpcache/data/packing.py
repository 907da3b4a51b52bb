"""Documents -> sequences -> parts. Pure: the same documents give the same parts, from any cursor.

Train and validation are two streams of tokens. The rank of a document assigns it to one stream, and
the number of a part assigns the part by the same rule. A part takes the next sequences of its
stream; where each document is run alone, the next pieces of documents.

An item is a token, or a token with its flags (`mpcache.data.tokenization`).
S: sequences in a part. L: tokens in a sequence (`ctx_len`).
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt, UInt8

from mpcache.config import CollectConfig, Split, split_of
from mpcache.data.documents import Documents
from mpcache.data.special_tokens import SpecialTokens, special_tokens_of
from mpcache.data.tokenization import FLAG_SHIFT, DocumentTokenizer, Stream
from mpcache.data.vocabulary import Tokenizer, token_dtype
from mpcache.errors import UsageError
from mpcache.store.mark import TokenProgress
from mpcache.store.next_token_parts import next_part
from mpcache.store.object_paths import STARTS_DOCUMENT

BATCH_DOCUMENTS = 64  # documents tokenised in one call; the fast tokenizer spreads them over cores
_TOKEN_BITS = (1 << int(FLAG_SHIFT)) - 1  # of an item


class Cursor(NamedTuple):
    """Where a part starts: the rank of a document, and the index of a token in that document."""

    document: int
    token: int


FIRST_PARTS: Mapping[int, Cursor] = {0: Cursor(0, 0), 1: Cursor(0, 0)}
"the first part of each split, and its cursor"


@dataclass(frozen=True, eq=False)
class PartTokens:
    """The tokens of a part, and where the next part of its split starts."""

    part: int
    split: Split
    tokens: UInt[np.ndarray, "S L"]
    cursor: Cursor
    next_cursor: Cursor
    last: bool
    "the split ends with this part"
    flags: UInt8[np.ndarray, "S L"] | None = None
    "of each token; None in a store without token_flags"
    rows: int = -1
    "tokens before the zeros that fill the last sequence; -1: all"
    empty_documents: int | None = None
    "documents without tokens that were left out since the previous part; None: they are kept"

    def __post_init__(self) -> None:
        if self.rows < 0:
            object.__setattr__(self, "rows", self.tokens.size)

    @property
    def progress(self) -> TokenProgress:
        """The fields of the part's mark that describe its documents."""
        return TokenProgress(
            cursor=self.cursor,
            next_cursor=self.next_cursor,
            last=self.last,
            empty_documents=self.empty_documents,
        )


# --- parts ---


class SequencePacker:
    """Packs the documents of one split into whole sequences, without gaps between documents."""

    def __init__(
        self, part: int, cursor: Cursor, config: CollectConfig, specials: SpecialTokens
    ) -> None:
        self.part, self.cursor, self.validation_every = part, cursor, config.validation_every
        self.split = split_of(part, self.validation_every)
        self.begin = specials.begin if specials.begins == "sequence" else None
        self.ctx_len, self.part_rows = config.ctx_len, config.part_rows
        self.items_per_sequence = config.ctx_len - (self.begin is not None)
        self.part_sequences = config.part_rows // config.ctx_len
        self.streams: deque[tuple[int, Stream]] = deque()  # ranks and unpacked items of documents
        self.size = 0  # unpacked items
        self.counts_empty = not config.keep_empty_documents
        self.empty: deque[int] = deque()  # ranks of documents left out, not yet counted in a part

    @property
    def sequences(self) -> int:
        """Whole sequences that the unpacked items fill."""
        return self.size // self.items_per_sequence

    @property
    def is_empty(self) -> bool:
        """Whether not even one sequence can be packed."""
        return not self.sequences

    @property
    def is_ready(self) -> bool:
        """Whether a part can be cut: one sequence more tells that the part is not the last."""
        return self.sequences > self.part_sequences

    def skip(self, rank: int) -> None:
        """Count a document without tokens."""
        self.empty.append(rank)

    def push(self, rank: int, stream: Stream) -> None:
        """Add the items of a document."""
        rest = stream[self.cursor.token :] if rank == self.cursor.document else stream
        self.streams.append((rank, rest))
        self.size += len(rest)

    def cut_part(self, dtype: np.dtype[Any]) -> PartTokens:
        """Remove the items of the next part. The part has fewer sequences only at the end."""
        part, cursor = self.part, self.cursor
        items, rows = self.take_part()
        tokens, flags = _split_items(items.reshape(-1, self.ctx_len), dtype)
        self.part = next_part(part, self.validation_every)
        return PartTokens(
            part,
            self.split,
            tokens,
            cursor,
            self.cursor,
            last=self.is_empty,
            flags=flags,
            rows=rows,
            empty_documents=self.count_empty() if self.counts_empty else None,
        )

    def take_part(self) -> tuple[Stream, int]:
        """The items of the next part, whole sequences, and how many of the items are no filling."""
        sequences = min(self.sequences, self.part_sequences)
        count = sequences * self.items_per_sequence
        stream = self.take(count).reshape(sequences, self.items_per_sequence)
        if self.begin is not None:
            stream = np.insert(stream, 0, self.begin, axis=1)
        return stream.reshape(-1), stream.size

    def take(self, count: int) -> Stream:
        """The next items of the stream. The cursor moves past them."""
        self.size -= count
        taken = []
        while count:
            rank, stream = self.streams.popleft()
            taken.append(stream[:count])
            start = self.cursor.token if rank == self.cursor.document else 0
            if rest := stream[count:].size:
                self.streams.appendleft((rank, stream[count:]))
                self.cursor = Cursor(rank, start + len(stream) - rest)
            else:
                self.cursor = Cursor(rank + 1, 0)
            count -= len(taken[-1])
        return np.concatenate(taken)

    def count_empty(self) -> int:
        """Documents left out up to the cursor, or to the end of the split. Forgets them."""
        count = len(self.empty)
        while self.empty and (self.is_empty or self.empty[0] < self.cursor.document):
            self.empty.popleft()
        return count - len(self.empty)


class SingleDocumentPacker(SequencePacker):
    """Packs whole pieces into parts: each is at most `ctx_len` tokens of one document."""

    def __init__(
        self, part: int, cursor: Cursor, config: CollectConfig, specials: SpecialTokens
    ) -> None:
        super().__init__(part, cursor, config, specials)
        self.pieces: deque[tuple[Stream, Cursor]] = deque()  # each with the cursor after it

    @property
    def is_empty(self) -> bool:
        return not self.pieces

    @property
    def is_ready(self) -> bool:
        return self.size > self.part_rows

    def push(self, rank: int, stream: Stream) -> None:
        start = self.cursor.token if rank == self.cursor.document else 0
        while start < len(stream):
            piece, start = self.piece(stream, start)
            after = Cursor(rank, start) if start < len(stream) else Cursor(rank + 1, 0)
            self.pieces.append((piece, after))
            self.size += len(piece)

    def piece(self, stream: Stream, start: int) -> tuple[Stream, int]:
        """The piece of a document that starts at an item, and where the next piece starts."""
        has_begin = start == 0 and int(stream[0]) & _TOKEN_BITS == self.begin
        head = [] if self.begin is None or has_begin else [self.begin]
        stop = start + self.ctx_len - len(head)
        piece = np.concatenate([np.array(head, stream.dtype), stream[start:stop]])
        piece[0] |= np.uint64(STARTS_DOCUMENT) << FLAG_SHIFT
        return piece, min(stop, len(stream))

    def take_part(self) -> tuple[Stream, int]:
        taken: list[Stream] = []
        rows = 0
        while self.pieces and rows + len(self.pieces[0][0]) <= self.part_rows:
            piece, self.cursor = self.pieces.popleft()
            taken.append(piece)
            rows += len(piece)
        self.size -= rows
        filling = np.zeros(-rows % self.ctx_len, np.uint64)
        return np.concatenate([*taken, filling]), rows


def _split_items(
    items_SL: UInt[np.ndarray, "S L"], dtype: np.dtype[Any]
) -> tuple[UInt[np.ndarray, "S L"], UInt8[np.ndarray, "S L"] | None]:
    """Tokens, and their flags if the items have flags."""
    if items_SL.dtype != np.uint64:
        return items_SL.astype(dtype), None
    flags_SL = (items_SL >> FLAG_SHIFT).astype(np.uint8)
    return (items_SL & np.uint64(_TOKEN_BITS)).astype(dtype), flags_SL


class DocumentFeed:
    """Reads each document once and gives it to the packer of its split."""

    def __init__(
        self,
        documents: Documents,
        tokenizer: DocumentTokenizer,
        validation_every: int,
        packers: dict[Split, SequencePacker],
    ) -> None:
        self.tokenizer, self.validation_every = tokenizer, validation_every
        self.packers = packers
        self.count = min(packer.cursor.document for packer in packers.values())  # documents read
        self.starts = {split: packer.cursor.document for split, packer in packers.items()}
        self.reader = documents.read(self.count)

    def fill(self, packer: SequencePacker) -> None:
        """Read until the packer is ready or the documents end."""
        while not packer.is_ready and (batch := list(islice(self.reader, BATCH_DOCUMENTS))):
            self.count = batch[-1][0] + 1
            wanted = [(rank, document) for rank, document in batch if self.is_wanted(rank)]
            streams = self.tokenizer([document for _, document in wanted])
            for (rank, _), stream in zip(wanted, streams, strict=True):
                owner = self.packers[split_of(rank, self.validation_every)]
                if stream is None:
                    owner.skip(rank)
                else:
                    owner.push(rank, stream)

    def is_wanted(self, rank: int) -> bool:
        """Whether a document belongs to a split that is packed, at or after its cursor."""
        split = split_of(rank, self.validation_every)
        return split in self.starts and rank >= self.starts[split]


def iter_parts(
    documents: Documents,
    tokenizer: Tokenizer,
    config: CollectConfig,
    cursors: Mapping[int, Cursor] = FIRST_PARTS,
    template: str | None = None,
) -> Iterator[PartTokens]:
    """Parts in order of their numbers until the splits end.

    `cursors` maps the first wanted part of a split to its cursor; a split that is missing there is
    not read. `template` is the chat template; conversations need it.

    Raises UsageError for a special token that the tokenizer lacks, a split that does not fill one
    sequence, or a conversation that the chat template rejects.
    """
    specials = special_tokens_of(tokenizer, config)
    packer_type = SingleDocumentPacker if config.one_document_per_sequence else SequencePacker
    packers = {
        split_of(part, config.validation_every): packer_type(part, cursor, config, specials)
        for part, cursor in cursors.items()
    }
    encode = DocumentTokenizer(tokenizer, specials, config, documents, template)
    feed = DocumentFeed(documents, encode, config.validation_every, packers)
    return _pack_all(packers, feed, token_dtype(tokenizer), config)


def _pack_all(
    packers: dict[Split, SequencePacker],
    feed: DocumentFeed,
    dtype: np.dtype[Any],
    config: CollectConfig,
) -> Iterator[PartTokens]:
    for packer in packers.values():  # an empty split must raise before the first part is yielded
        feed.fill(packer)
        if packer.is_empty and packer.cursor == (0, 0):
            is_validation = packer.split == "validation"
            fewer = ", a smaller --validation-every" if is_validation else ""
            raise UsageError(
                f"each split must fill at least one sequence of {config.ctx_len} tokens, got no "
                f"{packer.split} sequence from {feed.count} documents; use more documents{fewer} "
                "or a smaller --ctx-len"
            )
    unfinished = list(packers.values())
    while unfinished:
        packer = min(unfinished, key=lambda packer: packer.part)
        feed.fill(packer)
        if packer.is_empty:
            unfinished.remove(packer)
        else:
            yield packer.cut_part(dtype)
