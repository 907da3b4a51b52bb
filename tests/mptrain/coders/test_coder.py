"""Coders of every kind and architecture, and the measures of their predictions."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mptrain.coders.code import Code
from mptrain.coders.coder import Coder
from mptrain.coders.fvu import Fvu, batch_fvu, reconstruction_loss
from mptrain.config.architectures import ARCHITECTURES, Arch
from mptrain.config.coder import CoderConfig, Kind
from mptrain.config.sides import hookpoint_sides
from mptrain.pursuit.autograd import matching_pursuit
from mptrain.pursuit.batch_threshold import EntryThreshold
from tests.helpers import reference

KINDS: tuple[Kind, ...] = ("sae", "transcoder", "skip-transcoder")
ARCHS: tuple[Arch, ...] = ("mp", "batch-mp", "topk", "batch-topk", "groupmax")
ALL = list(itertools.product(KINDS, ARCHS))


def make_coder(kind: Kind, arch: Arch, D: int = 6, E: int = 4, k: int = 3) -> Coder:
    config = CoderConfig(**hookpoint_sides("h", kind), kind=kind, arch=arch, k=k, expansion=3)
    coder = Coder(config, D, D if kind == "sae" else E)
    generator = torch.Generator().manual_seed(0)
    width = D if kind == "sae" else E
    coder.initialise_(torch.full((D,), 0.5), torch.full((width,), 0.25), generator)
    return coder


def randomised(coder: Coder) -> Coder:
    """The coder with every parameter moved away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    coder.normalise_()
    return coder


@pytest.mark.parametrize(
    ("kind", "arch", "names"),
    [
        ("sae", "mp", "b_D encoder.W_MD"),
        ("transcoder", "mp", "b_D c_E encoder.W_MD decoder.V_ME"),
        ("skip-transcoder", "mp", "b_D c_E encoder.W_MD decoder.V_ME decoder.S_ED"),
        ("sae", "batch-mp", "b_D encoder.W_MD"),
        ("transcoder", "batch-mp", "b_D c_E encoder.W_MD decoder.V_ME"),
        ("sae", "topk", "b_D encoder.encoder_MD encoder.bias_M decoder.V_ME"),
        ("sae", "batch-topk", "b_D encoder.encoder_MD encoder.bias_M decoder.V_ME"),
        ("sae", "groupmax", "b_D encoder.encoder_MD encoder.bias_M decoder.V_ME"),
        ("transcoder", "topk", "b_D c_E encoder.encoder_MD encoder.bias_M decoder.V_ME"),
        (
            "skip-transcoder",
            "topk",
            "b_D c_E encoder.encoder_MD encoder.bias_M decoder.V_ME decoder.S_ED",
        ),
    ],
)
def test_parameters(kind: Kind, arch: Arch, names: str):
    assert [name for name, _ in make_coder(kind, arch).named_parameters()] == names.split()


@pytest.mark.parametrize(("kind", "arch"), ALL)
def test_start(kind: Kind, arch: Arch):
    coder, x_BD = make_coder(kind, arch), torch.randn(5, 6)
    first_MD = coder.encoder.dictionary_MD
    torch.testing.assert_close(first_MD.norm(dim=1), torch.ones(18))
    assert (coder.b_D == 0.5).all()
    if kind == "sae":
        assert torch.equal(coder.decoder_ME, first_MD)
    else:
        assert torch.equal(coder(x_BD), torch.full((5, 4), 0.25)), "at first, the mean target"


@pytest.mark.parametrize(("kind", "arch"), ALL)
def test_prediction_is_the_stated_sum(kind: Kind, arch: Arch):
    coder, x_BD = randomised(make_coder(kind, arch)), torch.randn(7, 6)
    code = coder.encode(x_BD)
    y_BE = reference.dense(code.idx_BK, code.val_BK, coder.latents) @ coder.decoder_ME
    y_BE = y_BE + coder.output_bias_E
    if coder.decoder.S_ED is not None:
        y_BE = y_BE + x_BD @ coder.decoder.S_ED.T
    torch.testing.assert_close(coder.decode(code, x_BD), y_BE, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(coder(x_BD), y_BE, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "arch"), ALL)
def test_every_parameter_learns(kind: Kind, arch: Arch):
    coder, x_BD = randomised(make_coder(kind, arch)), torch.randn(7, 6)
    coder(x_BD).square().sum().backward()
    for name, parameter in coder.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize(("kind", "arch"), ALL)
def test_bfloat16_rows_are_computed_in_float32(kind: Kind, arch: Arch):
    coder, x_BD = randomised(make_coder(kind, arch)), torch.randn(7, 6).bfloat16()
    y_BE = coder(x_BD)
    assert y_BE.dtype == torch.float32
    torch.testing.assert_close(y_BE, coder(x_BD.float()))
    y_BE.sum().backward()


@pytest.mark.parametrize("arch", ARCHS)
def test_more_entries_at_inference(arch: Arch):
    coder, x_BD = make_coder("sae", arch), torch.randn(7, 6)
    entries = {"batch-mp": 12, "batch-topk": 18}.get(arch, 6)
    assert coder.encode(x_BD, k=6).idx_BK.shape == (7, entries)
    with pytest.raises(ValueError, match=r"got k=19, latents=18"):
        coder.encode(x_BD, k=19)


def test_refuses_more_entries_than_latents_and_an_sae_of_two_widths():
    config = CoderConfig(
        inputs=("h:output",), targets=("h:output",), kind="sae", arch="mp", k=9, expansion=2
    )
    with pytest.raises(ValueError, match=r"got k=9, latents=8; use a smaller k"):
        Coder(config, 4, 4)
    with pytest.raises(ValueError, match="input_width=8, target_width=4; use kind=transcoder"):
        Coder(config, 8, 4)


@pytest.mark.parametrize(("kind", "arch"), ALL)
def test_unit_norm(kind: Kind, arch: Arch):
    coder = randomised(make_coder(kind, arch))
    coder(torch.randn(7, 6)).square().sum().backward()
    sizes = {name: p.grad.norm(dim=1) for name, p in coder.named_parameters() if p.ndim == 2}
    coder.project_gradient_()
    linear = ("decoder.V_ME",) if kind == "sae" else ()
    expected = ("encoder.W_MD",) if ARCHITECTURES[arch].is_pursuit else linear
    assert coder.unit_norm == expected
    for name in coder.unit_norm:
        rows = coder.get_parameter(name)
        assert rows.grad is not None
        # the remainder along an atom is the float32 rounding of the part removed
        assert ((rows.grad * rows).sum(1).abs() <= 1e-6 * sizes[name]).all()
        with torch.no_grad():
            rows.mul_(3.7)
        coder.normalise_()
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)), atol=3e-7, rtol=0)


def test_the_seed_decides_the_start():
    def first(seed: int) -> Tensor:
        coder = make_coder("sae", "mp")
        coder.initialise_(torch.zeros(6), torch.zeros(6), torch.Generator().manual_seed(seed))
        return coder.decoder_ME.detach().clone()

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_tolerance_and_backend_reach_the_pursuit():
    x_BD = torch.randn(50, 6)
    coder = make_coder("sae", "mp")
    loose = Coder(replace(coder.config, tolerance=0.9, backend="direct"), 6, 6)
    loose.load_state_dict(coder.state_dict())
    assert (loose.encode(x_BD).idx_BK == -1).any()
    assert (coder.encode(x_BD).idx_BK >= 0).all()


def test_loss_is_a_share_of_the_variance():
    y_BE = torch.randn(1000, 3)
    variance = float(y_BE.var(0, correction=0).sum())
    loss = reconstruction_loss(y_BE, y_BE.mean(0).expand_as(y_BE), variance)
    assert float(loss) == pytest.approx(1)
    assert float(batch_fvu(y_BE, y_BE.mean(0).expand_as(y_BE))) == pytest.approx(1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([0.0, 1e6]))
@settings(max_examples=50, deadline=None)
def test_fvu_does_not_depend_on_batches(batches: list[int], offset: float):
    rng = np.random.default_rng(len(batches))
    y_BE = rng.normal(size=(sum(batches) + 1, 3)) + offset
    y_hat_BE = y_BE + 0.1 * rng.normal(size=y_BE.shape)
    fvu = Fvu()
    ends = np.cumsum([*batches, 1])[:-1]
    for y, y_hat in zip(np.split(y_BE, ends), np.split(y_hat_BE, ends), strict=True):
        fvu.add_(torch.from_numpy(y), torch.from_numpy(y_hat))
    assert fvu.rows == len(y_BE)
    assert fvu.value == pytest.approx(reference.fvu(y_BE, y_hat_BE), rel=1e-6)


def test_fvu_without_rows_is_no_number():
    assert np.isnan(Fvu().value)


def linear_code(coder: Coder, x_BD: Tensor) -> Tensor:
    return torch.relu((x_BD - coder.b_D) @ coder.encoder.encoder_MD.T + coder.encoder.bias_M)


def test_groupmax_keeps_the_largest_of_each_group():
    coder, x_BD = randomised(make_coder("sae", "groupmax")), torch.randn(7, 6)
    code = coder.encode(x_BD)
    pre_Bkg = linear_code(coder, x_BD).unflatten(1, (3, 6))
    expected_BM = (pre_Bkg * (pre_Bkg == pre_Bkg.amax(2, keepdim=True))).flatten(1)
    code_BM = reference.dense(code.idx_BK, code.val_BK, 18)
    torch.testing.assert_close(code_BM, expected_BM)
    with pytest.raises(ValueError, match=r"k must divide .* groupmax, got k=4, latents=18"):
        coder.encode(x_BD, k=4)


@pytest.mark.parametrize("arch", ["topk", "batch-topk", "groupmax"])
def test_bfloat16_scores_choose_and_values_stay_in_float32(arch: Arch):
    """Nearly the same latents; latents in both codes have equal values up to rounding."""
    config = CoderConfig(
        inputs=("h:output",), targets=("h:output",), kind="sae", arch=arch, k=8, expansion=64
    )
    coders = [
        Coder(replace(config, score_dtype=dtype), 32, 32) for dtype in ("float32", "bfloat16")
    ]
    x_BD = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    code_BM = []
    for coder in coders:
        coder.initialise_(torch.zeros(32), torch.zeros(32), torch.Generator().manual_seed(0))
        with torch.no_grad():
            code = coder.encode(x_BD)
        code_BM.append(reference.dense(code.idx_BK, code.val_BK, 64 * 32))
    both_BM = (code_BM[0] > 0) & (code_BM[1] > 0)
    assert 0.9 < both_BM.sum() / (code_BM[0] > 0).sum() < 1
    torch.testing.assert_close(code_BM[0][both_BM], code_BM[1][both_BM])


def test_batch_topk_keeps_k_on_average_and_the_strongest():
    coder, x_BD = randomised(make_coder("sae", "batch-topk")), torch.randn(50, 6)
    x_BD[:25] *= 2
    code = coder.encode(x_BD, over_batch=True)
    pre_BM = linear_code(coder, x_BD)
    least = pre_BM.flatten().topk(150).values.min()
    code_BM = reference.dense(code.idx_BK, code.val_BK, 18)
    torch.testing.assert_close(code_BM, pre_BM * (pre_BM >= least))
    assert len(set((code.idx_BK >= 0).sum(1).tolist())) > 1
    coder.batch_threshold.threshold = smallest(code)
    torch.testing.assert_close(coder.encode(x_BD[:7]).val_BK, code.val_BK[:7])


def smallest(code: Code) -> Tensor:
    return code.val_BK[code.val_BK > 0].detach().min()


def test_batch_mp_keeps_k_steps_on_average_and_the_strongest():
    """Equal to a pursuit of twice as many steps with all rows cut at one threshold."""
    coder, x_BD = randomised(make_coder("sae", "batch-mp")), torch.randn(50, 6)
    x_BD[:25] *= 5
    idx_BK, val_BK, residual_BD, _ = coder.encode(x_BD, over_batch=True)
    steps_B = (idx_BK >= 0).sum(1)
    assert steps_B[:25].sum() > 2 * steps_B[25:].sum(), "rows with larger values get more"
    uncut = reference.pursue(
        (x_BD - coder.b_D).detach().numpy(), coder.decoder_ME.detach().numpy(), 6, 0.0
    )
    lowest_BK = np.minimum.accumulate(uncut.val_BK, 1)
    least = np.sort(lowest_BK.flatten())[-150]
    # an entry with a larger value than the entry before is kept with it: more than 150 only in ties
    assert steps_B.sum() == (lowest_BK >= least).sum() >= 50 * 3
    assert (lowest_BK > least).sum() < 50 * 3
    expected_BK = np.where(lowest_BK >= least, uncut.val_BK, 0)
    np.testing.assert_allclose(val_BK.detach(), expected_BK, atol=1e-5)
    prediction_BD = coder.decode(Code(idx_BK, val_BK, None), x_BD)
    torch.testing.assert_close(prediction_BD, x_BD - residual_BD, atol=1e-5, rtol=1e-5)


def test_batch_mp_codes_rows_alone_once_it_has_a_threshold():
    coder, x_BD = randomised(make_coder("sae", "batch-mp")), torch.randn(50, 6)
    assert (coder.encode(x_BD).idx_BK >= 0).all(), "none yet: no step is cut"
    code = coder.encode(x_BD, over_batch=True)
    coder.batch_threshold.threshold = smallest(code)
    torch.testing.assert_close(coder.encode(x_BD).val_BK, code.val_BK)
    torch.testing.assert_close(coder.encode(x_BD[:7]).val_BK, code.val_BK[:7])


@pytest.mark.parametrize("output", [1, 2])
def test_batch_mp_gradcheck(output: int):
    generator = torch.Generator().manual_seed(3)
    x_BD = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    W_MD = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    W_MD = (W_MD / W_MD.norm(dim=1, keepdim=True)).requires_grad_()
    coder = make_coder("sae", "batch-mp")
    cut = EntryThreshold(2, torch.zeros(()))
    assert torch.autograd.gradcheck(
        lambda x, W: matching_pursuit(
            x, W, W, 4, coder.encoder.rule, coder.encoder.search, False, cut
        )[output],
        (x_BD, W_MD),
    )


def test_no_rows_change_no_fvu() -> None:
    fvu, rows = Fvu(), torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    fvu.add_(rows[:0], rows[:0])
    fvu.add_(rows, rows + 1)
    before = fvu.value
    fvu.add_(rows[:0], rows[:0])
    assert (fvu.value, fvu.rows) == (before, 2)
    assert np.isfinite(before)


@pytest.mark.parametrize(("kind", "arch"), ALL)
def test_no_rows_have_no_codes(kind: Kind, arch: Arch) -> None:
    coder = make_coder(kind, arch)
    empty = torch.zeros(0, 6)
    code = coder.encode(empty)
    entries = {"batch-mp": 6, "batch-topk": 12}.get(arch, 3)  # before they are cut
    assert code.idx_BK.shape == (0, entries)
    assert len(coder.predict(code, empty)) == 0
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        coder.encode(empty, 0)
