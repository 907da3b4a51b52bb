"""A journal of `verify`: what was found sound, so that the same command goes on from there.

A file of the user's outside the store, because a store that can only be read is verified too. One
JSON object a line, each in one write, so that several commands may append; half a line, of one that
was killed, is passed over. The first line names the store and where it lies: what is sound in one
place says nothing of a copy. What was sound counts while the mark is the very one that was checked,
and what was last found under it is that.
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
from mpcache.validation import printable

_KIND = "mpcache verify"


class Journal:
    """The journal of one store, by its address and its digest, in a file; made where there is none.

    Raises:
        ValueError: the file holds something else, or is the journal of another store or place.
    """

    def __init__(self, path: Path, store: str, digest: str) -> None:
        self.path = path
        head = {"journal": _KIND, "store": store, "store_digest": digest}
        lines = list(_lines(path)) if path.exists() else []
        heads = [line for line in lines if line.get("journal") == _KIND and "store" in line]
        if heads[:1] != lines[:1] or (not lines and path.exists() and path.stat().st_size):
            raise UsageError(f"{path} is no journal of mpcache verify; name another file")
        for found in heads:  # several, where several commands began it at the same moment
            if found != head:
                is_here = found["store"] == store
                other = (
                    "another store, which was there" if is_here else printable(str(found["store"]))
                )
                raise UsageError(
                    f"the journal of {store} must be its own, got {path}, that of {other}; name "
                    "another file"
                )
        if not lines:
            self._append(head)
        self._sound: dict[str, str] = {}
        for line in lines:
            if line.get("findings") == []:
                self._sound[str(line.get("mark"))] = str(line.get("digest"))
            else:
                self._sound.pop(str(line.get("mark")), None)

    def sound(self, mark: str) -> str | None:
        """Digest of the mark of this name that was found sound, with its objects."""
        return self._sound.get(mark)

    def note(self, mark: str, digest: str, findings: Sequence[Finding]) -> None:
        """Write down what was found under a mark."""
        told = {"mark": mark, "digest": digest, "findings": [asdict(one) for one in findings]}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._append({**told, "host": socket.gethostname(), "time": now})

    def _append(self, line: dict[str, Any]) -> None:
        # a line break before it too: the line before may have been cut short
        with self.path.open("ab", buffering=0) as file:
            file.write(f"\n{json.dumps(line)}\n".encode())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
