"""Malicious stores and names are refused in one line, and no file outside is touched."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from mpcache.config import ConvertConfig
from mpcache.errors import DamagedStoreError
from mpcache.maintenance.convert import convert
from mpcache.maintenance.copy import copy
from mpcache.maintenance.verify import verify
from mpcache.model.hookpoint_patterns import resolve_sides
from mpcache.storage.base import open_storage
from mpcache.store.reader import open_store
from mpcache.store.sealed_json import seal, unseal
from mpcache.store.store_metadata import is_store
from mpcli.mpcache import app
from tests.helpers.stores import small_config, small_store

COLLECT = ("--rows", "900", "--ctx-len", "16", "--part-rows", "192", "--chunk-rows", "32")
COLLECT += ("--validation-every", "4", "--model-dtype", "float32", "--batch-sequences", "5")
SIDE = "acts/layers.0/output"
MARK = "marks/2/layers.0/output.json"

# --- what is watched ---

WATCHED: list[str] = []
TOUCHED: list[str] = []
FOLLOWING = {"open", "os.listdir", "os.scandir", "os.chmod", "os.truncate"}
NAMING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"}


def audit(event: str, args: tuple[Any, ...]) -> None:
    if not WATCHED or event not in FOLLOWING | NAMING:
        return
    for arg in args[:2]:
        if isinstance(arg, str | os.PathLike) and os.path.isabs(path := os.fspath(arg)):
            folder = os.path.dirname(path)
            real = os.path.realpath(path) if event in FOLLOWING else os.path.realpath(folder)
            TOUCHED.extend(f"{event} {path}" for root in WATCHED if f"{real}/".startswith(root))


sys.addaudithook(audit)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder outside the store, shaped like parts of a store so that links to it fit."""
    folder = tmp_path / "elsewhere" / "outside"
    (folder / "c/0").mkdir(parents=True)
    for name in ("secret", "c/0/0", "output.json", "store.json", "zarr.json"):
        (folder / name).write_text("secret")
    before = state(folder)
    TOUCHED.clear()
    WATCHED.append(f"{os.path.realpath(folder)}/")
    yield folder
    WATCHED.clear()
    assert TOUCHED == []
    assert state(folder) == before


def state(folder: Path) -> dict[str, tuple[object, ...]]:
    files = [folder, *folder.rglob("*")]
    return {
        str(f): (f.stat().st_mtime_ns, f.stat().st_mode, f.is_file() and f.read_bytes())
        for f in files
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    small_store(folder, rows=600)
    return folder


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(original / "store", tmp_path / "store"))


def command(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def error_line(result, codes: tuple[int, ...] = (1, 2)) -> str:
    """The error line of a refused command: no traceback and no control characters."""
    assert result.exit_code in codes, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "\x1b[31m" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def all_commands(original: Path, store: Path) -> dict[str, Callable[[], Any]]:
    """Every command that reads or writes a store."""
    model = (
        original / "model",
        original / "corpus.jsonl",
        store,
        "--hookpoints",
        "layers.0,layers.1.mlp",
    )
    return {
        "info": lambda: command("info", store),
        "stats": lambda: command("stats", store),
        "verify": lambda: command("verify", store),
        "collect": lambda: command("collect", *model, *COLLECT),
        "copy": lambda: command("copy", store, store.parent / "copied"),
        "convert": lambda: command("convert", store, store.parent / "new", "--dtype", "float32"),
        "list": lambda: command("list", store.parent),
        "remove": lambda: command("remove", store, "--yes"),
    }


# --- names ---


@pytest.mark.parametrize(
    "name", ["..", "../x", "/etc", "a/b", "a\\b", "layers.\x1b[31m0", "layers..0", "a\nb", ".x"]
)
def test_hookpoints_that_leave_the_store_are_refused(
    original: Path, tmp_path: Path, name: str
) -> None:
    model = (original / "model", original / "corpus.jsonl", tmp_path / "new" / "store")
    assert "hookpoint" in error_line(
        command("collect", *model, "--hookpoints", name, *COLLECT), (2,)
    )
    into = ("convert", original / "store", tmp_path / "new" / "store", "--hookpoints", name)
    error_line(command(*into), (2,))
    assert list(tmp_path.iterdir()) == []


def test_module_names_that_leave_the_store_are_refused() -> None:
    """A star matches existing modules, which may have any name."""
    model = nn.Module()
    model.add_module("layers", nn.ModuleDict({"a": nn.Identity(), "x/y": nn.Identity()}))
    with pytest.raises(ValueError, match=r"matches the module 'layers.x/y'"):
        resolve_sides(("layers.*",), model)


@pytest.mark.parametrize("name", ["bad\x1b[31m", "bad\nname"])
def test_paths_with_control_characters_do_not_reach_the_terminal(
    original: Path, tmp_path: Path, name: str
) -> None:
    model = ("collect", original / "model", original / "corpus.jsonl", "--hookpoints", "layers.0")
    for words in (
        (*model, tmp_path / name, *COLLECT),
        (*model, "--root", tmp_path / name, *COLLECT),
        ("copy", original / "store", tmp_path / name),
        ("convert", original / "store", tmp_path / name),
    ):
        assert "must be printable" in error_line(command(*words), (2,))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "marks/00/layers.0/output.json",
        "marks/-1/layers.0/output.json",
        "marks/٣/layers.0/output.json",
        "marks/0/a/b/output.json",
        "marks/0/.hidden/output.json",
        "marks/0/\x1b[31m/output.json",
        "marks/0/layers.0/sideways.json",
        "marks/0/deep.json",
        "marks/99999999999999/layers.0/output.json",
    ],
)
def test_files_that_are_named_like_no_mark_are_none(store: Path, tmp_path: Path, name: str) -> None:
    file = store / name
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(store / MARK, file)
    assert "acts/layers.0/output" in open_store(store).arrays
    (finding,) = verify(store).findings
    assert (finding.fault, finding.path) == ("foreign", name)
    assert "\x1b" not in command("verify", store).output
    copy(store, tmp_path / "copied")
    assert not (tmp_path / "copied" / name).exists()
    assert verify(tmp_path / "copied").findings == ()


# --- content edited by hand, and sealed again ---


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = unseal(file.read_bytes(), str(file))
    change(content)
    file.write_bytes(seal(content))


def renamed(target: str) -> Callable[[dict[str, Any]], object]:
    """Let a mark name a file that is not its own."""

    def change(mark: dict[str, Any]) -> None:
        name = f"arrays.zarr/{SIDE}/c/2/0"
        mark["objects"][target] = mark["objects"].pop(name)

    return change


def put(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(values)


MARKS = {
    "outside by ..": renamed("../outside/secret"),
    "outside by root": renamed("/etc/passwd"),
    "another part's": renamed(f"arrays.zarr/{SIDE}/c/1/0"),
    "one object more": lambda m: m["objects"].update(
        more=m["objects"][f"arrays.zarr/{SIDE}/c/2/0"]
    ),
    "no objects": put(objects={}),
    "objects of another kind": put(objects=[1]),
    "size of another kind": lambda m: m["objects"][f"arrays.zarr/{SIDE}/c/2/0"].update(bytes="9"),
    "no digest": lambda m: m["objects"][f"arrays.zarr/{SIDE}/c/2/0"].pop("xxh3_128"),
    "digest that is a path": lambda m: m["objects"][f"arrays.zarr/{SIDE}/c/2/0"].update(
        xxh3_128="../" * 10 + "xx"
    ),
    "width": put(width=10**15),
    "no width": lambda m: m.pop("width"),
    "rows below": put(rows=0),
    "rows above": put(rows=193),
    "rows of another kind": put(rows=True),
    "part": put(part=1),
    "array": put(array="acts/layers.1.mlp/output"),
    "array outside": put(array="acts/../../outside"),
    "split": put(split="validation"),
    "largest": put(largest="1e999"),
    "finite rows": put(finite_rows=500),
}


@pytest.mark.parametrize("name", MARKS)
def test_a_mark_edited_and_sealed_again_is_refused(
    original: Path, store: Path, outside: Path, name: str
) -> None:
    edit(store / MARK, MARKS[name])
    with pytest.raises(DamagedStoreError, match=r"marks/2/layers\.0/output\.json"):
        open_store(store).acts.read_chunk("layers.0", "output", 2, 0)
    assert MARK in {f.path for f in verify(store).findings if f.is_damage}
    for words in (("copy", store, store.parent / "a"), ("convert", store, store.parent / "b")):
        assert MARK in error_line(
            command(*words, *["--dtype", "float32"][: 2 * (words[0] != "copy")])
        )
        assert not is_store(open_storage(words[2]))


def test_a_mark_of_other_rows_than_the_positions_is_refused(
    original: Path, store: Path, outside: Path
) -> None:
    """Otherwise old memory would be taken for the missing rows."""
    edit(store / MARK, put(rows=1, finite_rows=1))
    with pytest.raises(DamagedStoreError, match=r"part 2 .* have different numbers of rows"):
        open_store(store).parts([("layers.0", "output")], "train")


LAYOUTS = {
    "ctx_len": 0,
    "part_rows": 10**30,
    "chunk_rows": -32,
    "validation_every": "4",
    "dtype": "object",
    "codec": "pickle",
    "token_dtype": "|O8",
    "more": 1,
}


@pytest.mark.parametrize("name", [*LAYOUTS, "provenance", "identity", "fingerprint", "layout"])
def test_a_store_file_edited_and_sealed_again_is_refused(
    original: Path, store: Path, outside: Path, name: str
) -> None:
    if name in LAYOUTS:
        edit(store / "store.json", lambda c: c["layout"].update({name: LAYOUTS[name]}))
    else:
        edit(store / "store.json", put(**{name: {"..": "../outside"}}))
    for what, call in all_commands(original, store).items():
        if what == "list":
            result = call()
            assert result.exit_code == 0
            assert "is damaged" in result.stderr
        elif what == "verify":
            result = call()
            assert (result.exit_code, "DAMAGED" in result.stdout) == (1, True)
        else:
            assert "store.json is damaged" in error_line(call(), (1,))
    assert is_store(open_storage(store))


@pytest.mark.parametrize("file", [MARK, "store.json", f"arrays.zarr/{SIDE}/zarr.json"])
@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"[" * 99_999, b"\xff\xfe", b'{"a":NaN}']
)
def test_anything_at_all_in_a_json_file_is_refused(
    original: Path, store: Path, outside: Path, file: str, data: bytes
) -> None:
    (store / file).write_bytes(data)
    for what in ("copy", "convert"):
        message = error_line(all_commands(original, store)[what](), (1,))
        assert "damaged" in message
    assert command("verify", store).exit_code == 1


METADATA: dict[str, Callable[[dict[str, Any]], object]] = {
    "shape": put(shape=[10**18, 16]),
    "fewer": put(shape=[192, 16]),
    "type": put(data_type="float64"),
    "filling": put(fill_value=7),
    "keys": lambda m: m["chunk_key_encoding"]["configuration"].update(separator="."),
    "codecs": lambda m: m["codecs"][0]["configuration"].update(codecs=[]),
    "grid": lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[1, 1]),
    "transformers": put(storage_transformers=[{"name": "evil"}]),
    "attributes": put(attributes={"logical_dtype": "../outside"}),
    "more": put(url="https://example.org"),
}


@pytest.mark.parametrize("name", METADATA)
def test_array_metadata_edited_by_hand_is_refused(
    original: Path, store: Path, outside: Path, name: str
) -> None:
    file = f"arrays.zarr/{SIDE}/zarr.json"
    content = json.loads((store / file).read_bytes())
    METADATA[name](content)
    (store / file).write_text(json.dumps(content, indent=2))
    with pytest.raises(DamagedStoreError):
        open_store(store).acts.read_chunk("layers.0", "output", 2, 0)
    assert file in {f.path for f in verify(store).findings if f.is_damage}
    if name not in ("shape", "fewer"):  # which are multiples of a part, and may grow again
        assert file in error_line(all_commands(original, store)["copy"](), (1,))
    error_line(all_commands(original, store)["convert"](), (1,))


# --- links ---

LINKS = [
    "store.json",
    "arrays.zarr",
    "arrays.zarr/acts",
    "arrays.zarr/acts/layers.0/output",
    "arrays.zarr/acts/layers.0/output/c",
    "arrays.zarr/acts/layers.0/output/c/2",
    "arrays.zarr/acts/layers.0/output/c/2/0",
    "arrays.zarr/acts/layers.0/output/zarr.json",
    "arrays.zarr/norms/layers.0/output/c/2",
    "arrays.zarr/tokens/c/2/0",
    "arrays.zarr/zarr.json",
    "marks",
    "marks/2/layers.0",
    "marks/2/layers.0/output.json",
]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("dangling", [False, True])
def test_links_out_of_a_store_are_never_followed(
    original: Path, store: Path, outside: Path, name: str, dangling: bool
) -> None:
    path = store / name
    is_folder = path.is_dir()
    shutil.rmtree(path) if is_folder else path.unlink()
    target = outside / ("nothing" if dangling else "c/.." if is_folder else "secret")
    path.symlink_to(target)
    is_seen = [f for f in verify(store).findings if f.path == name or f.path.startswith(name)]
    assert is_seen or name == "marks/2/layers.0"
    results = {what: call() for what, call in all_commands(original, store).items()}
    for result in results.values():
        assert result.exception is None or isinstance(result.exception, SystemExit), result
    if name not in ("marks/2/layers.0", "arrays.zarr/zarr.json"):  # without marks, so not committed
        assert "symbolic link" in results["copy"].stderr + results["collect"].stderr
        assert not is_store(open_storage(store.parent / "copied"))
    if name != "store.json":
        assert not store.exists()
        assert results["remove"].exit_code == 0


@pytest.mark.parametrize(
    "name", ["arrays.zarr", "marks", "store.json", "store.json.incoming.partial"]
)
def test_a_target_that_holds_a_link_is_not_written_to(
    original: Path, tmp_path: Path, outside: Path, name: str
) -> None:
    """Also where half a copy exists that the command would continue."""
    for begun in (False, True):
        target = tmp_path / f"place{begun}"
        target.mkdir()
        if begun and name != "store.json.incoming.partial":
            shutil.copy(original / "store/store.json", target / "store.json.incoming.partial")
        (target / name).symlink_to(outside / ("" if "." not in name[6:] else "store.json"))
        error_line(command("copy", original / "store", target))
        error_line(command("convert", original / "store", target, "--codec", "lz4"))
        model = (original / "model", original / "corpus.jsonl", target, "--hookpoints", "layers.0")
        if not name.endswith(".partial"):  # a stale temporary file does no harm
            error_line(command("collect", *model, *COLLECT))
        assert (target / name).is_symlink()


def test_a_store_reached_by_a_link_is_the_users_choice(original: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(original / "store")
    assert verify(tmp_path / "link").findings == ()
    convert(tmp_path / "link", tmp_path / "new", ConvertConfig(codec="lz4"))
    assert verify(tmp_path / "new").findings == ()


@pytest.mark.parametrize("name", ["arrays.zarr/acts/layers.0/output/c/2/0", MARK, "store.json"])
def test_a_pipe_does_not_hang(original: Path, store: Path, name: str) -> None:
    (store / name).unlink()
    os.mkfifo(store / name)
    for what in ("copy", "convert"):
        assert "must be a regular file" in error_line(all_commands(original, store)[what](), (1,))
    assert command("verify", store).exit_code == 1


def test_unknown_fields_are_ignored(store: Path, original: Path) -> None:
    """Later writers may add fields; a reader ignores fields that it does not know."""
    edit(store / MARK, put(weather="fine"))
    assert verify(store).findings == ()
    assert small_config(original).rows == 1500
