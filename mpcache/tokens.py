"""Documents -> sequences -> parts. Pure: the same documents give the same parts, from any cursor.

Train and validation are two streams: the document at place i belongs to one of them, and so does
part p, by the same rule. Each part takes the next sequences of its stream.

S: sequences in a part. L: tokens in a sequence (`ctx_len`).
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt

from mpcache.config import CollectConfig, Split, split_of
from mpcache.documents import Documents, permutation
from mpcache.records import Document
from mpcache.tokenised import TokenIds, Tokenizer, Tokens, end_token, token_dtype

BATCH_DOCUMENTS = 64  # documents tokenised in one call; the fast tokenizer spreads them over cores


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


@dataclass(frozen=True)
class Specials:
    """The special tokens that packing puts in; None where it puts none."""

    begin: int | None
    begins: Literal["document", "sequence"]
    "what `begin` begins"
    end: int | None
    "ends each document"


def following(part: int, validation_every: int) -> int:
    """The next part of the same split."""
    if split_of(part, validation_every) == "validation":
        return part + validation_every
    return part + 1 if split_of(part + 1, validation_every) == "train" else part + 2


def special_tokens(tokenizer: Tokenizer, config: CollectConfig) -> Specials:
    """What `config` asks of the tokenizer. Raises ValueError where it has no such token."""
    begin = next(
        (t for t in (tokenizer.bos_token_id, tokenizer.cls_token_id) if isinstance(t, int)), None
    )
    end = end_token(tokenizer)
    if config.bos != "none" and begin is None:
        raise ValueError(
            f"bos={config.bos} needs a tokenizer with BOS or CLS, got none; use bos=none"
        )
    if config.eos and end is None:
        raise ValueError("eos needs a tokenizer with EOS or SEP, got none; turn eos off")
    if config.bos == "sequence" and config.ctx_len == 1:
        raise ValueError("bos=sequence needs ctx_len of at least 2, got 1; use bos=none")
    if not (config.cross_document_attention or config.eos or config.bos == "document"):
        raise ValueError(
            "without cross_document_attention a token must mark where documents start, "
            f"got eos=False, bos={config.bos}; turn eos on, or use bos=document"
        )
    return Specials(
        begin=None if config.bos == "none" else begin,
        begins="sequence" if config.bos == "sequence" else "document",
        end=end if config.eos else None,
    )


# --- parts ---


class Encoder:
    """Documents -> their tokens, with the special tokens of each document."""

    def __init__(self, tokenizer: Tokenizer, specials: Specials) -> None:
        self.tokenizer = tokenizer
        begins = specials.begin is not None and specials.begins == "document"
        self.head = np.array([specials.begin] if begins else [], np.uint32)
        self.tail = np.array([] if specials.end is None else [specials.end], np.uint32)

    def __call__(self, batch: Sequence[Document]) -> list[Tokens]:
        return [np.concatenate([self.head, ids, self.tail]) for ids in self.encode(batch)]

    def encode(self, batch: Sequence[Document]) -> list[Tokens]:
        texts = [document for document in batch if isinstance(document, str)]
        if not texts:
            return [np.asarray(tokens, np.uint32) for tokens in batch]
        # a dataset of texts is refused where there is no tokenizer
        assert not isinstance(self.tokenizer, TokenIds)
        # verbose=False: it would warn of documents longer than the model's context, which we cut
        ids = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return [np.array(one, np.uint32) for one in ids]


class Packer:
    """The stream of one split: documents in, parts out."""

    def __init__(
        self, part: int, cursor: Cursor, config: CollectConfig, specials: Specials
    ) -> None:
        self.part, self.cursor, self.every = part, cursor, config.validation_every
        self.split = split_of(part, self.every)
        self.first = (
            [specials.begin] if specials.begins == "sequence" and specials.begin is not None else []
        )
        self.body = config.ctx_len - len(self.first)  # stream tokens in a sequence
        self.part_sequences = config.part_rows // config.ctx_len
        self.pieces: deque[tuple[int, Tokens]] = deque()
        self.size = 0  # tokens waiting

    @property
    def sequences(self) -> int:
        return self.size // self.body

    @property
    def ready(self) -> bool:
        """A part is there, and a sequence after it: so it is known whether the part is the last."""
        return self.sequences > self.part_sequences

    def push(self, place: int, tokens: Tokens) -> None:
        rest = tokens[self.cursor.token :] if place == self.cursor.document else tokens
        self.pieces.append((place, rest))
        self.size += len(rest)

    def cut(self, dtype: np.dtype[Any]) -> PartTokens:
        sequences = min(self.sequences, self.part_sequences)
        part, cursor = self.part, self.cursor
        stream = self.take(sequences * self.body).reshape(sequences, self.body)
        tokens = np.empty((sequences, len(self.first) + self.body), dtype)
        tokens[:, : len(self.first)] = self.first
        tokens[:, len(self.first) :] = stream
        self.part = following(part, self.every)
        return PartTokens(part, self.split, tokens, cursor, self.cursor, last=not self.sequences)

    def take(self, wanted: int) -> Tokens:
        """The next tokens of the stream; the cursor moves behind them."""
        self.size -= wanted
        taken = []
        while wanted:
            place, tokens = self.pieces.popleft()
            taken.append(tokens[:wanted])
            start = self.cursor.token if place == self.cursor.document else 0
            if rest := tokens[wanted:].size:
                self.pieces.appendleft((place, tokens[wanted:]))
                self.cursor = Cursor(place, start + len(tokens) - rest)
            else:
                self.cursor = Cursor(place + 1, 0)
            wanted -= len(taken[-1])
        return np.concatenate(taken)


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
            encoded = self.encode([document for _, document in wanted])
            for (place, _), tokens in zip(wanted, encoded, strict=True):
                self.packers[split_of(place, self.every)].push(place, tokens)

    def is_wanted(self, place: int) -> bool:
        split = split_of(place, self.every)
        return split in self.starts and place >= self.starts[split]


def iter_parts(
    documents: Documents,
    tokenizer: Tokenizer,
    config: CollectConfig,
    cursors: Mapping[int, Cursor] = FIRST_PARTS,
) -> Iterator[PartTokens]:
    """Parts in order of their numbers until the splits end.

    `cursors` maps the first part wanted of a split to its cursor; a split that is not named is not
    read. Raises ValueError for a token the tokenizer lacks, or a split without a single sequence.
    """
    specials = special_tokens(tokenizer, config)
    packers = {
        split_of(part, config.validation_every): Packer(part, cursor, config, specials)
        for part, cursor in cursors.items()
    }
    feed = Feed(documents, Encoder(tokenizer, specials), config.validation_every, packers)
    return packed(packers, feed, token_dtype(tokenizer), config)


def packed(
    packers: dict[Split, Packer], feed: Feed, dtype: np.dtype[Any], config: CollectConfig
) -> Iterator[PartTokens]:
    for packer in packers.values():  # an empty split shows before the first part is out
        feed.fill(packer)
        if not packer.sequences and packer.cursor == (0, 0):
            raise ValueError(
                f"each split must fill a sequence of {config.ctx_len} tokens, got no "
                f"{packer.split} one from {feed.count} documents; use more documents, "
                "or a smaller ctx_len or validation_every"
            )
    waiting = list(packers.values())
    while waiting:
        packer = min(waiting, key=lambda packer: packer.part)
        feed.fill(packer)
        if packer.sequences:
            yield packer.cut(dtype)
        else:
            waiting.remove(packer)


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
