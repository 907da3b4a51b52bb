"""Datasets on the Hub: what a revision means now, loading, and the Hub's errors in one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mpcache.config import CollectConfig
from mpcache.errors import UsageError


def names_a_place(name: str) -> bool:
    """Whether a name that is no path here was meant as one, rather than as a Hub id."""
    parts = Path(name).parts
    return name.startswith((".", "/", "~")) or (len(parts) > 1 and os.path.isdir(parts[0]))


def resolve_commit(config: CollectConfig) -> str:
    """The commit that a revision means now; a full commit hash is one, online or not."""
    if re.fullmatch(r"[0-9a-f]{40}", config.dataset_revision):
        return config.dataset_revision
    with explained(f"dataset {config.dataset}", config.dataset_revision):
        return str(HfApi().dataset_info(config.dataset, revision=config.dataset_revision).sha)


def load_hub(config: CollectConfig, commit: str) -> Any:
    """The split at a commit, a Dataset or IterableDataset; never what a cache has of another."""
    import datasets  # slow to import, and local files do without it

    with explained(f"dataset {config.dataset}", commit):
        builder = datasets.load_dataset_builder(
            config.dataset, config.dataset_config, revision=commit
        )
    refuse_other_commit(builder.hash, config, commit)
    with explained(f"dataset {config.dataset}", commit):
        if config.streaming:
            return builder.as_streaming_dataset(split=config.split)
        builder.download_and_prepare()
        return builder.as_dataset(split=config.split)


def refuse_other_commit(cached: str | None, config: CollectConfig, commit: str) -> None:
    """Without the Hub, `datasets` takes the latest commit that its cache has, whatever was asked.

    A builder for a commit has the commit as its hash, and so has the folder that it prepares.
    """
    if cached != commit:
        raise ConnectionError(
            f"the Hub cannot be reached for dataset {config.dataset} at {commit}; the local cache "
            f"has another version, {cached}: check the connection (and HF_HUB_OFFLINE), "
            "or name that version with --dataset-revision"
        )


# --- errors ---


@contextmanager
def explained(thing: str, revision: str) -> Iterator[None]:
    """Errors of opening a thing of the Hub, in one line: UsageError for the user's mistake,
    ConnectionError for a lost server. What is neither, such as a full disk, passes as it is.
    """
    try:
        yield
    except Exception as error:  # the Hub client's errors share no other base
        if (explanation := hub_error(error, thing, revision)) is error:
            raise
        raise explanation from error


def hub_error(error: Exception, thing: str, revision: str) -> Exception:
    """What `error` means to the user; itself where it is not about the Hub or the thing."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and isinstance(cause, Exception):
        chain.append(cause)

    def caused_by(*kinds: type[Exception]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if caused_by(GatedRepoError):
        return UsageError(f"{thing} is gated; accept its terms on the Hub, then `hf auth login`")
    if caused_by(RevisionNotFoundError):
        return UsageError(f"revision must exist in {thing}, got {revision}; look it up on the Hub")
    if caused_by(RepositoryNotFoundError):
        return UsageError(
            f"{thing} is neither a path here nor on the Hub; check its name, "
            "or `hf auth login` if it is private"
        )
    if caused_by(ConnectionError, LocalEntryNotFoundError, TimeoutError) or is_network(chain):
        return ConnectionError(
            f"the Hub cannot be reached for {thing}, which is not in the local cache; "
            "check the connection (and HF_HUB_OFFLINE), or give a local path"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, ValueError | OSError) or caused_by(RemoteEntryNotFoundError):
        return UsageError(f"{thing} cannot be opened: {first_line(error)}")
    return error


def is_network(chain: list[Exception]) -> bool:
    # by module: the Hub client changed its HTTP library twice, and its errors with it
    libraries = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "aiohttp")
    return any(
        isinstance(one, HfHubHTTPError) or type(one).__module__.split(".")[0] in libraries
        for one in chain
        if not isinstance(one, RemoteEntryNotFoundError)
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
