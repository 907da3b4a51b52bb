"""Other tools' coders with the parameters of ours, where these tools are installed.

B rows in a batch, D input width, M latents. Each adapter takes the dictionary `W_MD`, the bias
`b_D` and `k`; rows are coded in float32 unless stated. None of these tools is a dependency.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mptrain.bench.measure import Method
from mptrain.coders.fvu import reconstruction_loss


def saelens_mp(W_MD: Tensor, b_D: Tensor, k: int) -> Method:
    """SAELens' matching pursuit in training, with dense codes. No row stops before `k` steps."""
    sae_lens = _imported("sae_lens")
    M, D = W_MD.shape
    config = sae_lens.MatchingPursuitTrainingSAEConfig(
        d_in=D, d_sae=M, device=str(W_MD.device), decoder_init_norm=1.0,
        max_iterations=k, residual_threshold=0.0, stop_on_duplicate_support=False,
    )  # fmt: skip
    sae = sae_lens.MatchingPursuitTrainingSAE(config)
    _copy_(sae, W_dec=W_MD, b_dec=b_D)
    return Method(
        name=f"SAELens {version('sae-lens')} mp",
        encode=sae.encode,
        loss=lambda x_BD: reconstruction_loss(x_BD, sae(x_BD), 1.0),
        parameters=tuple(sae.parameters()),
        pursues=True,
    )


def overcomplete_mp(W_MD: Tensor, b_D: Tensor, k: int) -> Method:
    """overcomplete's matching pursuit, with dense codes.

    It has no bias, so it is given rows less ours. A step without a positive score takes its atom
    with a negative value, where ours stops. Every forward pass scales the atoms to unit norm.
    """
    M, D = W_MD.shape
    # its constructor warns of tensors; it copies the array
    dictionary = {"initializer": W_MD.detach().cpu().numpy()}
    sae = _overcomplete_sae().MpSAE(
        D, M, k=k, dictionary_params=dictionary, device=str(W_MD.device)
    )
    return Method(
        name=f"overcomplete {version('overcomplete')} mp",
        encode=lambda x_BD: sae.encode(x_BD - b_D)[1],
        loss=lambda x_BD: reconstruction_loss(x_BD - b_D, sae(x_BD - b_D)[2], 1.0),
        parameters=tuple(sae.parameters()),
        pursues=True,
    )


def sparsify_topk(W_MD: Tensor, b_D: Tensor, k: int) -> Method:
    """sparsify's TopK with its fused encoder, `W_MD` as encoder and decoder; its loss is an FVU.

    On GPUs it computes in bfloat16 where they can.
    """
    if W_MD.device.type == "cpu":
        # its decoder for GPUs would be taken wherever triton is installed
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    sparsify = _imported("sparsify")
    M, D = W_MD.shape
    config = sparsify.SparseCoderConfig(activation="topk", num_latents=M, k=k)
    coder = sparsify.SparseCoder(D, config, device=W_MD.device)
    _copy_(coder, **{"encoder.weight": W_MD, "W_dec": W_MD, "b_dec": b_D})

    def encode(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        code = coder.encode(x_BD)
        return code.top_indices, code.top_acts

    return Method(
        name=f"sparsify {version('eai-sparsify')} topk",
        encode=encode,
        loss=lambda x_BD: coder(x_BD).fvu,
        parameters=tuple(coder.parameters()),
        pursues=False,
    )


ADAPTERS: dict[str, Callable[[Tensor, Tensor, int], Method]] = {
    "sae-lens": saelens_mp,
    "overcomplete": overcomplete_mp,
    "eai-sparsify": sparsify_topk,
}
HOW_TO_INSTALL = "pip install 'mpcache[peers]' and pip install --no-deps overcomplete"


def saelens_reads(x_ND: Tensor, ctx_len: int, folder: Path) -> dict[str, Callable[[], int]]:
    """SAELens' reading of its own cache of rows, made in `folder`: in order, and mixed.

    Each gives the rows that it read. The cache is float32 in Arrow, as SAELens writes it.
    """
    store_type = _imported("sae_lens.training.activations_store").ActivationsStore
    sequences, width = len(x_ND) // ctx_len, x_ND.shape[1]
    _write_arrow(x_ND[: sequences * ctx_len].view(sequences, ctx_len, width), folder)

    def opened() -> Any:
        prompts = min(32, sequences)  # as the numbers below its default, in so far as they fit
        return store_type(
            model=None, dataset=None, streaming=False, hook_name="rows", hook_head_index=None,
            context_size=ctx_len, d_in=width, n_batches_in_buffer=20, total_training_tokens=0,
            store_batch_size_prompts=prompts, train_batch_size_tokens=min(4096, 20 * ctx_len),
            prepend_bos=False, normalize_activations="none", device=torch.device("cpu"),
            dtype="float32", cached_activations_path=str(folder),
        )  # fmt: skip

    def in_order() -> int:
        store = opened()
        batches = sequences // store.store_batch_size_prompts
        return sum(len(store.get_raw_llm_batch()[0]) for _ in range(batches))

    def mixed() -> int:
        store, read = opened(), 0
        with _quietly():  # it warns where its cache begins anew
            while read < sequences * ctx_len:
                read += len(next(store))
        return read

    name = f"SAELens {version('sae-lens')}"
    return {f"{name} in order": in_order, f"{name} mixed": mixed}


def _write_arrow(x_SLD: Tensor, folder: Path) -> None:
    from datasets import Array2D, Dataset, Features, disable_progress_bars, enable_progress_bars

    features = Features({"rows": Array2D(shape=tuple(x_SLD.shape[1:]), dtype="float32")})
    disable_progress_bars()
    Dataset.from_dict({"rows": x_SLD.float().numpy()}, features=features).save_to_disk(folder)
    enable_progress_bars()


def find_peers(
    names: Sequence[str], W_MD: Tensor, b_D: Tensor, k: int
) -> tuple[list[Method], dict[str, str]]:
    """The methods of these tools that can be used here, and why the others cannot."""
    found: list[Method] = []
    absent: dict[str, str] = {}
    for name in names:
        try:
            found.append(ADAPTERS[name](W_MD, b_D, k))
        except ModuleNotFoundError as error:
            absent[name] = f"there is no module {error.name}"
        # theirs to raise what they like: what is broken there must not keep ours from being timed
        except Exception as error:
            absent[name] = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return found, absent


def _imported(module: str) -> ModuleType:
    with _quietly():
        return import_module(module)


def _overcomplete_sae() -> ModuleType:
    """Its SAEs without the rest of the package, which needs torchvision and its vision models.

    torchvision from PyPI does not work beside a torch for CPUs, and then breaks transformers too.
    """
    spec = find_spec("overcomplete") if "overcomplete" not in sys.modules else None
    if spec is None:
        return _imported("overcomplete.sae")
    sys.modules["overcomplete"] = module_from_spec(spec)
    try:
        return _imported("overcomplete.sae")
    finally:
        del sys.modules["overcomplete"]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What a package says when imported is not for our output, nor an error."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def _copy_(module: torch.nn.Module, **values: Tensor) -> None:
    for name, value in values.items():
        module.get_parameter(name).copy_(value)
