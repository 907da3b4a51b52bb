"""Laws of a store: what it holds is what the model computes, and nothing else is ever read."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel

from mpcache.collection import store_side
from mpcache.collection.collect import collect
from mpcache.errors import DamagedStoreError
from mpcache.maintenance.repair import repair
from mpcache.maintenance.stats import stats
from mpcache.maintenance.verify import verify
from mpcache.storage import atomic_files
from mpcache.store.reader import open_store
from mpcache.store.sealed_json import canonical_json, seal, unseal
from mpcache.store.store_info import store_info
from mptrain.config.coder_version_1 import upgrade_tensor_name
from tests.helpers.golden import fitted, machine, sums
from tests.helpers.paths import PROJECT
from tests.helpers.stores import SIDES, files_of, marks_of, small_config, small_store


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that tests only read."""
    return small_store(tmp_path_factory.mktemp("made"))[0]


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "store"))


def full_values(model, tokens: np.ndarray, batch: int) -> dict[tuple[str, str], torch.Tensor]:
    """Values at the hookpoints in a full forward pass, taken by plain hooks, flat over tokens."""
    seen: dict[tuple[str, str], list[torch.Tensor]] = {side: [] for side in SIDES}
    modules = dict(model.named_modules())

    def keep(side):
        def hook(_, args, output):
            value = args[0] if side[1] == "input" else output
            seen[side].append(value[0] if isinstance(value, tuple) else value)

        return hook

    handles = [modules[h].register_forward_hook(keep((h, s))) for h, s in SIDES]
    with torch.no_grad():
        for part in np.split(tokens, range(batch, len(tokens), batch)):
            model(torch.from_numpy(part.astype(np.int64)), use_cache=False)
    for handle in handles:
        handle.remove()
    return {side: torch.cat([v.flatten(0, 1) for v in values]) for side, values in seen.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_rows_are_the_models_own(tmp_path: Path, dtype: str, codec: str) -> None:
    """Rows are found by rows/sequence and rows/position, and bit-equal after the same rounding."""
    path, _ = small_store(tmp_path, dtype=dtype, codec=codec, rows=400)
    model = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    group = zarr.open_group(path / "arrays.zarr", mode="r")
    store = open_store(path)
    for part in store.part_numbers("tokens"):
        values = full_values(model, store.tokens.read_tokens(part), batch=5)
        rows = slice(part * 192, part * 192 + store.mark(part, "tokens").rows)
        sequence = group["rows/sequence"][rows].astype(np.int64) - part * 12
        flat = torch.from_numpy(sequence * 16 + group["rows/position"][rows])
        for side in SIDES:
            stored = torch.from_numpy(group[f"acts/{side[0]}/{side[1]}"][rows])
            stored = stored.view(getattr(torch, dtype))
            assert torch.equal(stored, values[side][flat].to(stored.dtype))
            norms = torch.from_numpy(group[f"norms/{side[0]}/{side[1]}"][rows])
            torch.testing.assert_close(norms, stored.float().norm(dim=1))


def test_demo_model_rows_are_its_own(tmp_path: Path) -> None:
    """The same for the demo model, through its own dtype and the reader."""
    config = small_config(
        tmp_path,
        model=str(PROJECT / "data/model"),
        dataset=str(PROJECT / "data/corpus/validation.parquet"),
        rows=1,
        ctx_len=64,
        part_rows=512,
        model_dtype="bfloat16",
    )
    collect(config, tmp_path / "store")
    store = open_store(tmp_path / "store")
    model = AutoModel.from_pretrained(PROJECT / "data/model", dtype=torch.bfloat16)
    for part in store.part_numbers("tokens"):
        values = full_values(model, store.tokens.read_tokens(part), batch=5)
        read = store.read_part("rows/position", part)["rows/position"].astype(np.int64)
        sequence = store.read_part("rows/sequence", part)["rows/sequence"].astype(np.int64)
        flat = torch.from_numpy((sequence - part * 8) * 64 + read)
        for side in SIDES:
            stored = torch.cat([store.acts.read_chunk(*side, part, chunk) for chunk in range(16)])
            assert torch.equal(stored, values[side][flat])


def test_every_token_is_one_row_and_splits_share_no_document(original: Path) -> None:
    store = open_store(original)
    for part in store.part_numbers("tokens"):
        rows = store.mark(part, "tokens").rows
        sequence = store.read_part("rows/sequence", part)["rows/sequence"].astype(np.int64)
        position = store.read_part("rows/position", part)["rows/position"].astype(np.int64)
        flat = sequence * 16 + position
        assert sorted(flat) == list(range(part * 192, part * 192 + rows))
        assert list(flat) != sorted(flat)
    documents = {"train": [], "validation": []}
    for part in store.part_numbers("tokens"):
        progress = store.index.token_progress(part)
        ends = [progress.cursor[0], progress.next_cursor[0]]
        documents[store.mark(part, "tokens").split] += ends
    assert all(number % 4 == 1 for number in documents["validation"] if number)


def test_moments_agree_with_float64(original: Path) -> None:
    store = open_store(original)
    for side in SIDES:
        parts = [p for split in ("train", "validation") for p in store.parts([side], split)]
        read = [
            store.acts.read_chunk(*side, p.number, c)
            for p in parts
            for c in range(-(-p.rows // 32))
        ]
        rows = torch.cat(read).double()
        mean, variance = store.acts.moments(*side)
        torch.testing.assert_close(mean, rows.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance, rows.var(0, correction=0), rtol=1e-12, atol=1e-12)
        (statistics,) = [
            s.stats for s in stats(original) if (s.stats.hookpoint, s.stats.side) == side
        ]
        assert statistics.rows == len(rows)
        assert statistics.largest == rows.abs().max()
        assert statistics.norm_median == pytest.approx(float(rows.norm(dim=1).median()), rel=0.02)
        assert statistics.norm_largest == pytest.approx(float(rows.norm(dim=1).max()), rel=0.01)


def test_same_command_again_needs_no_forward_pass(tmp_path: Path) -> None:
    path, first = small_store(tmp_path)
    before = {**files_of(path), **{n: canonical_json(m) for n, m in marks_of(path).items()}}
    _, second = small_store(tmp_path)
    assert first.forward_rows == first.rows > 0
    assert second.forward_rows == 0
    assert second.rows == first.rows
    assert {**files_of(path), **{n: canonical_json(m) for n, m in marks_of(path).items()}} == before


def test_more_rows_and_more_hookpoints_equal_one_collection(tmp_path: Path) -> None:
    path, _ = small_store(tmp_path, rows=600, hookpoints=("layers.0",))
    small_store(tmp_path, rows=600, hookpoints=("layers.1.mlp",))
    assert verify(path).intact
    small_store(tmp_path)
    at_once = tmp_path / "at_once"
    collect(small_config(tmp_path), at_once)
    assert marks_of(path) == marks_of(at_once)
    grown, expected = files_of(path), files_of(at_once)
    assert {n: f for n, f in grown.items() if n != "store.json"} == {
        n: f for n, f in expected.items() if n != "store.json"
    }


def test_an_interrupted_extension_is_no_damage_and_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = small_store(tmp_path, rows=600)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_side, "commit_tokens", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small_store(tmp_path)
    assert verify(path).intact
    small_store(tmp_path)
    collect(small_config(tmp_path), tmp_path / "at_once")
    assert marks_of(path) == marks_of(tmp_path / "at_once")


def test_parts_with_deleted_marks_are_collected_again(tmp_path: Path) -> None:
    """A damaged part is repaired by deleting its mark and collecting again."""
    path, _ = small_store(tmp_path)
    before = marks_of(path)
    for part, array in ((1, "layers.0/output"), (2, "tokens"), (5, "rows/position"), (6, "tokens")):
        (path / f"marks/{part}/{array}.json").unlink()
    small_store(tmp_path)
    assert marks_of(path) == before


def test_a_finished_store_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A team's read-only store can still be named by `collect`."""
    small_store(tmp_path)

    def refused(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(atomic_files, "write_temporary_file", refused)
    assert small_store(tmp_path)[1].forward_rows == 0


def test_overflowing_channels_are_counted(tmp_path: Path) -> None:
    config = small_config(tmp_path, rows=400)
    model = AutoModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3] = float("inf")
    model.save_pretrained(tmp_path / "model")
    summary = collect(config, tmp_path / "store")
    assert summary.nonfinite == summary.rows
    (statistics,) = [s.stats for s in stats(tmp_path / "store") if s.stats.nonfinite]
    assert (statistics.norm_median, statistics.variance) == (None, 0)
    assert verify(tmp_path / "store").intact


def test_a_store_of_an_exhausted_dataset_stays_short(tmp_path: Path) -> None:
    path, summary = small_store(tmp_path, rows=1_000_000)
    store = open_store(path)
    lasts = [store.mark(p, "tokens") for p in store.part_numbers("tokens")]
    assert [m.split for m in lasts if m.progress.last] == ["validation", "train"] or [
        m.split for m in lasts if m.progress.last
    ] == ["train", "validation"]
    assert summary.rows == sum(m.rows for m in lasts) < 192 * len(lasts)
    assert summary.exhausted
    _, again = small_store(tmp_path, rows=2_000_000)
    assert again.forward_rows == 0
    assert verify(path).intact


def test_zeros_are_stored_and_a_missing_object_is_not_read_as_zeros(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    model = AutoModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight.zero_()
        model.layers[0].self_attn.o_proj.weight.zero_()
        model.embed_tokens.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    collect(config, tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert not store.acts.read_chunk("layers.0", "output", 0, 0).any()
    (tmp_path / "store/arrays.zarr/acts/layers.0/output/c/0/0").unlink()
    with pytest.raises(DamagedStoreError, match="missing"):
        open_store(tmp_path / "store").acts.read_chunk("layers.0", "output", 0, 0)


def test_a_fresh_store_is_intact(original: Path) -> None:
    verdict = verify(original)
    assert verdict.intact
    assert not verdict.findings
    assert {(h["hookpoint"], h["side"]) for h in store_info(original)["hookpoints"]} == set(SIDES)


@pytest.mark.slow
def test_any_flipped_byte_fails_verify_by_name(tmp_path: Path) -> None:
    """Every file, metadata and marks included; one random byte of each, one of three bits.

    Two parts of a split and one of the other have every kind of file.
    """
    store, _ = small_store(tmp_path, rows=3 * 192)
    draw = random.Random(0)
    for file in sorted(f for f in store.rglob("*") if f.is_file()):
        data = file.read_bytes()
        offset, bit = draw.randrange(len(data)), draw.choice((1, 16, 128))
        file.write_bytes(data[:offset] + bytes([data[offset] ^ bit]) + data[offset + 1 :])
        name = file.relative_to(store).as_posix()
        try:
            named = [f.path for f in verify(store).findings if f.is_damage]
        except ValueError as error:
            named = [name] if name in str(error) else []  # the format version was hit
        assert name in named, (name, offset)
        file.write_bytes(data)
    assert verify(store).intact


@pytest.mark.parametrize("harm", ["unlink", "truncate", "append"])
def test_missing_and_resized_objects_are_distinguished(store: Path, harm: str) -> None:
    file = store / "arrays.zarr/acts/layers.0/output/c/2/0"
    data = file.read_bytes()
    file.unlink()
    if harm != "unlink":
        file.write_bytes(data[:-3] if harm == "truncate" else data + b"x")
    (finding,) = [f for f in verify(store).findings if f.is_damage]
    assert finding.path == file.relative_to(store).as_posix()
    assert (
        finding.fault == {"unlink": "missing", "truncate": "truncated", "append": "overlong"}[harm]
    )


def test_strays_are_reported_and_harmless(store: Path) -> None:
    (store / "marks/0/layers.0/output.json").unlink()
    (store / "notes.txt").write_text("mine")
    (store / "arrays.zarr/tokens/c/0/0.ab12.partial").write_bytes(b"rest")
    verdict = verify(store)
    assert verdict.intact
    assert {(f.fault, f.path.split("/")[-1]) for f in verdict.findings} >= {
        ("foreign", "notes.txt"),
        ("leftover", "0.ab12.partial"),
    }
    assert sum(f.fault == "uncommitted" for f in verdict.findings) == 3


def test_an_unmarked_part_is_not_read(store: Path) -> None:
    side = ("layers.0", "output")
    parts = [p.number for p in open_store(store).parts([side], "train")]
    (store / "marks/0/layers.0/output.json").unlink()
    assert [p.number for p in open_store(store).parts([side], "train")] == parts[1:]


def test_unknown_format_version_is_refused_by_name(store: Path) -> None:
    content = unseal((store / "store.json").read_bytes(), "store")
    (store / "store.json").write_bytes(seal({**content, "format_version": 9}))
    with pytest.raises(
        ValueError, match="version 9, but this version of mpcache reads only 1 and 2"
    ):
        open_store(store)


@pytest.mark.parametrize("version", [1, 2])
def test_a_golden_store_always_reads_the_same(version: int) -> None:
    """The store was made once by `python -m tests.helpers.golden`, kept in the repository."""
    golden = PROJECT / f"tests/golden/store-v{version}"
    expected = json.loads((PROJECT / f"tests/golden/store-v{version}.json").read_bytes())
    store = open_store(golden)
    assert store.layout.format_version == version
    assert verify(golden).intact
    assert sums(store) == expected
    assert store.has_assistant == store.has_lone_documents == (version == 2)


def test_a_fit_on_the_golden_store_of_version_1_gives_the_same_bits(tmp_path: Path) -> None:
    """On the processor model that trained the weights; on other processors, close weights."""
    file = PROJECT / "tests/golden/fit-v1.safetensors"
    expected = {upgraded(name): weights for name, weights in load_file(file).items()}
    actual = fitted(PROJECT / "tests/golden/store-v1", tmp_path / "run")
    with safe_open(file, "pt") as about:
        processor = about.metadata()
    assert actual.keys() == expected.keys()
    for name, weights in actual.items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-3, atol=1e-4)
        assert processor != machine() or torch.equal(weights, expected[name]), name


def test_an_older_store_of_a_text_file_names_the_options_too(tmp_path: Path) -> None:
    """The digest of a single .txt depends on the options, so it is not named as a difference."""
    text = tmp_path / "corpus.txt"
    text.write_text("\n\n".join(f"document {i} " + "x" * (i % 40) for i in range(80)))
    old = {"keep_empty_documents": True, "parse_special_tokens": True, "dataset": str(text)}
    path, _ = small_store(tmp_path, rows=300, **old)
    with pytest.raises(
        ValueError, match="add --parse-special-tokens --keep-empty-documents to continue"
    ) as caught:
        collect(small_config(tmp_path, dataset=str(text)), path)
    assert "dataset_digest" not in str(caught.value)
    text.write_text("another\n\n" * 80)
    with pytest.raises(ValueError, match="dataset_digest"):
        collect(small_config(tmp_path, rows=300, **old), path)


def test_an_older_store_names_the_options_that_continue_it(tmp_path: Path) -> None:
    old = {"keep_empty_documents": True, "parse_special_tokens": True}
    path, _ = small_store(tmp_path, rows=300, **old)
    content = unseal((path / "store.json").read_bytes(), "store")
    for name in old:  # an old config has neither option
        del content["config"][name]
    (path / "store.json").write_bytes(seal(content))
    with pytest.raises(
        ValueError,
        match="add --parse-special-tokens --keep-empty-documents to continue the store, or",
    ):
        collect(small_config(tmp_path), path)
    assert collect(small_config(tmp_path, rows=600, **old), path).empty_documents is None
    (path / "arrays.zarr/tokens/c/0/0").unlink()
    assert repair(path).intact


def upgraded(name: str) -> str:
    """The name of a coder and its tensor, as coder files of version 2 have it."""
    coder, _, tensor = name.partition("/")
    return f"{coder}/{upgrade_tensor_name(tensor)}"
