"""How fast, how lean and how exact the back ends are on this machine, on the same tensors.

B rows in a batch, D input width, M latents, K pursuit steps.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from mptrain.batches import resolve_device
from mptrain.checkpoint import load_coder
from mptrain.coder import Code, Coder
from mptrain.config import BenchConfig
from mptrain.evaluate import sides_of
from mptrain.loader import Loader, open_store
from mptrain.loss import batch_fvu, reconstruction_loss
from mptrain.pursuit.rule import argmax
from mptrain.recipe import CoderConfig
from mptrain.sparse import sparse_decode


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One way to code the rows; ratios are to `direct`, medians over alternating repeats."""

    method: str
    encode_seconds: float
    "codes without gradients; building a Gram matrix counted"
    encode_ratio: float
    "how often that goes into what direct takes"
    train_seconds: float | None
    "forward, loss and backward, without the optimizer"
    train_ratio: float | None
    same_atoms: float | None
    "share of direct's atoms that were chosen too, each row on its own, in any order"
    fvu_change: float | None
    "relative to direct"
    saved_bytes: int | None
    "what autograd keeps for the backward pass, parameters and the rows themselves excluded"
    peak_bytes: int | None
    "most memory in use above what was in use before, forward and backward"


def bench(config: BenchConfig) -> list[Measurement]:
    """Measure all methods; `direct` is the first one."""
    x_BD, coder = make_tensors(config)
    methods = {**_coders(config, coder), "bare products": coder, "topk": _topk(coder)}
    encoders: dict[str, Callable[[], object]] = {
        name: partial(_encode, one, x_BD) for name, one in methods.items()
    }
    encoders["bare products"] = partial(_bare_products, x_BD - coder.b_D, coder)
    trainings: dict[str, Callable[[], object]] = {
        name: partial(_forward_backward, one, x_BD)
        for name, one in methods.items()
        if name != "bare products"
    }
    encode = _seconds(encoders, config.repeats, x_BD.device)
    train = _seconds(trainings, config.repeats, x_BD.device)
    exact = _encode(coder, x_BD)
    return [_measurement(name, one, x_BD, exact, encode, train) for name, one in methods.items()]


def make_tensors(config: BenchConfig) -> tuple[Tensor, Coder]:
    """Rows and the `direct` coder: of a trained coder and a store, or planted."""
    device = resolve_device(config.device)
    if config.coder is not None:
        assert config.store is not None
        x_BD, coder = _stored(Path(config.coder), Path(config.store), config)
    else:
        coder = _new_coder(config)
        x_BD = planted_rows(coder.decoder_ME.detach(), config)
    return x_BD.to(device), coder.to(device)


def planted_rows(W_MD: Tensor, config: BenchConfig) -> Tensor:
    """Sums of `active` random atoms a row, values uniform in [0.1, 1.1], with Gaussian noise."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.rows, config.active or config.k)
    idx_BL = torch.randint(len(W_MD), shape, generator=generator)
    val_BL = 0.1 + torch.rand(shape, generator=generator)
    x_BD = sparse_decode(idx_BL, val_BL, W_MD)
    rms = x_BD.square().mean().sqrt()
    return x_BD + config.noise * rms * torch.randn(x_BD.shape, generator=generator)


def _new_coder(config: BenchConfig) -> Coder:
    one = CoderConfig(
        hookpoint="bench", kind="sae", arch="mp", k=config.k, backend="direct",
        expansion=config.latents // config.width,
    )  # fmt: skip
    coder = Coder(one, config.width, config.width)
    zero_D = torch.zeros(config.width)
    coder.initialise_(zero_D, zero_D, torch.Generator().manual_seed(config.seed))
    return coder


def _stored(folder: Path, store: Path, config: BenchConfig) -> tuple[Tensor, Coder]:
    coder, _ = load_coder(folder)
    if coder.config.arch != "mp" or coder.config.codes != "mp":
        raise ValueError(f"{folder} holds no coder of plain matching pursuit; name one that is")
    source, _ = sides_of(coder.config)
    with Loader(
        open_store(store), (source,), "validation", batch_rows=config.rows, seed=config.seed,
        device=torch.device("cpu"),
    ) as loader:  # fmt: skip
        rows = next(iter(loader.one_pass(config.rows))).values[source]
    exact = {"backend": "direct", "kind": "sae", "k": config.k}
    direct = Coder(_plain(coder.config, exact), len(coder.b_D), len(coder.b_D))
    own = {name: p for name, p in coder.state_dict().items() if name in direct.state_dict()}
    direct.load_state_dict(own)
    return rows.float(), direct


def _plain(config: CoderConfig, changes: dict[str, object]) -> CoderConfig:
    kept = {name: getattr(config, name) for name in ("hookpoint", "arch", "expansion")}
    return CoderConfig(**{**kept, **changes})


def _coders(config: BenchConfig, direct: Coder) -> dict[str, Coder]:
    short: dict[str, str | int] = {
        "backend": "shortlist",
        "shortlist_size": config.shortlist_size,
        "shortlist_refresh": config.shortlist_refresh,
    }
    return {
        "direct": direct,
        "gram": _like(direct, {"backend": "gram"}),
        "shortlist": _like(direct, short),
        "shortlist bfloat16": _like(direct, {**short, "score_dtype": "bfloat16"}),
    }


def _like(coder: Coder, changes: dict[str, str | int]) -> Coder:
    """The same parameters under another config."""
    other = Coder(replace(coder.config, **changes), len(coder.b_D), len(coder.b_D))  # type: ignore[arg-type]
    other.load_state_dict(coder.state_dict(), assign=True)
    return other


def _topk(coder: Coder) -> Coder:
    """A TopK SAE of the same size, to compare with."""
    config = replace(coder.config, arch="topk", backend="auto")
    other = Coder(config, len(coder.b_D), len(coder.b_D))
    zero_D = torch.zeros(len(coder.b_D))
    other.initialise_(zero_D, zero_D, torch.Generator().manual_seed(0))
    return other.to(coder.b_D.device)


@torch.no_grad()
def _encode(coder: Coder, x_BD: Tensor) -> Code:
    return coder.encode(x_BD)


@torch.no_grad()
def _bare_products(x_BD: Tensor, coder: Coder) -> None:
    """What `direct` cannot do without: K products with the dictionary, and their argmax."""
    W_MD, rows = coder.decoder_ME, max(1, (1 << 21) // coder.latents)
    for x_bD in torch.split(x_BD, rows):
        score_bM = x_bD.new_empty(len(x_bD), coder.latents)
        for _ in range(coder.config.k):
            argmax(torch.mm(x_bD, W_MD.T, out=score_bM))


def _forward_backward(coder: Coder, x_BD: Tensor) -> None:
    coder.zero_grad(set_to_none=True)
    _loss(coder, x_BD).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it


def _loss(coder: Coder, x_BD: Tensor) -> Tensor:
    return reconstruction_loss(x_BD, coder(x_BD), 1.0)


def _seconds(
    calls: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call, all methods in turn; a first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            _synchronise(device)
            began = time.perf_counter()
            call()
            _synchronise(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: all_of[1:] for name, all_of in seconds.items()}


def _measurement(
    name: str,
    coder: Coder,
    x_BD: Tensor,
    exact: Code,
    encode: dict[str, list[float]],
    train: dict[str, list[float]],
) -> Measurement:
    trains, pursues = name in train, coder.W_MD is not None and name != "bare products"
    code = _encode(coder, x_BD) if pursues else None
    return Measurement(
        method=name,
        encode_seconds=median(encode[name]),
        encode_ratio=_ratio(encode["direct"], encode[name]),
        train_seconds=median(train[name]) if trains else None,
        train_ratio=_ratio(train["direct"], train[name]) if trains else None,
        same_atoms=None if code is None else same_atoms(exact.idx_BK, code.idx_BK, coder.latents),
        fvu_change=None if code is None else _fvu(x_BD, code) / _fvu(x_BD, exact) - 1,
        saved_bytes=saved_bytes(coder, x_BD) if trains else None,
        peak_bytes=_peak_bytes(coder, x_BD) if trains else None,
    )


def _ratio(base: Sequence[float], other: Sequence[float]) -> float:
    return median(a / b for a, b in zip(base, other, strict=True))


def _fvu(x_BD: Tensor, code: Code) -> float:
    assert code.residual_BD is not None
    return float(batch_fvu(x_BD, x_BD - code.residual_BD))


def same_atoms(idx_BK: Tensor, other_BK: Tensor, latents: int) -> float:
    """Share of the atoms of the first codes that are in the second too, as often."""
    counts = [
        torch.zeros(len(idx), latents + 1, device=idx.device).scatter_add_(
            1, idx + 1, torch.ones_like(idx, dtype=torch.float32)
        )[:, 1:]
        for idx in (idx_BK, other_BK)
    ]
    return float(torch.minimum(*counts).sum() / counts[0].sum())


def saved_bytes(coder: Coder, x_BD: Tensor) -> int:
    """Bytes that a forward pass leaves for the backward pass."""
    given = {t.untyped_storage().data_ptr() for t in (x_BD, *coder.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _loss(coder, x_BD)
    del loss
    return sum(kept.values())


def _peak_bytes(coder: Coder, x_BD: Tensor) -> int | None:
    if x_BD.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(x_BD.device)
        before = torch.cuda.memory_allocated(x_BD.device)
        _forward_backward(coder, x_BD)
        return torch.cuda.max_memory_allocated(x_BD.device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the peak starts again from what is in use
    except OSError:
        return None
    before = _kilobytes(status.read_text(), "VmRSS")
    _forward_backward(coder, x_BD)
    return 1024 * (_kilobytes(status.read_text(), "VmHWM") - before)


def _kilobytes(status: str, name: str) -> int:
    return int(status.split(f"{name}:")[1].split()[0])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
