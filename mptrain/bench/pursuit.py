"""How fast, how lean and how exact the back ends are on this machine, on the same tensors, beside
other tools where they are installed.

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
from mptrain.bench.measure import Codes, Method, peak_bytes, saved_bytes, seconds
from mptrain.bench.peers import find_peers
from mptrain.coders.checkpoint import load_coder
from mptrain.coders.coder import Coder
from mptrain.coders.fvu import batch_fvu, reconstruction_loss
from mptrain.config.architectures import Arch
from mptrain.config.coder import CoderConfig
from mptrain.config.run import BenchConfig
from mptrain.data.loader import Loader, open_store
from mptrain.evals.evaluate import sides_of
from mptrain.kernels.device import resolve_device
from mptrain.kernels.sparse import sparse_decode
from mptrain.pursuit import numba_backend as cpu
from mptrain.pursuit.rule import argmax


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One way to code the rows; ratios are to `direct`, medians over alternating repeats."""

    method: str
    rows: int
    "the first so many of all; ratios and changes are to `direct` on the same"
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


@dataclass(frozen=True, kw_only=True)
class Report:
    """All measurements, `direct` the first on each number of rows."""

    methods: list[Measurement]
    absent: dict[str, str]
    "other tools that were not measured, and why"


def bench(config: BenchConfig) -> Report:
    """Measure our methods on all rows, then beside other tools on the first `peer_rows`.

    Fewer rows, because these tools keep every step of the pursuit, some of them `[rows, latents]`.
    """
    x_BD, coder = make_tensors(config)
    ours, bare = _our_methods(config, coder), _bare_method(coder)
    tensors = coder.decoder_ME.detach(), coder.b_D.detach()
    peers, absent = find_peers(config.peers, *tensors, config.k)
    groups = [([*ours, bare], x_BD)]
    if peers and len(x_BD) <= config.peer_rows:
        groups = [([*ours, *peers, bare], x_BD)]
    elif peers:
        groups.append(([*ours, *peers], x_BD[: config.peer_rows]))
    found = [one for group, rows_BD in groups for one in _measure(group, rows_BD, coder, config)]
    return Report(methods=found, absent=absent)


def make_tensors(config: BenchConfig) -> tuple[Tensor, Coder]:
    """Rows and the `direct` coder: of a trained coder and a store, or planted."""
    device = resolve_device(config.device)
    if config.coder is not None:
        assert config.store is not None
        x_BD, coder = _stored(Path(config.coder), config.store, config)
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


def _stored(folder: Path, store: str, config: BenchConfig) -> tuple[Tensor, Coder]:
    coder, _ = load_coder(folder)
    one = coder.config
    plain = (one.arch, one.codes, one.blocks, one.select, one.subtract, one.free_norm)
    if plain != ("mp", "mp", "none", "positive", "selecting", False):
        raise UsageError(f"{folder} holds no coder of plain matching pursuit; name one that is")
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
    kept = {name: getattr(config, name) for name in ("hookpoint", "arch", "expansion", "latents")}
    return CoderConfig(**{**kept, **changes})


def _our_methods(config: BenchConfig, direct: Coder) -> list[Method]:
    short: dict[str, str | int] = {
        "backend": "shortlist",
        "shortlist_size": config.shortlist_size,
        "shortlist_refresh": config.shortlist_refresh,
    }
    coders = {
        "direct": direct,
        "gram": _like(direct, {"backend": "gram"}),
        "gram bfloat16": _like(direct, {"backend": "gram", "score_dtype": "bfloat16"}),
        "shortlist": _like(direct, short),
        "shortlist bfloat16": _like(direct, {**short, "score_dtype": "bfloat16"}),
        "topk": _one_shot(direct, "topk"),
    }
    if direct.latents % direct.config.k == 0:
        coders["groupmax"] = _one_shot(direct, "groupmax")
    return [_ours(name, coder) for name, coder in coders.items()]


def _like(coder: Coder, changes: dict[str, str | int]) -> Coder:
    """The same parameters under another config."""
    other = Coder(replace(coder.config, **changes), len(coder.b_D), len(coder.b_D))  # type: ignore[arg-type]
    other.load_state_dict(coder.state_dict(), assign=True)
    return other


def _one_shot(coder: Coder, arch: Arch) -> Coder:
    """An SAE with the dictionary as encoder and decoder."""
    other = Coder(replace(coder.config, arch=arch, backend="auto"), len(coder.b_D), len(coder.b_D))
    other = other.to(coder.b_D.device)
    W_MD = coder.decoder_ME.detach()
    same = {"b_D": coder.b_D.detach(), "encoder_MD": W_MD, "V_ME": W_MD}
    other.load_state_dict({**other.state_dict(), **same})
    return other


def _ours(name: str, coder: Coder) -> Method:
    def encode(x_BD: Tensor) -> Codes:
        code = coder.encode(x_BD)
        return code.idx_BK, code.val_BK

    return Method(
        name=name,
        encode=encode,
        loss=lambda x_BD: reconstruction_loss(x_BD, coder(x_BD), 1.0),
        parameters=tuple(coder.parameters()),
        pursues=coder.W_MD is not None,
    )


def _bare_method(coder: Coder) -> Method:
    """What `direct` cannot do without: K products with the dictionary, and their argmax."""

    def encode(x_BD: Tensor) -> None:
        W_MD, rows = coder.decoder_ME, max(1, (1 << 21) // coder.latents)
        for x_bD in torch.split(x_BD, rows):
            score_bM = x_bD.new_empty(len(x_bD), coder.latents)
            for _ in range(coder.config.k):
                argmax(torch.mm(x_bD, W_MD.T, out=score_bM))

    return Method(name="bare products", encode=encode, loss=None, parameters=(), pursues=False)


def _measure(
    methods: Sequence[Method], x_BD: Tensor, direct: Coder, config: BenchConfig
) -> list[Measurement]:
    encoders = {one.name: partial(_encode, one, x_BD) for one in methods}
    trainings = {one.name: partial(_train, one, x_BD) for one in methods if one.loss}
    encode = seconds(encoders, config.repeats, x_BD.device)
    train = seconds(trainings, config.repeats, x_BD.device)
    exact = _encode(methods[0], x_BD)
    assert exact is not None
    return [_measurement(one, x_BD, direct, exact, encode, train) for one in methods]


def _measurement(
    method: Method,
    x_BD: Tensor,
    direct: Coder,
    exact: Codes,
    encode: dict[str, list[float]],
    train: dict[str, list[float]],
) -> Measurement:
    name, loss = method.name, method.loss
    codes = _encode(method, x_BD) if method.pursues else None
    fvu_change = (
        None if codes is None else _fvu(x_BD, codes, direct) / _fvu(x_BD, exact, direct) - 1
    )
    return Measurement(
        method=name,
        rows=len(x_BD),
        encode_seconds=median(encode[name]),
        encode_ratio=_ratio(encode["direct"], encode[name]),
        train_seconds=median(train[name]) if loss else None,
        train_ratio=_ratio(train["direct"], train[name]) if loss else None,
        same_atoms=None if codes is None else same_atoms(exact, codes, direct.latents),
        fvu_change=fvu_change,
        saved_bytes=saved_bytes(partial(loss, x_BD), (x_BD, *method.parameters)) if loss else None,
        peak_bytes=_peak_bytes(method, x_BD) if loss else None,
    )


@torch.no_grad()
def _encode(method: Method, x_BD: Tensor) -> Codes | None:
    return method.encode(x_BD)


def _train(method: Method, x_BD: Tensor) -> None:
    """Forward, loss and backward."""
    assert method.loss is not None
    for parameter in method.parameters:
        parameter.grad = None
    method.loss(x_BD).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it


def _peak_bytes(method: Method, x_BD: Tensor) -> int | None:
    cpu.free_room()  # of earlier methods: this one is to pay for its own
    return peak_bytes(partial(_train, method, x_BD), x_BD.device)


def _ratio(base: Sequence[float], other: Sequence[float]) -> float:
    return median(a / b for a, b in zip(base, other, strict=True))


@torch.no_grad()
def _fvu(x_BD: Tensor, codes: Codes, coder: Coder) -> float:
    W_MD = coder.decoder_ME
    coded_BD = codes @ W_MD if isinstance(codes, Tensor) else sparse_decode(*codes, W_MD)
    return float(batch_fvu(x_BD, coder.b_D + coded_BD))


def same_atoms(codes: Codes, others: Codes, latents: int) -> float:
    """Share of the atoms of the first codes that are in the second too.

    Each counts as often as it was chosen; dense codes tell only that it was.
    """
    counts_BM, others_BM = _counts(codes, latents), _counts(others, latents)
    if isinstance(others, Tensor):
        counts_BM = counts_BM.clamp(max=1)
    return float(torch.minimum(counts_BM, others_BM).sum() / counts_BM.sum())


def _counts(codes: Codes, latents: int) -> Tensor:
    if isinstance(codes, Tensor):
        return (codes != 0).float()
    idx_BK, _ = codes
    counts_BM = torch.zeros(len(idx_BK), latents + 1, device=idx_BK.device)
    return counts_BM.scatter_add_(1, idx_BK + 1, torch.ones_like(idx_BK, dtype=torch.float32))[
        :, 1:
    ]
