"""Ctrl-C between two train steps, not within one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back a first Ctrl-C, and tell whether it came; a second one interrupts at once."""
    came = False

    def hold(*_: object) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    # only the main thread gets Ctrl-C, and a handler that someone else has set is theirs
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
