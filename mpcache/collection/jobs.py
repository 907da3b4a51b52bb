"""The work of a collection, part by part: what is to do, and what could not be done."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from mpcache.model.hookpoint_patterns import Side


@dataclass(frozen=True)
class Job:
    """The unit of work: a part, and the sides that the part lacks."""

    part: int
    rows: int
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class MissingPart:
    """A part that could not be collected."""

    part: int
    times: int
    "how often it was tried"
    cause: str
    "what went wrong in the last try, and where"


class JobQueue:
    """Jobs that wait for a worker. A job that fails `tries` times is given up."""

    def __init__(self, jobs: Sequence[Job], tries: int) -> None:
        self._waiting = deque(jobs)
        self._failures: Counter[Job] = Counter()
        self._tries = tries

    def __len__(self) -> int:
        """Number of jobs that wait."""
        return len(self._waiting)

    def take(self) -> Job:
        return self._waiting.popleft()

    def put_back(self, job: Job) -> None:
        """Let a job wait again. Nothing was wrong with it."""
        self._waiting.append(job)

    def failures(self, job: Job) -> int:
        """How often a job has failed."""
        return self._failures[job]

    def put_back_failed(self, job: Job) -> bool:
        """Let a job that failed wait again; False if it is given up instead."""
        self._failures[job] += 1
        is_retried = self._failures[job] < self._tries
        if is_retried:
            self._waiting.append(job)
        return is_retried
