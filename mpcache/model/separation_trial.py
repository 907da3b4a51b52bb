"""Runs a model on random documents to see what changes when other documents change.

S: sequences. L: tokens in a sequence. W: width.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpcache.errors import first_line
from mpcache.model.hookpoint_patterns import Side
from mpcache.model.hooks import Capture, forward_options, output_of
from mpcache.model.inputs import ModelInputs

Values = dict[Side, Tensor]
Document = Int64[np.ndarray, " _"]
Sequences = list[list[Document]]
InputsOf = Callable[[Sequences], ModelInputs]

# Units in the last place by which the control changes embeddings. Sums in float32 lose bits with
# each term; in the short dtypes a sum is exact until it is rounded.
LAST_PLACES = {torch.float32: 32, torch.bfloat16: 1, torch.float16: 1}
SLACK = 4  # every layer rounds, but the control changes the embeddings alone
TWO_DRAWS = 2  # a difference and its control are two samples of the same noise


_ERRORS = (TypeError, ValueError, RuntimeError, IndexError, AssertionError, AttributeError)


class TrialError(Exception):
    """The model rejects its arguments. The message says why."""


def random_documents(model: PreTrainedModel, lengths: Sequence[int], seed: int) -> list[Document]:
    """Documents of random tokens from the middle of the vocabulary, away from special tokens."""
    size = embeddings_of(model).weight.shape[0]
    random = np.random.default_rng(seed)
    return [random.integers(size // 10, size - size // 10, length) for length in lengths]


def embeddings_of(model: PreTrainedModel) -> nn.Embedding:
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    return embeddings


def exchanged(sequences: Sequences, documents: slice) -> Sequences:
    """Two sequences with the named documents exchanged between them."""
    first, second = ([*sequence] for sequence in sequences)
    first[documents], second[documents] = second[documents], first[documents]
    return [first, second]


class SeparationTrial:
    """A model and the sides whose values are compared. `capture` has been entered."""

    def __init__(self, model: PreTrainedModel, capture: Capture, dtype: torch.dtype) -> None:
        self.model, self.capture, self.dtype = model, capture, dtype

    def values(self, inputs: ModelInputs) -> Values:
        """Copies of the values in one pass. Raises TrialError where the model does not run."""
        copies: Values = {}
        try:
            self.capture.run(inputs, lambda side, value: copies.update({side: value.clone()}))
        except torch.OutOfMemoryError:
            raise
        except _ERRORS as error:
            raise TrialError(f"{type(error).__name__}: {first_line(error)}") from error
        return copies

    def has_flow(
        self,
        before: Values,
        sequences: Sequences,
        documents: slice,
        inputs_of: InputsOf,
        row: int,
        tokens: slice,
    ) -> bool:
        """Whether an exchange of documents changes the values of `tokens` in a row of the batch.

        `before` has the values before the exchange.
        """
        changed = exchanged(sequences, documents)
        after = self.values(inputs_of(changed))
        if all(same_bits(x[row, tokens], after[side][row, tokens]) for side, x in before.items()):
            return False
        # a kernel may add in a different order each time: measure the change without any flow
        batches = [sequences + sequences, sequences + changed, changed + sequences]
        before, after, control = (self.values(inputs_of(batch)) for batch in batches)
        row += len(sequences)
        return any(
            change(x[row, tokens], after[side][row, tokens])
            > TWO_DRAWS * change(x[row, tokens], control[side][row, tokens])
            for side, x in before.items()
        )

    def differs_from_alone(self, documents: Sequence[Document], packed: Values, row: int) -> bool:
        """Whether the documents in a row of a batch have different values when they run alone.

        `packed` has the values of the batch.
        """
        alone = self._alone(documents)
        with self._perturbed_embeddings():
            control = self._alone(documents)
        return any(
            change(x, packed[side][row, : len(x)]) > SLACK * change(x, control[side])
            for side, x in alone.items()
        )

    def _alone(self, documents: Sequence[Document]) -> Values:
        inputs = ({"input_ids": self._ids(document[None])} for document in documents)
        values = [self.values(arguments) for arguments in inputs]
        return {side: torch.cat([v[side][0] for v in values]) for side in values[0]}

    def _ids(self, tokens: np.ndarray) -> Tensor:
        return torch.from_numpy(tokens.astype(np.int64)).to(self.model.device)

    @contextlib.contextmanager
    def _perturbed_embeddings(self) -> Iterator[None]:
        """Within this context the last bits of embeddings are changed up or down at random."""
        unit = LAST_PLACES[self.dtype] * torch.finfo(self.dtype).eps

        def hook(_: nn.Module, args: object, output: Tensor) -> Tensor:
            random = torch.Generator().manual_seed(0)
            signs = torch.randint(0, 2, output.shape, generator=random).to(output.device) * 2 - 1
            return (output.float() * (1 + unit * signs)).to(output.dtype)

        handle = embeddings_of(self.model).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def first_module(
        self, sequences: Sequences, documents: slice, inputs_of: InputsOf, row: int, tokens: slice
    ) -> str:
        """The first child of a layer, or module outside layers, that an exchange changes."""
        before = self._output_hashes(inputs_of(sequences), row, tokens)
        after = self._output_hashes(inputs_of(exchanged(sequences, documents)), row, tokens)
        for name, bits in before.items():
            if after.get(name) != bits:
                path = name.split(".")
                layer = next((n for n, part in enumerate(path) if part.isdecimal()), len(path))
                module = ".".join(path[: layer + 2])
                return f"{module} ({type(self.model.get_submodule(module)).__name__})"
        return type(self.model).__name__

    def _output_hashes(self, inputs: ModelInputs, row: int, tokens: slice) -> dict[str, int]:
        """A hash of each module's output at `tokens`, in the order of computation."""
        shape, hashes = tuple(inputs["input_ids"].shape), {}

        def hook_of(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: object, output: object) -> None:
                value = output_of(output)
                if isinstance(value, Tensor) and tuple(value.shape[:2]) == shape:
                    hashes[name] = hash(bits_of(value[row, tokens]).cpu().numpy().tobytes())

            return hook

        modules = [(name, module) for name, module in self.model.named_modules() if name]
        handles = [module.register_forward_hook(hook_of(name)) for name, module in modules]
        try:
            with torch.no_grad():
                self.model(**inputs, **forward_options(self.model))
        finally:
            for handle in handles:
                handle.remove()
        return hashes


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits_of(a), bits_of(b))


def change(x_LW: Float[Tensor, "L W"], other_LW: Float[Tensor, "L W"]) -> float:
    """The largest change of a token's values, as a fraction of the mean norm of tokens."""
    x_LW, other_LW = (x.double().nan_to_num(0, 0, 0) for x in (x_LW, other_LW))
    return float((other_LW - x_LW).norm(dim=1).max() / x_LW.norm(dim=1).mean().clamp_min(1e-300))
