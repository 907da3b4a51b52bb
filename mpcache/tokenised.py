"""A tokenised `.bin` -> documents: runs of token ids, each closed by the tokenizer's end token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt
from transformers import PreTrainedTokenizerBase

Tokens = UInt[np.ndarray, " _"]
Indices = Int64[np.ndarray, " _"]

SCAN_TOKENS = 1 << 24  # tokens of a .bin looked at at once, so that a file larger than memory opens


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a document: EOS, else SEP."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if isinstance(token, int):
            return token
    return None


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id; ids may leave gaps, so it is no count."""
    return max(tokenizer.get_vocab().values())


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype[Any]:
    """Smallest unsigned integer that holds every token id."""
    return np.dtype(np.min_scalar_type(largest_id(tokenizer)))


def token_source(
    path: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, Callable[[Indices], list[Tokens]]]:
    """Documents of a flat little-endian stream (uint16, uint32 if ids need it), ends stripped."""
    dtype = np.promote_types(token_dtype(tokenizer), np.uint16).newbyteorder("<")
    size = path.stat().st_size
    if not size or size % dtype.itemsize:
        raise ValueError(
            f"a tokenised .bin must hold {dtype.name} tokens, got {size} bytes in {path.name}; "
            "write it anew"
        )
    stream = np.memmap(path, dtype=dtype, mode="r")
    bounds = document_bounds(stream, path, tokenizer)
    return len(bounds) - 1, lambda indices: [
        stream[bounds[i] : bounds[i + 1] - 1].astype(dtype.newbyteorder("=")) for i in indices
    ]


def document_bounds(
    stream: UInt[np.ndarray, " n"], path: Path, tokenizer: PreTrainedTokenizerBase
) -> Int64[np.ndarray, " bounds"]:
    """Where documents start, and one past the last one's end token."""
    end, largest = end_token(tokenizer), max(tokenizer.get_vocab().values())
    found = [np.zeros(1, np.int64)]
    for start in range(0, len(stream), SCAN_TOKENS):
        piece = stream[start : start + SCAN_TOKENS]
        if piece.max() > largest:
            raise ValueError(
                f"tokens must be at most {largest} for this tokenizer, got {piece.max()} "
                f"in {path.name}; tokenise it with the model's own"
            )
        found.append(np.flatnonzero(piece == end) + start + 1)
    bounds = np.concatenate(found)
    if len(bounds) == 1:
        raise ValueError(f"documents in {path.name} must end with token {end}, got no such token")
    # the file may stop amid a document: as if its end token came next
    return bounds if bounds[-1] == len(stream) else np.append(bounds, len(stream) + 1)
