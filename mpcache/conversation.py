"""A chat as a dataset holds it: messages with a role and a content."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """The messages of one chat, in order. An empty or null row has no message."""

    messages: tuple[Mapping[str, Any], ...]
    "each has `role` and `content`; other fields are those of the dataset that are not null"
