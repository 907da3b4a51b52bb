"""Model code that comes with a model: run from a fresh copy, and part of the model's digest.

`transformers` runs a copy of the code that it keeps from one run to the next, and in some cases
never compares with the model's own files. Here each process has a copy of its own.
"""

import functools
import hashlib
import importlib
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import dynamic_module_utils

_UTILS: Any = dynamic_module_utils  # its names are not exported
_PACKAGE: str = _UTILS.TRANSFORMERS_DYNAMIC_MODULE_NAME


@functools.cache
def use_fresh_copies() -> "tempfile.TemporaryDirectory[str]":
    """Keep the code that is run in a folder of this process, which ends with it."""
    folder = tempfile.TemporaryDirectory(prefix="mpcache-code-", ignore_cleanup_errors=True)
    _UTILS.HF_MODULES_CACHE = folder.name
    # modules that were imported before may come from the old folder, and lead back to it
    for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, folder.name)
    importlib.invalidate_caches()
    return folder


def code_digest(classes: Iterable[type]) -> str | None:
    """sha256 of the source that defines these classes, if any of it came with the model."""
    names = {base.__module__ for kind in classes for base in kind.__mro__}
    files = {Path(str(sys.modules[name].__file__)) for name in names if _is_remote(name)}
    if not files:
        return None
    for file in list(files):
        files |= set(map(Path, _UTILS.get_relative_import_files(file)))
    digest = hashlib.sha256()
    for name, content in sorted((file.name, file.read_bytes()) for file in files):
        digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\0".encode())
    return digest.hexdigest()


def _is_remote(name: str) -> bool:
    return name.split(".")[0] == _PACKAGE
