"""What parts of a store held, once more: from the model and the dataset that it was made from.

Values are rounded as often as the store's own were. Whether they are the very bits that were
committed is for the writer to see that they are given to.
"""

import functools
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpcache.collection.producer import ActivationProducer, load_for_collection
from mpcache.config import CollectConfig, RepairConfig
from mpcache.data.dataset import open_documents
from mpcache.data.documents import Documents
from mpcache.data.packing import Cursor, PartTokens, iter_parts
from mpcache.data.permutation import row_permutation
from mpcache.errors import DamagedStoreError, UsageError
from mpcache.model.architecture import load_vocabulary
from mpcache.model.forward_batches import PartInput, part_input
from mpcache.model.hookpoint_patterns import Side
from mpcache.model.loading import load_tokenizer
from mpcache.model.model_identity import tokenizer_digest
from mpcache.store.fingerprint import dtype_history, stored_settings
from mpcache.store.format import POSITION, SEQUENCE, TOKENS, acts_array, hookpoint_of, mark_path
from mpcache.store.mark import Mark, TokenProgress
from mpcache.store.reader import Store, open_store
from mpcache.store.units import Units, join_progress, unit_rows
from mpcache.store.writer import Writer


class NoDatasetError(Exception):
    """The dataset that a store was made from is not to be had; the message says why."""


class Recomputation:
    """The collection that a store came from, set up again as far as it is needed.

    Raises:
        ValueError: the model or tokenizer is not the one it was made from, or not there.
    """

    def __init__(self, store: Store, config: RepairConfig, arrays: Iterable[str]) -> None:
        self.store = store
        self.units = Units(store.layout, unit_rows(store.identity, store.layout))
        sides = [":".join(hookpoint_of(a)) for a in arrays if a.startswith("acts/")]
        self.dtypes = dtype_history(store.layout.dtype, store.provenance)
        self.config = _config(store, config, sides, self.dtypes[0], self.units.unit_rows)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.config)
        self._refuse_other("tokenizer", tokenizer_digest(tokenizer), "model")
        return tokenizer

    @functools.cached_property
    def _documents(self) -> Documents:
        vocabulary = load_vocabulary(self.config, self._tokenizer)
        try:
            documents = open_documents(self.config, vocabulary)
            self._refuse_other("dataset", documents.digest, "dataset")
        except (ValueError, OSError) as error:
            raise NoDatasetError(str(error)) from error
        return documents

    @functools.cached_property
    def _station(self) -> ActivationProducer:
        loaded = load_for_collection(self.config)
        self._refuse_other("model", loaded.digests["model_digest"], "model")
        return ActivationProducer(self.config, loaded)

    def _refuse_other(self, name: str, digest: str | None, option: str) -> None:
        if digest != self.store.identity.get(f"{name}_digest"):
            raise UsageError(
                f"{self.store.storage} was made from another {name} than that of "
                f"{getattr(self.config, option)}; say with --{option} where the right one is"
            )

    def give(self, part: int, arrays: Sequence[str], writer: Writer) -> None:
        """Give a writer what a part holds of some arrays: tokens and rows first.

        Raises DamagedStoreError where what that takes is damaged too, NoDatasetError where tokens
        are wanted and the dataset cannot be had.
        """
        if TOKENS in arrays:
            self._give_tokens(part, writer)
        if {SEQUENCE, POSITION} & set(arrays):
            writer.commit_rows(part, self._token_of_row(part, writer))
        if sides := [Side(*hookpoint_of(a)) for a in arrays if a.startswith("acts/")]:  # type: ignore[arg-type]  # input or output
            for side, x_RW in self._acts(part, tuple(sides)).items():
                writer.commit_acts(part, acts_array(side.hookpoint, side.side), x_RW)

    def close(self) -> None:
        """Leave the model as it was."""
        if "_station" in self.__dict__:
            self._station.close()

    # --- tokens and rows ---

    def _give_tokens(self, part: int, writer: Writer) -> None:
        wanted = self.units.units_of(part)
        cursors = {wanted[0]: self._cursor(part, writer)}
        # the file of a chat template may have changed since: the store has its text
        template = self.store.provenance.get("chat_template")
        parts = iter_parts(self._documents, self._tokenizer, self.config, cursors, template)
        found = list(islice(parts, self._count(part, writer)))
        if [one.part for one in found] != list(wanted[: len(found)]) or not found:
            raise DamagedStoreError(f"the dataset has no tokens for part {part}")
        tokens_SL = np.concatenate([one.tokens for one in found])
        flags = [one.flags for one in found if one.flags is not None]
        flags_SL = np.concatenate(flags) if flags else None
        rows = sum(one.rows for one in found)
        writer.commit_tokens(part, tokens_SL, flags_SL, _progress(found), rows)

    def _cursor(self, part: int, writer: Writer) -> Cursor:
        """Where a part starts in the documents: its mark knows, or that of the part before."""
        try:
            return Cursor(*self.store.index.token_progress(part).cursor)
        except DamagedStoreError:
            before = self.units.previous_part(part)
        if before is None:
            return Cursor(0, 0)
        progress = self._token_mark(before, writer).progress
        assert progress is not None
        return Cursor(*progress.next_cursor)

    def _token_mark(self, part: int, writer: Writer) -> Mark:
        """The mark of a part's tokens, which may have been mended since."""
        try:
            return writer.mark(part, TOKENS)
        except FileNotFoundError:
            name = f"{self.store.storage}/{mark_path(part, TOKENS)}"
            raise DamagedStoreError(
                f"{name} is missing; its part is not known without it"
            ) from None

    def _count(self, part: int, writer: Writer) -> int:
        """Units of a part, of which any sound mark of the part tells."""
        for array in self.store.arrays:
            if part in self.store.part_numbers(array):
                try:
                    rows = self.store.mark(part, array).rows
                except DamagedStoreError:
                    continue
                return len(self.units.units_with_rows(part, rows))
        return self.units.count

    def _token_of_row(self, part: int, writer: Writer) -> np.ndarray:
        rows, seed = self._token_mark(part, writer).rows, self.store.identity["seed"]
        found = [
            place * self.units.unit_rows + row_permutation(seed, unit, count)
            for place, (unit, count) in enumerate(self.units.units_with_rows(part, rows))
        ]
        return np.concatenate(found)

    # --- activations ---

    def _acts(self, part: int, sides: tuple[Side, ...]) -> dict[Side, Tensor]:
        store = open_store(self.store.storage)  # its tokens may have been mended since
        tokens = part_input(store, part)
        units = self.units.units_with_rows(part, store.tokens.token_count(part))
        cuts = [self.units.unit_sequences * place for place in range(1, len(units))]
        units_SL = np.split(tokens.tokens_SL, cuts)
        # a part of lone documents is one unit: such parts are never joined
        inputs = [PartInput(unit_SL) for unit_SL in units_SL] if cuts else [tokens]
        found = [
            self._station.read_part(unit, unit_input, sides, lambda _: None)
            for (unit, _), unit_input in zip(units, inputs, strict=True)
        ]
        return {side: self._rounded(torch.cat([one[side] for one in found])) for side in sides}

    def _rounded(self, x_RW: Tensor) -> Tensor:
        for dtype in self.dtypes[1:]:
            x_RW = x_RW.to(getattr(torch, dtype))
        return x_RW


def _progress(found: Sequence[PartTokens]) -> TokenProgress:
    """What the mark of these parts' tokens says of the documents."""
    return join_progress([one.progress for one in found])


def _config(
    store: Store, config: RepairConfig, hookpoints: Sequence[str], dtype: str, rows: int
) -> CollectConfig:
    """The settings of the collection, with what lies elsewhere now."""
    elsewhere = {name: getattr(config, name) for name in ("model", "revision", "dataset")}
    settings = {
        **store.config,
        **stored_settings(store.identity),
        **{name: value for name, value in elsewhere.items() if value is not None},
        "hookpoints": tuple(hookpoints) or ("*",),  # at least one, though none is looked up
        "dtype": dtype,
        "part_rows": rows,
        "chunk_rows": rows,
        "device": config.device,
        # the store may be somebody else's: its word is not enough
        "trust_remote_code": config.trust_remote_code,
    }
    try:
        return CollectConfig(**settings)
    except TypeError as error:
        raise DamagedStoreError(
            f"{store.storage}: its settings are unknown here: {error}"
        ) from error
