"""Hides tokens of a sequence, which a bidirectional model then predicts.

The procedure of BERT (Devlin et al. 2019, section 3.1, task 1): 15 % of the tokens are chosen,
special tokens excepted; 80 % of these become the mask token, 10 % a random token, and 10 % stay.
The choice depends on the tokens of the sequence alone: it is the same for every coder, batch size
and order.

L: tokens in a sequence.
"""

import hashlib

import numpy as np
from jaxtyping import Bool, Int64

SHARE, MASKED, RANDOM = 0.15, 0.8, 0.1


class BertMasking:
    """Hides tokens of one vocabulary."""

    def __init__(self, mask: int, specials: set[int], vocabulary: int) -> None:
        self.mask = mask
        self.specials = np.array(sorted(specials | {mask}))
        self.ordinary = np.setdiff1d(np.arange(vocabulary), self.specials)

    def hide(
        self, tokens_L: Int64[np.ndarray, " L"]
    ) -> tuple[Int64[np.ndarray, " L"], Bool[np.ndarray, " L"]]:
        """The tokens to show the model, and whether the model must predict a token.

        At least one token is hidden, unless all are special tokens.
        """
        random = _random(tokens_L)
        candidates = np.flatnonzero(~np.isin(tokens_L, self.specials))
        count = min(len(candidates), max(1, round(SHARE * len(candidates))))
        chosen = random.permutation(candidates)[:count]
        kinds = random.random(count)
        is_masked, is_random = kinds < MASKED, kinds >= 1 - RANDOM
        shown_L, is_chosen_L = tokens_L.copy(), np.zeros(len(tokens_L), bool)
        is_chosen_L[chosen] = True
        shown_L[chosen[is_masked]] = self.mask
        shown_L[chosen[is_random]] = random.choice(self.ordinary, int(is_random.sum()))
        return shown_L, is_chosen_L


def _random(tokens_L: Int64[np.ndarray, " L"]) -> np.random.Generator:
    digest = hashlib.sha256(np.ascontiguousarray(tokens_L, "<i8").tobytes()).digest()
    return np.random.default_rng(np.frombuffer(digest, "<u4").tolist())
