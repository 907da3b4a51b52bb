"""Token flags are committed, checked, copied and repaired together with their tokens."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpcache.data.permutation import row_permutation
from mpcache.errors import DamagedStoreError
from mpcache.maintenance.copy import copy
from mpcache.maintenance.verify import verify
from mpcache.storage.base import open_storage
from mpcache.storage.local import LocalStorage
from mpcache.store.mark import TokenProgress
from mpcache.store.object_paths import STORE_FILE
from mpcache.store.part_layout import Layout
from mpcache.store.reader import Store, open_store
from mpcache.store.sealed_json import digest, seal
from mpcache.store.store_metadata import read_store_file
from mpcache.store.writer import Writer

PLAIN = Layout(
    ctx_len=8,
    part_rows=32,
    chunk_rows=16,
    validation_every=4,
    dtype="float32",
    codec="none",
    token_dtype="uint16",
)
FLAGGED = replace(PLAIN, token_flags=True)
ROWS = {0: 32, 1: 27, 2: 30}


def part_tokens(part: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and flags `[sequences, ctx_len]`; zeros fill up the last sequence."""
    random = np.random.default_rng(part)
    size = -(-rows // 8) * 8
    tokens, flags = random.integers(1, 300, size), random.integers(0, 4, size)
    tokens[rows:] = flags[rows:] = 0
    flags[0] |= 1
    return tokens.reshape(-1, 8).astype(np.uint16), flags.reshape(-1, 8).astype(np.uint8)


def make_store(folder: Path, **identity: object) -> Store:
    """A store of tokens and rows, without activations; parts end within a sequence."""
    named = {"seed": 0, "part_rows": 32, **identity}
    content = {
        "format": "mpcache",
        "format_version": 2,
        "fingerprint": digest(named),
        "identity": named,
        "layout": FLAGGED.as_json(),
        "config": {"rows": 96},
        "provenance": {"model": {"model": "m"}, "dataset": {"dataset": "d"}},
    }
    storage = open_storage(folder)
    storage.create(STORE_FILE, seal(content))
    writer = Writer(storage, FLAGGED, digest(named))
    for part, rows in ROWS.items():
        progress = TokenProgress(cursor=(0, 0), next_cursor=(1, 0), last=False)
        writer.commit_tokens(part, *part_tokens(part, rows), progress, rows)
        writer.commit_rows(part, row_permutation(0, part, rows))
    for array in ("tokens", "rows/sequence", "rows/position"):
        writer.grow(array, 3)
    return open_store(folder)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "s", one_document_per_sequence=True, chat_template="0")


def test_a_layout_without_flags_is_spelled_as_version_1_spells_it() -> None:
    assert PLAIN.format_version == 1
    assert "token_flags" not in PLAIN.as_json()
    assert Layout(**PLAIN.as_json()) == PLAIN
    assert FLAGGED.format_version == 2
    assert Layout(**FLAGGED.as_json()) == FLAGGED


@pytest.mark.parametrize("part", ROWS)
def test_flags_read_back_in_order_of_tokens_and_of_rows(store: Store, part: int) -> None:
    tokens_SL, flags_SL = part_tokens(part, ROWS[part])
    assert np.array_equal(store.tokens.read_tokens(part), tokens_SL)
    assert np.array_equal(store.tokens.read_flags(part), flags_SL)  # type: ignore[arg-type]
    starts_SL = store.tokens.read_document_starts(part)
    assert starts_SL is not None
    assert np.array_equal(starts_SL, flags_SL & 1 > 0)
    assert store.tokens.token_count(part) == ROWS[part]
    order = row_permutation(0, part, ROWS[part])
    position, positions = 0, []
    for starts in starts_SL.reshape(-1)[: ROWS[part]].tolist():  # the slow reference
        position = 0 if starts else position + 1
        positions.append(position)
    assert store.tokens.read_positions(part).tolist() == [positions[token] for token in order]
    assert store.tokens.read_token_ids(part).tolist() == tokens_SL.reshape(-1)[order].tolist()
    assistant = store.tokens.read_assistant(part)
    assert assistant is not None
    assert assistant.tolist() == (flags_SL.reshape(-1)[order] & 2 > 0).tolist()
    for read in (
        store.tokens.read_positions,
        store.tokens.read_assistant,
        store.tokens.read_token_ids,
    ):
        chunks = [row for c in range(2) for row in read(part, c).tolist()]  # type: ignore[union-attr]
        assert chunks == read(part).tolist()  # type: ignore[union-attr]


def test_a_store_says_only_what_its_identity_says(tmp_path: Path) -> None:
    chat = make_store(tmp_path / "chat", chat_template="0")
    lone = make_store(tmp_path / "lone", one_document_per_sequence=True)
    assert chat.tokens.read_document_starts(0) is None
    assert chat.tokens.read_assistant(0) is not None
    assert lone.tokens.read_document_starts(0) is not None
    assert lone.tokens.read_assistant(0) is None


def test_every_flipped_byte_of_flags_is_found(store: Store, tmp_path: Path) -> None:
    assert verify(tmp_path / "s").intact
    file = tmp_path / "s/arrays.zarr/token_flags/c/1/0"
    content = file.read_bytes()
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        (finding,) = verify(tmp_path / "s").findings
        assert (finding.fault, finding.mark) == ("flipped", (1, "tokens"))
    file.unlink()
    (finding,) = verify(tmp_path / "s").findings
    assert finding.fault == "missing"
    with pytest.raises(DamagedStoreError):
        open_store(tmp_path / "s").tokens.read_flags(1)


def test_a_copy_has_the_flags(store: Store, tmp_path: Path) -> None:
    copy(tmp_path / "s", tmp_path / "t")
    there = open_store(tmp_path / "t")
    assert all(np.array_equal(there.tokens.read_flags(p), store.tokens.read_flags(p)) for p in ROWS)  # type: ignore[arg-type]
    assert verify(tmp_path / "t").intact


def test_version_and_layout_must_agree(store: Store, tmp_path: Path) -> None:
    content = read_store_file(LocalStorage(tmp_path / "s"))
    (tmp_path / "s" / STORE_FILE).write_bytes(seal({**content, "format_version": 1}))
    with pytest.raises(DamagedStoreError, match="contradict"):
        open_store(tmp_path / "s")
    layout = {k: v for k, v in content["layout"].items() if k != "token_flags"}
    (tmp_path / "s" / STORE_FILE).write_bytes(seal({**content, "layout": layout}))
    with pytest.raises(DamagedStoreError, match="contradict"):
        open_store(tmp_path / "s")


def test_plain_zarr_reads_the_flags(store: Store, tmp_path: Path) -> None:
    metadata = json.loads((tmp_path / "s/arrays.zarr/token_flags/zarr.json").read_bytes())
    assert (metadata["data_type"], metadata["shape"]) == ("uint8", [12, 8])
