"""Ctrl-C and SIGTERM take effect between two train steps, not within one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# only the default handlers are replaced: any other handler belongs to somebody else
_DEFAULT_HANDLERS = (signal.default_int_handler, signal.SIG_DFL)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send before they kill a process."""


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], type[KeyboardInterrupt] | None]]:
    """Defer a first Ctrl-C or SIGTERM; a second one raises at once.

    Yields a function that returns the exception to raise, or None while no signal has come. No-op
    outside the main thread, because Python handles signals in the main thread only.
    """
    pending: type[KeyboardInterrupt] | None = None

    def defer(number: int, _: object) -> None:
        nonlocal pending
        interrupt = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if pending is not None:
            raise interrupt
        pending = interrupt

    replaced = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
        and (handler := signal.getsignal(number)) in _DEFAULT_HANDLERS
    }
    for number in replaced:
        signal.signal(number, defer)
    try:
        yield lambda: pending
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
