"""Settings of a collection are in groups for people; a store records them as one flat object."""

import dataclasses
import doctest
import inspect
import json

import pytest

from mpcache import config as config_module
from mpcache.config import CollectConfig, ConvertConfig, HookpointsConfig
from mpcache.errors import UsageError
from mpcache.store.sealed_json import canonical_json
from tests.helpers.paths import GOLDEN


def test_a_store_records_the_same_bytes_as_before() -> None:
    recorded = json.loads((GOLDEN / "store-v2" / "store.json").read_bytes())["config"]
    config = CollectConfig(**{**recorded, "hookpoints": tuple(recorded["hookpoints"])})
    assert canonical_json(dataclasses.asdict(config)) == canonical_json(recorded)


def test_every_setting_of_a_collection_has_a_group() -> None:
    own = inspect.get_annotations(CollectConfig)
    assert not own, "define the setting in one of the groups"
    assert all("group" in vars(base) for base in CollectConfig.__bases__)


def test_examples_run() -> None:
    result = doctest.testmod(config_module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hookpoints": ()}, "hookpoints is empty"),
        ({"hookpoints": "layers.0"}, r"must be a tuple of names, .*; write \('layers.0',\)"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        ({"bos": "documents"}, "bos must be one of none, document, sequence"),
        ({"rows": 1e6}, r"rows must be a whole number, got 1000000\.0"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"write_threads": 0}, "write_threads must be at least 1, got 0"),
        ({"validation_every": 1}, "validation_every must be at least 2, got 1"),
        ({"ctx_len": 100}, "part_rows must be a multiple of ctx_len, .*; use 65600"),
        ({"chunk_rows": 1000}, "chunk_rows must divide part_rows"),
        ({"autocast": True, "model_dtype": "float32"}, "--autocast needs a model_dtype"),
        (
            {"compile": True, "one_document_per_sequence": True},
            "--compile needs batches of one shape",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        CollectConfig(**({"model": "m", "dataset": "d", "hookpoints": ("a",)} | changes))  # type: ignore[arg-type]


def test_values_of_other_types_are_refused() -> None:
    with pytest.raises(UsageError, match="codec must be one of none, lz4, zstd, None, got 'gzip'"):
        ConvertConfig(codec="gzip")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"write \('layers\.0',\)"):
        ConvertConfig(hookpoints="layers.0")  # type: ignore[arg-type]
    assert HookpointsConfig(model="m").attention is None
    with pytest.raises(UsageError, match="attention must be one of sdpa, eager"):
        HookpointsConfig(model="m", attention="flash")  # type: ignore[arg-type]
