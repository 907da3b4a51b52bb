"""Checks that a model's file is what its name says, from its first bytes and its size.

Each check raises UsageError with the name of the file and a remedy. No check reads all of a large
file.
"""

import errno
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from mpcache.data.digested_file import is_lfs_pointer, is_markup
from mpcache.errors import UsageError

DOWNLOAD_AGAIN = "download it again, for instance with `hf download`"
_HEAD = 1024  # bytes; enough for a Git LFS pointer and for the start of a web page
# bits of a value in a safetensors file
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
         "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
         "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
         "U64": 64, "I64": 64, "F64": 64, "C64": 64}  # fmt: skip


# integer dtypes of PyTorch; all others are floating-point
_NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
          torch.int64: "I64", torch.bool: "BOOL"}  # fmt: skip
TensorHeaders = dict[str, tuple[str, tuple[int, ...]]]
"dtype and shape of each tensor"


def check_present(path: Path) -> None:
    """Raises UsageError for a file that is unreadable, empty, or stands for another file."""
    head = read_head(path)
    if not head:
        raise UsageError(f"{path} is empty; {DOWNLOAD_AGAIN}")
    if is_lfs_pointer(head):
        raise UsageError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its "
            "folder, or download the file with `hf download`"
        )
    if is_markup(head):
        raise UsageError(f"{path} is a web page, not the file itself; {DOWNLOAD_AGAIN}")


def read_head(path: Path) -> bytes:
    """The first bytes of a file. Raises UsageError where it cannot be read."""
    if os.path.islink(path) and not os.path.exists(path):
        if _is_loop(path):
            raise UsageError(f"{path} is a link to itself; {DOWNLOAD_AGAIN}")
        raise UsageError(
            f"{path} is a link to a missing file, {os.readlink(path)}; {DOWNLOAD_AGAIN}"
        )
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except IsADirectoryError:
        raise UsageError(f"{path} must be a file, got a folder; {DOWNLOAD_AGAIN}") from None
    except PermissionError:
        raise UsageError(
            f"{path} must be readable, got no permission; run chmod +r {path}"
        ) from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UsageError(f"{path} is too long for a path; correct --model") from None


def _is_loop(path: Path) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def check_json(path: Path | None) -> dict[str, Any]:
    """The content of a JSON file that holds an object."""
    assert path is not None
    check_present(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} must be JSON, got {reason}; {DOWNLOAD_AGAIN}") from None
    if not isinstance(content, dict):
        raise UsageError(
            f"{path} must hold a JSON object, got {type(content).__name__}; {DOWNLOAD_AGAIN}"
        )
    return content


def check_index(path: Path) -> list[str]:
    """The names of the files in an index of shards."""
    names = check_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(
        isinstance(name, str) and name for name in names.values()
    ):  # fmt: skip
        raise UsageError(
            f"{path} must hold a weight_map, which maps tensors to files; {DOWNLOAD_AGAIN}"
        )
    files = sorted(set(names.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise UsageError(
            f"{path} must refer only to files in its own folder, got {outside[0]!r}; "
            f"{DOWNLOAD_AGAIN}"
        )
    return files


# --- weights ---


def check_safetensors(path: Path) -> TensorHeaders:
    """Dtype and shape of each tensor. The file must have exactly the size that its header says."""
    check_present(path)
    size = path.stat().st_size
    tensors, start = _header(path, size)
    end = 0
    for name, (dtype, shape, (begin, stop)) in tensors.items():
        if dtype in _BITS and (stop - begin) * 8 != _BITS[dtype] * math.prod(shape):
            raise UsageError(
                f"{path} is damaged: its header gives {stop - begin} bytes to {name}, which does "
                f"not fit {dtype} values of shape {list(shape)}; {DOWNLOAD_AGAIN}"
            )
        end = max(end, stop)
    if size != start + end:
        raise UsageError(_size_message(path, size, start + end))
    return {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}


def _size_message(path: Path, size: int, wanted: int) -> str:
    state = "cut short" if size < wanted else "damaged"
    return f"{path} is {state}: it has {size:,} bytes, its header says {wanted:,}; {DOWNLOAD_AGAIN}"


_TensorRanges = dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]


def _header(path: Path, size: int) -> tuple[_TensorRanges, int]:
    """Dtype, shape and byte range of each tensor, and the offset of the first byte."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size >= 8 + length:
            raw = file.read(length)
        elif file.read(1) == b"{":
            raise UsageError(_size_message(path, size, 8 + length))
        else:
            raise UsageError(
                f"{path} must be a safetensors file, got other content; {DOWNLOAD_AGAIN}"
            )
    try:
        content = json.loads(raw)
        content.pop("__metadata__", None)
        tensors = {
            name: (str(t["dtype"]), tuple(map(int, t["shape"])), _pair(t["data_offsets"]))
            for name, t in content.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UsageError(
            f"{path} must be a safetensors file, got a broken header; {DOWNLOAD_AGAIN}"
        ) from None
    return tensors, 8 + length


def _pair(offsets: Any) -> tuple[int, int]:
    begin, end = map(int, offsets)
    if not 0 <= begin <= end:
        raise ValueError
    return begin, end


def check_torch(path: Path) -> TensorHeaders:
    """Dtype and shape of each tensor of a .bin file, without reading the tensors.

    Empty for a file of PyTorch before 1.6, which can only be read as a whole.
    """
    head = read_head(path)
    check_present(path)
    if not head.startswith(b"PK"):
        if not head.startswith(b"\x80"):  # a pickle
            raise UsageError(
                f"{path} must hold PyTorch weights, got other content; {DOWNLOAD_AGAIN}"
            )
        return {}
    try:
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{path} is cut short or damaged: {str(error).splitlines()[0]}; {DOWNLOAD_AGAIN}"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must map names to tensors, got other content; {DOWNLOAD_AGAIN}")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return {str(name): (_NAMES.get(t.dtype, "F32"), tuple(t.shape)) for name, t in tensors.items()}
