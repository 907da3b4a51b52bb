"""Coders of other tools with the parameters of ours.

B rows in a batch, D input width, M latents. Each adapter takes the dictionary `W_MD`, the bias
`b_D` and `k`; rows are coded in float32 unless stated.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.tool_imports import import_quietly
from mptrain.bench.measure import CodingMethod
from mptrain.coders.fvu import reconstruction_loss

Adapter = Callable[[Tensor, Tensor, int], CodingMethod]


def saelens_mp(W_MD: Tensor, b_D: Tensor, k: int) -> CodingMethod:
    """SAELens' matching pursuit in training, with dense codes. No row stops before `k` steps."""
    sae_lens = import_quietly("sae_lens")
    M, D = W_MD.shape
    config = sae_lens.MatchingPursuitTrainingSAEConfig(
        d_in=D, d_sae=M, device=str(W_MD.device), decoder_init_norm=1.0,
        max_iterations=k, residual_threshold=0.0, stop_on_duplicate_support=False,
    )  # fmt: skip
    sae = sae_lens.MatchingPursuitTrainingSAE(config)
    _copy_(sae, W_dec=W_MD, b_dec=b_D)
    return CodingMethod(
        name=f"SAELens {version('sae-lens')} mp",
        encode=sae.encode,
        loss=lambda x_BD: reconstruction_loss(x_BD, sae(x_BD), 1.0),
        parameters=tuple(sae.parameters()),
        is_pursuit=True,
    )


def overcomplete_mp(W_MD: Tensor, b_D: Tensor, k: int) -> CodingMethod:
    """overcomplete's matching pursuit, with dense codes.

    It has no bias, so our bias is subtracted from its rows. Where no score is positive, it takes an
    atom with a negative value, and ours stops. Each forward pass scales the atoms to unit norm.
    """
    M, D = W_MD.shape
    # its constructor warns about tensors, and copies an array
    dictionary = {"initializer": W_MD.detach().cpu().numpy()}
    sae = overcomplete_sae().MpSAE(D, M, k=k, dictionary_params=dictionary, device=str(W_MD.device))
    return CodingMethod(
        name=f"overcomplete {version('overcomplete')} mp",
        encode=lambda x_BD: sae.encode(x_BD - b_D)[1],
        loss=lambda x_BD: reconstruction_loss(x_BD - b_D, sae(x_BD - b_D)[2], 1.0),
        parameters=tuple(sae.parameters()),
        is_pursuit=True,
    )


def sparsify_topk(W_MD: Tensor, b_D: Tensor, k: int) -> CodingMethod:
    """sparsify's TopK with its fused encoder, `W_MD` as encoder and decoder; its loss is an FVU.

    On GPUs that support bfloat16 it computes in bfloat16.
    """
    if W_MD.device.type == "cpu":
        # else it takes its GPU decoder wherever triton is installed
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    sparsify = import_quietly("sparsify")
    M, D = W_MD.shape
    config = sparsify.SparseCoderConfig(activation="topk", num_latents=M, k=k)
    coder = sparsify.SparseCoder(D, config, device=W_MD.device)
    _copy_(coder, **{"encoder.weight": W_MD, "W_dec": W_MD, "b_dec": b_D})

    def encode(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        code = coder.encode(x_BD)
        return code.top_indices, code.top_acts

    return CodingMethod(
        name=f"sparsify {version('eai-sparsify')} topk",
        encode=encode,
        loss=lambda x_BD: coder(x_BD).fvu,
        parameters=tuple(coder.parameters()),
        is_pursuit=False,
    )


ADAPTERS: dict[str, Adapter] = {
    "sae-lens": saelens_mp,
    "overcomplete": overcomplete_mp,
    "eai-sparsify": sparsify_topk,
}


def find_methods(
    tools: Sequence[str],
    W_MD: Tensor,
    b_D: Tensor,
    k: int,
    adapters: Mapping[str, Adapter] = ADAPTERS,
) -> tuple[list[CodingMethod], dict[str, str]]:
    """The methods of the tools that work on this machine, and the reasons why others do not."""
    methods: list[CodingMethod] = []
    absent: dict[str, str] = {}
    for name in tools:
        try:
            methods.append(adapters[name](W_MD, b_D, k))
        except ModuleNotFoundError as error:
            absent[name] = f"there is no module {error.name}"
        # a tool may raise any error, which must not keep the other tools from being measured
        except Exception as error:
            absent[name] = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return methods, absent


def overcomplete_sae() -> ModuleType:
    """The SAEs of overcomplete without the rest of the package, which imports torchvision.

    PyPI's torchvision does not work beside a torch for CPUs, and then breaks transformers too.
    """
    spec = find_spec("overcomplete") if "overcomplete" not in sys.modules else None
    if spec is None:
        return import_quietly("overcomplete.sae")
    sys.modules["overcomplete"] = module_from_spec(spec)
    try:
        return import_quietly("overcomplete.sae")
    finally:
        del sys.modules["overcomplete"]


@torch.no_grad()
def _copy_(module: torch.nn.Module, **values: Tensor) -> None:
    for name, value in values.items():
        module.get_parameter(name).copy_(value)
