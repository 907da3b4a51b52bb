"""Speed, memory and exactness of the pursuit's back ends on this machine, on the same tensors.

B rows in a batch, D input width, M latents, K pursuit steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from mpcache.errors import UsageError
from mptrain.bench.config import PursuitBenchConfig
from mptrain.bench.measure import (
    CodeTensors,
    CodingMethod,
    Progress,
    median_ratio,
    peak_bytes,
    saved_bytes,
    silent,
    time_calls,
)
from mptrain.coders.checkpoint import load_coder
from mptrain.coders.coder import Coder
from mptrain.coders.fvu import batch_fvu, reconstruction_loss
from mptrain.config.architectures import Arch
from mptrain.config.coder import CoderConfig
from mptrain.config.sides import hookpoint_sides
from mptrain.data.loader import Loader, open_store
from mptrain.kernels.device import resolve_device
from mptrain.kernels.sparse import sparse_decode
from mptrain.pursuit import numba_backend
from mptrain.pursuit.rule import argmax


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One method that codes the rows; ratios and changes compare with `direct` on the same rows."""

    method: str
    rows: int
    encode_seconds: float
    "codes without gradients, including the Gram matrix; median over the rounds"
    encode_ratio: float
    "encode_seconds of direct / encode_seconds, median over the rounds"
    train_seconds: float | None
    "forward pass, loss and backward pass, without the optimizer"
    train_ratio: float | None
    same_atoms: float | None
    "share of the atoms chosen by direct that this method chose too, in any order, per row"
    fvu_change: float | None
    "FVU / FVU of direct - 1"
    saved_bytes: int | None
    "memory that autograd keeps for the backward pass, without parameters and rows"
    peak_bytes: int | None
    "peak memory of forward and backward pass, above the memory in use before"


@dataclass(frozen=True, kw_only=True)
class PursuitReport:
    """All measurements; `direct` is the first."""

    methods: list[Measurement]


def bench_pursuit(config: PursuitBenchConfig, progress: Progress = silent) -> PursuitReport:
    """Measure the package's back ends and coders on this machine."""
    x_BD, coder = make_tensors(config)
    methods = [*own_methods(config, coder), bare_products(coder)]
    return PursuitReport(methods=measure_methods(methods, x_BD, coder, config.repeats, progress))


def make_tensors(config: PursuitBenchConfig) -> tuple[Tensor, Coder]:
    """Rows `[rows, width]` and a `direct` coder: random ones, or a trained coder and held-out rows.

    Raises:
        UsageError: the trained coder is not plain matching pursuit.
    """
    device = resolve_device(config.device)
    if config.coder is not None:
        assert config.store is not None
        x_BD, coder = _trained_coder_and_rows(Path(config.coder), config.store, config)
    else:
        coder = _new_coder(config)
        x_BD = random_rows(coder.decoder_ME.detach(), config)
    return x_BD.to(device), coder.to(device)


_NOISE = 0.05  # as a share of the rows' root mean square


def random_rows(W_MD: Tensor, config: PursuitBenchConfig) -> Tensor:
    """Rows that are sums of `k` random atoms, values uniform in [0.1, 1.1], plus noise."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.rows, config.k)
    idx_BK = torch.randint(len(W_MD), shape, generator=generator)
    val_BK = 0.1 + torch.rand(shape, generator=generator)
    x_BD = sparse_decode(idx_BK, val_BK, W_MD)
    rms = x_BD.square().mean().sqrt()
    return x_BD + _NOISE * rms * torch.randn(x_BD.shape, generator=generator)


def _new_coder(config: PursuitBenchConfig) -> Coder:
    coder_config = CoderConfig(
        **hookpoint_sides("bench", "sae"), kind="sae", arch="mp", k=config.k, backend="direct",
        expansion=config.latents // config.width,
    )  # fmt: skip
    coder = Coder(coder_config, config.width, config.width)
    zero_D = torch.zeros(config.width)
    coder.initialise_(zero_D, zero_D, torch.Generator().manual_seed(config.seed))
    return coder


def _trained_coder_and_rows(
    folder: Path, store: str, config: PursuitBenchConfig
) -> tuple[Tensor, Coder]:
    coder, _ = load_coder(folder)
    if not _is_plain_pursuit(coder.config):
        raise UsageError(
            f"the coder in {folder} is not plain matching pursuit; give a coder trained with "
            "--arch mp and without variants"
        )
    source, _ = coder.config.sides
    with Loader(
        open_store(store), (source,), "validation", batch_rows=config.rows, seed=config.seed,
        device=torch.device("cpu"),
    ) as loader:  # fmt: skip
        rows = next(iter(loader.one_pass(config.rows))).values[source]
    direct_config = CoderConfig(
        inputs=coder.config.inputs, targets=coder.config.inputs, kind="sae", arch="mp",
        k=config.k, backend="direct",
        expansion=coder.config.expansion, latents=coder.config.latents,
    )  # fmt: skip
    direct = Coder(direct_config, len(coder.b_D), len(coder.b_D))
    # a transcoder has parameters that an SAE lacks
    shared = {name: p for name, p in coder.state_dict().items() if name in direct.state_dict()}
    direct.load_state_dict(shared)
    return rows.float(), direct


def _is_plain_pursuit(config: CoderConfig) -> bool:
    variant = (config.codes, config.blocks, config.select, config.subtract, config.free_norm)
    return config.arch == "mp" and variant == ("mp", "none", "positive", "selecting", False)


def own_methods(config: PursuitBenchConfig, direct: Coder) -> list[CodingMethod]:
    """All back ends of the pursuit, and the coders without one, with the dictionary of `direct`."""
    short: dict[str, str | int] = {
        "backend": "shortlist",
        "shortlist_size": config.shortlist_size,
        "shortlist_refresh": config.shortlist_refresh,
    }
    coders = {
        "direct": direct,
        "gram": _with_config(direct, {"backend": "gram"}),
        "gram bfloat16": _with_config(direct, {"backend": "gram", "score_dtype": "bfloat16"}),
        "shortlist": _with_config(direct, short),
        "shortlist bfloat16": _with_config(direct, {**short, "score_dtype": "bfloat16"}),
        "topk": _linear_coder(direct, "topk"),
    }
    if direct.latents % direct.k == 0:
        coders["groupmax"] = _linear_coder(direct, "groupmax")
    return [_method_of(name, coder) for name, coder in coders.items()]


def _with_config(coder: Coder, changes: dict[str, str | int]) -> Coder:
    """The same parameters under another config."""
    other = Coder(replace(coder.config, **changes), len(coder.b_D), len(coder.b_D))  # type: ignore[arg-type]
    other.load_state_dict(coder.state_dict(), assign=True)
    return other


def _linear_coder(coder: Coder, arch: Arch) -> Coder:
    """An SAE with the dictionary as encoder and decoder."""
    other = Coder(replace(coder.config, arch=arch, backend="auto"), len(coder.b_D), len(coder.b_D))
    other = other.to(coder.b_D.device)
    W_MD = coder.decoder_ME.detach()
    same = {"b_D": coder.b_D.detach(), "encoder.encoder_MD": W_MD, "decoder.V_ME": W_MD}
    other.load_state_dict({**other.state_dict(), **same})
    return other


def _method_of(name: str, coder: Coder) -> CodingMethod:
    def encode(x_BD: Tensor) -> CodeTensors:
        code = coder.encode(x_BD)
        return code.idx_BK, code.val_BK

    return CodingMethod(
        name=name,
        encode=encode,
        loss=lambda x_BD: reconstruction_loss(x_BD, coder(x_BD), 1.0),
        parameters=tuple(coder.parameters()),
        is_pursuit=coder.config.architecture.is_pursuit,
    )


def bare_products(coder: Coder) -> CodingMethod:
    """The least work of `direct`: K products of rows and dictionary, and their argmax."""

    def encode(x_BD: Tensor) -> None:
        W_MD, rows = coder.decoder_ME, max(1, (1 << 21) // coder.latents)
        for x_bD in torch.split(x_BD, rows):
            score_bM = x_bD.new_empty(len(x_bD), coder.latents)
            for _ in range(coder.k):
                argmax(torch.mm(x_bD, W_MD.T, out=score_bM))

    return CodingMethod(
        name="bare products", encode=encode, loss=None, parameters=(), is_pursuit=False
    )


def measure_methods(
    methods: Sequence[CodingMethod],
    x_BD: Tensor,
    direct: Coder,
    repeats: int,
    progress: Progress = silent,
) -> list[Measurement]:
    """Measure methods on the same rows; the first method is `direct`."""
    encoders = {f"encode, {m.name}": partial(_encode, m, x_BD) for m in methods}
    trainings = {f"train, {m.name}": partial(_train, m, x_BD) for m in methods if m.loss}
    encode = time_calls(encoders, repeats, x_BD.device, progress)
    train = time_calls(trainings, repeats, x_BD.device, progress)
    exact = _encode(methods[0], x_BD)
    assert exact is not None
    return [_measurement(method, x_BD, direct, exact, encode, train) for method in methods]


def _measurement(
    method: CodingMethod,
    x_BD: Tensor,
    direct: Coder,
    exact: CodeTensors,
    encode: dict[str, list[float]],
    train: dict[str, list[float]],
) -> Measurement:
    name, loss = method.name, method.loss
    codes = _encode(method, x_BD) if method.is_pursuit else None
    fvu_change = (
        None if codes is None else _fvu(x_BD, codes, direct) / _fvu(x_BD, exact, direct) - 1
    )
    return Measurement(
        method=name,
        rows=len(x_BD),
        encode_seconds=median(encode[f"encode, {name}"]),
        encode_ratio=median_ratio(encode["encode, direct"], encode[f"encode, {name}"]),
        train_seconds=median(train[f"train, {name}"]) if loss else None,
        train_ratio=median_ratio(train["train, direct"], train[f"train, {name}"]) if loss else None,
        same_atoms=None if codes is None else same_atoms(exact, codes, direct.latents),
        fvu_change=fvu_change,
        saved_bytes=saved_bytes(partial(loss, x_BD), (x_BD, *method.parameters)) if loss else None,
        peak_bytes=_peak_bytes(method, x_BD) if loss else None,
    )


@torch.no_grad()
def _encode(method: CodingMethod, x_BD: Tensor) -> CodeTensors | None:
    return method.encode(x_BD)


def _train(method: CodingMethod, x_BD: Tensor) -> None:
    """Forward pass, loss and backward pass."""
    assert method.loss is not None
    for parameter in method.parameters:
        parameter.grad = None
    method.loss(x_BD).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it


def _peak_bytes(method: CodingMethod, x_BD: Tensor) -> int | None:
    numba_backend.free_room()  # buffers of earlier methods would hide the peak of this one
    return peak_bytes(partial(_train, method, x_BD), x_BD.device)


@torch.no_grad()
def _fvu(x_BD: Tensor, codes: CodeTensors, coder: Coder) -> float:
    W_MD = coder.decoder_ME
    coded_BD = codes @ W_MD if isinstance(codes, Tensor) else sparse_decode(*codes, W_MD)
    return float(batch_fvu(x_BD, coder.b_D + coded_BD))


def same_atoms(codes: CodeTensors, others: CodeTensors, latents: int) -> float:
    """Share of the atoms of the first codes that are also in the second codes of the same row.

    An atom counts as often as it was chosen; in dense codes, which do not say how often, once.
    """
    counts_BM, others_BM = _counts(codes, latents), _counts(others, latents)
    if isinstance(others, Tensor):
        counts_BM = counts_BM.clamp(max=1)
    return float(torch.minimum(counts_BM, others_BM).sum() / counts_BM.sum())


def _counts(codes: CodeTensors, latents: int) -> Tensor:
    if isinstance(codes, Tensor):
        return (codes != 0).float()
    idx_BK, _ = codes
    counts_BM = torch.zeros(len(idx_BK), latents + 1, device=idx_BK.device)
    ones_BK = torch.ones_like(idx_BK, dtype=torch.float32)
    return counts_BM.scatter_add_(1, idx_BK + 1, ones_BK)[:, 1:]  # index -1 marks an unused step
