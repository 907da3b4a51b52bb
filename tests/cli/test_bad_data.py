"""Whatever is wrong with a file of a dataset: one line with its name, exit 2, and no store."""

import csv
import gzip
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mpcache.data import digested_file as data_file
from mpcli.mpcache import app
from tests.helpers.models import save_tiny

EOS = 257
TEXTS = [f"document {i} é " + "x" * (i % 50) for i in range(400)]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


# --- good files of every kind, also with another column or another type of values ---


def jsonl(values, column="text"):
    return b"".join(json.dumps({"id": 1, column: value}).encode() + b"\n" for value in values)


def json_array(values, column="text"):
    return json.dumps([{"id": 1, column: value} for value in values], indent=1).encode()


def csv_table(values, column="text"):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["text", "id"] if column == "text" else [column, "id"]])
    csv.writer(file).writerows(
        [value, "an end that is quoted, as it has a comma"] for value in values
    )
    return file.getvalue().encode()


def table(values, column="text"):
    return pa.table({"id": list(range(len(values))), column: values})


def parquet(values, column="text"):
    sink = io.BytesIO()
    pq.write_table(table(values, column), sink, row_group_size=100)
    return sink.getvalue()


def arrow_stream(values, column="text"):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table(values, column).schema) as writer:
        writer.write_table(table(values, column), max_chunksize=100)
    return sink.getvalue()


def arrow_file(values, column="text"):
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table(values, column).schema) as writer:
        writer.write_table(table(values, column), max_chunksize=100)
    return sink.getvalue()


def text(values, column="text"):
    return "\n\n".join(map(str, values)).encode()


def token_file(values, column="text"):
    ids = [[*value.encode(), EOS] if isinstance(value, str) else [60_000, EOS] for value in values]
    return np.concatenate(ids).astype("<u2").tobytes()


def gz(write):
    return lambda *arguments: gzip.compress(write(*arguments), 1, mtime=0)


def zst(write):
    return lambda *arguments: pa.compress(write(*arguments), codec="zstd", asbytes=True)


KINDS = {
    "a.jsonl": jsonl,
    "a.json": json_array,
    "a.csv": csv_table,
    "a.parquet": parquet,
    "a.arrow": arrow_stream,
    "file.arrow": arrow_file,
    "a.txt": text,
    "a.bin": token_file,
    "a.jsonl.gz": gz(jsonl),
    "a.jsonl.zst": zst(jsonl),
    "a.csv.gz": gz(csv_table),
    "a.parquet.zst": zst(parquet),
    "a.txt.gz": gz(text),
    "a.bin.zst": zst(token_file),
}

# --- what can be wrong ---


def cut(write):
    data = write(TEXTS)
    return data[: len(data) // 2 | 1]  # an odd count: no whole token of a .bin


def other_type(write):
    return write([float(i) for i in range(9)])


FAULTS = {
    "cut": cut,
    "empty": lambda _: b"",
    "lfs": lambda _: LFS,
    "html": lambda _: HTML,
    "other shape": lambda write: write(TEXTS[:9], "body"),
    "other dtype": other_type,
}
# combinations that are no fault, with the reason
NO_FAULT = {
    ("a.txt", "cut"): "a text has no end mark: a shorter text is a text",
    ("a.txt", "html"): "a corpus of web pages is a corpus",
    ("a.txt", "other shape"): "a text has no columns",
    ("a.txt", "other dtype"): "numbers in a text are text",
    ("a.txt.gz", "other shape"): "a text has no columns",
    ("a.txt.gz", "other dtype"): "numbers in a text are text",
    ("a.bin", "other shape"): "tokens have no columns",
    ("a.bin.zst", "other shape"): "tokens have no columns",
    ("a.csv", "other dtype"): "numbers in a .csv are text",
    ("a.csv.gz", "other dtype"): "numbers in a .csv are text",
}


def collect(model, dataset, folder, *more):
    arguments = [str(model), str(dataset), str(folder / "store"), "--hookpoints", "layers.0"]
    arguments += ["--ctx-len", "16", "--part-rows", "64", "--chunk-rows", "64", "--rows", "200"]
    result = CliRunner().invoke(app, ["collect", *arguments, "--validation-every", "4", *more])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refusal(model, dataset, folder, *more):
    """The error line of a refused collection."""
    result = collect(model, dataset, folder, *more)
    assert result.exit_code == 2, result.output
    assert not (folder / "store").exists()
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_bad_file_is_refused_in_one_line(tmp_path, model, name, fault):
    (tmp_path / name).write_bytes(FAULTS[fault](KINDS[name]))
    if (name, fault) in NO_FAULT:
        result = collect(model, tmp_path / name, tmp_path)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        if fault in (
            "html",
            "other dtype",
        ):  # the file is read, and is too short to fill a sequence
            assert result.exit_code == 2
            assert "each split must fill at least one sequence" in errors[0]
        else:
            assert result.exit_code == 0, result.output
        assert len(errors) == (result.exit_code == 2)
        assert (tmp_path / "store").exists() == (result.exit_code == 0)
        return
    message = refusal(model, tmp_path / name, tmp_path)
    assert name in message
    assert ";" in message  # the remedy


@pytest.mark.parametrize("name", KINDS)
def test_a_bad_shard_among_good_ones_is_named(tmp_path, model, name):
    """The second of three shards. Texts of a folder cannot be bad: each file is a document."""
    (tmp_path / "d").mkdir()
    for shard in "xyz":
        (tmp_path / "d" / f"{shard}{name[name.index('.') :]}").write_bytes(KINDS[name](TEXTS[:50]))
    bad = tmp_path / "d" / f"y{name[name.index('.') :]}"
    bad.write_bytes(LFS)
    assert bad.name in refusal(model, tmp_path / "d", tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_a_dangling_link_is_named(tmp_path, model, name):
    (tmp_path / name).symlink_to(tmp_path / "gone")
    assert f"{name} is a link to" in refusal(model, tmp_path / name, tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).symlink_to(tmp_path / "gone")
    assert f"{name} is a link to" in refusal(model, tmp_path / "d", tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_a_link_to_itself_is_named(tmp_path, model, name):
    (tmp_path / name).symlink_to(name)
    assert f"{name} is a link to itself" in refusal(model, tmp_path / name, tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).symlink_to(name)
    assert f"{name} is a link to itself" in refusal(model, tmp_path / "d", tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_suffixes_in_upper_case_are_the_same(tmp_path, model, name):
    path = tmp_path / name.upper()
    path.write_bytes(KINDS[name](TEXTS))
    assert collect(model, path, tmp_path).exit_code == 0
    path.write_bytes(LFS)
    assert path.name in refusal(model, path, tmp_path / "other")


TABLES = {name: KINDS[name] for name in ("a.jsonl", "a.json", "a.parquet", "a.arrow", "file.arrow")}
CHAT = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
BAD_VALUES = {
    "ids beyond": ([[1, 2]] * 20 + [[300]] * 20, "from 0 to 259"),
    "negative ids": ([[1, 2]] * 20 + [[-1]] * 20, "from 0 to 259"),
    "chats without role": ([CHAT] * 20 + [[{"role": None, "content": "a"}]], "in the field role"),
    "chats without content": (
        [CHAT] * 20 + [[{"role": "user", "content": None}]],
        "in the field content",
    ),
    "chats without template": ([CHAT] * 20, "give a Jinja file with --chat-template"),
}


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("name", TABLES)
def test_bad_ids_and_chats_are_named_by_their_line(tmp_path, model, name, bad):
    values, message = BAD_VALUES[bad]
    (tmp_path / name).write_bytes(TABLES[name](values))
    assert message in refusal(model, tmp_path / name, tmp_path)


@pytest.mark.parametrize("fault", ["cut", "empty", "lfs", "html"])
@pytest.mark.parametrize("values", ["ids", "chats"])
@pytest.mark.parametrize("name", TABLES)
def test_a_bad_file_of_ids_or_chats_is_refused(tmp_path, model, name, values, fault):
    rows = [list(text.encode()) if values == "ids" else CHAT for text in TEXTS]
    (tmp_path / name).write_bytes(FAULTS[fault](lambda *_: TABLES[name](rows)))
    assert name in refusal(model, tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_an_unreadable_file_is_named(tmp_path, model, name, monkeypatch):
    """Root can read all files, so the test simulates the system's refusal."""
    (tmp_path / name).write_bytes(KINDS[name](TEXTS[:50]))
    plain = data_file.os.open

    def refuse(path, *arguments, **options):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(data_file.os, "open", refuse)
    assert f"{name} cannot be read" in refusal(model, tmp_path / name, tmp_path)


def test_a_folder_or_a_pipe_in_place_of_a_file(tmp_path, model):
    (tmp_path / "a.jsonl").mkdir()
    assert "got a.jsonl with neither" in refusal(model, tmp_path / "a.jsonl", tmp_path)
    data_file.os.mkfifo(tmp_path / "b.jsonl")
    assert "b.jsonl must be a regular file" in refusal(model, tmp_path / "b.jsonl", tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_good_files_are_read(tmp_path, model, name):
    """Good files of every kind are read, so the tests above fail for the right reason."""
    (tmp_path / name).write_bytes(KINDS[name](TEXTS))
    assert collect(model, tmp_path / name, tmp_path).exit_code == 0


# --- places in files ---


def lines_with(bad, number=300):
    lines = jsonl(TEXTS).splitlines(keepends=True)
    lines[number - 1] = bad
    return b"".join(lines)


BAD_LINES = {
    "cut": b'{"id": 1, "text": "abc\n',
    "cut after the text": b'{"id": 1, "text": "abc"\n',
    "latin-1": '{"text": "café"}\n'.encode("latin-1"),
    "no object": b"[1, 2]\n",
    "a word": b"None\n",
    "no field": b'{"id": 1}\n',
    "a number": b'{"text": 1}\n',
    "a list": b'{"text": ["a"]}\n',
    "token ids": b'{"text": [1, 2]}\n',
    "twice": b'{"text": "a", "text": "b"}\n',
    "half a pair": b'{"text": "\\ud800"}\n',
    "deep": b'{"text": ' + b"[" * 200_000 + b"\n",
    "a long number": b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n",
    "zeros": b"\0\0\0\0\n",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(tmp_path, model, bad):
    (tmp_path / "a.jsonl").write_bytes(lines_with(BAD_LINES[bad]))
    message = refusal(model, tmp_path / "a.jsonl", tmp_path)
    assert "line 300 of a.jsonl" in message
    assert message.count("iconv") == (bad == "latin-1")


def test_a_bad_line_of_a_second_shard_is_named_by_its_number_in_the_shard(tmp_path, model):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "p-1.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "d" / "p-2.jsonl.gz").write_bytes(gzip.compress(lines_with(b"{\n", 7)))
    assert "line 7 of d/p-2.jsonl.gz" in refusal(model, tmp_path / "d", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n{"text": "b"},\n{"text": ', "line 3 of a.json is not JSON"),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2 of a.json is not JSON: expected ,"),
        ('[{"text": "a"}] x', "got more text at line 1 of a.json"),
        ('[{"text": "a"},', "line 1 of a.json is not JSON"),
        ('{\n "text": "a"\n}', "line 1 of a.json is not JSON"),
        ('{"data": [{"text": "a"}]}', "got text; use one of data"),
        ('["a", "b"]', "line 1 of a.json must be a JSON object, got str"),
        ("[]", "must hold a document, got none in a.json"),
        ('"a"', "line 1 of a.json must be a JSON object, got str"),
    ],
)
def test_a_bad_json_tells_its_line(tmp_path, model, content, message):
    (tmp_path / "a.json").write_text(content)
    assert message in refusal(model, tmp_path / "a.json", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,text\n1,a\n2\n", "line 3 of a.csv must have 2 fields, as the header has, got 1"),
        (
            b'id,text\n1,"a\nb"\n2,b,c\n',
            "line 4 of a.csv must have 2 fields, as the header has, got 3",
        ),
        (b'id,text\n1,a\n2,"b\n\n\n', "line 3 of a.csv is not CSV: unexpected end of data"),
        ("id,text\n1,café\n".encode("latin-1"), "line 1 of a.csv or a line after it is not UTF-8"),
        (b"text,text\na,b\n", "line 1 of a.csv names the column text twice"),
        (b"id;text\n1;a\n", "got text; use one of id;text"),
        (b"id,text\n", "must hold a document, got none in a.csv"),
    ],
)
def test_a_bad_csv_tells_its_line(tmp_path, model, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    assert message in refusal(model, tmp_path / "a.csv", tmp_path)


def test_bad_rows_of_a_table_are_named(tmp_path, model):
    tokens = pa.array([[1, 2], [3, 999], [4]])
    pq.write_table(pa.table({"text": tokens}), tmp_path / "a.parquet")
    message = refusal(model, tmp_path / "a.parquet", tmp_path)
    assert "row 1 of a.parquet (the first is 0)" in message
    assert "from 0 to 259 for this model, got 999" in message
    chats = [[{"role": "user", "content": "a"}], [{"role": None, "content": "b"}]]
    pq.write_table(pa.table({"text": chats}), tmp_path / "b.parquet")
    assert "message 1 in row 1 of b.parquet" in refusal(model, tmp_path / "b.parquet", tmp_path)
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pq.write_table(twice, tmp_path / "c.parquet")
    assert "has the column text twice" in refusal(model, tmp_path / "c.parquet", tmp_path)


def test_a_stream_that_is_cut_between_two_batches(tmp_path, model):
    """Arrow's own reader takes a truncated stream for a shorter one."""
    sink, schema = io.BytesIO(), table(TEXTS).schema
    writer = pa.ipc.new_stream(sink, schema)
    writer.write_table(table(TEXTS), max_chunksize=100)
    (tmp_path / "a.arrow").write_bytes(sink.getvalue())
    assert "a.arrow cannot be read as arrow, because its last bytes are missing" in refusal(
        model, tmp_path / "a.arrow", tmp_path
    )


# --- what is unusual and good ---


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + jsonl(TEXTS),
        jsonl(TEXTS).replace(b"\n", b"\r\n"),
        jsonl(TEXTS).replace(b"\n", b"\n\n  \n"),
        jsonl(TEXTS).rstrip(b"\n"),
        jsonl([*TEXTS, None, ""]),
        jsonl([*TEXTS, "x" * 3_000_000]),
    ],
    ids=["mark", "CRLF", "blank lines", "no last newline", "null", "a long line"],
)
def test_unusual_lines_are_read(tmp_path, model, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert collect(model, tmp_path / "a.jsonl", tmp_path).exit_code == 0
