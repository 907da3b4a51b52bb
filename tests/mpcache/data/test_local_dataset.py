"""Rows depend on the bytes of the files and on the config alone, for data in common forms."""

import gzip
import io
import json
import os
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcache.config import CollectConfig
from mpcache.data import digested_file, hub_dataset, local_dataset
from mpcache.data.conversation import Conversation
from mpcache.data.dataset import open_documents
from mpcache.data.dataset_files import find_dataset_files
from mpcache.data.documents import Documents
from mpcache.data.hub_dataset import HubDataset
from mpcache.data.vocabulary import ConfigTokens, Vocabulary, vocabulary_of
from tests.helpers.models import tiny_tokenizer

VOCABULARY = vocabulary_of(tiny_tokenizer(), 260)
TEXTS = [f"document {i} é\n" + "x" * (i % 5) for i in range(150)]


def open_(dataset, vocabulary: Vocabulary = VOCABULARY, **changes) -> Documents:
    config = CollectConfig(model="m", dataset=str(dataset), hookpoints=("a",), **changes)
    return open_documents(config, vocabulary)


def values(documents: Documents) -> list:
    plain = [document for _, document in documents.read()]
    return [d.tolist() if isinstance(d, np.ndarray) else d for d in plain]


def jsonl(values, column="text") -> bytes:
    return b"".join(json.dumps({column: value}).encode() + b"\n" for value in values)


def parquet(values, column="text") -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({column: values}), sink, row_group_size=7)
    return sink.getvalue()


def arrow(values, column="text") -> bytes:
    sink, table = io.BytesIO(), pa.table({column: values})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue()


def arrow_file(values, column="text") -> bytes:
    sink, table = io.BytesIO(), pa.table({column: values})
    with pa.ipc.new_file(
        sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
    ) as w:
        w.write_table(table, max_chunksize=7)
    return sink.getvalue()


def json_array(values, column="text") -> bytes:
    return json.dumps([{column: value} for value in values]).encode()


def csv(values, column="text") -> bytes:
    quoted = ['"' + value.replace('"', '""') + '"' for value in values]
    return "\r\n".join([column, *quoted]).encode()


FORMS = {
    ".jsonl": jsonl,
    ".json": json_array,
    ".csv": csv,
    ".parquet": parquet,
    ".arrow": arrow,
}
SQUEEZED = {
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}

# --- the bytes that are digested are the bytes that are read ---


def write_at(path: Path, data: bytes, seconds: int = 1_000_000_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (seconds, seconds))
    return path


@pytest.mark.parametrize("suffix", FORMS)
def test_a_file_replaced_with_the_same_time_is_another(tmp_path, suffix):
    texts, others = ["a one", "b two", "c six"], ["d one", "e two", "f six"]
    first = open_(write_at(tmp_path / f"x{suffix}", FORMS[suffix](texts)))
    second = open_(write_at(tmp_path / f"x{suffix}", FORMS[suffix](others)))
    assert sorted(values(second)) == others
    assert first.digest != second.digest
    assert sorted(values(first)) == texts  # still the digested texts


# texts that all forms can hold: any text without half a surrogate pair
texts_ = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20)


@settings(max_examples=25)
@given(texts=texts_, seconds=st.integers(0, 2**31), name=st.sampled_from(["a", "b-10", "c/d"]))
def test_rows_depend_on_content_alone(texts, seconds, name):
    """Path, time, file format and compression do not change the rows."""
    with tempfile.TemporaryDirectory() as folder:
        directory, seen, digests = Path(folder), [], set()
        for suffix, write in FORMS.items():
            if suffix == ".csv" and any("\r" in text for text in texts):
                continue  # pyarrow's and Python's readers keep it; a hand-made one is no reference
            data = write(texts)
            plain = open_(write_at(directory / f"{name}{suffix}", data, seconds))
            elsewhere = open_(write_at(directory / "other" / f"x{suffix}", data))
            assert plain.digest == elsewhere.digest
            seen += [values(plain), values(elsewhere)]
            digests.add(plain.digest)
            for ending, squeeze in SQUEEZED.items():
                path = write_at(directory / f"{name}{suffix}{ending}", squeeze(data), seconds)
                seen.append(values(squeezed := open_(path)))
                assert squeezed.digest != plain.digest
        assert all(texts_read == seen[0] for texts_read in seen)
        assert sorted(seen[0]) == sorted(texts)


def test_no_cache_is_asked_and_none_is_left(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    documents = open_(write_at(tmp_path / "a.parquet", parquet(TEXTS)))
    assert sorted(values(documents)) == sorted(TEXTS)
    assert not cache.exists()
    assert not list((tmp_path / "t").iterdir())


def changing(monkeypatch, change):
    """Call `change` after the digest and before the file is read."""
    plain = digested_file.DataFile._digest

    def digest(self):
        digest_before = plain(self)
        monkeypatch.setattr(digested_file.DataFile, "_digest", plain)
        change(self.path)
        return digest_before

    monkeypatch.setattr(digested_file.DataFile, "_digest", digest)


@pytest.mark.parametrize("suffix", [*FORMS, ".txt", ".bin"])
def test_a_file_put_in_its_place_meanwhile_is_not_read(tmp_path, suffix, monkeypatch):
    write = FORMS.get(suffix, lambda texts: "".join(texts).encode())
    if suffix == ".bin":
        write = lambda texts: np.array([*map(ord, texts[0]), 257], "<u2").tobytes()  # noqa: E731
    path = write_at(tmp_path / f"x{suffix}", write(["abc"]))
    want = values(open_(path)), open_(path).digest
    other = write_at(tmp_path / f"y{suffix}", write(["def"]))
    changing(monkeypatch, lambda path: other.replace(path))
    documents = open_(path)
    assert (values(documents), documents.digest) == want


@pytest.mark.parametrize("suffix", [*FORMS, ".txt", ".jsonl.gz"])
def test_a_file_changed_in_place_meanwhile_is_refused(tmp_path, suffix, monkeypatch):
    write = FORMS.get(suffix, lambda texts: "".join(texts).encode())
    if suffix == ".jsonl.gz":
        write = lambda texts: gzip.compress(jsonl(texts), 0, mtime=0)  # noqa: E731
    path = write_at(tmp_path / f"x{suffix}", write(["abc"]))
    changing(monkeypatch, lambda path: write_at(path, write(["def"])))
    with pytest.raises(ValueError, match=r"x\S* changed while mpcache read it"):
        open_(path)


def test_a_bin_changed_in_place_later_is_refused(tmp_path):
    path = write_at(tmp_path / "x.bin", np.array([1, 257], "<u2").tobytes())
    documents = open_(path)
    write_at(path, np.array([2, 257], "<u2").tobytes(), 5)
    with pytest.raises(ValueError, match=r"x\.bin changed while mpcache read it"):
        values(documents)


def test_a_touched_or_renamed_bin_is_no_other(tmp_path):
    path = write_at(tmp_path / "x.bin", np.array([1, 257], "<u2").tobytes())
    documents = open_(path)
    os.utime(path, (7, 7))
    path.rename(tmp_path / "y.bin")
    assert values(documents) == [[1]]


# --- digests that stores have ---


def test_digests_are_those_that_stores_have(tmp_path):
    """Digests that an earlier version computed. They must never change."""
    import hashlib

    older = {"parse_special_tokens": True, "keep_empty_documents": True}
    for name, data, changes in (
        ("a.jsonl", jsonl(TEXTS), {}),
        ("a.parquet", parquet(TEXTS), {}),
        ("a.txt", b"a", older),
    ):
        path = write_at(tmp_path / name, data)
        assert open_(path, **changes).digest == hashlib.sha256(data).hexdigest()
    for name in ("t/10.txt", "t/9.txt", "t/deep/1.txt"):
        write_at(tmp_path / name, name.encode())
    content = hashlib.sha256()
    for name in ("10.txt", "9.txt", "deep/1.txt"):
        own = hashlib.sha256(f"t/{name}".encode()).hexdigest()
        content.update(f"{name}\0{own}\0".encode())
    assert open_(tmp_path / "t").digest == content.hexdigest()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "s", num_shards=2)
    content = hashlib.sha256()
    for name in ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow"):
        own = hashlib.sha256((tmp_path / "s" / name).read_bytes()).hexdigest()
        content.update(f"{name}\0{own}\0".encode())
    assert open_(tmp_path / "s").digest == content.hexdigest()


def test_the_same_bytes_read_differently_are_another_dataset(tmp_path):
    data = jsonl(["a"])
    digests = {open_(write_at(tmp_path / f"x{end}", data)).digest for end in (".jsonl", ".txt")}
    assert len(digests) == 2


def test_order_of_texts_in_a_folder_is_that_of_stores(tmp_path):
    for name in ("9", "10", "a"):
        write_at(tmp_path / "t" / f"{name}.txt", name.encode())
    config = CollectConfig(model="m", dataset=str(tmp_path / "t"), hookpoints=("a",))
    assert [path.stem for path in find_dataset_files(config).paths] == ["10", "9", "a"]


def test_no_text_of_a_folder_is_left_out(tmp_path):
    for name in ("t/a.txt", "t/b.TXT", "t/9.txt", "t/.h.txt", "other/c.txt", "other/deep/d.Txt"):
        write_at(tmp_path / name, name.encode())
    (tmp_path / "t" / "sub").symlink_to("../other")
    (tmp_path / "t" / "again").symlink_to(".")
    config = CollectConfig(model="m", dataset=str(tmp_path / "t"), hookpoints=("a",))
    there = [
        path.relative_to(tmp_path / "t").as_posix() for path in find_dataset_files(config).paths
    ]
    assert there == [".h.txt", "9.txt", "a.txt", "b.TXT", "sub/c.txt", "sub/deep/d.Txt"]
    write_at(tmp_path / "lone" / "b.TXT", b"b")
    assert values(open_(tmp_path / "lone")) == ["b"]


# --- folders, globs, lists ---


@pytest.mark.parametrize("suffix", [*FORMS, ".jsonl.gz", ".parquet.zst", ".csv.zst"])
def test_shards_are_one_dataset_in_natural_order(tmp_path, suffix):
    write = FORMS["." + suffix.split(".")[1]]
    squeeze = SQUEEZED.get(Path(suffix).suffix, bytes)
    names = [f"part-{i}" for i in (1, 2, 10, 11)]
    for i in np.random.default_rng(0).permutation(4):  # the order on disk
        write_at(tmp_path / "d" / "data" / f"{names[i]}{suffix}", squeeze(write(TEXTS[i::4])))
    for other in ("README.md", ".gitattributes", "dataset_info.json", "LICENSE.txt", ".x.jsonl"):
        write_at(tmp_path / "d" / other, b"?")
    in_order = [text for i in range(4) for text in TEXTS[i::4]]
    single_file = open_(write_at(tmp_path / "whole.jsonl", jsonl(in_order)))
    folder, parts = open_(tmp_path / "d"), open_(tmp_path / "d" / "data" / f"*-*{suffix}")
    listed = ",".join(str(tmp_path / "d" / "data" / f"{name}{suffix}") for name in names)
    assert values(folder) == values(parts) == values(open_(listed)) == values(single_file)
    assert folder.digest == parts.digest == open_(listed).digest
    swapped = ",".join(reversed(listed.split(",")))
    assert open_(swapped).digest != folder.digest
    assert sorted(values(open_(swapped))) == sorted(TEXTS)


def test_names_of_shards_give_their_order_and_nothing_else(tmp_path):
    digests = set()
    for folder, names in (("a", ("x1", "x2")), ("b", ("b/part", "c/part")), ("c", ("2", "1"))):
        for name, texts in zip(names, (TEXTS[:9], TEXTS[9:]), strict=True):
            write_at(tmp_path / folder / f"{name}.jsonl", jsonl(texts))
        digests.add((open_(tmp_path / folder).digest, tuple(values(open_(tmp_path / folder)))))
    assert len(digests) == 2  # the third folder has them in the other order


def test_a_folder_of_texts_has_a_document_a_file(tmp_path):
    for i in range(12):
        write_at(tmp_path / "t" / f"{i}.txt.gz", gzip.compress(f"text {i}\n\nmore".encode()))
    assert sorted(values(open_(tmp_path / "t"))) == sorted(f"text {i}\n\nmore" for i in range(12))
    assert len(values(open_(tmp_path / "t" / "1*.txt.gz"))) == 3
    assert sorted(values(open_(tmp_path / "t" / "3.txt.gz"))) == ["more", "text 3"]


def test_several_token_files(tmp_path):
    for i in range(3):
        write_at(tmp_path / f"{i}.bin", np.array([i, 257, i, i], "<u2").tobytes())
    got = values(open_(tmp_path / "*.bin"))
    assert sorted(got) == [[0], [0, 0], [1], [1, 1], [2], [2, 2]]


def test_splits_of_a_download(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_at(tmp_path / "d" / "data" / f"{name}.parquet", parquet([name]))
    assert len(values(open_(tmp_path / "d"))) == 2
    assert values(open_(tmp_path / "d", split="test")) == ["test-00000-of-00001"]
    with pytest.raises(ValueError, match="split must be one of test, train in d, got validation"):
        open_(tmp_path / "d", split="validation")
    first = tmp_path / "d" / "data" / "train-00000-of-00002.parquet"
    first.rename(
        first.with_name("train-00002-of-00002.parquet")
    )  # some data sets number shards from 1
    assert len(values(open_(tmp_path / "d"))) == 2
    first.with_name("train-00002-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"2 shards, got 1: train-00000-of-00002 is missing"):
        open_(tmp_path / "d")


@pytest.mark.parametrize("suffix", [".bin", ".bin.zst", ".txt.gz"])
def test_the_split_is_read_from_names_of_files(tmp_path, suffix):
    squeeze = SQUEEZED.get(Path(suffix).suffix, bytes)
    for i, split in enumerate(("train", "val")):
        data = np.array([65 + i, 257], "<u2").tobytes() if "bin" in suffix else b"AB"[i : i + 1]
        write_at(tmp_path / "d" / f"{split}{suffix}", squeeze(data))
    both = [values(open_(tmp_path / "d", split=split)) for split in ("train", "validation")]
    assert both == ([[[65]], [[66]]] if "bin" in suffix else [["A"], ["B"]])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.jsonl", "b.parquet"), r"one kind, got \.jsonl and \.parquet in d; .* d/\*\.jsonl"),
        (("a.jsonl", "b.json"), r"one kind, got \.jsonl and \.json in d"),
        (("a.jsonl", "a.jsonl.gz"), r"each file once, got both a\.jsonl\.gz and a\.jsonl"),
        (("a.jsonl", "b.jsonl.bz2"), r"b\.jsonl\.bz2 in the dataset's folder does not end in"),
        (
            ("train.jsonl", "more.jsonl"),
            r"got train\.jsonl \(with a split\) and more\.jsonl \(without\)",
        ),
        (("x/train.jsonl", "y/train.jsonl"), r"several datasets with train files, in x, y; give"),
        (
            ("en/train/0.jsonl", "de/train/0.jsonl"),
            r"several datasets with train files, in de, en; give one",
        ),
        (
            ("a/en/train/x/0.bin", "a/de/train-0.bin"),
            r"several datasets with train files, in a/de, a/en; give",
        ),
        (
            ("train.bin", "more.bin"),
            r"got train\.bin \(with a split\) and more\.bin \(without\)",
        ),
        (("a-00001-of-00002.bin",), r"2 shards, got 1: a-00000-of-00002 is missing"),
        (("a-00002-of-00003.jsonl", "a-00003-of-00003.jsonl"), "a-00001-of-00003 is missing"),
        (("val.txt.gz",), "split must be one of validation in d, got train"),
        (("README.md",), "must hold files that end in .*, got d with neither"),
    ],
)
def test_ambiguous_paths_are_refused(tmp_path, names, message):
    for name in names:
        write_at(tmp_path / "d" / name, jsonl(["a"]))
    with pytest.raises(ValueError, match=message) as error:
        open_(tmp_path / "d")
    assert "\n" not in str(error.value)


def test_a_list_may_be_longer_than_a_path(tmp_path):
    files = [write_at(tmp_path / f"{i:050}.jsonl", jsonl([str(i)])) for i in range(90)]
    assert len(values(open_(",".join(map(str, files))))) == 90


def test_paths_that_are_not_there_are_named(tmp_path):
    write_at(tmp_path / "a.jsonl", jsonl(["a"]))
    for dataset, message in (
        (f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", r"dataset \S+b\.jsonl does not exist"),
        (f"{tmp_path}/*.csv", r"got \S+/\*\.csv, which matches none"),
        (f"{tmp_path}/a.jsonl,{tmp_path}/*.jsonl", r"each file once, got \S+a\.jsonl twice"),
        (f"{tmp_path}/b.jsonl.zst", r"dataset \S+b\.jsonl\.zst does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            open_(dataset)


# --- columns ---

IDS = [[1, 2, 3], [], [4], [5, 259], None, [6, 7]]
FIXED = pa.FixedSizeListArray.from_arrays(pa.array(range(12), pa.int32()), 3)


@pytest.mark.parametrize("write", [jsonl, json_array, parquet, arrow, arrow_file])
def test_token_ids_are_documents(tmp_path, write):
    path = write_at(tmp_path / f"a{suffix_of(write)}", write(IDS, "input_ids"))
    documents = open_(path, text_column="input_ids")
    assert documents.kind == "tokens"
    assert sorted(values(documents)) == sorted(ids or [] for ids in IDS)


def suffix_of(write) -> str:
    names = {function: suffix for suffix, function in FORMS.items()}
    return names.get(write, ".arrow")


@pytest.mark.parametrize("kind", [pa.uint16(), pa.int64(), pa.int32()])
def test_lists_of_fixed_and_large_length(tmp_path, kind):
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(range(12), kind), 3)
    large = pa.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]], pa.large_list(kind))
    for number, column in enumerate((fixed, large, fixed.slice(1), large.slice(1))):
        path = write_at(tmp_path / f"{number}.arrow", arrow(column))
        want = [[i, i + 1, i + 2] for i in range(0, 12, 3)][number // 2 :]
        assert sorted(values(open_(path))) == want


@settings(max_examples=30)
@given(st.lists(st.lists(st.tuples(st.integers(0, 259), st.booleans()), max_size=6), min_size=1))
def test_masked_tokens_are_left_out(rows):
    ids = [[i for i, _ in row] for row in rows]
    masks = [[int(kept) for _, kept in row] for row in rows]
    want = sorted([i for i, kept in row if kept] for row in rows)
    table = pa.table(
        {"meta": [{"ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]},
        pa.schema(
            {"meta": pa.struct({k: pa.list_(pa.int64()) for k in ("ids", "attention_mask")})}
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, Path(folder) / "a.parquet")
        lines = [json.dumps(row) + "\n" for row in table.to_pylist()]
        (Path(folder) / "a.jsonl").write_text("".join(lines))
        for name in ("a.parquet", "a.jsonl"):
            documents = open_(Path(folder) / name, text_column="meta.ids")
            assert sorted(d if isinstance(d, list) else [] for d in values(documents)) == want


def test_a_mask_must_fit(tmp_path):
    table = pa.table({"text": [[1, 2], [3]], "attention_mask": [[1, 0], [1, 1]]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"row 1 of a\.parquet .* as many values as there are tokens, 1, got 2"
    ):
        open_(tmp_path / "a.parquet")


@pytest.mark.parametrize("write", [jsonl, json_array, parquet, arrow, arrow_file])
def test_fields_of_a_struct_to_any_depth(tmp_path, write):
    rows = [{"deep": {"text": text, "n": 1}} for text in TEXTS] + [None, {"deep": None}]
    path = write_at(tmp_path / f"a{suffix_of(write)}", write(rows, "meta"))
    documents = open_(path, text_column="meta.deep.text")
    assert sorted(values(documents)) == sorted([*TEXTS, "", ""])
    with pytest.raises(ValueError, match=r"got meta\.text; use one of meta\.deep\.text, meta\.dee"):
        open_(path, text_column="meta.text")


def test_a_column_with_a_point_in_its_name(tmp_path):
    table = pa.table({"meta.text": ["a"], "meta": [{"text": "b"}]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(table.to_pylist()[0]))
    for name in ("a.parquet", "a.jsonl"):
        assert values(open_(tmp_path / name, text_column="meta.text")) == ["a"]


CHATS = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "c", "name": "n"}],
    [],
    None,
]


@pytest.mark.parametrize("write", [jsonl, json_array, parquet, arrow, arrow_file])
def test_chats_are_conversations(tmp_path, write):
    path = write_at(tmp_path / f"a{suffix_of(write)}", write(CHATS, "messages"))
    documents = open_(path, text_column="messages")
    assert documents.kind == "conversations"
    got = sorted(values(documents), key=repr)
    assert got == sorted((Conversation(tuple(chat or ())) for chat in CHATS), key=repr)


def test_chats_of_sharegpt(tmp_path):
    chat = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]
    chat += [{"from": "gpt", "value": "b"}, {"from": "tool", "value": "c"}]
    path = write_at(tmp_path / "a.jsonl", jsonl([chat], "conversations"))
    (conversation,) = values(open_(path, text_column="conversations"))
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "tool"]
    assert [message["content"] for message in conversation.messages] == list("sabc")


def test_parts_of_text_are_joined_and_calls_have_no_text(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
    path = write_at(tmp_path / "a.jsonl", jsonl([[{"role": "user", "content": parts}, call]]))
    (conversation,) = values(open_(path))
    assert [message["content"] for message in conversation.messages] == ["ab", ""]
    assert conversation.messages[1]["tool_calls"] == [{"id": 1}]


def test_half_a_surrogate_pair_in_a_message_is_refused(tmp_path):
    path = write_at(tmp_path / "a.jsonl", jsonl([[{"role": "user", "content": "\ud800"}]]))
    with pytest.raises(ValueError, match=r"line 1 of a\.jsonl must hold valid Unicode text"):
        open_(path)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user"}, "message 2 in line 1 of a.jsonl must have a text in the field content"),
        ({"content": "a"}, "message 2 in line 1 of a.jsonl must have a text in the field role"),
        ({"role": 1, "content": "a"}, "must have a text in the field role, got 1"),
        ({"from": "gpt", "value": 3}, "must have a text in the field value, got int"),
        ({"role": "user", "content": [{"type": "image"}]}, "got parts of type image"),
        (
            "hello",
            "message 2 in line 1 of a.jsonl must be an object with role and content, got str",
        ),
    ],
)
def test_malformed_messages_are_refused(tmp_path, message, problem):
    path = write_at(tmp_path / "a.jsonl", jsonl([[{"role": "user", "content": "a"}, message]]))
    with pytest.raises(ValueError, match=problem):
        open_(path)


def test_files_of_another_kind_are_refused(tmp_path):
    write_at(tmp_path / "d" / "1.parquet", parquet(["a"]))
    write_at(tmp_path / "d" / "2.parquet", parquet([[1]]))
    with pytest.raises(
        ValueError, match=r"got tokens in d/2\.parquet, but text in the files before it"
    ):
        open_(tmp_path / "d")


@pytest.mark.parametrize("mask", [None, "ab", [1.0, 1.0], [1, None], 1, [1]])
@pytest.mark.parametrize("write", [jsonl, json_array, parquet, arrow, "hub"])
def test_a_missing_mask_is_refused(tmp_path, write, mask):
    """One rule for all kinds of tables; rows without ids need no mask."""
    rows = [{"text": [], "attention_mask": None}, {"text": [1, 2], "attention_mask": mask}]
    with pytest.raises(ValueError, match=r"attention_mask in (row|line|a\.)") as caught:
        read_rows(rows, write, tmp_path)
    assert "\n" not in str(caught.value)


def read_rows(rows, write, folder):
    if write == "hub":
        list(hub_rows(rows, "text").order(0))
    elif write in (parquet, arrow):
        path = folder / f"a.{write.__name__}"
        (pq.write_table if write is parquet else write_stream)(pa.Table.from_pylist(rows), path)
        open_(path)
    else:
        text = json.dumps(rows) if write is json_array else "\n".join(map(json.dumps, rows))
        open_(write_at(folder / "a.json", text.encode()))


def write_stream(table, path):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def test_all_rows_have_a_mask_or_none(tmp_path):
    rows = [{"text": [1, 2], "attention_mask": [1, 0]}, {"text": [3]}]
    for order, message in ((rows, "has no attention_mask"), (rows[::-1], "has an attention_mask")):
        path = write_at(tmp_path / "a.jsonl", "\n".join(map(json.dumps, order)).encode())
        with pytest.raises(ValueError, match=f"line 2 of a.jsonl {message}"):
            open_(path)
    twice = b'{"text": [1], "attention_mask": [0], "attention_mask": [1]}\n'
    with pytest.raises(ValueError, match=r"line 1 of a\.jsonl has the field attention_mask twice"):
        open_(write_at(tmp_path / "a.jsonl", twice))
    twice = b'{"text": "a", "attention_mask": [0], "attention_mask": [1]}\n'
    assert values(open_(write_at(tmp_path / "a.jsonl", twice))) == ["a"]


@pytest.mark.parametrize("write", [jsonl, parquet, arrow_file])
@pytest.mark.parametrize("rows", [[None, None], [[], []], [None, []], ["", ""]])
def test_a_dataset_without_any_token_is_refused(tmp_path, write, rows):
    path = write_at(tmp_path / f"a{suffix_of(write)}", write(rows))
    without = vocabulary_of(ConfigTokens(vocab_size=9, eos_token_id=2), 9)
    with pytest.raises(ValueError, match=r"got 2 empty documents in a\.|has no tokenizer"):
        open_(path, without)


def test_suffixes_in_upper_case(tmp_path):
    for suffix, write in FORMS.items():
        assert sorted(values(open_(write_at(tmp_path / f"a{suffix.upper()}", write(["x"]))))) == [
            "x"
        ]
    pretty = write_at(tmp_path / "b.JSON", json.dumps({"text": "a"}, indent=1).encode())
    with pytest.raises(
        ValueError, match=r"line 1 of b\.JSON .* one object a line, or in a \.json an"
    ):
        open_(pretty)


def test_more_token_files_than_may_be_open(tmp_path, monkeypatch):
    for i in range(5):
        write_at(tmp_path / "d" / f"{i}.bin", np.array([i, 257], "<u2").tobytes())
    monkeypatch.setattr(local_dataset.resource, "getrlimit", lambda _: (130, 130))
    with pytest.raises(ValueError, match=r"d has 5 \.bin files, .* with ulimit -n 133, or join"):
        open_(tmp_path / "d")
    assert len(values(open_(tmp_path / "d" / "[01].bin"))) == 2


# --- without a tokenizer ---


def test_a_model_without_tokenizer_reads_token_ids(tmp_path):
    vocabulary = vocabulary_of(ConfigTokens(vocab_size=70_000, eos_token_id=2), 70_000)
    path = write_at(tmp_path / "a.bin", np.array([69_999, 2, 3], "<u4").tobytes())
    assert sorted(values(open_(path, vocabulary))) == [[3], [69_999]]
    path = write_at(tmp_path / "a.jsonl", jsonl([[69_999]]))
    assert values(open_(path, vocabulary)) == [[69_999]]
    write_at(path, jsonl([[70_000]]))
    with pytest.raises(ValueError, match=r"line 1 of a\.jsonl .* from 0 to 69999 .* got 70000"):
        open_(path, vocabulary)
    for value, kind in (("a", "text"), ([{"role": "user", "content": "a"}], "conversations")):
        write_at(path, jsonl([value]))
        with pytest.raises(ValueError, match=f"holds {kind}, but the model m has no tokenizer"):
            open_(path, vocabulary)


# --- Hub ---


def hub_rows(rows, column, *, streaming=False) -> HubDataset:
    table = datasets.Dataset.from_list(rows)
    config = CollectConfig(model="m", dataset="id", hookpoints=("a",), text_column=column)
    return HubDataset(table.to_iterable_dataset() if streaming else table, config, VOCABULARY)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_the_hub_are_of_any_kind(streaming):
    masks = {"ids": [1, 2], "attention_mask": [0, 1]}, {"ids": [3], "attention_mask": [1]}
    documents = hub_rows([{"x": row} for row in masks], "x.ids", streaming=streaming)
    assert documents.kind == "tokens"
    assert sorted(d.tolist() for d in documents.order(0)) == [[2], [3]]
    documents = hub_rows([{"x": {"ids": [1, 2]}}], "x.ids", streaming=streaming)
    assert [d.tolist() for d in documents.order(0)] == [[1, 2]]
    documents = hub_rows([{"m": chat} for chat in CHATS[:2]], "m", streaming=streaming)
    got = sorted(documents.order(0), key=repr)
    assert got == sorted((Conversation(tuple(chat)) for chat in CHATS[:2]), key=repr)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_is_not_asked_for_is_not_decoded(streaming):
    images = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "image": [{"bytes": b"no image", "path": None}] * 2},
        features=datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()}),
    )
    config = CollectConfig(model="m", dataset="id", hookpoints=("a",))
    rows = HubDataset(images.to_iterable_dataset() if streaming else images, config, VOCABULARY)
    assert sorted(rows.order(0)) == ["a", "b"]
    with pytest.raises(ValueError, match="got body; use one of text, image"):
        HubDataset(images, CollectConfig(**{**vars(config), "text_column": "body"}), VOCABULARY)


def test_a_bad_row_of_the_hub_is_named():
    with pytest.raises(ValueError, match=r"row 1 of id .* from 0 to 259 .* got 300"):
        list(hub_rows([{"text": [1]}, {"text": [300]}], "text").order(0))


def test_another_commit_in_the_cache_is_not_taken(tmp_path, monkeypatch):
    """Offline, `datasets` would take the latest commit in its cache."""
    there, asked = "a" * 40, "b" * 40
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    prepare(tmp_path / "owner___name" / "default" / "0.0.0" / there)
    config = CollectConfig(model="m", dataset="owner/name", hookpoints=("a",))
    message = f"{asked}; the local cache has another version, {there}"
    with pytest.raises(ConnectionError, match=message):
        hub_dataset.load_hub_split(config, asked)
    assert hub_dataset.load_hub_split(config, there)["text"][:] == ["old"]


def prepare(folder: Path) -> None:
    """Write the cache entry that `datasets` keeps of a downloaded dataset."""
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_dict({"text": ["old"]})
    file = str(folder / "name-train.arrow")
    with datasets.arrow_writer.ArrowWriter(path=file, features=table.features) as writer:
        writer.write({"text": "old"})
        writer.finalize()
    splits = datasets.SplitDict(dataset_name="name")
    splits.add(datasets.SplitInfo("train", num_bytes=3, num_examples=1, dataset_name="name"))
    info = datasets.DatasetInfo(
        features=table.features,
        config_name="default",
        dataset_name="name",
        version="0.0.0",
        splits=splits,
    )
    info.write_to_directory(str(folder))
