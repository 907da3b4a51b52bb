"""The Hugging Face Hub: its errors in one line, and names that cannot be Hub ids."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mpcache.errors import UsageError, first_line

# by name: the Hub client changed its HTTP library twice, and its errors with it
_HTTP_LIBRARIES = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "aiohttp")


def looks_like_path(name: str) -> bool:
    """Whether a name without a file here was meant as a path rather than as a Hub id."""
    parts = Path(name).parts
    return name.startswith((".", "/", "~")) or (len(parts) > 1 and os.path.isdir(parts[0]))


@contextmanager
def explain_hub_errors(subject: str, revision: str) -> Iterator[None]:
    """Turn errors of opening a model, dataset or file of the Hub into errors of one line.

    Raises UsageError for the user's mistake, ConnectionError without the Hub. Other errors, such as
    that of a full disk, pass unchanged.
    """
    try:
        yield
    except Exception as error:  # the Hub client's errors share no other base
        if (explanation := hub_error(error, subject, revision)) is error:
            raise
        raise explanation from error


def hub_error(error: Exception, subject: str, revision: str) -> Exception:
    """The error to show to the user; `error` itself if neither the Hub nor the subject caused it.

    `subject` names what was opened, such as "model gpt2".
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and isinstance(cause, Exception):
        chain.append(cause)

    def caused_by(*kinds: type[Exception]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    if caused_by(GatedRepoError):
        return UsageError(
            f"{subject} is gated; accept its terms on the Hub, then run `hf auth login`"
        )
    if caused_by(RevisionNotFoundError):
        return UsageError(
            f"revision must exist in {subject}, got {revision}; look up the revisions on the Hub"
        )
    if caused_by(RepositoryNotFoundError):
        return UsageError(
            f"{subject} is neither a local path nor on the Hub; correct its name, or run `hf "
            "auth login` if it is private"
        )
    if caused_by(ConnectionError, LocalEntryNotFoundError, TimeoutError) or _is_network(chain):
        return ConnectionError(
            f"the Hub cannot be reached for {subject}, which is not in the local cache; check "
            "the network connection and the variable HF_HUB_OFFLINE, or give a local path"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, ValueError | OSError) or caused_by(RemoteEntryNotFoundError):
        return UsageError(f"{subject} cannot be opened: {first_line(error)}")
    return error


def _is_network(chain: list[Exception]) -> bool:
    return any(
        isinstance(error, HfHubHTTPError) or type(error).__module__.split(".")[0] in _HTTP_LIBRARIES
        for error in chain
        if not isinstance(error, RemoteEntryNotFoundError)
    )
