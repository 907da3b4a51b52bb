"""Where documents start in packed sequences, read off the tokens alone.

S: sequences in a part. L: tokens in a sequence (`ctx_len`).
"""

import numpy as np
from jaxtyping import Bool, Int64, UInt

from mpcache.data.special_tokens import SpecialTokens


def document_starts(
    tokens_SL: UInt[np.ndarray, "S L"], specials: SpecialTokens
) -> Bool[np.ndarray, "S L"]:
    """Whether a token starts a document. The first token of a sequence always does."""
    starts_SL = np.zeros(tokens_SL.shape, np.bool_)
    if specials.begins == "document" and specials.begin is not None:
        starts_SL |= tokens_SL == specials.begin
        if specials.begin == specials.end:  # one token is both: the second of a pair begins
            starts_SL[:, 1:] &= starts_SL[:, :-1]
    elif specials.end is not None:
        starts_SL[:, 1:] = tokens_SL[:, :-1] == specials.end
        if specials.begin is not None:
            # the second token follows the sequence's begin token, which may be the same as `end`
            starts_SL[:, 1:2] = False
    starts_SL[:, 0] = True
    return starts_SL


def position_ids(
    tokens_SL: UInt[np.ndarray, "S L"], specials: SpecialTokens
) -> Int64[np.ndarray, "S L"]:
    """The position of each token in its document, counted from 0."""
    positions_L = np.arange(tokens_SL.shape[1])
    starts_SL = np.where(document_starts(tokens_SL, specials), positions_L, 0)
    return positions_L - np.maximum.accumulate(starts_SL, axis=1)
