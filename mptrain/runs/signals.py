"""Ctrl-C and SIGTERM between two train steps, not within one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# a handler that someone else has set is theirs
_OURS_TO_TAKE = (signal.default_int_handler, signal.SIG_DFL)


class Terminated(KeyboardInterrupt):
    """Asked to end by SIGTERM, which schedulers send before they kill."""


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], type[KeyboardInterrupt] | None]]:
    """Hold back a first Ctrl-C or SIGTERM, and tell what to raise; a second one is raised at once.

    Does nothing outside the main thread, which alone gets signals.
    """
    came: type[KeyboardInterrupt] | None = None

    def hold(number: int, _: object) -> None:
        nonlocal came
        raised = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if came is not None:
            raise raised
        came = raised

    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
        and (handler := signal.getsignal(number)) in _OURS_TO_TAKE
    }
    for number in before:
        signal.signal(number, hold)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
