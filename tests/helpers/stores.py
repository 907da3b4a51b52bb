"""A small collection on a tiny random model, for tests of any stage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpcache.collection.collect import collect
from mpcache.collection.summary import CollectSummary
from mpcache.config import CollectConfig
from mpcache.store.reader import Store
from tests.helpers.models import save_tiny

HOOKPOINTS = ("layers.0", "layers.1.mlp")
SIDES = (("layers.0", "output"), ("layers.1.mlp", "input"), ("layers.1.mlp", "output"))


def write_corpus(path: Path, documents: int = 60, seed: int = 0) -> Path:
    """A .jsonl of random printable texts of uneven length."""
    random = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(documents):
            letters = random.integers(97, 123, random.integers(5, 120))
            file.write(json.dumps({"text": bytes(letters.tolist()).decode()}) + "\n")
    return path


def small_config(folder: Path, **changes: object) -> CollectConfig:
    """A config over a tiny model and corpus that it makes in `folder`."""
    if not (folder / "model").exists():
        save_tiny(folder / "model")
    if not (folder / "corpus.jsonl").exists():
        write_corpus(folder / "corpus.jsonl")
    settings: dict[str, object] = {
        "model": str(folder / "model"),
        "dataset": str(folder / "corpus.jsonl"),
        "hookpoints": HOOKPOINTS,
        "rows": 1500,
        "ctx_len": 16,
        "part_rows": 192,
        "chunk_rows": 32,
        "batch_sequences": 5,
        "validation_every": 4,
        "model_dtype": "float32",
        "device": "cpu",
        **changes,
    }
    return CollectConfig(**settings)  # type: ignore[arg-type]


def small_store(folder: Path, **changes: object) -> tuple[Path, CollectSummary]:
    """A collected store."""
    path = folder / "store"
    return path, collect(small_config(folder, **changes), path)


def files_of(path: Path) -> dict[str, bytes]:
    """Files of a store whose bytes do not depend on host and time: all files but marks."""
    files = {f.relative_to(path).as_posix(): f for f in sorted(path.rglob("*")) if f.is_file()}
    return {name: f.read_bytes() for name, f in files.items() if not name.startswith("marks/")}


def marks_of(path: Path) -> dict[str, dict[str, object]]:
    """All marks without the fields that depend on host, time and the order of writers."""
    marks = {}
    for file in sorted((path / "marks").rglob("*.json")):
        mark = json.loads(file.read_bytes())
        marks[file.relative_to(path).as_posix()] = {
            k: v for k, v in mark.items() if k not in ("host", "time", "attempt", "digest")
        }
    return marks


def rows_of(store: Store, side: tuple[str, str], split: str) -> torch.Tensor:
    parts = store.parts([side], split)  # type: ignore[arg-type]
    chunks = [
        store.acts.read_chunk(*side, p.number, c)
        for p in parts
        for c in range(-(-p.rows // store.chunk_rows))
    ]
    return torch.cat(chunks)


def lasting_content(path: Path) -> dict[str, Any]:
    """All content of a store that does not depend on who wrote it and when."""
    marks = {
        name: {k: v for k, v in mark.items() if k != "replaces"}
        for name, mark in marks_of(path).items()
    }
    return {**files_of(path), **marks}
