"""The progress bar of a collection."""

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mpcache.collection.jobs import Job


class Progress:
    """One bar over the rows of all parts, whichever process reads them.

    A part that is read again counts once. Threads may share the bar.
    """

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

    def set_rows(self, part: int, rows: int) -> None:
        """Show that the model has read this many rows of a part."""
        with self._lock:
            previous, self._rows[part] = self._rows[part], rows
            self._bar.update(rows - previous)

    def row_counter(self, part: int) -> Callable[[int], None]:
        """A function that adds the rows of one batch of a part."""

        def add(rows: int) -> None:
            self.set_rows(part, self._rows[part] + rows)

        return add

    def add_bytes(self, size: int) -> None:
        """Show that this many more bytes are committed."""
        with self._lock:
            self._bytes += size
            text = f"{self._bytes / 1e9:.2f} GB committed"
            self._bar.set_postfix_str(text, refresh=False)

    def print_line(self, line: str) -> None:
        """Print a line above the bar."""
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
