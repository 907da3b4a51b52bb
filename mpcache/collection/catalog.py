"""A root: a folder or bucket of stores that a team shares. What it has, and where things belong.

Only what lies directly in the root counts, neither links nor names that begin with a dot.
"""

import dataclasses
import datetime
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpcache.collection.collect import Summary
from mpcache.config import CollectConfig
from mpcache.data.dataset_files import LOCAL_SUFFIXES
from mpcache.data.documents import open_documents
from mpcache.data.tokenization import template_digests, template_of
from mpcache.errors import DamagedStoreError, UsageError
from mpcache.model.hooks import resolve
from mpcache.model.loading import (
    library_version,
    load_model,
    load_tokenizer,
    model_digest,
    tokenizer_digest,
)
from mpcache.model.model_source import short_name
from mpcache.model.skeleton import files_digest, load_vocabulary, skeleton
from mpcache.storage.base import Storage, open_storage
from mpcache.store.description import is_store, read_store_file
from mpcache.store.fingerprint import identify
from mpcache.store.format import TOKENS, acts_array
from mpcache.store.reader import Store, open_store
from mpcache.store.rows_wanted import Extent, extent_of
from mpcache.store.sealed_json import digest, json_round_trip
from mpcache.validation import check_printable

_NAME = 48  # characters of a model's or dataset's name in a folder's
_PREFIX = 12  # hexadecimal digits of a fingerprint in a folder's name


# --- finding ---


@dataclass(frozen=True)
class Found:
    """Where a collection belongs."""

    place: Storage
    config: CollectConfig
    "as asked, with the codec and the chunks of the store that is there"
    done: Summary | None
    "what the store has, if that is all that was asked for"


def find_store(where: str | Path | Storage, config: CollectConfig) -> Found:
    """The store below a root that holds these rows, or where it is to be made.

    Loads the model's weights only where no store names the model's files.

    Raises ValueError where the rows are there in another dtype only.
    """
    root = open_storage(where)
    check_root(root)
    stores = tuple(s for s in _stores(root) if isinstance(s, Store))
    identity = _identity(stores, config)
    same = [
        store
        for store in stores  # a store of larger parts can hold these rows, but not their parts
        if store.fingerprint == digest(identity) and store.part_rows == config.part_rows
    ]
    if not same:
        return Found(_new_place(root, config, digest(identity)), config, None)
    store = _with_dtype(same, config)
    layout = store.layout
    config = dataclasses.replace(config, codec=layout.codec, chunk_rows=layout.chunk_rows)
    sides = resolve(config.hookpoints, skeleton(config))
    done = _summary(store, [acts_array(side.hookpoint, side.side) for side in sides], config)
    return Found(store.storage, config, done)


def check_root(root: Storage) -> None:
    check_printable(root)
    if is_store(root):
        raise UsageError(f"{root} is a store, not a root of stores; name the folder above it")
    if not root.can_be_root():
        raise UsageError(f"a root must be a folder, got {root}; name another place")


def _stores(root: Storage) -> Iterator[Store | tuple[str, Exception]]:
    """The stores of a root by name; of one that cannot be opened why."""
    for name in root.children():
        try:
            place = root.child(name)
        except ValueError:  # no URL leads there, so no store was made there
            continue
        if name.startswith(".") or root.is_link(name) or not is_store(place):
            continue
        try:
            yield open_store(place)
        except (DamagedStoreError, ValueError, PermissionError) as error:
            yield name, error


def _identity(stores: Sequence[Store], config: CollectConfig) -> dict[str, Any]:
    """What determines the rows asked for, from a store that was made from the same files."""
    tokenizer = load_tokenizer(config)
    documents = open_documents(config, load_vocabulary(config, tokenizer))
    digests = {
        "dataset_digest": documents.digest,
        **template_digests(template_of(documents, tokenizer, config)),
    }
    if (own := tokenizer_digest(tokenizer)) is not None:
        digests["tokenizer_digest"] = own
    alike = [store for store in stores if _differ_in_model_alone(store, config, digests)]
    if alike and (files := files_digest(config)) is not None:
        here = {"model_files": files, "transformers_version": library_version("transformers")}
        for store in alike:
            if store.provenance["model"].items() >= here.items():
                return store.identity
    model, _ = load_model(config, tokenizer=tokenizer)
    digests["model_digest"] = model_digest(model)
    found: dict[str, Any] = json_round_trip(
        identify(config, digests, str(model.config._attn_implementation))
    )
    return found


def _differ_in_model_alone(store: Store, config: CollectConfig, digests: dict[str, str]) -> bool:
    wanted = identify(config, digests, config.attention)
    found = {k: v for k, v in store.identity.items() if k != "model_digest"}
    return bool(found == json_round_trip(wanted))


def _with_dtype(same: Sequence[Store], config: CollectConfig) -> Store:
    """Of stores of the same rows the one in the wanted dtype with the most parts."""
    found = [store for store in same if store.layout.dtype == config.dtype]
    if not found:
        other = max(same, key=_size)
        raise UsageError(
            f"{other.storage} holds these rows as {other.layout.dtype}, got {config.dtype}; "
            f"mpcache convert {other.storage} {other.storage}-{config.dtype} "
            f"--dtype {config.dtype} does it"
        )
    return max(found, key=_size)


def _size(store: Store) -> int:
    return sum(len(store.part_numbers(array)) for array in store.arrays)


def _new_place(root: Storage, config: CollectConfig, fingerprint: str) -> Storage:
    """A readable name that cannot lead out of the root."""
    dataset = Path(short_name(config.dataset.split(",")[0]))
    while dataset.suffix.lower() in LOCAL_SUFFIXES:
        dataset = dataset.with_suffix("")
    readable = f"{_safe(short_name(config.model))}-{_safe(dataset.name)}"
    short = root.child(f"{readable}-{fingerprint[:_PREFIX]}")
    if is_store(short) and read_store_file(short)["fingerprint"] != fingerprint:
        return root.child(f"{readable}-{fingerprint}")
    return short


def _safe(name: str) -> str:
    """What of a name can be part of any folder's name on any system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_NAME].strip("-.") or "unnamed"


# --- progress ---


def _summary(store: Store, arrays: Sequence[str], config: CollectConfig) -> Summary | None:
    """What a collection of these arrays would find done; None if something is missing."""
    extent = extent_of(store, config.rows)
    parts = [part for part in store.part_numbers(TOKENS) if part < extent.parts_wanted]
    if not extent.is_planned or any(set(parts) - set(store.part_numbers(a)) for a in arrays):
        return None
    marks = [mark for array in arrays for mark in store.marks(array, parts)]
    return Summary(
        store=str(store.storage),
        parts=len(parts),
        rows=sum(store.mark(part, TOKENS).rows for part in parts),
        rows_wanted=extent.rows_wanted,
        exhausted=extent.exhausted,
        shortfall=extent.shortfall,
        forward_rows=0,
        bytes=sum(mark.stored_bytes for mark in marks),
        nonfinite=sum(mark.nonfinite for mark in marks),
        seconds=0.0,
        empty_documents=store.tokens.empty_documents(parts),
    )


# --- listing ---


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One store of a root."""

    store: str
    "its folder's name"
    model: str | None
    dataset: str | None
    hookpoints: tuple[str, ...]
    dtype: str | None
    rows: int
    "rows that all its hookpoints have"
    rows_wanted: int
    "rows asked for; of an extended store the most that were, in whole parts"
    exhausted: bool
    "the dataset ended before the rows wanted"
    shortfall: str | None
    "why there will be fewer rows than were wanted"
    bytes: int
    "of all that is committed"
    complete: float
    "share of the rows wanted that its arrays have"
    changed: str | None
    "time of the last commit"
    age_seconds: float | None
    fault: str | None
    "why the store cannot be read"


def entries(where: str | Path | Storage) -> tuple[Entry, ...]:
    """What a root has, by name; marks are read, not arrays."""
    root = open_storage(where)
    check_root(root)
    if not root.exists():
        raise UsageError(f"a root must be a folder, got {root}; check the path")
    return tuple(_entry(found) for found in _stores(root))


def _entry(found: Store | tuple[str, Exception]) -> Entry:
    if isinstance(found, Store):
        try:
            return _entry_of(found)
        except DamagedStoreError as error:
            found = (found.storage.name, error)
    name, fault = found
    return Entry(
        store=name, model=None, dataset=None, hookpoints=(), dtype=None, rows=0,
        rows_wanted=0, exhausted=False, shortfall=None, bytes=0, complete=0.0, changed=None,
        age_seconds=None, fault=str(fault),
    )  # fmt: skip


def _entry_of(store: Store) -> Entry:
    marks = [mark for array in store.arrays for mark in store.marks(array)]
    sides = [array for array in store.arrays if array.startswith("acts/")]
    whole = set(store.part_numbers(TOKENS)).intersection(
        *(store.part_numbers(array) for array in sides)
    )
    times = [time for mark in marks if (time := _time(mark.time)) is not None]
    changed = max(times, default=None)
    now = datetime.datetime.now(datetime.UTC)
    extent = extent_of(store)
    return Entry(
        store=store.storage.name,
        model=str(store.provenance["model"]["model"]),
        dataset=str(store.provenance["dataset"]["dataset"]),
        hookpoints=store.hookpoints,
        dtype=store.layout.dtype,
        rows=sum(store.mark(part, TOKENS).rows for part in whole) if sides else 0,
        rows_wanted=extent.rows_wanted,
        exhausted=extent.exhausted,
        shortfall=extent.shortfall,
        bytes=sum(mark.stored_bytes for mark in marks),
        complete=_complete(store, sides, extent),
        changed=None if changed is None else changed.isoformat(timespec="seconds"),
        # the clock of another machine may be ahead of ours
        age_seconds=None if changed is None else max(0.0, (now - changed).total_seconds()),
        fault=None,
    )


def _complete(store: Store, sides: Sequence[str], extent: Extent) -> float:
    """Share of the rows wanted, mean over the arrays."""
    if not sides:
        return 0.0
    rows = sum(mark.rows for array in sides for mark in store.marks(array))
    return min(1.0, extent.share(rows / len(sides), store.part_rows))


def _time(text: object) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time if time.tzinfo else None
