"""Python code that comes with a model: runs from a fresh copy and counts in the model's digest.

`transformers` keeps a copy of the code between runs and does not always compare it with the model's
files. Here each process has a fresh copy.
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

_UTILS: Any = dynamic_module_utils  # these names are not exported
_PACKAGE: str = _UTILS.TRANSFORMERS_DYNAMIC_MODULE_NAME


@functools.cache
def use_fresh_copies() -> "tempfile.TemporaryDirectory[str]":
    """Make `transformers` copy model code into a temporary folder of this process."""
    folder = tempfile.TemporaryDirectory(prefix="mpcache-code-", ignore_cleanup_errors=True)
    _UTILS.HF_MODULES_CACHE = folder.name
    # modules imported earlier may come from the old folder and import more from it
    for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, folder.name)
    importlib.invalidate_caches()
    return folder


def code_digest(classes: Iterable[type]) -> str | None:
    """sha256 of the model's own source files that define these classes; None without any."""
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
