"""Matching pursuit: against references, and its laws."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mptrain.config.coder_settings import CoderSettings
from mptrain.pursuit import backend as backend_module
from mptrain.pursuit import backward as backward_module
from mptrain.pursuit import numba_backend, numba_kernels
from mptrain.pursuit.autograd import matching_pursuit
from mptrain.pursuit.backend import microbatch_rows, resolve_backend
from mptrain.pursuit.batch_threshold import EntryThreshold
from mptrain.pursuit.forward import _put_unused_last_, pursue_forward
from mptrain.pursuit.rule import N_RESCORED, Rule
from tests.helpers import reference
from tests.helpers.pursuits import (
    ALL_ATOMS,
    DIRECT,
    EVERY,
    EXACT,
    GRAM,
    GRAM16,
    LAYOUTS,
    SHORT,
    SHORT16,
    Baseline,
    Layout,
    assert_same_code,
    assert_well_formed,
    baselines,
    explained,
    problem,
    sizes,
)

SELECTS = ("positive", "signed", "magnitude")
RULES = [Rule(select) for select in SELECTS]
TOLERANCES = st.sampled_from([0.0, 1e-6, 0.3])
POSITIVE = Rule()

each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda r: r.select)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
each_baseline = pytest.mark.parametrize(
    "baseline", baselines(EVERY), ids=lambda baseline: baseline.name
)
BLOCK_LAYOUTS = tuple(layout for layout in LAYOUTS if layout.in_blocks)
in_both_forms = pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "matrices"])


def run_select(
    baseline: Baseline, x_BD: Tensor, W_MD: Tensor, U_MD: Tensor, k: int, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    with baseline.forced():
        return pursue_forward(x_BD, W_MD, U_MD, k, rule, baseline.search)


def drawn(
    layout: Layout, rule: Rule, sizes: dict[str, int], k: int, *, unit: bool = False
) -> tuple[Tensor, Tensor, Tensor, Rule]:
    """Rows, both dictionaries, and the rule with its block."""
    generator = torch.Generator().manual_seed(sizes["seed"])
    x_BD = torch.randn(sizes["B"], sizes["D"], generator=generator, dtype=torch.float64)
    x_BD[1:2] = 0
    W_MD, U_MD = layout.dictionaries(generator, sizes["D"], sizes["M"], k, unit=unit)
    return x_BD, W_MD, U_MD, rule._replace(block=sizes["M"] if layout.in_blocks else None)


@each_layout
@each_rule
@given(sizes=sizes, k=st.integers(1, 9), tolerance=TOLERANCES, unit=st.booleans())
@settings(max_examples=7)
def test_equals_reference(
    layout: Layout, rule: Rule, sizes: dict[str, int], k: int, tolerance: float, unit: bool
):
    x_BD, W_MD, U_MD, rule = drawn(layout, rule._replace(tolerance=tolerance), sizes, k, unit=unit)
    options = {"select": rule.select, "tolerance": rule.tolerance, "block": rule.block}
    expected = reference.pursue(x_BD.numpy(), W_MD.numpy(), k, U_MD=U_MD.numpy(), **options)
    for baseline in baselines(EXACT, layout.in_blocks):
        actual = run_select(baseline, x_BD, W_MD, U_MD, k, rule)
        assert_well_formed(*actual[:2], rule.block)
        assert_same_code(actual, expected, k * sizes["M"])


@each_rule
@given(sizes=sizes, k=st.integers(1, 9), tolerance=TOLERANCES, tied=st.booleans())
@settings(max_examples=20)
def test_a_shortlist_is_the_same_in_both_forms(
    rule: Rule, sizes: dict[str, int], k: int, tolerance: float, tied: bool
):
    layout = LAYOUTS[0] if tied else LAYOUTS[1]
    x_BD, W_MD, U_MD, rule = drawn(layout, rule._replace(tolerance=tolerance), sizes, k)
    for search in (SHORT, replace(SHORT, shortlist_size=1), replace(SHORT, shortlist_refresh=4)):
        compiled, matrices = (
            run_select(Baseline(search, is_compiled), x_BD, W_MD, U_MD, k, rule)
            for is_compiled in (True, False)
        )
        assert_same_code(compiled, matrices, len(W_MD))


AWKWARD = [  # B, D, M, K
    (1, 1, 1, 1),
    (1, 1, 1, 5),
    (1, 5, 300, 1),
    (3, 4, 1, 3),
    (5, 2, 300, 7),  # far above the rank
    (16, 5, 128, 4),
    (17, 3, 127, 4),
    (33, 5, 129, 4),
    (40, 6, 257, 8),
    (2, 3, 4, 9),  # more steps than atoms
]


@each_rule
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
@pytest.mark.parametrize("atoms_twice", [False, True], ids=["once", "twice"])
def test_laws_in_float32(rule: Rule, shape: tuple[int, int, int, int], atoms_twice: bool):
    """Laws of a pursuit on one dictionary of unit norm, for every search."""
    B, D, M, k = shape
    x_BD, W_MD = problem(sum(shape), B, D, M, torch.float32)
    W_MD = torch.cat([W_MD, W_MD]) if atoms_twice else W_MD
    for baseline in baselines(EVERY):
        norm_B = x_BD.norm(dim=1)
        for steps in {k} if atoms_twice else sorted({(k + 1) // 2, k}):
            idx_BK, val_BK, residual_BD = run_select(baseline, x_BD, W_MD, W_MD, steps, rule)
            assert val_BK.dtype == residual_BD.dtype == torch.float32
            assert_well_formed(idx_BK, val_BK)
            assert (idx_BK < len(W_MD)).all()
            assert (idx_BK[1:2] == -1).all(), "a row of zeros has no code"
            if rule.select == "positive":
                assert (val_BK >= 0).all()
            assert (residual_BD.norm(dim=1) <= norm_B * (1 + 1e-6)).all(), "it never grows"
            norm_B = residual_BD.norm(dim=1)
            prediction_BD = explained(idx_BK, val_BK, W_MD)
            torch.testing.assert_close(prediction_BD + residual_BD, x_BD, atol=1e-5, rtol=1e-5)


@each_rule
def test_the_first_of_equal_atoms_is_chosen(rule: Rule):
    """Scores of integers are exact, so that an atom and its copy have equal scores."""
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randint(-3, 4, (40, 6), generator=generator).double()
    W_MD = torch.randint(-2, 3, (30, 6), generator=generator).double()
    for baseline in baselines(EXACT):
        for doubled_MD in (torch.cat([W_MD, W_MD]), W_MD.repeat_interleave(2, 0)):
            first = torch.tensor([doubled_MD.eq(w_D).all(1).int().argmax() for w_D in doubled_MD])
            idx_BK, _, _ = run_select(baseline, x_BD, doubled_MD, doubled_MD, 2, rule)
            used_K = idx_BK[idx_BK >= 0]
            assert len(used_K) > 40
            assert torch.equal(first[used_K], used_K)


def used(idx_BK: Tensor) -> list[list[int]]:
    return [[latent for latent in row if latent >= 0] for row in idx_BK.tolist()]


@given(sizes=sizes, k=st.integers(1, 6), tied=st.booleans())
@settings(max_examples=20)
def test_magnitude_is_positive_with_every_atom_in_both_directions(
    sizes: dict[str, int], k: int, tied: bool
):
    layout = LAYOUTS[0] if tied else LAYOUTS[1]
    x_BD, W_MD, U_MD, _ = drawn(layout, POSITIVE, sizes, k)
    both_W_MD, both_U_MD = torch.cat([W_MD, -W_MD]), torch.cat([U_MD, -U_MD])
    for baseline in baselines(EXACT):
        actual = run_select(baseline, x_BD, W_MD, U_MD, k, Rule("magnitude"))
        idx_BK, val_BK, r_BD = run_select(baseline, x_BD, both_W_MD, both_U_MD, k, POSITIVE)
        signed_BK = torch.where(idx_BK < len(W_MD), val_BK, -val_BK)
        assert_same_code(actual, (idx_BK, signed_BK, r_BD), len(W_MD))


@given(sizes=sizes, k=st.integers(1, 6), tied=st.booleans())
@settings(max_examples=20)
def test_signed_takes_a_negative_value_only_where_all_are_negative(
    sizes: dict[str, int], k: int, tied: bool
):
    layout = LAYOUTS[0] if tied else LAYOUTS[1]
    x_BD, W_MD, U_MD, rule = drawn(layout, Rule("signed"), sizes, k)
    for baseline in baselines(EXACT):
        _, val_BK, _ = run_select(baseline, x_BD, W_MD, U_MD, k, rule)
        r_BD = x_BD if k == 1 else run_select(baseline, x_BD, W_MD, U_MD, k - 1, rule)[2]
        largest_B = (r_BD @ W_MD.T).max(1).values
        torch.testing.assert_close(val_BK[:, -1], largest_B, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("layout", BLOCK_LAYOUTS, ids=lambda layout: layout.name)
@given(sizes=sizes, k=st.integers(1, 6))
@settings(max_examples=7)
def test_a_step_chooses_within_its_block(layout: Layout, sizes: dict[str, int], k: int):
    x_BD, W_MD, U_MD, rule = drawn(layout, Rule("magnitude"), sizes, k)
    assert rule.block is not None
    idx_BK, _, residual_BD = pursue_forward(x_BD, W_MD, U_MD, k, rule, DIRECT)
    rows = used(idx_BK)
    assert all(a // rule.block < b // rule.block < k for row in rows for a, b in pairwise(row))
    assert residual_BD.isfinite().all()


def test_only_direct_knows_blocks():
    x_BD, W_MD = problem(0, 3, 4, 6)
    for search in (GRAM, ALL_ATOMS):
        with pytest.raises(AssertionError, match="only direct knows blocks"):
            pursue_forward(x_BD, W_MD, W_MD, 2, Rule(block=3), search)


@each_rule
@each_baseline
@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.ones(3, 4)], ids=["zeros", "ones"])
def test_constant_rows_give_no_nan(baseline: Baseline, rule: Rule, x: Tensor):
    _, W_MD = problem(0, 3, 4, 7, torch.float32)
    W_MD.requires_grad_()
    with baseline.forced():
        idx_BK, val_BK, residual_BD = matching_pursuit(x, W_MD, W_MD, 9, rule, baseline.search)
        (val_BK.sum() + residual_BD.sum()).backward()
    assert torch.equal(idx_BK, idx_BK[:1].expand(3, 9))
    assert val_BK.isfinite().all()
    assert residual_BD.isfinite().all()
    assert W_MD.grad is not None
    assert W_MD.grad.isfinite().all()
    if (x == 0).all():
        assert (idx_BK == -1).all()


OTHERS = torch.tensor([0, 1, 2, 4])


@each_layout
@each_rule
@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_a_nan_stays_in_its_row_and_shows(layout: Layout, rule: Rule, tolerance: float):
    size = {"seed": 0, "B": 5, "D": 8, "M": 20}
    x_BD, W_MD, U_MD, rule = drawn(layout, rule._replace(tolerance=tolerance), size, 4)
    for baseline in baselines(EVERY, layout.in_blocks):
        clean = run_select(baseline, x_BD, W_MD, U_MD, 4, rule)
        x = x_BD.clone().requires_grad_()
        with torch.no_grad():
            x[3, 2] = torch.nan
        with baseline.forced():
            spoilt = matching_pursuit(x, W_MD, U_MD, 4, rule, baseline.search)
            (spoilt[1].square().sum() + spoilt[2].sum()).backward()
        assert spoilt[1][3].isnan().all()
        assert spoilt[2][3].isnan().any()
        assert x.grad is not None
        assert x.grad[OTHERS].isfinite().all()
        for before, after in zip(clean, spoilt, strict=True):
            assert torch.equal(before[OTHERS], after[OTHERS])


@each_rule
@each_baseline
@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_infinity_stays_in_its_row_and_shows(baseline: Baseline, rule: Rule, infinity: float):
    x_BD, W_MD = problem(0, 5, 8, 20)
    clean = run_select(baseline, x_BD, W_MD, W_MD, 4, rule)
    x_BD[3, 2] = infinity
    spoilt = run_select(baseline, x_BD, W_MD, W_MD, 4, rule)
    assert not spoilt[1][3].isfinite().all()
    assert not spoilt[2][3].isfinite().all()
    for before, after in zip(clean, spoilt, strict=True):
        assert torch.equal(before[OTHERS], after[OTHERS])


@each_rule
@each_baseline
def test_no_rows(baseline: Baseline, rule: Rule):
    _, W_MD = problem(0, 1, 4, 6)
    W_MD.requires_grad_()
    with baseline.forced():
        cut = EntryThreshold(2, torch.zeros(()))
        idx_BK, val_BK, r_BD = matching_pursuit(
            W_MD[:0].detach(), W_MD, W_MD, 3, rule, baseline.search, threshold=cut
        )
        (val_BK.sum() + r_BD.sum()).backward()
    assert idx_BK.shape == val_BK.shape == (0, 3)
    assert W_MD.grad is not None
    assert (W_MD.grad == 0).all()


def outcome(
    baseline: Baseline, x_BD: Tensor, W_MD: Tensor, U_MD: Tensor, k: int, rule: Rule
) -> tuple[Tensor, ...]:
    """Code, residual and gradients of a loss."""
    W_MD = W_MD.clone().requires_grad_()
    U_MD = W_MD if rule.block is None else U_MD.clone().requires_grad_()
    x_BD = x_BD.clone().requires_grad_()
    with baseline.forced():
        idx_BK, val_BK, residual_BD = matching_pursuit(x_BD, W_MD, U_MD, k, rule, baseline.search)
        loss = val_BK.sin().sum() + residual_BD.pow(3).sum()
        return idx_BK, val_BK, residual_BD, *torch.autograd.grad(loss, (x_BD, W_MD, U_MD))


@each_baseline
def test_microbatch_does_not_matter(baseline: Baseline, monkeypatch: pytest.MonkeyPatch):
    x_BD, W_MD = problem(3, 23, 8, 40)
    problems = [(x_BD, W_MD, W_MD, 5, POSITIVE)]
    if baseline.search == DIRECT:
        problems.append((x_BD, W_MD, W_MD.flip(0), 5, Rule("signed", block=8)))
    expected = [outcome(baseline, *arguments) for arguments in problems]
    monkeypatch.setattr(backend_module, "_CPU_ELEMENTS", 5 * 40)
    monkeypatch.setattr(backward_module, "_ELEMENTS", 4 * 5 * 8)
    monkeypatch.setattr(numba_backend, "_PIECE", 3)
    monkeypatch.setattr(numba_backend, "_COLUMNS", 3)
    for before, arguments in zip(expected, problems, strict=True):
        for a, b in zip(before, outcome(baseline, *arguments), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@each_baseline
def test_the_number_of_threads_changes_no_bit(baseline: Baseline):
    x_BD, W_MD = problem(4, 70, 96, 300, torch.float32)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outcomes.append(outcome(baseline, x_BD, W_MD, W_MD, 12, POSITIVE))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_rows_may_lie_apart_in_memory():
    x_BD, W_MD = problem(4, 9, 8, 20)
    for baseline in baselines(EXACT):
        apart_BD = torch.zeros(9, 16, dtype=torch.float64)
        apart_BD[:, ::2] = x_BD
        for a, b in zip(
            outcome(baseline, x_BD, W_MD, W_MD, 4, POSITIVE),
            outcome(baseline, apart_BD[:, ::2], W_MD, W_MD, 4, POSITIVE),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_select_makes_no_graph_and_changes_no_argument():
    x_BD, W_MD = (t.requires_grad_() for t in problem(0, 4, 5, 6))
    for baseline in baselines(EVERY):
        before = x_BD.detach().clone(), W_MD.detach().clone()
        _, val_BK, residual_BD = run_select(baseline, x_BD, W_MD, W_MD, 3, POSITIVE)
        assert not val_BK.requires_grad
        assert not residual_BD.requires_grad
        assert torch.equal(x_BD, before[0])
        assert torch.equal(W_MD, before[1])


def test_gram_equals_direct_in_float32():
    x_BD, W_MD = problem(5, 300, 48, 400, torch.float32)
    idx_BK, val_BK, residual_BD = pursue_forward(x_BD, W_MD, W_MD, 24, POSITIVE, DIRECT)
    for baseline in (Baseline(GRAM), Baseline(GRAM, is_compiled=False)):
        gram = run_select(baseline, x_BD, W_MD, W_MD, 24, POSITIVE)
        same_B = (idx_BK == gram[0]).all(1)
        assert same_B.float().mean() > 0.99, "rounding may decide a near tie, rarely"
        torch.testing.assert_close(val_BK[same_B], gram[1][same_B], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(residual_BD[same_B], gram[2][same_B], atol=1e-5, rtol=0)


@in_both_forms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("atoms_twice", [False, True])
def test_shortlist_agrees_with_direct_on_sums_of_atoms(
    dtype: str, atoms_twice: bool, is_compiled: bool
):
    """Agreement as docs/coders.md states, at defaults; an atom and its copy count as equal."""
    generator = torch.Generator().manual_seed(8)
    _, W_MD = problem(4, 1, 256, 2048, torch.float32)
    x_BD = sums_of_atoms(generator, W_MD, 512, 16)
    defaults = replace(
        ALL_ATOMS,
        shortlist_size=CoderSettings.shortlist_size,
        shortlist_refresh=CoderSettings.shortlist_refresh,
        score_dtype=dtype,
    )
    if atoms_twice:
        W_MD = torch.cat([W_MD, W_MD])
    idx_BK, _, residual_BD = pursue_forward(x_BD, W_MD, W_MD, 24, POSITIVE, DIRECT)
    short = run_select(Baseline(defaults, is_compiled), x_BD, W_MD, W_MD, 24, POSITIVE)
    assert (idx_BK % 2048 == short[0] % 2048)[:, :16].float().mean() > 0.998
    error, short_error = residual_BD.square().sum(), short[2].square().sum()
    assert float(short_error) == pytest.approx(float(error), rel=1e-3)


@in_both_forms
def test_gram_in_bfloat16_agrees_with_direct_on_sums_of_atoms(is_compiled: bool):
    """bfloat16 scores drift, but rescoring the best few mostly finds the best; values are exact."""
    generator = torch.Generator().manual_seed(8)
    _, W_MD = problem(4, 1, 256, 2048, torch.float32)
    x_BD = sums_of_atoms(generator, W_MD, 200, 16)
    idx_BK, val_BK, residual_BD = pursue_forward(x_BD, W_MD, W_MD, 24, POSITIVE, DIRECT)
    actual = run_select(Baseline(GRAM16, is_compiled), x_BD, W_MD, W_MD, 24, POSITIVE)
    same_BK = idx_BK == actual[0]
    assert same_BK[:, :16].float().mean() > 0.998
    same_B = same_BK.all(1)
    torch.testing.assert_close(actual[1][same_B], val_BK[same_B], atol=1e-5, rtol=1e-4)
    error, bfloat16_error = residual_BD.square().sum(), actual[2].square().sum()
    assert float(bfloat16_error) == pytest.approx(float(error), rel=1e-3)
    x_BD, W_MD = problem(5, 300, 16, 400, torch.float32)
    exact, actual = (
        run_select(Baseline(s, is_compiled), x_BD, W_MD, W_MD, 24, POSITIVE) for s in (GRAM, GRAM16)
    )
    assert not torch.equal(exact[0], actual[0]), "among many atoms in few dimensions it shows"


def sums_of_atoms(generator: torch.Generator, W_MD: Tensor, B: int, L: int) -> Tensor:
    """Rows of L atoms each, with some noise."""
    M, D = W_MD.shape
    idx_BL = torch.randint(M, (B, L), generator=generator)
    val_BL = 0.2 + torch.rand(B, L, generator=generator)
    noise_BD = 0.02 * torch.randn(B, D, generator=generator)
    return explained(idx_BL, val_BL, W_MD) + noise_BD


@in_both_forms
@pytest.mark.parametrize("change", [{"shortlist_size": 2}, {"shortlist_refresh": 4}])
def test_a_smaller_or_older_shortlist_chooses_otherwise(change: dict[str, int], is_compiled: bool):
    x_BD, W_MD = problem(5, 100, 16, 100, torch.float32)
    base = replace(SHORT, shortlist_size=8)
    before, after = (
        run_select(Baseline(search, is_compiled), x_BD, W_MD, W_MD, 8, POSITIVE)
        for search in (base, replace(base, **change))
    )
    assert not torch.equal(before[0], after[0])
    assert before[2].square().sum() < after[2].square().sum(), "and worse"


@in_both_forms
def test_bfloat16_chooses_the_shortlist_only(is_compiled: bool):
    """Values, residual and the choice within the shortlist have float32 precision."""
    x_BD, W_MD = problem(5, 100, 16, 100, torch.float32)

    def run(search) -> tuple[Tensor, ...]:
        return run_select(Baseline(search, is_compiled), x_BD, W_MD, W_MD, 8, POSITIVE)

    idx_BK, val_BK, _ = run(replace(SHORT16, shortlist_size=50))
    exact_idx_BK, exact_val_BK, _ = run(replace(SHORT, shortlist_size=50))
    same_B = (idx_BK == exact_idx_BK).all(1)
    assert same_B.float().mean() > 0.98
    torch.testing.assert_close(val_BK[same_B], exact_val_BK[same_B], atol=1e-6, rtol=1e-5)
    assert not torch.equal(run(SHORT)[0], run(SHORT16)[0]), "at the end of a list of three it shows"


# the parts of the compiled kernels

awkward_floats = st.sampled_from([-np.inf, np.inf, np.nan]) | st.integers(-4, 4).map(float)
scores = st.lists(awkward_floats, min_size=1, max_size=9) | st.integers(0, 2**20).map(
    lambda seed: list(np.random.default_rng(seed).integers(-9, 9, 100 + seed % 600) / 4)
)


@given(scores, st.data())
def test_the_largest_are_the_largest_and_the_first_of_equals(p: list[float], data: st.DataObject):
    """Also where most scores are NaN, and where lanes give a bound."""
    p_M = np.array(p, np.float32)
    if len(p) > 9 and data.draw(st.booleans()):
        p_M[data.draw(st.integers(0, 3)) :: 4] = np.nan
    size = data.draw(st.integers(1, len(p)))
    listed, keys = np.empty(len(p), np.int64), np.empty(len(p), np.float32)
    more = data.draw(st.integers(1, 4), label="more lanes than listed")
    lanes = np.empty(numba_kernels.LANES * (size // numba_kernels.LANES + more), np.float32)
    count = numba_kernels.largest(p_M, size, lanes, keys, listed)
    candidates = [j for j in range(len(p)) if p_M[j] > -np.inf]
    assert listed[:count].tolist() == sorted(sorted(candidates, key=lambda j: -p_M[j])[:size])
    score_C = torch.from_numpy(p_M[candidates])
    expected = score_C.topk(min(size, len(score_C))).values
    assert torch.equal(torch.from_numpy(p_M[listed[:count]]).sort(descending=True)[0], expected)


@given(scores, st.data())
def test_nth_largest(p: list[float], data: st.DataObject):
    values = np.array([v for v in p if v == v], np.float32)
    assume(len(values))
    n = data.draw(st.integers(1, len(values)))
    expected = np.sort(values)[::-1][n - 1]
    before = np.sort(values)
    assert numba_kernels.nth_largest_(values, n) == expected
    assert np.array_equal(np.sort(values), before), "only reordered"


@pytest.mark.parametrize("select", SELECTS)
@given(p=scores)
def test_first_largest(select: str, p: list[float]):
    p_M = np.array(p, np.float32)
    actual = numba_kernels.first_largest(
        p_M, np.empty(numba_kernels.LANES, np.float32), numba_kernels.MODES[select]
    )
    keys = np.abs(p_M) if select == "magnitude" else p_M
    if (keys > -np.inf).any():
        assert actual == np.nanargmax(keys)
    else:
        assert actual == -1


@pytest.mark.parametrize("select", SELECTS)
@given(p=scores, seed=st.integers(0, 2**20))
def test_the_best_of_inexact_scores_are_scored_again(select: str, p: list[float], seed: int):
    """The best few scores, and those equal to the last of them, are computed again."""
    score_M = np.array(p, np.float32)
    generator = np.random.default_rng(seed)
    W_MD = generator.integers(-2, 3, (len(score_M), 2)).astype(np.float32)
    r_D = generator.integers(-2, 3, 2).astype(np.float32)
    mode, lanes = numba_kernels.MODES[select], np.empty(numba_kernels.LANES, np.float32)
    actual = numba_kernels.first_of_few(score_M, lanes, N_RESCORED, W_MD, r_D, mode)
    size = np.abs if select == "magnitude" else np.asarray
    kept = [j for j in range(len(score_M)) if size(score_M)[j] > -np.inf]
    bound = sorted((size(score_M)[j] for j in kept), reverse=True)[:N_RESCORED][-1:]
    few = [j for j in kept if size(score_M)[j] >= bound[0]]
    exact = [float(size(W_MD[j] @ r_D)) for j in few]
    assert actual == (few[int(np.argmax(exact))] if few else -1)


@given(st.integers(0, 2**20), st.integers(1, 6), st.integers(1, 7))
def test_gaps_close_and_the_order_stays(seed: int, B: int, K: int):
    generator = torch.Generator().manual_seed(seed)
    idx_BK = torch.randint(-2, 5, (B, K), generator=generator).clamp_min(-1)
    val_BK = torch.rand(B, K, generator=generator).masked_fill(idx_BK < 0, 0)
    idx, val = idx_BK.clone(), val_BK.clone()
    _put_unused_last_(idx, val)
    for row in range(B):
        used = idx_BK[row] >= 0
        unused = int((~used).sum())
        assert idx[row].tolist() == idx_BK[row, used].tolist() + [-1] * unused
        assert val[row].tolist() == val_BK[row, used].tolist() + [0.0] * unused


@in_both_forms
def test_a_new_shortlist_may_continue_where_the_last_one_was_empty(is_compiled: bool):
    """New entries come right after the earlier entries."""
    x_BD, W_MD = problem(5, 400, 16, 40)
    few = replace(SHORT, shortlist_size=1, shortlist_refresh=5)
    baseline = Baseline(few, is_compiled)
    U_MD = 1.5 * W_MD  # a chosen atom keeps a negative correlation
    idx_BK, val_BK, _ = run_select(baseline, x_BD, W_MD, U_MD, 15, POSITIVE)
    assert_well_formed(idx_BK, val_BK)
    assert ((idx_BK >= 0).sum(1)[2:] == 3).all(), "one from each list"


def test_auto_goes_by_latents_and_steps():
    auto = replace(DIRECT, backend="auto")

    def resolved(latents: int, steps: int, in_blocks: bool = False) -> str:
        return resolve_backend(auto, latents, steps, in_blocks)

    assert resolved(16384, 16384) == resolved(1, 1) == "gram"
    assert resolved(16384, 16383) == "direct", "a Gram matrix costs as much as M steps"
    assert resolved(16385, 10**9) == "direct", "it would take more than 1 GiB"
    assert resolved(64, 10**9, True) == "direct"
    for search in (DIRECT, GRAM, ALL_ATOMS):
        assert all(resolve_backend(search, M, 5, False) == search.backend for M in (1, 10**6))


@each_rule
def test_auto_is_one_of_the_others(rule: Rule):
    x_BD, W_MD = problem(5, 50, 8, 100)
    auto = replace(DIRECT, backend="auto")
    for k, search in ((1, DIRECT), (2, GRAM)):
        actual, expected = (pursue_forward(x_BD, W_MD, W_MD, k, rule, s) for s in (auto, search))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_microbatches_hold_the_given_number_of_elements():
    here, there = torch.device("cpu"), torch.device("cuda")
    assert microbatch_rows(1 << 12, here) == 1 << 10
    assert microbatch_rows(1 << 12, there) == 1 << 16
    assert microbatch_rows(3 << 20, here) == 1
    assert microbatch_rows(1 << 40, here) == 1, "at least one row"


# gradients

each_select = pytest.mark.parametrize("select", SELECTS)
detached_or_not = pytest.mark.parametrize("detach", [False, True], ids=["", "detach"])


@each_layout
@each_select
@in_both_forms
@given(sizes=sizes, k=st.integers(1, 7), detach=st.booleans(), of=st.data())
@settings(max_examples=7)
def test_gradients_equal_autograd(
    layout: Layout,
    select: str,
    is_compiled: bool,
    sizes: dict[str, int],
    k: int,
    detach: bool,
    of: st.DataObject,
):
    """Gradients of rows and dictionaries equal autograd through the reference, choice fixed."""
    x_BD, W_MD, U_MD, rule = drawn(layout, Rule(select), sizes, k)
    search = DIRECT if layout.in_blocks else of.draw(st.sampled_from(EVERY))
    baseline = Baseline(search, is_compiled)
    generator = torch.Generator().manual_seed(1)
    weight_BK = torch.randn(len(x_BD), k, generator=generator, dtype=torch.float64)
    leaves = tuple(
        t.requires_grad_() for t in ((x_BD, W_MD) if U_MD is W_MD else (x_BD, W_MD, U_MD))
    )

    def with_gradients(val_BK: Tensor, residual_BD: Tensor) -> tuple[Tensor, ...]:
        loss = (val_BK * weight_BK).sum() + residual_BD.square().sum()
        return val_BK, residual_BD, *torch.autograd.grad(loss, leaves)

    with baseline.forced():
        idx_BK, *actual = matching_pursuit(x_BD, W_MD, U_MD, k, rule, search, detach)
        ours = with_gradients(*actual)
    plain = with_gradients(*reference.follow(x_BD, W_MD, idx_BK, U_MD, detach))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@given(sizes=sizes, k=st.integers(2, 6), of=st.data())
@settings(max_examples=20)
def test_detach_changes_gradients_only(sizes: dict[str, int], k: int, of: st.DataObject):
    layout, select = of.draw(st.sampled_from(LAYOUTS)), of.draw(st.sampled_from(SELECTS))
    x_BD, W_MD, U_MD, rule = drawn(layout, Rule(select), sizes, k)
    attached, detached = (
        matching_pursuit(x_BD, W_MD, U_MD, k, rule, DIRECT, detach) for detach in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(attached, detached, strict=True))


GRADCHECK = {"seed": 2, "B": 3, "D": 5, "M": 7}


def checked(
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    x_BD: Tensor,
    W_MD: Tensor,
    U_MD: Tensor,
) -> bool:
    """Finite differences along random directions, of the values alone and the residual alone."""
    leaves = tuple(
        t.requires_grad_() for t in ((x_BD, W_MD) if U_MD is W_MD else (x_BD, W_MD, U_MD))
    )

    def outputs(x: Tensor, W: Tensor, U: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return run(x, W, W if U is None else U)

    values = outputs(*leaves)[1]
    assert (values.abs() > 1e-3).any(), "something is chosen, and none of it by rounding"
    assert ((values == 0) | (values.abs() > 1e-3)).all()
    return all(
        torch.autograd.gradcheck(lambda *of, at=at: outputs(*of)[at], leaves, fast_mode=True)
        for at in (1, 2)
    )


@each_layout
@each_select
@in_both_forms
def test_gradcheck(layout: Layout, select: str, is_compiled: bool):
    x_BD, W_MD, U_MD, rule = drawn(layout, Rule(select), GRADCHECK, 3)
    x_BD[1] = 0.5
    for baseline in baselines((DIRECT, GRAM, SHORT), layout.in_blocks):
        if baseline.is_compiled == is_compiled:
            with baseline.forced():
                run = lambda x, W, U: matching_pursuit(x, W, U, 3, rule, baseline.search)  # noqa: B023, E731
                assert checked(run, x_BD, W_MD, U_MD)


def cuts(idx_BK: Tensor, val_BK: Tensor) -> list[EntryThreshold]:
    """Cuts by a mean number of steps, and by a threshold between two values; both drop steps."""
    sizes = val_BK.abs().cummin(1).values.unique()
    between = (sizes[len(sizes) // 2] + sizes[len(sizes) // 2 - 1]) / 2
    return [EntryThreshold(2, torch.zeros(())), EntryThreshold(None, between)]


@each_layout
@each_select
@in_both_forms
def test_cut_gradcheck(layout: Layout, select: str, is_compiled: bool):
    x_BD, W_MD, U_MD, rule = drawn(layout, Rule(select), GRADCHECK | {"B": 4}, 4)
    x_BD[1] = 0.5
    x_BD[0] *= 2
    baseline = Baseline(DIRECT, is_compiled)
    with baseline.forced():
        for cut in cuts(*matching_pursuit(x_BD, W_MD, U_MD, 4, rule, DIRECT)[:2]):
            run = lambda x, W, U: matching_pursuit(x, W, U, 4, rule, DIRECT, threshold=cut)  # noqa: B023, E731
            assert checked(run, x_BD, W_MD, U_MD)


@each_layout
@each_select
@given(sizes=sizes, k=st.integers(1, 6), detach=st.booleans(), at=st.integers(0, 30))
@settings(max_examples=7)
def test_cut_equals_reference(
    layout: Layout, select: str, sizes: dict[str, int], k: int, detach: bool, at: int
):
    """Each row ends at the reference's step, and equals a pursuit of that length."""
    x_BD, W_MD, U_MD, rule = drawn(layout, Rule(select), sizes, k)
    leaves = tuple(
        t.requires_grad_() for t in ((x_BD, W_MD) if U_MD is W_MD else (x_BD, W_MD, U_MD))
    )
    uncut_idx_BK, uncut_val_BK, _ = matching_pursuit(x_BD, W_MD, U_MD, k, rule, DIRECT)
    values = uncut_val_BK.detach().abs().flatten()
    for cut in (
        EntryThreshold(1 + at % k, torch.tensor(torch.inf)),
        EntryThreshold(None, values[at % len(values)]),
        EntryThreshold(None, torch.zeros(())),
    ):
        expected_idx_BK = reference.cut(
            uncut_idx_BK.numpy(),
            uncut_val_BK.detach().numpy(),
            cut.mean_entries,
            float(cut.value),
        )
        idx_BK, *actual = matching_pursuit(x_BD, W_MD, U_MD, k, rule, DIRECT, detach, cut)
        assert_well_formed(idx_BK, actual[0], rule.block)
        assert np.array_equal(idx_BK.numpy(), expected_idx_BK)
        if cut.mean_entries is None and cut.value == 0:
            assert torch.equal(idx_BK, uncut_idx_BK), "no threshold yet: all are kept"
        plain = reference.follow(x_BD, W_MD, idx_BK, U_MD, detach)
        for a, b in zip(actual, plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
        ours, theirs = (
            torch.autograd.grad(val.square().sum() + r.square().sum(), leaves)
            for val, r in (actual, plain)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@each_select
def test_a_mean_number_of_steps_is_kept(select: str):
    x_BD, W_MD = problem(1, 60, 16, 50)
    x_BD[:30] *= 5
    idx_BK, val_BK, _ = matching_pursuit(
        x_BD, W_MD, W_MD, 8, Rule(select), DIRECT, threshold=EntryThreshold(3, torch.zeros(()))
    )
    steps_B = (idx_BK >= 0).sum(1)
    lowest_BK = val_BK.abs().cummin(1).values
    assert (lowest_BK > lowest_BK[lowest_BK > 0].min()).sum() < 3 * 60 <= steps_B.sum()
    assert steps_B[:30].sum() > 2 * steps_B[30:].sum(), "rows with larger values get more"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "baseline", baselines((DIRECT, GRAM, SHORT, SHORT16)), ids=lambda baseline: baseline.name
)
def test_little_is_kept_for_the_backward_pass(baseline: Baseline, tied: bool):
    B, D, M, K = 128, 128, 2048, 32
    x_BD, W_MD = problem(0, B, D, M, torch.float32)
    W_MD.requires_grad_()
    U_MD = W_MD if tied else W_MD.detach().clone().requires_grad_()
    dictionaries = {W_MD.data_ptr(), U_MD.data_ptr()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with baseline.forced():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _, val_BK, residual_BD = matching_pursuit(
                x_BD, W_MD, U_MD, K, POSITIVE, baseline.search
            )
            loss = val_BK.sum() + residual_BD.square().sum()
        others = [t for t in kept if t.data_ptr() not in dictionaries]
        assert len(kept) - len(others) == len(dictionaries), "dictionaries are kept by reference"
        assert all(t.numel() < B * M and t.numel() < K * B * D for t in others)
        # the last is what the loss itself keeps
        assert sum(t.nbytes for t in others) <= B * (12 * K + 4 * D) + 4 * B * D
        loss.backward()
    for dictionary in (W_MD, U_MD):
        assert dictionary.grad is not None
        assert dictionary.grad.dtype == torch.float32
