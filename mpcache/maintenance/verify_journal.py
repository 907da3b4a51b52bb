"""A journal of `verify`: which marks were intact, so that the same command continues from there.

The journal is a file outside the store, because a store that is read-only can be verified too. Each
line is a JSON object, written in one call, so that several commands may append. Half a line, of a
command that was killed, is skipped. The first line names the store and its address, because a
journal says nothing of a copy. An entry counts only for the very mark that was checked; of several
entries of a mark, the last counts.
"""

import datetime
import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpcache.errors import UsageError
from mpcache.maintenance.findings import Finding
from mpcache.untrusted_names import printable

_KIND = "mpcache verify"


class Journal:
    """The journal of one store in a file, which is created if it does not exist.

    Raises:
        UsageError: the file holds something else, or is the journal of another store or address.
    """

    def __init__(self, path: Path, store: str, digest: str) -> None:
        self.path = path
        head = {"journal": _KIND, "store": store, "store_digest": digest}
        lines = list(_read_lines(path)) if path.exists() else []
        heads = [line for line in lines if line.get("journal") == _KIND and "store" in line]
        if heads[:1] != lines[:1] or (not lines and path.exists() and path.stat().st_size):
            raise UsageError(
                f"{path} is not a journal of mpcache verify; give another file with --journal"
            )
        for other in heads:  # several, if several commands created the file at the same moment
            if other != head:
                owner = (
                    "another store that was there before"
                    if other["store"] == store
                    else printable(str(other["store"]))
                )
                raise UsageError(
                    f"{path} is the journal of {owner}, not of {store}; give another file with "
                    "--journal"
                )
        if not lines:
            self._append(head)
        self._intact: dict[str, str] = {}
        for line in lines:
            if line.get("findings") == []:
                self._intact[str(line.get("mark"))] = str(line.get("digest"))
            else:
                self._intact.pop(str(line.get("mark")), None)

    def intact_digest(self, mark: str) -> str | None:
        """Digest of the mark of this name that was intact, with its objects; None if unknown."""
        return self._intact.get(mark)

    def add(self, mark: str, digest: str, findings: Sequence[Finding]) -> None:
        """Append what was found under a mark."""
        entry = {"mark": mark, "digest": digest, "findings": [asdict(f) for f in findings]}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._append({**entry, "host": socket.gethostname(), "time": now})

    def _append(self, entry: dict[str, Any]) -> None:
        # A line break before the entry too: the line before it may have been cut short.
        with self.path.open("ab", buffering=0) as file:
            file.write(f"\n{json.dumps(entry)}\n".encode())


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry
