"""Documents -> sequences -> parts. Pure: the same documents give the same parts, from any cursor.

Train and validation are two streams: the document at place i belongs to one of them, and so does
part p, by the same rule. Each part takes the next sequences of its stream; or its next pieces,
where each document is run alone.

S: sequences in a part. L: tokens in a sequence (`ctx_len`).
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt, UInt8

from mpcache.config import CollectConfig, Split, split_of
from mpcache.data.documents import Documents, permutation
from mpcache.data.token_file import Tokenizer, end_token, token_dtype
from mpcache.data.tokenization import FLAG_SHIFT, Encoder, Specials, Stream
from mpcache.errors import UsageError
from mpcache.store.format import STARTS_DOCUMENT
from mpcache.store.token_plan import next_part

BATCH_DOCUMENTS = 64  # documents tokenised in one call; the fast tokenizer spreads them over cores
_TOKEN = (1 << int(FLAG_SHIFT)) - 1  # bits of an item that are its token


class Cursor(NamedTuple):
    """Where a part starts: a document's place, and a token's place in that document."""

    document: int
    token: int


FIRST_PARTS: Mapping[int, Cursor] = {0: Cursor(0, 0), 1: Cursor(0, 0)}


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
    "of each token; None where the store has no token_flags"
    rows: int = -1
    "true tokens: zeros fill up the last sequence; -1 stands for all"
    empty_documents: int | None = None
    "documents without tokens that were left out since the part before; None: such are kept"

    def __post_init__(self) -> None:
        if self.rows < 0:
            object.__setattr__(self, "rows", self.tokens.size)

    @property
    def progress(self) -> dict[str, Any]:
        """What the mark of the part says of the documents."""
        empty = {} if self.empty_documents is None else {"empty_documents": self.empty_documents}
        cursors = {"cursor": list(self.cursor), "next_cursor": list(self.next_cursor)}
        return {**cursors, "last": self.last, **empty}


def special_tokens(tokenizer: Tokenizer, config: CollectConfig) -> Specials:
    """What `config` asks of the tokenizer. Raises UsageError where it has no such token."""
    begin = next(
        (t for t in (tokenizer.bos_token_id, tokenizer.cls_token_id) if isinstance(t, int)), None
    )
    end = end_token(tokenizer)
    if config.bos != "none" and begin is None:
        raise UsageError(
            f"bos={config.bos} needs a tokenizer with BOS or CLS, got none; use bos=none"
        )
    if config.eos and end is None:
        raise UsageError("eos needs a tokenizer with EOS or SEP, got none; turn eos off")
    if config.bos == "sequence" and config.ctx_len == 1:
        raise UsageError("bos=sequence needs ctx_len of at least 2, got 1; use bos=none")
    is_apart = config.cross_document_attention or config.one_document_per_sequence
    if not (is_apart or config.eos or config.bos == "document"):
        raise UsageError(
            "without cross_document_attention a token must mark where documents start, "
            f"got eos=False, bos={config.bos}; turn eos on, or use bos=document"
        )
    return Specials(
        begin=None if config.bos == "none" else begin,
        begins="sequence" if config.bos == "sequence" else "document",
        end=end if config.eos else None,
    )


# --- parts ---


class Packer:
    """The stream of one split: documents in, parts out."""

    def __init__(
        self, part: int, cursor: Cursor, config: CollectConfig, specials: Specials
    ) -> None:
        self.part, self.cursor, self.every = part, cursor, config.validation_every
        self.split = split_of(part, self.every)
        self.begin = specials.begin if specials.begins == "sequence" else None
        self.ctx_len, self.part_rows = config.ctx_len, config.part_rows
        self.body = config.ctx_len - (self.begin is not None)  # stream tokens in a sequence
        self.part_sequences = config.part_rows // config.ctx_len
        self.pieces: deque[tuple[int, Stream]] = deque()
        self.size = 0  # tokens waiting
        self.counts_empty = not config.keep_empty_documents
        self.empty: deque[int] = deque()  # documents left out, not yet counted in a part

    @property
    def sequences(self) -> int:
        return self.size // self.body

    @property
    def is_empty(self) -> bool:
        """Nothing is left for a part."""
        return not self.sequences

    @property
    def ready(self) -> bool:
        """A part is there, and a sequence after it: so it is known whether the part is the last."""
        return self.sequences > self.part_sequences

    def leave_out(self, place: int) -> None:
        """Count a document without tokens."""
        self.empty.append(place)

    def push(self, place: int, stream: Stream) -> None:
        rest = stream[self.cursor.token :] if place == self.cursor.document else stream
        self.pieces.append((place, rest))
        self.size += len(rest)

    def cut(self, dtype: np.dtype[Any]) -> PartTokens:
        part, cursor = self.part, self.cursor
        items, rows = self.next_items()
        tokens, flags = _unpacked(items.reshape(-1, self.ctx_len), dtype)
        self.part = next_part(part, self.every)
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

    def next_items(self) -> tuple[Stream, int]:
        """The items of the next part, and how many of them are true."""
        sequences = min(self.sequences, self.part_sequences)
        stream = self.take(sequences * self.body).reshape(sequences, self.body)
        if self.begin is not None:
            stream = np.insert(stream, 0, self.begin, axis=1)
        return stream.reshape(-1), stream.size

    def take(self, wanted: int) -> Stream:
        """The next items of the stream; the cursor moves behind them."""
        self.size -= wanted
        taken = []
        while wanted:
            place, stream = self.pieces.popleft()
            taken.append(stream[:wanted])
            start = self.cursor.token if place == self.cursor.document else 0
            if rest := stream[wanted:].size:
                self.pieces.appendleft((place, stream[wanted:]))
                self.cursor = Cursor(place, start + len(stream) - rest)
            else:
                self.cursor = Cursor(place + 1, 0)
            wanted -= len(taken[-1])
        return np.concatenate(taken)

    def count_empty(self) -> int:
        """Documents left out up to the cursor, or to the end of the split."""
        count = len(self.empty)
        while self.empty and (self.is_empty or self.empty[0] < self.cursor.document):
            self.empty.popleft()
        return count - len(self.empty)


class LonePacker(Packer):
    """Parts of whole pieces: each has at most `ctx_len` tokens of one document."""

    def __init__(
        self, part: int, cursor: Cursor, config: CollectConfig, specials: Specials
    ) -> None:
        super().__init__(part, cursor, config, specials)
        self.waiting: deque[tuple[Stream, Cursor]] = deque()  # pieces, and what comes after each

    @property
    def is_empty(self) -> bool:
        return not self.waiting

    @property
    def ready(self) -> bool:
        return self.size > self.part_rows

    def push(self, place: int, stream: Stream) -> None:
        start = self.cursor.token if place == self.cursor.document else 0
        while start < len(stream):
            piece, start = self.piece(stream, start)
            after = Cursor(place, start) if start < len(stream) else Cursor(place + 1, 0)
            self.waiting.append((piece, after))
            self.size += len(piece)

    def piece(self, stream: Stream, start: int) -> tuple[Stream, int]:
        """The piece of a document that starts with an item, and where the next one starts."""
        is_begun = start == 0 and int(stream[0]) & _TOKEN == self.begin
        head = [] if self.begin is None or is_begun else [self.begin]
        stop = start + self.ctx_len - len(head)
        piece = np.concatenate([np.array(head, stream.dtype), stream[start:stop]])
        piece[0] |= np.uint64(STARTS_DOCUMENT) << FLAG_SHIFT
        return piece, min(stop, len(stream))

    def next_items(self) -> tuple[Stream, int]:
        taken: list[Stream] = []
        rows = 0
        while self.waiting and rows + len(self.waiting[0][0]) <= self.part_rows:
            piece, self.cursor = self.waiting.popleft()
            taken.append(piece)
            rows += len(piece)
        self.size -= rows
        filling = np.zeros(-rows % self.ctx_len, np.uint64)
        return np.concatenate([*taken, filling]), rows


def _unpacked(
    items_SL: UInt[np.ndarray, "S L"], dtype: np.dtype[Any]
) -> tuple[UInt[np.ndarray, "S L"], UInt8[np.ndarray, "S L"] | None]:
    """Tokens, and their flags where the items have some."""
    if items_SL.dtype != np.uint64:
        return items_SL.astype(dtype), None
    return (items_SL & np.uint64(_TOKEN)).astype(dtype), (items_SL >> FLAG_SHIFT).astype(np.uint8)


class Feed:
    """Reads documents once and hands each to the packer of its split."""

    def __init__(
        self,
        documents: Documents,
        encode: Encoder,
        validation_every: int,
        packers: dict[Split, Packer],
    ) -> None:
        self.encode, self.every, self.packers = encode, validation_every, packers
        self.count = min(packer.cursor.document for packer in packers.values())
        self.starts = {split: packer.cursor.document for split, packer in packers.items()}
        self.reader = documents.read(self.count)

    def fill(self, packer: Packer) -> None:
        """Until the packer is ready or the documents end."""
        while not packer.ready and (batch := list(islice(self.reader, BATCH_DOCUMENTS))):
            self.count = batch[-1][0] + 1
            wanted = [(place, document) for place, document in batch if self.is_wanted(place)]
            streams = self.encode([document for _, document in wanted])
            for (place, _), stream in zip(wanted, streams, strict=True):
                own = self.packers[split_of(place, self.every)]
                if stream is None:
                    own.leave_out(place)
                else:
                    own.push(place, stream)

    def is_wanted(self, place: int) -> bool:
        split = split_of(place, self.every)
        return split in self.starts and place >= self.starts[split]


def iter_parts(
    documents: Documents,
    tokenizer: Tokenizer,
    config: CollectConfig,
    cursors: Mapping[int, Cursor] = FIRST_PARTS,
    template: str | None = None,
) -> Iterator[PartTokens]:
    """Parts in order of their numbers until the splits end.

    `cursors` maps the first part wanted of a split to its cursor; a split that is not named is not
    read. `template` is the chat template; without it that of the config is taken.

    Raises UsageError for a token the tokenizer lacks, a split without a single sequence, or a
    conversation that the chat template does not take.
    """
    specials = special_tokens(tokenizer, config)
    kind = LonePacker if config.one_document_per_sequence else Packer
    packers = {
        split_of(part, config.validation_every): kind(part, cursor, config, specials)
        for part, cursor in cursors.items()
    }
    encode = Encoder(tokenizer, specials, config, documents, template)
    feed = Feed(documents, encode, config.validation_every, packers)
    return packed(packers, feed, token_dtype(tokenizer), config)


def packed(
    packers: dict[Split, Packer], feed: Feed, dtype: np.dtype[Any], config: CollectConfig
) -> Iterator[PartTokens]:
    for packer in packers.values():  # an empty split shows before the first part is out
        feed.fill(packer)
        if packer.is_empty and packer.cursor == (0, 0):
            raise UsageError(
                f"each split must fill a sequence of {config.ctx_len} tokens, got no "
                f"{packer.split} one from {feed.count} documents; use more documents, "
                "or a smaller ctx_len or validation_every"
            )
    waiting = list(packers.values())
    while waiting:
        packer = min(waiting, key=lambda packer: packer.part)
        feed.fill(packer)
        if packer.is_empty:
            waiting.remove(packer)
        else:
            yield packer.cut(dtype)


# --- rows and documents of a part ---


def row_permutation(seed: int, part: int, rows: int) -> Int64[np.ndarray, " rows"]:
    """For each row of a part the flat index of its token: sequence * ctx_len + position."""
    return permutation(rows, f"rows {seed} {part}")


def document_starts(tokens: UInt[np.ndarray, "S L"], specials: Specials) -> Bool[np.ndarray, "S L"]:
    """Where documents start, read off the tokens alone; a sequence starts one in any case."""
    starts = np.zeros(tokens.shape, np.bool_)
    if specials.begins == "document" and specials.begin is not None:
        starts |= tokens == specials.begin
        if specials.begin == specials.end:  # one token does both: the second of a pair begins
            starts[:, 1:] &= starts[:, :-1]
    elif specials.end is not None:
        starts[:, 1:] = tokens[:, :-1] == specials.end
        if specials.begin is not None:
            starts[:, 1:2] = (
                False  # it follows the sequence's own begin token, perhaps the same as end
            )
    starts[:, 0] = True
    return starts


def position_ids(tokens: UInt[np.ndarray, "S L"], specials: Specials) -> Int64[np.ndarray, "S L"]:
    """Positions that restart at each document, so that no document sees an earlier one."""
    places = np.arange(tokens.shape[1])
    starts = np.where(document_starts(tokens, specials), places, 0)
    return places - np.maximum.accumulate(starts, axis=1)
