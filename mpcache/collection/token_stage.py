"""The tokens of a store: read from the dataset, packed into parts, committed with the row order."""

import itertools
from collections.abc import Iterator

from mpcache.config import CollectConfig, split_of
from mpcache.data.documents import Documents
from mpcache.data.packing import FIRST_PARTS, Cursor, PartTokens, iter_parts
from mpcache.data.permutation import row_permutation
from mpcache.data.vocabulary import Tokenizer
from mpcache.store.reader import Store
from mpcache.store.writer import Writer


def missing_cursors(store: Store, parts_wanted: int) -> dict[int, Cursor]:
    """The first wanted part of each split that lacks tokens -> where it starts in the documents."""
    return {
        part: FIRST_PARTS[part]
        if previous is None
        else Cursor(*store.index.token_progress(previous).next_cursor)
        for part, previous in store.index.first_missing_parts(parts_wanted).items()
    }


def missing_parts(
    cursors: dict[int, Cursor],
    parts_wanted: int,
    config: CollectConfig,
    documents: Documents,
    tokenizer: Tokenizer,
    template: str | None,
) -> Iterator[PartTokens]:
    """Tokenize the parts that start at `cursors` and after them, in the order of parts."""
    if not cursors:
        return iter(())
    parts = iter_parts(documents, tokenizer, config, cursors, template)
    # A count and not a condition, because looking at one more part would tokenize it.
    every = config.validation_every
    first = {split_of(part, every): part for part in cursors}
    count = sum(p >= first.get(split_of(p, every), p + 1) for p in range(parts_wanted))
    return itertools.takewhile(
        lambda part: part.part < parts_wanted, itertools.islice(parts, count)
    )


def commit_tokens(writer: Writer, part: PartTokens, seed: int) -> None:
    """Commit the tokens of a part, and the order of its rows."""
    writer.commit_tokens(part.part, part.tokens, part.flags, part.progress, part.rows)
    writer.commit_rows(part.part, row_permutation(seed, part.part, part.rows))
