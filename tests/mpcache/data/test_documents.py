"""Every form of a dataset gives each document once, in an order that only the seed decides."""

import json
import os
import subprocess
import sys
from functools import partial

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcache.config import CollectConfig
from mpcache.data.dataset import open_documents
from mpcache.data.documents import Documents
from mpcache.data.hub_dataset import SHUFFLE_BUFFER, HubDataset
from mpcache.data.permutation import seeded_permutation
from mpcache.data.vocabulary import token_dtype, vocabulary_of
from tests.helpers.models import tiny_tokenizer

TEXTS = [f"document {i} é\n" + "x" * (i % 5) for i in range(150)]
TOKENIZER = tiny_tokenizer()
EOS = 257


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(folder, texts):
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "a.jsonl"


def write_parquet(folder, texts):
    datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def write_arrow(folder, texts):
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "arrow")
    return folder / "arrow"


def write_splits(folder, texts):
    split = datasets.Dataset.from_dict({"text": texts})
    datasets.DatasetDict({"test": split.select([0]), "train": split}).save_to_disk(folder / "s")
    return folder / "s"


def write_texts(folder, texts):
    (folder / "texts" / "deep").mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / "texts" / ("deep" if i % 2 else ".") / f"{i:03}.txt").write_text(text)
    return folder / "texts"


def write_bin(folder, texts):
    ids = [[*TOKENIZER(text)["input_ids"], EOS] for text in texts]
    np.concatenate(ids).astype("<u2").tofile(folder / "a.bin")
    return folder / "a.bin"


WRITERS = [write_jsonl, write_parquet, write_arrow, write_splits, write_texts, write_bin]


def make_config(dataset, **changes) -> CollectConfig:
    return CollectConfig(model="m", dataset=str(dataset), hookpoints=("a",), **changes)


def open_(dataset, **changes) -> Documents:
    return open_documents(make_config(dataset, **changes), vocabulary_of(TOKENIZER))


def texts_of(documents, start=0) -> list[str]:
    plain = [d if isinstance(d, str) else TOKENIZER.decode(d) for _, d in documents.read(start)]
    return [str(text) for text in plain]


@pytest.mark.parametrize("write", WRITERS)
def test_each_document_comes_once_and_from_any_start(tmp_path, write):
    documents = open_(write(tmp_path, TEXTS))
    texts = texts_of(documents)
    assert texts != TEXTS
    assert sorted(texts) == sorted(TEXTS)
    assert texts_of(documents, 101) == texts[101:]
    assert next(documents.read(77))[0] == 77
    assert list(documents.read(150)) == []


@pytest.mark.parametrize("write", WRITERS)
def test_digest_is_of_content(tmp_path, write):
    digests = []
    for name, texts in (("one", TEXTS[:9]), ("two", TEXTS[:9]), ("other", TEXTS[1:9])):
        (tmp_path / name).mkdir()
        digests.append(open_(write(tmp_path / name, texts)).digest)
    # save_to_disk writes a new fingerprint: a copy has the same digest, a second save has another
    if write not in (write_arrow, write_splits):
        assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_forms_agree_and_the_seed_decides(tmp_path):
    paths = [write(tmp_path, TEXTS) for write in (write_jsonl, write_parquet, write_arrow)]
    assert len({tuple(texts_of(open_(path))) for path in paths}) == 1
    assert len({tuple(texts_of(open_(paths[0], seed=seed))) for seed in range(5)}) == 5


def test_names_of_files_are_content(tmp_path):
    folder = write_texts(tmp_path, TEXTS[:3])
    before = open_(folder).digest
    (folder / "000.txt").rename(folder / "zzz.txt")
    assert open_(folder).digest != before


def test_provenance(tmp_path):
    assert open_(write_jsonl(tmp_path, TEXTS)).provenance == {
        "dataset": "a.jsonl",
        "dataset_revision": None,
        "dataset_config": None,
        "split": "train",
    }


def test_one_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("\none\nline\n\n \ntwo\n")
    assert {text for _, text in open_(tmp_path / "a.txt").read()} == {"one\nline", "two"}


def test_a_null_row_is_an_empty_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    assert sorted(texts_of(open_(tmp_path / "a.jsonl"))) == ["", "a"]


def test_a_bin_may_stop_amid_a_document(tmp_path):
    np.array([1, 2, EOS, EOS, 3], "<u2").tofile(tmp_path / "a.bin")
    got = [tokens.tolist() for _, tokens in open_(tmp_path / "a.bin").read()]
    assert sorted(got) == [[], [1, 2], [3]]


def test_tokens_are_as_wide_as_ids_need():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16 - 258)])
    assert token_dtype(tokenizer) == np.uint16
    tokenizer.add_tokens(["<one more>"])
    assert token_dtype(tokenizer) == np.uint32


# --- a stream, as of the Hub ---


def hub_order(table, config):
    return HubDataset(table, config, vocabulary_of(TOKENIZER)).order


@pytest.mark.parametrize("count", [50, 500])
def test_a_stream_starts_at_any_document(monkeypatch, count):
    monkeypatch.setattr("mpcache.data.hub_dataset.SHUFFLE_BUFFER", 100)
    table = datasets.Dataset.from_dict({"text": [str(i) for i in range(count)]})
    table = table.to_iterable_dataset(num_shards=3)
    orders = [hub_order(table, make_config("id", seed=seed)) for seed in (0, 0, 1)]
    first, again, other = (list(order(0)) for order in orders)
    assert sorted(first, key=int) == [str(i) for i in range(count)]
    assert first == again != other
    assert list(orders[0](33)) == first[33:]
    assert SHUFFLE_BUFFER == 10_000  # changing it would change the order of existing stores


def test_an_empty_stream_and_a_wrong_column_are_refused():
    empty = datasets.IterableDataset.from_generator(partial(iter, ()))
    with pytest.raises(ValueError, match="the dataset id has no documents"):
        hub_order(empty, make_config("id"))
    table = datasets.Dataset.from_dict({"content": ["a"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="got text; use one of content"):
        hub_order(table, make_config("id"))


# --- mistakes ---


def make_damaged(folder):
    (folder / "empty.jsonl").touch()
    (folder / "empty.bin").touch()
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "numbers.jsonl").write_text('{"text": 1}\n')
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "a.doc").write_text("text\na\n")
    (folder / "odd.bin").write_bytes(b"123")
    (folder / "none").mkdir()
    np.array([1, 2], "<u2").tofile(folder / "endless.bin")
    np.array([1, 9999, EOS], "<u2").tofile(folder / "foreign.bin")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", r"dataset .*missing\.jsonl does not exist"),
        ("empty.jsonl", r"must hold a document, got the empty file empty\.jsonl"),
        ("broken.jsonl", r"line 2 of broken\.jsonl is not JSON: .*cut short: correct it"),
        (
            "numbers.jsonl",
            r"line 1 of numbers\.jsonl: text_column must .*, got int in text; give",
        ),
        ("latin.txt", r"must be UTF-8, got latin\.txt"),
        (
            "a.doc",
            r"must be a folder or a file that ends in \.jsonl, .*, got a\.doc; convert the file",
        ),
        (
            "none",
            "must hold files that end in .jsonl, .*, got \\S+ with neither; give another folder",
        ),
        ("odd.bin", r"must hold uint16 tokens, got 3 bytes in odd\.bin"),
        ("empty.bin", r"must hold a document, got the empty file empty\.bin"),
        ("endless.bin", r"documents in endless\.bin must end with token 257, got no such"),
        ("foreign.bin", r"must be at most 257 for this model, got 9999 at token 1 of foreign\.bin"),
    ],
)
def test_refuses_in_one_line(tmp_path, name, message):
    make_damaged(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        list(open_(tmp_path / name).read())
    assert "\n" not in str(error.value)


def test_a_wrong_column_or_split_lists_the_existing_ones(tmp_path):
    with pytest.raises(ValueError, match="got body; use one of id, text"):
        open_(write_jsonl(tmp_path, TEXTS), text_column="body")
    with pytest.raises(ValueError, match="split must be one of test, train in s, got dev"):
        open_(write_splits(tmp_path, TEXTS), split="dev")


def test_a_lost_hub_is_no_mistake_of_the_user():
    """In a separate process, since the Hub client reads HF_HUB_OFFLINE on import."""
    code = """
from mpcache.config import CollectConfig
from mpcache.data.dataset import open_documents
try:
    open_documents(CollectConfig(model="m", dataset="no/such", hookpoints=("a",)), None)
except ConnectionError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("the Hub cannot be reached for dataset no/such")


# --- order ---


@given(st.integers(0, 500), st.text(max_size=5))
def test_permutation_is_a_bijection(count, key):
    assert sorted(seeded_permutation(count, key)) == list(range(count))


def test_permutation_mixes():
    orders = np.array([seeded_permutation(50, f"{key}") for key in range(2000)])
    assert len({tuple(order) for order in orders}) == 2000
    assert np.abs(orders.mean(axis=0) - 24.5).max() < 1.5  # standard error 0.32
