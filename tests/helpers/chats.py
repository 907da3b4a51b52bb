"""A small dataset of conversations, and a store that is collected from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

from mpcache.collection import collect as collect_module
from mpcache.collection.collect import collect
from mpcache.collection.summary import CollectSummary
from mpcache.config import CollectConfig
from mpcache.data.conversation import Conversation
from mpcache.data.documents import Documents
from mpcache.maintenance import original_collection
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.stores import small_config


def conversations(count: int = 40, seed: int = 0) -> list[Conversation]:
    """Conversations of two or four messages of random letters; each tenth has no message."""
    random = np.random.default_rng(seed)

    def text() -> str:
        return bytes(random.integers(97, 123, random.integers(3, 30)).tolist()).decode()

    chats = []
    for i in range(count):
        roles = ["user", "assistant"] * int(random.integers(1, 3))
        messages = tuple({"role": role, "content": text()} for role in roles)
        chats.append(Conversation(() if i % 10 == 5 else messages))
    return chats


@contextmanager
def dataset_of(chats: list[Conversation]) -> Iterator[None]:
    """Let every command read these conversations, whatever dataset it names."""
    provenance = {"dataset": "chats", "dataset_revision": None, "dataset_config": None}
    documents = Documents("0" * 64, provenance, lambda start: iter(chats[start:]), "conversations")

    def open_chats(*_: object) -> Documents:
        return documents

    with (
        mock.patch.object(collect_module, "open_documents", open_chats),
        mock.patch.object(original_collection, "open_documents", open_chats),
    ):
        yield


def chat_config(folder: Path, **changes: object) -> CollectConfig:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "template.jinja"
    file.write_text(TEMPLATES["chatml"])
    return small_config(folder, **{"chat_template": str(file), **changes})


def chat_store(folder: Path, chats: int = 40, **changes: object) -> tuple[Path, CollectSummary]:
    """Collect a small store of conversations."""
    with dataset_of(conversations(chats)):
        return folder / "store", collect(chat_config(folder, **changes), folder / "store")
