"""Models in .gguf files: checks of the header, and arguments for `transformers`."""

import math
import mmap
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mpcache.errors import UsageError
from mpcache.model.file_integrity import DOWNLOAD_AGAIN, check_present

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# struct formats by the number of a value's type
_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


def check_gguf(path: Path) -> None:
    """Raises UsageError for a damaged file, a piece of a model, or without the packages."""
    check_present(path)
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{path.name} needs packages that are not installed: {', '.join(missing)}; run pip "
            "install 'mpcache[gguf]'"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"{path} must be a GGUF file, got other content; {DOWNLOAD_AGAIN}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                header = _Header(content)
            except (struct.error, IndexError):
                raise UsageError(
                    f"{path} is cut short: its header has no end; {DOWNLOAD_AGAIN}"
                ) from None
            except (KeyError, UnicodeDecodeError):
                raise UsageError(
                    f"{path} is damaged: its header is not valid GGUF; {DOWNLOAD_AGAIN}"
                ) from None
            size = len(content)
    _check_header(path, header, size)


def _check_header(path: Path, header: "_Header", size: int) -> None:
    if header.version not in _VERSIONS:
        raise UsageError(
            f"{path} must be GGUF version 2 or 3, got {header.version}; convert the model again "
            "with a current llama.cpp"
        )
    if (pieces := int(header.fields.get("split.count", 1))) > 1:
        raise UsageError(
            f"{path} is one of {pieces} pieces of a model; join the pieces with "
            "`llama-gguf-split --merge` of llama.cpp, and give the joined file"
        )
    if not header.fields.get("general.architecture"):
        raise UsageError(
            f"{path} must have the field general.architecture, got none; {DOWNLOAD_AGAIN}"
        )
    if not header.tensors:
        raise UsageError(
            f"{path} must hold weights, got only a vocabulary; give a .gguf file with weights"
        )
    wanted = max(header.data_start + tensor.offset + tensor.bytes for tensor in header.tensors)
    if size < wanted:
        raise UsageError(
            f"{path} is cut short: it has {size:,} bytes, but its header needs {wanted:,}; "
            f"{DOWNLOAD_AGAIN}"
        )


@dataclass(frozen=True)
class _Tensor:
    offset: int
    bytes: int


class _Header:
    """The single values and tensors in the header of a GGUF file. Arrays are skipped."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._position = content, 4
        self.fields: dict[str, Any] = {}
        self.tensors: list[_Tensor] = []
        self.data_start = 0
        self.version = self._read("I")
        if self.version not in _VERSIONS:
            return
        tensors, fields = self._read("Q"), self._read("Q")
        for _ in range(fields):
            name = self._string()
            self.fields[name] = self._value(self._read("I"))
        self.tensors = [self._tensor() for _ in range(tensors)]
        alignment = int(self.fields.get("general.alignment") or 32)
        self.data_start = -(-self._position // alignment) * alignment

    def _read(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._content, self._position)
        self._position += struct.calcsize(kind)
        return value

    def _string(self) -> str:
        length = self._read("Q")
        start, self._position = self._position, self._position + length
        if self._position > len(self._content):
            raise IndexError
        return self._content[start : self._position].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._read(_FORMATS[kind])
        element, count = self._read("I"), self._read("Q")
        if element in _FORMATS:
            self._position += count * struct.calcsize(_FORMATS[element])
        else:
            for _ in range(count):
                self._skip(element)
        return None

    def _skip(self, element: int) -> None:
        if element == _STRING:
            self._position += 8 + self._length()
        else:
            self._value(element)

    def _length(self) -> int:
        (length,) = struct.unpack_from("<Q", self._content, self._position)
        return int(length)

    def _tensor(self) -> _Tensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self._string()
        shape = [self._read("Q") for _ in range(self._read("I"))]
        kind, offset = self._read("I"), self._read("Q")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError:  # a type that the package does not know: the loader raises
            return _Tensor(offset, 0)
        return _Tensor(offset, math.prod(shape) // block * size)


def dequantize_options() -> dict[str, Any]:
    """Arguments of `from_pretrained` that dequantise all weights."""
    try:
        from transformers import GgufConfig
    except ImportError:  # older versions always dequantise
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def forget_quantization_(model: PreTrainedModel) -> None:
    """Remove the settings of quantisation, because the weights are dense now."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        for owner, name in (
            (module, "hf_quantizer"), (module, "quantization_method"), (module, "is_quantized"),
            (module.config, "quantization_config"), (module.config, "_is_quantized"),
        ):  # fmt: skip
            if name in vars(owner):
                delattr(owner, name)
