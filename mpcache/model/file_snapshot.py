"""A snapshot of a model's files: their digest, and whether they have changed since.

The digest must be that of the files that were loaded. So the stamps of all files are taken before
anything is loaded and compared after the last byte is digested. A stamp contains the ctime of a
file, which no tool can set, unlike its modification time.
"""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from mpcache.config import CollectConfig
from mpcache.errors import UsageError
from mpcache.model.file_integrity import check_index
from mpcache.model.model_source import ModelSource, commit_of, find_source

INDEX = ".index.json"
# in the order in which transformers looks for them
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}",
           "pytorch_model.bin", f"pytorch_model.bin{INDEX}")  # fmt: skip
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
GENERATION = "generation_config.json"
_SUFFIXES = {".json", ".safetensors", ".bin", ".gguf", ".model", ".tiktoken", ".jinja", ".py"}
_TEMPLATES = "additional_chat_templates"
_CLOCK = 0.02  # seconds; two changes within one tick of the clock leave the same ctime


@dataclass(frozen=True)
class ModelFileSnapshot:
    """All files that a model may be loaded from, at one time."""

    source: ModelSource
    stamps: dict[str, tuple[int, ...]]
    "stamp of each file, which changes with its content"
    paths: dict[str, Path]

    @classmethod
    def take(cls, source: ModelSource) -> "ModelFileSnapshot":
        paths = _paths(source)
        return cls(
            source, {name: file_stamp(path, settle=True) for name, path in paths.items()}, paths
        )

    def is_unchanged(self) -> bool:
        return not self._changed()

    def check_unchanged(self) -> None:
        """Raises UsageError where a file has been written or replaced since the snapshot."""
        if changed := self._changed():
            raise UsageError(
                f"{', '.join(changed[:3])} of {self.source.name} changed while the model was "
                "loaded; run the same command again"
            )

    def digest(self) -> str | None:
        """The sha256 of the files, or the commit of a Hub model.

        None if the Hub's cache cannot confirm the commit. Raises UsageError where a file has
        changed since the snapshot, or where a cached file differs from the Hub's.
        """
        if self.source.folder is None:
            digest_text = self._commit()
        elif self.source.gguf is not None:
            digest_text = f"sha256 {file_digest(self.paths[self.source.gguf])}"
        else:
            digest = hashlib.sha256()
            for name, path in sorted(self.paths.items()):
                digest.update(f"{name}\0{file_digest(path)}\0".encode())
            digest_text = f"sha256 {digest.hexdigest()}"
        self.check_unchanged()
        return digest_text

    def _changed(self) -> list[str]:
        now = _paths(self.source) if self.source.folder else self.paths
        now_stamps = {name: file_stamp(path) for name, path in now.items()}
        names = sorted(filter(_is_loaded, self.stamps.keys() | now_stamps.keys()))
        return [name for name in names if self.stamps.get(name) != now_stamps.get(name)]

    def _commit(self) -> str | None:
        """The commit, if all files in the cache have the content that the commit gives them."""
        intact_flags = [is_intact(path) for path in self.paths.values()]
        for path, intact in zip(self.paths.values(), intact_flags, strict=True):
            if intact is False:
                raise UsageError(
                    f"{path} is damaged: its checksum differs from that on the Hub; delete "
                    f"{path.resolve()}, then run the same command again"
                )
        commits = {commit_of(path) for path in self.paths.values()}
        if None in intact_flags or len(commits) != 1 or None in commits:
            return None
        return f"commit {commits.pop()}"


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path) -> bool | None:
    """Whether a file in the Hub's cache has the content that the name of its blob says.

    The cache has links to blobs, which are named by their sha256 or their git hash. None for a file
    that is no link, as on file systems without links.
    """
    name = path.resolve().name
    if not path.is_symlink() or set(name) - set("0123456789abcdef"):
        return None
    if len(name) == 64:
        return file_digest(path) == name
    return _git_digest(path) == name if len(name) == 40 else None


def _git_digest(path: Path) -> str:
    content = path.read_bytes()  # only small files have a git hash
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


# --- which files ---


def _paths(source: ModelSource) -> dict[str, Path]:
    if source.folder is None:
        return _hub_paths(source)
    if source.gguf is not None:
        return {source.gguf: source.folder / source.gguf}
    templates = source.folder / _TEMPLATES
    files = [*source.folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]
    return {f.relative_to(source.folder).as_posix(): f for f in files if f.is_file()}


def _hub_paths(source: ModelSource) -> dict[str, Path]:
    names = ["config.json", GENERATION, *TOKENIZER, *weight_names(source)]
    paths = {name: source.file(name) for name in names}
    return {name: path for name, path in paths.items() if path is not None}


def weight_names(source: ModelSource) -> list[str]:
    """Names of the files with the model's weights, and of their index; empty without weights.

    Raises UsageError where an index names missing files.
    """
    explicit = source.settings.get("transformers_weights")
    for name in (explicit,) if isinstance(explicit, str) else WEIGHTS:
        path = source.file(name)
        if path is None:
            continue
        if not name.endswith(INDEX):
            return [name]
        shards = check_index(path)
        missing = [shard for shard in shards if source.file(shard) is None]
        if missing:
            raise UsageError(
                f"{path} lists {len(shards)} files with weights, but {len(missing)} are missing: "
                f"{', '.join(missing[:3])}; download the missing files"
            )
        return [name, *shards]
    return []


def _is_loaded(name: str) -> bool:
    """Whether a model is loaded from files of this kind; a log, for example, is not loaded."""
    return Path(name).suffix.lower() in _SUFFIXES or Path(name).name in ("vocab.txt", "merges.txt")


def file_stamp(path: Path, settle: bool = False) -> tuple[int, ...]:
    """Numbers that change whenever the content of a file changes."""
    stat = path.stat()
    if settle and abs(time.time() - stat.st_ctime) < _CLOCK:
        time.sleep(_CLOCK)  # so that a later change has a different time
        stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def files_digest(config: CollectConfig) -> str | None:
    """The sha256 of a model's files as they are now, or the commit of a Hub model.

    With the same libraries, equal files compute equal values. None where the config allows code
    that comes with the model, which may compute anything.
    """
    if config.trust_remote_code:
        return None
    source = find_source(config)
    if source.folder is None:  # a commit of the Hub never changes
        return None if source.commit is None else f"commit {source.commit}"
    return ModelFileSnapshot.take(source).digest()
