"""docs/format.md is true: its examples read a store, and its formulas give the stored values."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
import xxhash

from mpcache.config import CollectConfig
from mpcache.store.reader import Store, open_store
from tests.helpers.chats import chat_store
from tests.helpers.paths import PROJECT
from tests.helpers.stores import SIDES, small_store

TEXT = (PROJECT / "docs/format.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose splits end with short parts."""
    folder = tmp_path_factory.mktemp("made")
    return small_store(folder, rows=1_000_000, dtype=request.param, codec="zstd")[0]


def example(name: str) -> Any:
    """A function from the document, executed as written."""
    (source,) = [text for text in EXAMPLES if f"def {name}(" in text]
    assert len(source.strip().splitlines()) <= 30
    names: dict[str, Any] = {}
    exec(compile(source, f"docs/format.md {name}", "exec"), names)
    return names[name]


def rows_of(store: Store, side: tuple[str, str], part: int, rows: int) -> torch.Tensor:
    chunks = [store.acts.read_chunk(*side, part, c) for c in range(-(-rows // store.chunk_rows))]
    return torch.cat(chunks).float()


def test_the_plain_reader_reads_what_is_committed(original: Path) -> None:
    store, read_parts = open_store(original), example("read_parts")
    for side in SIDES:
        (original / f"marks/3/{side[0]}/{side[1]}.json").unlink(missing_ok=True)
    store = open_store(original)
    for side in SIDES:
        parts_read = list(read_parts(original, *side))
        assert [part for part, _, _ in parts_read] == list(
            store.part_numbers(f"acts/{'/'.join(side)}")
        )
        for part, split, rows in parts_read:
            assert split == store.layout.split_of(part)
            wanted = rows_of(store, side, part, len(rows))
            assert np.array_equal(rows.astype(np.float32), wanted.numpy())


def test_the_plain_reader_reads_flags(tmp_path: Path) -> None:
    for name, changes in (("lone", {"one_document_per_sequence": True}), ("packed", {})):
        (tmp_path / name).mkdir()
        path, _ = chat_store(tmp_path / name, **changes)
        store, read_flags = open_store(path), example("read_flags")
        for part in store.part_numbers("tokens"):
            position, own = read_flags(path, part)
            assert position.tolist() == store.tokens.read_positions(part).tolist()
            assistant = store.tokens.read_assistant(part)
            assert assistant is not None
            assert own.tolist() == assistant.tolist()
        assert list(example("read_parts")(path, *SIDES[0]))


def test_the_lazy_reader_reads_what_is_committed(original: Path) -> None:
    store, open_rows = open_store(original), example("open_rows")
    for side in SIDES:
        for split in ("train", "validation"):
            parts = store.parts([side], split)  # type: ignore[arg-type]
            wanted = torch.cat([rows_of(store, side, p.number, p.rows) for p in parts])
            rows_read = open_rows(original, *side, split).compute(scheduler="synchronous")
            assert np.array_equal(rows_read.astype(np.float32), wanted.numpy())


def test_the_permutation_is_as_documented(original: Path) -> None:
    """Section 5, with Python's own integers."""
    store = open_store(original)
    seed, words = store.identity["seed"], 1 << 64
    for part in store.part_numbers("tokens"):
        count = store.mark(part, "tokens").rows
        key = int.from_bytes(hashlib.sha256(f"rows {seed} {part}".encode()).digest()[:8], "little")
        hashes = []
        for i in range(count):
            x = (i * 0x9E3779B97F4A7C15 + key) % words
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % words
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % words
            hashes.append((x ^ (x >> 31), i))
        tokens = [i for _, i in sorted(hashes)]
        position = store.read_part("rows/position", part)["rows/position"]
        sequence = store.read_part("rows/sequence", part)["rows/sequence"]
        assert position.tolist() == [t % 16 for t in tokens]
        assert sequence.tolist() == [part * 12 + t // 16 for t in tokens]


def test_seals_digests_and_moments_are_as_documented(original: Path) -> None:
    store = open_store(original)
    for file in [original / "store.json", *(original / "marks").rglob("*.json")]:
        content = json.loads(file.read_bytes())
        spelled = json.dumps(content, indent=1, sort_keys=True) + "\n"
        assert file.read_text() == spelled
        digest = content.pop("digest")
        rest = json.dumps(content, indent=1, sort_keys=True) + "\n"
        assert hashlib.sha256(rest.encode()).hexdigest() == digest
    for array in store.arrays:
        for part in store.part_numbers(array):
            values = store.read_part(array, part)
            for name, record in store.mark(part, array).objects.items():
                data = (original / name).read_bytes()
                assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (
                    record.bytes,
                    record.xxh3_128,
                )
                decoded = values[name.removeprefix("arrays.zarr/").partition("/c/")[0]].tobytes()
                assert xxhash.xxh3_128_hexdigest(decoded) == record.values_xxh3_128


def test_every_path_of_a_store_is_in_the_document(original: Path) -> None:
    """Each file has the form of a line of section 2."""
    (listing,) = [t for t in re.findall(r"```\n(.*?)```", TEXT, flags=re.DOTALL) if "acts/<" in t]
    forms = {re.sub(r"<part>", "N", word) for word in re.findall(r"[\w./<>-]+/[\w./<>-]+", listing)}
    for file in (f for f in original.rglob("*") if f.is_file() and f.name != "zarr.json"):
        name = file.relative_to(original).as_posix().removeprefix("arrays.zarr/")
        form = re.sub(r"^(marks|.*/c)/\d+", r"\1/N", name)
        for hookpoint, side in SIDES:
            form = form.replace(f"{hookpoint}/{side}", "<hookpoint>/<side>")
        assert form in {*forms, "store.json"}, name


def test_every_choice_of_the_config_is_in_the_document() -> None:
    hints = get_type_hints(CollectConfig)
    choices = [*hints["dtype"].__args__, *hints["codec"].__args__]
    assert all(f"`{choice}`" in TEXT for choice in choices)
