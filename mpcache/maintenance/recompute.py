"""Compute again what parts of a store held, from the model and the dataset of the store.

Values are rounded as often as the store's own were. The writer that gets them decides whether they
are the bits that were committed.

Shapes: R rows of a part, W width, S sequences, L tokens in a sequence.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mpcache.collection.wanted_parts import side_array
from mpcache.config import RepairConfig
from mpcache.data.packing import Cursor, iter_parts
from mpcache.data.permutation import row_permutation
from mpcache.errors import DamagedStoreError
from mpcache.maintenance.original_collection import OriginalCollection, original_config
from mpcache.model.cut_batches import PartInput, part_input
from mpcache.model.hookpoint_patterns import Side
from mpcache.store.fingerprint import dtype_history
from mpcache.store.mark import Mark
from mpcache.store.object_paths import POSITION, SEQUENCE, TOKENS, hookpoint_of, mark_path
from mpcache.store.reader import Store, open_store
from mpcache.store.units_of_part import Units, join_progress, unit_rows
from mpcache.store.writer import Writer


class Recomputation:
    """Computes parts of a store again."""

    def __init__(self, store: Store, config: RepairConfig, arrays: Iterable[str]) -> None:
        self.store = store
        self.units = Units(store.layout, unit_rows(store.identity, store.layout))
        sides = [":".join(hookpoint_of(a)) for a in arrays if a.startswith("acts/")]
        self.dtypes = dtype_history(store.layout.dtype, store.provenance)
        self.original = OriginalCollection(
            store,
            original_config(store, config, sides, self.dtypes[0], self.units.unit_rows),
        )

    def write_part(self, part: int, arrays: Sequence[str], writer: Writer) -> None:
        """Compute some arrays of a part and give them to a writer, tokens and rows first.

        Raises:
            DamagedStoreError: what the computation needs is damaged too.
            NoDatasetError: tokens are needed, and the dataset is not available.
            UsageError: the model or the tokenizer is another one, or is not available.
        """
        if TOKENS in arrays:
            self._write_tokens(part, writer)
        if {SEQUENCE, POSITION} & set(arrays):
            writer.commit_rows(part, self._token_of_row(part, writer))
        if sides := [Side(*hookpoint_of(a)) for a in arrays if a.startswith("acts/")]:  # type: ignore[arg-type]  # input or output
            for side, x_RW in self._acts(part, tuple(sides)).items():
                writer.commit_acts(part, side_array(side), x_RW)

    def close(self) -> None:
        self.original.close()

    # --- tokens and rows ---

    def _write_tokens(self, part: int, writer: Writer) -> None:
        units, original = self.units.units_of(part), self.original
        cursors = {units[0]: self._cursor(part, writer)}
        # The store has the text of the chat template, whose file may have changed since.
        template = self.store.provenance.get("chat_template")
        tokenized = iter_parts(
            original.documents, original.tokenizer, original.config, cursors, template
        )
        pieces = list(islice(tokenized, self._unit_count(part, writer)))
        if [piece.part for piece in pieces] != list(units[: len(pieces)]) or not pieces:
            raise DamagedStoreError(
                f"the dataset has no tokens for part {part}, but the store has that part; give "
                "the original dataset with --dataset"
            )
        tokens_SL = np.concatenate([piece.tokens for piece in pieces])
        flags = [piece.flags for piece in pieces if piece.flags is not None]
        flags_SL = np.concatenate(flags) if flags else None
        progress = join_progress([piece.progress for piece in pieces])
        rows = sum(piece.rows for piece in pieces)
        writer.commit_tokens(part, tokens_SL, flags_SL, progress, rows)

    def _cursor(self, part: int, writer: Writer) -> Cursor:
        """Where a part starts in the documents, from its mark or from that of the part before."""
        try:
            return Cursor(*self.store.index.token_progress(part).cursor)
        except DamagedStoreError:
            previous = self.units.previous_part(part)
        if previous is None:
            return Cursor(0, 0)
        progress = self._token_mark(previous, writer).progress
        assert progress is not None
        return Cursor(*progress.next_cursor)

    def _token_mark(self, part: int, writer: Writer) -> Mark:
        """The mark of a part's tokens, which may have been repaired just now."""
        try:
            return writer.mark(part, TOKENS)
        except FileNotFoundError:
            name = f"{self.store.storage}/{mark_path(part, TOKENS)}"
            raise DamagedStoreError(
                f"{name} is missing, so it is unknown which rows part {part} has; give the "
                "dataset with --dataset: repair then restores the tokens before the rows"
            ) from None

    def _unit_count(self, part: int, writer: Writer) -> int:
        """Units of a part, by any intact mark of the part."""
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
        permutations = [
            index * self.units.unit_rows + row_permutation(seed, unit, count)
            for index, (unit, count) in enumerate(self.units.units_with_rows(part, rows))
        ]
        return np.concatenate(permutations)

    # --- activations ---

    def _acts(self, part: int, sides: tuple[Side, ...]) -> dict[Side, Tensor]:
        store = open_store(self.store.storage)  # its tokens may have been repaired just now
        tokens = part_input(store, part)
        units = self.units.units_with_rows(part, store.tokens.token_count(part))
        cuts = [self.units.unit_sequences * index for index in range(1, len(units))]
        units_SL = np.split(tokens.tokens_SL, cuts)
        # A part of lone documents is one unit, because such parts are never joined.
        inputs = [PartInput(unit_SL) for unit_SL in units_SL] if cuts else [tokens]
        rows_of_units = [
            self.original.producer.read_part(unit, unit_input, sides, lambda _: None)
            for (unit, _), unit_input in zip(units, inputs, strict=True)
        ]
        return {
            side: self._round(torch.cat([rows[side] for rows in rows_of_units])) for side in sides
        }

    def _round(self, x_RW: Tensor) -> Tensor:
        """Through the dtypes that the store's values went through."""
        for dtype in self.dtypes[1:]:
            x_RW = x_RW.to(getattr(torch, dtype))
        return x_RW
