"""MODEL -> the location of its files: a folder, a .gguf file, or a commit of a Hub repository."""

import functools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from mpcache.config import CollectConfig
from mpcache.errors import UsageError
from mpcache.hub_errors import explain_hub_errors, looks_like_path
from mpcache.model.file_integrity import check_json, check_present, read_head
from mpcache.untrusted_names import user_path

CONFIG = "config.json"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class ModelSource:
    """The location of a model's files, and the arguments of `from_pretrained` for it."""

    name: str
    "the model as the user named it"
    folder: Path | None = None
    "folder of the files; None for a repository on the Hub"
    gguf: str | None = None
    "name of the .gguf file in the folder"
    revision: str = "main"
    "revision of a Hub repository: the commit, once it is known"

    @property
    def location(self) -> str:
        """The first argument of `from_pretrained`."""
        return self.name if self.folder is None else str(self.folder)

    @property
    def commit(self) -> str | None:
        """The commit of a Hub repository; None if it is not known."""
        is_commit = self.folder is None and re.fullmatch(r"[0-9a-f]{40}", self.revision)
        return self.revision if is_commit else None

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of `from_pretrained`."""
        revision = {"revision": self.revision} if self.folder is None else {}
        return revision if self.gguf is None else {**revision, "gguf_file": self.gguf}

    @property
    def gguf_path(self) -> Path | None:
        return None if self.folder is None or self.gguf is None else self.folder / self.gguf

    def file(self, name: str) -> Path | None:
        """The path of a file, downloaded from the Hub; None where the model has no such file.

        Raises UsageError for a file that cannot be read.
        """
        if self.folder is None:
            path = _from_hub(self.name, name, self.revision)
        else:
            path = self.folder / name
            path = path if path.exists() or path.is_symlink() else None
        if path is not None:
            check_present(path)
        return path

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The content of config.json; empty for a .gguf file."""
        path = None if self.gguf else self.file(CONFIG)
        return {} if path is None else check_json(path)


def find_source(config: CollectConfig) -> ModelSource:
    """The location of the config's model.

    Raises UsageError where there is no model, ConnectionError without the Hub.
    """
    path = user_path(config.model)
    if os.path.isdir(path):  # for a name that is too long for a path, Path.is_dir would raise
        if path.suffix.lower() == ".gguf" and not (path / CONFIG).exists():
            check_present(path)  # raises: it is a folder
        return _checked(ModelSource(config.model, folder=path))
    if path.suffix.lower() == ".gguf" and os.path.lexists(path):
        check_present(path)
        return ModelSource(config.model, folder=path.parent, gguf=path.name)
    if os.path.exists(path):
        raise UsageError(
            f"model must be a folder, a .gguf file or a Hub id, got the file {config.model}; "
            f"give {_suggested_name(path)}"
        )
    if looks_like_path(config.model) or path.suffix.lower() == ".gguf" or os.path.islink(path):
        raise UsageError(
            f"the model {config.model} does not exist; give an existing folder, a .gguf file or "
            "a Hub id"
        )
    return _checked(_at_commit(ModelSource(config.model, revision=config.revision)))


def short_name(name: str) -> str:
    """The last part of the name of a model or dataset.

    Links to folders are resolved, links to files are not: a file in the Hub's cache is a link to a
    file that is named by its digest.
    """
    path = user_path(name)
    return os.path.basename(os.path.realpath(path)) if os.path.isdir(path) else path.name


def _suggested_name(path: Path) -> str:
    if read_head(path)[:4] == b"GGUF":
        return "the file with the ending .gguf"
    return f"the folder it is in, {path.parent}"


def _at_commit(source: ModelSource) -> ModelSource:
    """The repository at the commit that its revision means now, for all files."""
    with explain_hub_errors(f"model {source.name}", source.revision):
        path = cached_file(
            source.name, CONFIG, revision=source.revision,
            _raise_exceptions_for_missing_entries=True,
        )  # fmt: skip
    commit = None if path is None else commit_of(Path(path))
    return source if commit is None else replace(source, revision=commit)


def commit_of(path: Path) -> str | None:
    """The commit of a file in the Hub's cache, .../snapshots/COMMIT/NAME."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-2] else None


def _from_hub(repository: str, name: str, revision: str) -> Path | None:
    with explain_hub_errors(f"{name} of {repository}", revision):
        path = cached_file(
            repository, name, revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    return None if path is None else Path(path)


def _checked(source: ModelSource) -> ModelSource:
    """Raises UsageError for a folder or repository that does not hold a model."""
    if source.file(ADAPTER) is not None:
        base = check_json(source.file(ADAPTER)).get("base_model_name_or_path", "its base model")
        raise UsageError(
            f"{source.location} is an adapter (LoRA) for {base}, not a whole model, according to "
            f"its {ADAPTER}; merge both with peft's merge_and_unload(), save the result and the "
            "tokenizer with save_pretrained(), and give that folder"
        )
    if source.file(CONFIG) is None:
        raise UsageError(
            f"a model folder must hold {CONFIG}, got {source.location} without it; "
            f"{_other_files(source)}"
        )
    return source


def _other_files(source: ModelSource) -> str:
    files = [] if source.folder is None else sorted(source.folder.glob("*.gguf"))
    if files:
        return f"give the file itself: {files[0]}"
    if source.folder:
        return "give the folder with the model's files"
    return "download a .gguf file of this model, and give the path of that file"
