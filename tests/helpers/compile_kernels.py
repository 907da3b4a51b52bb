"""Compiles every Triton kernel for the GPUs that are named, on any machine; a program of its own,
since Triton decides on its first import whether it compiles or interprets.

`python tests/helpers/compile_kernels.py 80 90` prints the largest shared memory of each, as JSON.
"""

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mptrain.kernels import sparse_triton
from mptrain.pursuit import triton_search
from mptrain.pursuit.triton_backward import pursue_backward
from mptrain.pursuit.triton_search import best_atoms, best_candidates
from mptrain.pursuit.triton_steps import gram_steps_, shortlist_steps_


class NoGpu:
    """The part of a driver that Triton needs before it launches a kernel."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(B: int, D: int, M: int, K: int, S: int) -> None:
    x_BD, W_MD, U_MD = torch.zeros(B, D), torch.zeros(M, D), torch.zeros(M, D)
    idx_BK, val_BK = torch.zeros(B, K, dtype=torch.int64), torch.zeros(B, K)
    stop_norm_B, G_MM = torch.zeros(B), torch.zeros(M, M)
    for dictionary_MD in (W_MD, W_MD.bfloat16()):
        best_atoms(x_BD, dictionary_MD)
        best_atoms(x_BD, dictionary_MD, "magnitude")
        candidate_BS = best_candidates(x_BD, dictionary_MD, S)
    best_atoms(x_BD, W_MD, precision="ieee")
    candidate_BS = torch.zeros_like(candidate_BS)
    code = idx_BK, val_BK, stop_norm_B
    shortlist_steps_(x_BD, candidate_BS, W_MD, W_MD, *code)
    shortlist_steps_(x_BD, candidate_BS, W_MD, U_MD, *code, "magnitude")
    shortlist_steps_(x_BD, candidate_BS, W_MD, U_MD, *code, "signed", G_MM=G_MM)
    gram_steps_(x_BD, torch.zeros(B, M), G_MM, W_MD, W_MD, *code)
    pursue_backward(idx_BK, val_BK, val_BK, x_BD, x_BD, W_MD, W_MD)
    pursue_backward(idx_BK, val_BK, val_BK, x_BD, x_BD, W_MD, U_MD, detach=True)
    sparse_triton.sparse_decode(idx_BK, val_BK, W_MD)
    sparse_triton.sparse_products(idx_BK, W_MD, x_BD)
    sparse_triton.latent_sums(idx_BK, val_BK, x_BD, M)


def shared_memory(capability: int) -> int:
    largest = 0

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        nonlocal largest
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        largest = max(largest, kernel.metadata.shared)

    triton.runtime.driver.set_active(NoGpu(capability))
    launch, JITFunction.run = JITFunction.run, compile_only
    tiles = triton_search._tiles
    triton_search._tiles = lambda *args: {**tiles(*args), "WIDEN": False}  # else as on a CPU
    try:
        compile_all(B=64, D=256, M=1024, K=32, S=128)
        compile_all(B=3, D=7, M=21, K=1, S=5)
    finally:
        JITFunction.run, triton_search._tiles = launch, tiles
    return largest


if __name__ == "__main__":
    sys.stdout.write(json.dumps({number: shared_memory(int(number)) for number in sys.argv[1:]}))
