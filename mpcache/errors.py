"""The errors of this package. Each also inherits the fitting built-in error.

Whoever catches `ValueError` or `OSError` catches these too. Any other `ValueError` that leaves the
package is a defect, in it or in a library.
"""


class MpcacheError(Exception):
    """Base of all errors that this package raises on purpose."""


class UsageError(MpcacheError, ValueError):
    """A mistake in what the user asked for. One line: what must hold, what was given, a remedy."""


class DamagedStoreError(MpcacheError, OSError):
    """A store does not hold what was committed. The message names the object."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
