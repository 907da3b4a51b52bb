"""Docs and groups of a config's fields: each from the class that defines the field."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import typer

from mpcli.field_docs import field_docs, field_groups
from mpcli.option_groups import DEFAULT_GROUP
from mpcli.values import count, option, shown


@dataclass(frozen=True, kw_only=True)
class Rows:
    group: ClassVar[str] = "Data"

    rows: int = 1
    "rows to read"
    seed: int = 0
    "seed of the order"


@dataclass(frozen=True, kw_only=True)
class Config(Rows):
    seed: int = 1
    "seed of the weights"
    threads: int = 2
    "threads that read"


def test_the_doc_and_the_group_are_those_of_the_defining_class() -> None:
    """A redefined field has the new doc; a group is not inherited by the fields of a subclass."""
    assert field_docs(Config) == {
        "seed": "seed of the weights", "threads": "threads that read", "rows": "rows to read",
    }  # fmt: skip
    assert field_groups(Config) == {"seed": DEFAULT_GROUP, "threads": DEFAULT_GROUP, "rows": "Data"}


@pytest.mark.parametrize(
    ("value", "text"), [(10_000_000, "10M"), (4 * 10**9, "4G"), (65_536, "65536"), (200, "200")]
)
def test_counts_are_written_as_they_are_read(value: int, text: str) -> None:
    assert shown(value) == text
    assert count(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "12q", "nan", "1e400"])
def test_invalid_counts_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="must be a whole number"):
        count(text)


def test_a_field_as_an_option() -> None:
    assert option("batch_rows", 200_000) == "--batch-rows 200k"
    assert option("k", (8, 16)) == "--k 8,16"
    assert (option("bias", False), option("bias", True)) == ("--no-bias", "--bias")
