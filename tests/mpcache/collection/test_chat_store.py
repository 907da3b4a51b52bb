"""A store of conversations: which tokens the assistant wrote goes with the rows everywhere."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mpcache.collection.collect import collect
from mpcache.collection.summary import CollectSummary
from mpcache.config import ConvertConfig, RepairConfig
from mpcache.data.permutation import row_permutation
from mpcache.maintenance.convert import convert
from mpcache.maintenance.copy import copy
from mpcache.maintenance.repair import repair
from mpcache.maintenance.verify import verify
from mpcache.store.reader import Store, open_store
from mpcache.store.store_info import store_info
from mptrain.coders.checkpoint import load_coder
from mptrain.config.coder_grid import FitConfig
from mptrain.data.columns import ASSISTANT
from mptrain.data.filters import Filters, filters_from_json, make_filters
from mptrain.data.loader import Loader
from mptrain.evals.evaluate import evaluate_coder
from mptrain.runs.fit import fit
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.chats import chat_config, chat_store, conversations, dataset_of
from tests.helpers.models import tiny_tokenizer
from tests.helpers.stores import small_store

MLP = (("layers.1.mlp", "input"), ("layers.1.mlp", "output"))
FLAGS, TOKENS = "arrays.zarr/token_flags/c/2/0", "arrays.zarr/tokens/c/2/0"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CollectSummary]:
    return chat_store(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="module")
def store(collected: tuple[Path, CollectSummary]) -> Store:
    return open_store(collected[0])


@pytest.fixture
def damaged(collected: tuple[Path, CollectSummary], tmp_path: Path) -> Path:
    shutil.copytree(collected[0].parent, tmp_path / "all")
    return tmp_path / "all/store"


def reference(chats: list, split: str) -> list[tuple[int, bool]]:
    """Tokens of a split, conversation by conversation, with whether the assistant wrote each."""
    tokenizer = tiny_tokenizer()
    stream: list[tuple[int, bool]] = []
    for i, chat in enumerate(chats):
        if (i % 4 == 1) != (split == "validation") or not chat.messages:
            continue
        for message in chat.messages:
            is_own = message["role"] == "assistant"
            pieces = [
                (f"<|im_start|>{message['role']}\n", False),
                (message["content"], is_own),
                ("<|im_end|>\n", False),
            ]
            for text, own in pieces:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                stream += [(token, own) for token in ids]
        stream.append((257, False))
    return stream


@pytest.mark.parametrize("split", ["train", "validation"])
def test_flags_are_the_assistants_tokens(store: Store, split: str) -> None:
    parts = [p for p in store.part_numbers("tokens") if store.layout.split_of(p) == split]
    tokens = np.concatenate([store.tokens.read_tokens(part).reshape(-1) for part in parts])
    flags = np.concatenate([store.tokens.read_flags(part).reshape(-1) for part in parts])  # type: ignore[union-attr]
    wanted = reference(conversations(), split)[: len(tokens)]
    assert tokens.tolist() == [token for token, _ in wanted]
    assert (flags & 2 > 0).tolist() == [own for _, own in wanted]
    assert not (flags & ~np.uint8(2)).any()
    for part in parts:
        order = row_permutation(0, part, store.tokens.token_count(part))
        own = store.tokens.read_assistant(part)
        assert own is not None
        assert own.tolist() == (store.tokens.read_flags(part).reshape(-1)[order] > 0).tolist()  # type: ignore[union-attr]


def test_the_store_records_its_chat_template(
    store: Store, collected: tuple[Path, CollectSummary]
) -> None:
    assert store.layout.format_version == 2
    assert store.provenance["chat_template"] == TEMPLATES["chatml"]
    identity = store.identity
    assert (identity["special_tokens"], identity["empty_documents"]) == ("text", "left out")
    assert len(identity["chat_template"]) == 64
    assert collected[1].empty_documents == store_info(collected[0])["empty_documents"] > 0
    assert verify(collected[0]).intact


def test_another_template_is_another_store(collected: tuple[Path, CollectSummary]) -> None:
    config = chat_config(collected[0].parent)
    Path(str(config.chat_template)).write_text(TEMPLATES["alpaca"])
    with dataset_of(conversations()), pytest.raises(ValueError, match="chat_template: "):
        collect(config, collected[0])
    chat_config(collected[0].parent)


def test_more_rows_continue_where_the_flags_ended(
    collected: tuple[Path, CollectSummary], tmp_path: Path
) -> None:
    path, less = chat_store(tmp_path, rows=400)
    _, more = chat_store(tmp_path, rows=1500)
    grown, at_once = open_store(path), open_store(collected[0])
    assert grown.part_numbers("tokens") == at_once.part_numbers("tokens")
    for part in grown.part_numbers("tokens"):
        assert np.array_equal(grown.tokens.read_flags(part), at_once.tokens.read_flags(part))  # type: ignore[arg-type]
    assert (less.empty_documents or 0) < (more.empty_documents or 0)
    assert more.empty_documents == collected[1].empty_documents


def test_tokens_and_flags_are_repaired_together(damaged: Path) -> None:
    before = {name: (damaged / name).read_bytes() for name in (FLAGS, TOKENS)}
    Path(str(chat_config(damaged.parent).chat_template)).write_text("{{ 'another by now' }}")
    for broken in ((FLAGS,), (TOKENS,), (FLAGS, TOKENS, "marks/2/tokens.json")):
        for name in broken:
            data = bytearray((damaged / name).read_bytes())
            data[9] ^= 1
            (damaged / name).write_bytes(data)
        with dataset_of(conversations()):
            done = repair(damaged, RepairConfig(device="cpu"))
        if "marks/2/tokens.json" not in broken:
            assert done.intact
            assert {name: (damaged / name).read_bytes() for name in before} == before
        else:  # nothing is left that records what was committed
            assert [mark.outcome for mark in done.marks] == ["other bits"]


def test_flags_are_repaired_from_a_copy(
    damaged: Path, collected: tuple[Path, CollectSummary]
) -> None:
    before = (damaged / FLAGS).read_bytes()
    (damaged / FLAGS).unlink()
    assert repair(damaged, RepairConfig(source=str(collected[0]))).intact
    assert (damaged / FLAGS).read_bytes() == before


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"part_rows": 384}, {"codec": "zstd"}])
def test_a_converted_store_has_the_flags_of_its_rows(
    collected: tuple[Path, CollectSummary], store: Store, tmp_path: Path, changes: dict[str, object]
) -> None:
    convert(collected[0], tmp_path / "new", ConvertConfig(**changes))  # type: ignore[arg-type]
    new = open_store(tmp_path / "new")
    assert verify(tmp_path / "new").intact

    def facts(source: Store, split: str) -> list[tuple[int, bool]]:
        parts = [p for p in source.part_numbers("tokens") if source.layout.split_of(p) == split]
        tokens = torch.cat([source.tokens.read_token_ids(part) for part in parts]).tolist()
        own = torch.cat([source.tokens.read_assistant(part) for part in parts]).tolist()  # type: ignore[misc]
        return list(zip(tokens, own, strict=True))

    for split in ("train", "validation"):
        assert facts(new, split) == facts(store, split)
    assert new.tokens.empty_documents() == store.tokens.empty_documents()
    convert(tmp_path / "new", tmp_path / "back", ConvertConfig(part_rows=192))
    back = open_store(tmp_path / "back")
    for part in store.part_numbers("tokens"):
        mark, expected = back.mark(part, "tokens"), store.mark(part, "tokens")
        assert (mark.objects, mark.progress) == (expected.objects, expected.progress)
    copy(collected[0], tmp_path / "copy")
    assert verify(tmp_path / "copy").intact


# --- training ---


def fit_config(store: Store, run: Path, **changes: object) -> FitConfig:
    settings = {
        "store": str(store.storage), "run": str(run), "hookpoints": ("layers.1.mlp",),
        "k": (3,), "expansion": (2,), "rows": 512, "batch_rows": 64, "window_rows": 128,
        "arch": ("topk",), "kind": ("sae",), "device": "cpu", "only_tokens": "assistant",
    }  # fmt: skip
    return FitConfig(**{**settings, **changes})  # type: ignore[arg-type]


def test_filters_take_just_the_assistants_rows(store: Store) -> None:
    filters = make_filters(fit_config(store, Path("run"), skip_positions=0), store, MLP)
    with Loader(
        store, MLP, "train", batch_rows=10_000, seed=0, device=torch.device("cpu"),
        row_fields=filters.row_fields,
    ) as loader:  # fmt: skip
        batch = next(loader.one_pass())
    own = batch.fields[ASSISTANT] > 0
    assert 0 < own.sum() < batch.rows
    assert filters.kept(batch, MLP).tolist() == own.tolist()
    parts = store.parts(MLP, "train")
    assert int(own.sum()) == sum(int(store.tokens.read_assistant(p.number).sum()) for p in parts)  # type: ignore[union-attr]
    assert filters_from_json(filters.as_json()) == filters
    assert filters_from_json({"skip_positions": 1, "allow_nonfinite": False}) == Filters(
        skip_positions=1, norm_limits={}
    )


def test_a_coder_is_trained_and_judged_on_the_same_rows(store: Store, tmp_path: Path) -> None:
    fit(fit_config(store, tmp_path / "own"))
    fit(fit_config(store, tmp_path / "all", only_tokens="all"))
    (own,), (every,) = (
        [p for p in (tmp_path / name / "coders").iterdir() if p.is_dir()] for name in ("own", "all")
    )
    assert load_coder(own)[1]["only_tokens"] == "assistant"
    assert load_coder(every)[1]["only_tokens"] == "all"
    (on_own,) = evaluate_coder(own, str(store.storage), (), None, "cpu")
    (result,) = json.loads((tmp_path / "own/results.json").read_bytes())
    assert result["validation"]["rows"] == on_own.rows
    assert result["validation"]["fvu"] == pytest.approx(on_own.fvu)
    (on_all,) = evaluate_coder(every, str(store.storage), (), None, "cpu")
    assert on_own.rows < on_all.rows


def test_a_store_without_the_mask_is_refused_in_one_line(tmp_path: Path) -> None:
    plain = open_store(small_store(tmp_path)[0])
    assert plain.layout.format_version == 1
    with pytest.raises(ValueError, match="does not record which tokens an assistant wrote"):
        make_filters(fit_config(plain, tmp_path / "run"), plain, MLP)
    with pytest.raises(ValueError, match="does not record which tokens an assistant wrote"):
        Loader(
            plain, MLP, "train", batch_rows=8, seed=0, device=torch.device("cpu"),
            row_fields=(ASSISTANT,),
        )  # fmt: skip


def test_an_id_outside_the_vocabulary_is_refused(store: Store, tmp_path: Path) -> None:
    config = fit_config(store, tmp_path, skip_tokens=("99999",), only_tokens="all")
    with pytest.raises(ValueError, match="at most 257, got 99999"):
        make_filters(config, store, MLP)
    assert make_filters(dataclasses.replace(config, skip_tokens=("257",)), store, MLP).skip_tokens


def test_conversations_need_to_be_run_alone_to_be_kept_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use --one-document-per-sequence"):
        chat_store(tmp_path, cross_document_attention=False)
    assert not (tmp_path / "store").exists()


def test_a_template_is_for_messages_alone(tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    with pytest.raises(ValueError, match="--chat-template applies only to chat messages"):
        collect(config, tmp_path / "store")
    assert not (tmp_path / "store").exists()
