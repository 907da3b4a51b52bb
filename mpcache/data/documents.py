"""Documents of a dataset in one seeded order.

A document is a text, an array of token ids, or a conversation. Its rank is its position in the
seeded order: the same settings give the same document at the same rank, on any machine and with any
version of numpy.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mpcache.data.document_codec import Document, Kind
from mpcache.data.permutation import seeded_permutation
from mpcache.data.vocabulary import Indices

Fetch = Callable[[Indices], Sequence[Document]]
"reads documents by their indices in the dataset"

FETCH_DOCUMENTS = 64  # documents read at once; enough to hide the cost of a random arrow read


@dataclass(frozen=True)
class Documents:
    """A dataset in its seeded order."""

    digest: str
    "sha256 of the content, whatever the dataset's folder and order"
    provenance: dict[str, str | None]
    order: Callable[[int], Iterator[Document]]
    "documents from a rank on"
    kind: Kind = "text"
    largest_id: int | None = None
    "the largest token id that the model has an embedding for; None: not known"

    def read(self, start: int = 0) -> Iterator[tuple[int, Document]]:
        """Ranks and documents from rank `start` on. A stream reads all earlier documents first."""
        return enumerate(self.order(start), start)


def permuted_documents(fetch: Fetch, count: int, seed: int, start: int) -> Iterator[Document]:
    """All `count` documents in the order of `seed`, from rank `start` on."""
    order = seeded_permutation(count, f"documents {seed}")
    for rank in range(start, count, FETCH_DOCUMENTS):
        yield from fetch(order[rank : rank + FETCH_DOCUMENTS])
