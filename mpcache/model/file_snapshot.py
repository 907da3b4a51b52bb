"""The files of a model at one time, the digest that names them, and whether they changed since.

A digest is worth its name only if the files that were digested are those that were loaded. So all
are looked at before anything is loaded, and again after the last byte is digested. No tool can set
the time of a file's last change (ctime), unlike the time of its last modification.
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
_CLOCK = 0.02  # seconds: a file changed twice within a tick of the clock keeps its ctime


@dataclass(frozen=True)
class ModelFileSnapshot:
    """All files that a model may be loaded from."""

    source: ModelSource
    seen: dict[str, tuple[int, ...]]
    "by name: what changes with the content of a file"
    paths: dict[str, Path]

    @classmethod
    def of(cls, source: ModelSource) -> "ModelFileSnapshot":
        paths = _paths(source)
        return cls(source, {name: look(path, settle=True) for name, path in paths.items()}, paths)

    def is_unchanged(self) -> bool:
        return not self._changed()

    def check_unchanged(self) -> None:
        """Raises UsageError where a file was written or replaced meanwhile."""
        if changed := self._changed():
            raise UsageError(
                f"{', '.join(changed[:3])} of {self.source.name} changed while the model was "
                "loaded; give the same command again"
            )

    def digest(self) -> str | None:
        """What names the files: their sha256, or the commit of a Hub model.

        None where neither says what was loaded. Raises UsageError where a file changed meanwhile,
        or where the Hub's cache holds other content than it had there.
        """
        if self.source.folder is None:
            named = self._commit()
        elif self.source.gguf is not None:
            named = f"sha256 {file_digest(self.paths[self.source.gguf])}"
        else:
            digest = hashlib.sha256()
            for name, path in sorted(self.paths.items()):
                digest.update(f"{name}\0{file_digest(path)}\0".encode())
            named = f"sha256 {digest.hexdigest()}"
        self.check_unchanged()
        return named

    def _changed(self) -> list[str]:
        now = _paths(self.source) if self.source.folder else self.paths
        looks = {name: look(path) for name, path in now.items()}
        names = sorted(filter(_is_loaded, self.seen.keys() | looks.keys()))
        return [name for name in names if self.seen.get(name) != looks.get(name)]

    def _commit(self) -> str | None:
        """The commit, if all files in the cache are its files: there, names are digests."""
        verdicts = [is_intact(path) for path in self.paths.values()]
        for path, intact in zip(self.paths.values(), verdicts, strict=True):
            if intact is False:
                raise UsageError(
                    f"{path} is not what the Hub has: its content does not fit its digest there; "
                    f"delete {path.resolve()} and give the same command again"
                )
        commits = {commit_of(path) for path in self.paths.values()}
        if None in verdicts or len(commits) != 1 or None in commits:
            return None
        return f"commit {commits.pop()}"


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path) -> bool | None:
    """Whether a file of the Hub's cache has the content that its name there says.

    A snapshot is links to blobs, which are named by their sha256, or as git names them. None where
    there is no link, because of a file system without links.
    """
    name = path.resolve().name
    if not path.is_symlink() or set(name) - set("0123456789abcdef"):
        return None
    if len(name) == 64:
        return file_digest(path) == name
    return _git_digest(path) == name if len(name) == 40 else None


def _git_digest(path: Path) -> str:
    content = path.read_bytes()  # git's own files are small: large ones have a sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


# --- which files ---


def _paths(source: ModelSource) -> dict[str, Path]:
    if source.folder is None:
        return _of_the_hub(source)
    if source.gguf is not None:
        return {source.gguf: source.folder / source.gguf}
    templates = source.folder / _TEMPLATES
    files = [*source.folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]
    return {f.relative_to(source.folder).as_posix(): f for f in files if f.is_file()}


def _of_the_hub(source: ModelSource) -> dict[str, Path]:
    names = ["config.json", GENERATION, *TOKENIZER, *weight_names(source)]
    found = {name: source.file(name) for name in names}
    return {name: path for name, path in found.items() if path is not None}


def weight_names(source: ModelSource) -> list[str]:
    """The names of the files that hold a model's weights, with their index; empty if none is there.

    Raises UsageError where an index names files that are not there.
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
                f"{path} names {len(shards)} files with weights, of which {len(missing)} are "
                f"missing: {', '.join(missing[:3])}; download them too"
            )
        return [name, *shards]
    return []


def _is_loaded(name: str) -> bool:
    """Whether a file is of a kind that a model is loaded from; a log in its folder is not."""
    return Path(name).suffix.lower() in _SUFFIXES or Path(name).name in ("vocab.txt", "merges.txt")


def look(path: Path, settle: bool = False) -> tuple[int, ...]:
    """What changes whenever a file's content does."""
    stat = path.stat()
    if settle and abs(time.time() - stat.st_ctime) < _CLOCK:
        time.sleep(_CLOCK)  # a later change has another time then
        stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def files_digest(config: CollectConfig) -> str | None:
    """What names a model's files now: their sha256, or the commit of a Hub model.

    Files alike compute alike with the same libraries. None where code that comes with the model
    may compute anything else.
    """
    if config.trust_remote_code:
        return None
    source = find_source(config)
    if source.folder is None:  # the commit is enough: what the Hub has there never changes
        return None if source.commit is None else f"commit {source.commit}"
    return ModelFileSnapshot.of(source).digest()
