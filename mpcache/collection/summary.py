"""What a collection did, and what its store holds afterwards."""

from dataclasses import dataclass

from mpcache.collection.jobs import MissingPart
from mpcache.collection.wanted_parts import CollectionPlan
from mpcache.store.collection_extent import extent_of
from mpcache.store.object_paths import TOKENS
from mpcache.store.reader import Store


@dataclass(frozen=True, kw_only=True)
class CollectSummary:
    """What a collection did, and what its store holds now."""

    store: str
    "path or URL of the store"
    parts: int
    "parts that hold all wanted hookpoints"
    rows: int
    "rows of these parts"
    rows_wanted: int
    "rows asked for"
    exhausted: bool
    "the dataset ended before the rows wanted"
    shortfall: str | None
    "why there are fewer rows than were wanted, over all shares"
    forward_rows: int
    "rows that the model had to read"
    bytes: int
    "bytes of the wanted arrays on disk"
    nonfinite: int
    "values that are infinite or not a number"
    seconds: float
    "time of forward passes and writing, without loading and tokenization"
    share: str = "1/1"
    "the share that parts, rows and bytes are counted in"
    missing: tuple[MissingPart, ...] = ()
    "wanted parts that could not be collected"
    empty_documents: int | None = None
    "documents without tokens that all wanted parts left out; None if such documents are kept"


def summarize(
    store: Store,
    plan: CollectionPlan,
    rows_wanted: int,
    *,
    forward_rows: int = 0,
    seconds: float = 0.0,
    missing: tuple[MissingPart, ...] = (),
) -> CollectSummary:
    """What the store holds of a plan, with what this run of it did."""
    parts = plan.complete_parts(store)
    marks = [mark for array in plan.arrays for mark in store.marks(array, parts)]
    extent = extent_of(store, rows_wanted)
    return CollectSummary(
        store=str(store.storage),
        parts=len(parts),
        rows=sum(store.mark(part, TOKENS).rows for part in parts),
        rows_wanted=extent.rows_wanted,
        exhausted=extent.exhausted,
        shortfall=extent.shortfall,
        forward_rows=forward_rows,
        bytes=sum(mark.stored_bytes for mark in marks),
        nonfinite=sum(mark.nonfinite for mark in marks),
        seconds=seconds,
        share=str(plan.share),
        missing=missing,
        empty_documents=store.tokens.empty_documents(plan.parts(store)),
    )
