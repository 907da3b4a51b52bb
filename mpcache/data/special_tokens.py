"""The special tokens that packing adds, as the settings ask."""

from dataclasses import dataclass
from typing import Literal

from mpcache.config import CollectConfig
from mpcache.data.vocabulary import Tokenizer, end_token_id
from mpcache.errors import UsageError


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens that packing adds; None for a token that is not added."""

    begin: int | None
    begins: Literal["document", "sequence"]
    "what the token `begin` begins"
    end: int | None
    "ends each document"


def special_tokens_of(tokenizer: Tokenizer, config: CollectConfig) -> SpecialTokens:
    """The tokens that `config` asks for. Raises UsageError where the tokenizer lacks one."""
    begin = next(
        (t for t in (tokenizer.bos_token_id, tokenizer.cls_token_id) if isinstance(t, int)), None
    )
    end = end_token_id(tokenizer)
    if config.bos != "none" and begin is None:
        raise UsageError(
            f"bos={config.bos} needs a tokenizer with a BOS or CLS token, got none; use --bos none"
        )
    if config.eos and end is None:
        raise UsageError("eos needs a tokenizer with an EOS or SEP token, got none; use --no-eos")
    if config.bos == "sequence" and config.ctx_len == 1:
        raise UsageError(
            "bos=sequence needs ctx_len of at least 2, got 1; use --bos none or a larger --ctx-len"
        )
    needs_no_mark = config.cross_document_attention or config.one_document_per_sequence
    if not (needs_no_mark or config.eos or config.bos == "document"):
        raise UsageError(
            "without --cross-document-attention, a token must mark the start or end of each "
            f"document, got eos=False, bos={config.bos}; use --eos or --bos document"
        )
    return SpecialTokens(
        begin=None if config.bos == "none" else begin,
        begins="sequence" if config.bos == "sequence" else "document",
        end=end if config.eos else None,
    )
