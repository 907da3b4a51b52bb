"""What is left to do of a collection, how far it is, and what could not be done."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mpcache.model.hooks import Side


@dataclass(frozen=True)
class Job:
    """The unit of work: the sides that a part lacks."""

    part: int
    rows: int
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Missing:
    """A part that could not be collected."""

    part: int
    times: int
    "how often it was tried"
    cause: str
    "what went wrong the last time, and where"


class Progress:
    """One bar over all parts, whoever reads them. A part that is done again counts once."""

    def __init__(self, jobs: Sequence[Job], quiet: bool) -> None:
        self._rows = {job.part: 0 for job in jobs}
        self._bytes = 0
        self._lock = threading.Lock()
        self._bar: tqdm[Any] = tqdm(
            total=sum(job.rows for job in jobs),
            desc="collect",
            unit="row",
            unit_scale=True,
            disable=quiet or not jobs,
        )

    def read(self, part: int, rows: int) -> None:
        """The model has read so many rows of a part."""
        with self._lock:
            before, self._rows[part] = self._rows[part], rows
            self._bar.update(rows - before)

    def reader(self, part: int) -> Callable[[int], None]:
        """To be told the rows of each batch of a part."""

        def advance(rows: int) -> None:
            self.read(part, self._rows[part] + rows)

        return advance

    def committed(self, size: int) -> None:
        """So many bytes more are committed."""
        with self._lock:
            self._bytes += size
            told = f"{self._bytes / 1e9:.2f} GB committed"
            self._bar.set_postfix_str(told, refresh=False)

    def tell(self, line: str) -> None:
        """A line above the bar."""
        if not self._bar.disable:
            self._bar.write(line, file=self._bar.fp)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
