"""The screened encoder's CUDA kernels on a CPU: codes, their margin, rescoring, what is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")
screened = testing.cuda_screened
DTYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16}
NOTHING = np.zeros(0, np.float32)


@pytest.fixture(autouse=True)
def seed_of_threads():
    yield
    testing.cuda_seed(0)


def rounded(values, dtype):
    return torch.from_numpy(values).to(DTYPES[dtype]).float().numpy()


def draw(n, d, f, dtype=1, seed=0, massive=0.0):
    """Gaussian tokens around a centre with a few large dimensions; latents of norm 1."""
    g = np.random.default_rng(seed)
    center = g.normal(size=d).astype(np.float32) * 0.3
    center[:: max(d // 4, 1)] += massive
    x = rounded(g.normal(size=(n, d)).astype(np.float32) + center, dtype)
    w = rounded(g.normal(size=(f, d)).astype(np.float32) / np.sqrt(d).astype(np.float32), dtype)
    bias = (0.1 * g.normal(size=f) - w @ center).astype(np.float32)
    threshold = (1.5 + 0.3 * g.random(f)).astype(np.float32)
    return x, w, bias, threshold, center


def tokens_of(x, dtype=1, center=NOTHING, stride=None):
    return screened.quantise(x, dtype, stride or x.shape[1], center, False)


def latents_of(w, dtype=1, center=NOTHING, stride=None):
    return screened.quantise(w, dtype, stride or w.shape[1], center, True)


def encode(x, w, bias, threshold, center=NOTHING, window=0.0, max_nnz=-1, **layout):
    """Entries, then the candidates."""
    x_dtype, w_dtype = layout.get("x_dtype", 1), layout.get("w_dtype", 1)
    strides = layout.get("x_stride", x.shape[1]), layout.get("w_stride", w.shape[1])
    return screened.encode(
        *(x, x_dtype, strides[0], w, w_dtype, strides[1]),
        *(bias, threshold, window, center, max_nnz, layout.get("hopper", False)),
    )


def pre_of(x, w, bias):
    """In float64, and what float32 may be away from it."""
    with np.errstate(all="ignore"):
        pre = x.astype(np.float64) @ w.T.astype(np.float64) + bias
        size = np.abs(x.astype(np.float64)) @ np.abs(w.T.astype(np.float64)) + np.abs(bias)
    return pre, 1e-6 * size


def assert_encodes(data, found, window=0.0):
    """The entries of `reference.jumprelu_encode`, but for those within rounding of a limit."""
    x, w, bias, threshold = data[:4]
    offsets, indices, values, gate, needed = found[:5]
    assert needed == offsets[-1] == len(indices)
    pre, slack = pre_of(x, w, bias)
    for i in range(len(x)):
        row = slice(offsets[i], offsets[i + 1])
        assert (np.diff(indices[row]) > 0).all()
        has = np.zeros(len(w), bool)
        has[indices[row]] = True
        value, on = np.zeros(len(w)), np.zeros(len(w))
        value[indices[row]], on[indices[row]] = values[row], gate[row]
        invalid = np.isnan(pre[i]) | np.isnan(threshold)
        with np.errstate(invalid="ignore"):
            kept, active = pre[i] > threshold - np.float32(window), pre[i] > threshold
            near = np.abs(pre[i] - threshold) <= slack[i]
            near |= np.abs(pre[i] - (threshold - np.float32(window))) <= slack[i]
        first = invalid & (np.cumsum(invalid) == 1)
        assert (has[invalid] == first[invalid]).all()
        assert np.isnan(value[first]).all() and (on[first] == 1).all()
        sure = ~invalid & ~near
        assert (has[sure] == kept[sure]).all()
        assert (on[sure] == active[sure]).all()
        active &= sure & np.isfinite(pre[i])
        assert (np.abs(value[active] - pre[i][active]) <= slack[i][active]).all()
        assert (value[sure & ~active & np.isfinite(pre[i])] == 0).all()


def scores(x, w, dtype=1, center=NOTHING):
    """Errors of the products of codes, in what each token's margin takes for their deviation."""
    q, u, bound = tokens_of(x, dtype, center)
    p, vb, _, unscreened = latents_of(w, dtype, center)
    assert unscreened == 0 and q.shape[1] % 128 == 0
    less = center if len(center) else 0
    truth = (x.astype(np.float64) - less) @ w.T.astype(np.float64)
    error = truth * u[:, None] * vb - q.astype(np.float64) @ p.T.astype(np.float64)
    return error / ((screened.zero - bound - 2) / screened.kappa)[:, None]


# ---- codes


@pytest.mark.parametrize(("d", "dtype"), [(128, 0), (200, 1), (384, 2), (640, 1), (768, 0)])
@pytest.mark.parametrize("massive", [0.0, 50.0])
def test_the_error_of_a_product_is_as_large_as_its_bound_says(d, dtype, massive):
    x, w, _, _, center = draw(40, d, 300, dtype, massive=massive)
    score = scores(x, w, dtype, center)
    assert abs(score.mean()) < 0.1
    assert 0.7 < score.std() < 1.05, "the bound assumes the largest rows that latents may have"
    assert np.abs(score).max() < 5.5
    q, p, dot = tokens_of(x, dtype, center)[0], *latents_of(w, dtype, center)[::2][:2]
    assert np.allclose(dot, w.astype(np.float64) @ center, rtol=1e-4, atol=1e-4)
    for codes in (q, p):
        rms = np.sqrt((codes.astype(np.float64) ** 2).mean(1))
        assert ((np.abs(codes.astype(int)).max(1) > 125) | (rms > 35.5)).all()
        assert rms.max() < 36.5


@pytest.mark.parametrize("stride", [200, 208, 203])
def test_codes_do_not_depend_on_layout_or_order_of_threads(stride):
    x, w, *_, center = draw(7, 200, 5)
    expected = tokens_of(x, center=center)
    for seed in range(3):
        testing.cuda_seed(seed)
        for ours, wanted in zip(tokens_of(x, 1, center, stride), expected, strict=True):
            assert (ours == wanted).all()
        for ours, wanted in zip(
            latents_of(w, 1, center, stride), latents_of(w, 1, center), strict=True
        ):
            assert np.array_equal(ours, wanted)


def test_latents_that_a_step_moved_alone():
    w, center = draw(1, 128, 9)[1], draw(1, 128, 1)[4]
    before, changed = latents_of(w, center=center), rounded(2 * w[::-1], 1)
    after = latents_of(changed, center=center)
    touched_at = np.array([0, 3, 5, 4, 1, 5, 0, 2, 3])
    for tail, moved in ((0, [2, 5]), (1, [2, 3, 5]), (2**62, [1, 2, 3, 4, 5, 7, 8])):
        found = [a.copy() for a in before[:3]]
        assert screened.requantise(changed, 1, center, *found, touched_at, 5, tail) == 0
        for ours, old, new in zip(found, before, after, strict=False):
            stay = np.setdiff1d(np.arange(9), moved)
            assert (ours[moved] == new[moved]).all() and (ours[stay] == old[stay]).all()


def test_latents_that_can_no_longer_be_screened_are_counted_once():
    w = draw(1, 128, 6)[1]
    w[1] = np.nan
    codes, scale, dot, unscreened = latents_of(w)
    assert unscreened == 1
    for value, more in ((np.inf, 2), (np.inf, 0), (1.0, -3), (1.0, 0)):
        w[[1, 2, 3]] = value
        touched_at = np.array([0, 1, 1, 1, 1, 0])
        assert screened.requantise(w, 1, NOTHING, codes, scale, dot, touched_at, 1, 0) == more
        assert np.isnan(scale).sum() == (3 if value == np.inf else 0)


def test_rows_that_cannot_be_screened():
    x = draw(9, 128, 1, 0)[0]
    x[0, 5], x[1, 3], x[2], x[3], x[4] = np.nan, np.inf, 1e20, 1e-20, 0.0
    x[5] *= 1e-10
    _, scale, bound = tokens_of(x, 0)
    assert np.isnan(bound).tolist() == [True] * 4 + [False] * 5
    assert scale[4] == 2.0**40 and bound[4] == screened.zero - 2
    assert np.isnan(latents_of(x, 0)[1]).tolist() == [True] * 4 + [False] * 5
    assert latents_of(x, 0)[3] == 4


def test_what_a_row_repeats_is_not_repeated_in_its_errors():
    """Few dimensions alive: the transform takes few values, which rounding to nearest repeats."""
    for alive in (slice(0, 24), slice(0, 768, 12)):
        x, w = np.zeros((40, 768), np.float32), np.zeros((150, 768), np.float32)
        given = draw(40, len(range(768)[alive]), 150, 0)
        x[:, alive], w[:, alive] = given[0], given[1]
        score = scores(x, w, 0)
        assert 0.6 < score.std() < 1.3 and np.abs(score).max() < 5.5
    g = np.random.default_rng(0)
    ternary = g.integers(-1, 2, (190, 768)).astype(np.float32)
    score = scores(ternary[:40], ternary[40:], 0)
    assert 0.6 < score.std() < 1.1 and np.abs(score).max() < 5.5


# ---- candidates and entries


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"x_dtype": 2, "w_dtype": 2},
        {"x_dtype": 0, "w_dtype": 0},
        {"x_dtype": 0},
        {"x_stride": 203, "w_stride": 208},
    ],
)
@pytest.mark.parametrize("window", [0.0, 0.25])
def test_entries(layout, window):
    d = 200
    x, w, bias, threshold, center = draw(35, d, 270, layout.get("w_dtype", 1), massive=30.0)
    if layout.get("x_dtype", 1) == 0:
        x = x + np.float32(1e-3)
    found = encode(x, w, bias, threshold, center, window, **layout)
    assert_encodes((x, w, bias, threshold), found, window)
    entries, candidates = len(found[1]), len(found[6])
    assert 300 < entries <= candidates < 1.4 * entries
    for seed in range(1, 3):
        testing.cuda_seed(seed)
        again = encode(x, w, bias, threshold, center, window, **layout)
        assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize(("n", "d", "f"), [(1, 128, 1), (140, 200, 300), (30, 640, 270)])
def test_hopper_multiplies_the_codes_exactly(n, d, f):
    data = draw(n, d, f, massive=20.0)
    data[3][:] = 0.5 if f > 1 else -9
    plain = encode(*data)
    testing.cuda_seed(3)
    for ours, wanted in zip(encode(*data, hopper=True), plain, strict=True):
        assert np.array_equal(ours, wanted)
    assert len(plain[6]) > 0.2 * n * f


def test_sums_that_are_no_exact_floats():
    """Tokens parallel to latents: sums beyond 2^22 in size, of either sign."""
    d = 4096
    w = rounded(np.random.default_rng(0).normal(size=(2, d)).astype(np.float32), 1)
    x = np.concatenate([w, -w])
    size = (w.astype(np.float64) ** 2).sum(1)
    codes = tokens_of(x)[0].astype(np.float64)
    assert (codes**2).sum(1).max() > 2**22
    for factor, expected in (
        (0.98, [0, 1]),
        (1.02, []),
        (-0.98, [0, 1] * 2 + [1, 0]),
        (-1.02, [0, 1] * 4),
    ):
        limits = (factor * size).astype(np.float32)
        found = encode(x, w, np.zeros(2, np.float32), limits, hopper=True)
        assert found[1].tolist() == expected


def test_pre_of_every_candidate():
    x, w, bias, threshold, _ = draw(20, 640, 100)
    *_, offsets, indices, pre = encode(x, w, bias, threshold)
    truth, slack = pre_of(x, w, bias)
    rows = np.repeat(np.arange(len(x)), np.diff(offsets))
    assert len(indices) > 100
    assert (np.abs(pre - truth[rows, indices]) <= slack[rows, indices]).all()


def test_a_pre_activation_depends_on_its_token_and_latent_alone():
    x, w, bias, threshold, _ = draw(20, 200, 100)
    *_, offsets, indices, pre = encode(x, w, bias, threshold)
    for i in (3, 11):
        one = encode(x[i : i + 1], w, bias, threshold)
        assert np.array_equal(one[7], pre[offsets[i] : offsets[i + 1]])
        assert np.array_equal(one[6], indices[offsets[i] : offsets[i + 1]])


@pytest.mark.parametrize("window", [0.0, 0.3])
def test_what_is_not_finite_or_extreme(window):
    x, w, bias, threshold, center = draw(21, 136, 300, 0)
    x[2, 5], x[3, 0], x[4], x[5], x[6] = np.nan, np.inf, 0.0, center, x[6] * 1e30
    x[7] = x[7] * 1e-30
    w[3, 5], w[7], w[8], w[9], w[10] = np.nan, 0.0, w[8] * 1e25, w[9] * 1e-25, np.inf
    threshold[20], threshold[21], threshold[22] = np.nan, np.inf, -np.inf
    bias[30], bias[31], bias[32], bias[7] = np.nan, np.inf, -np.inf, 5.0
    layout = {"x_dtype": 0, "w_dtype": 0}
    for middle in (NOTHING, center):
        found = encode(x, w, bias, threshold, middle, window, **layout)
        assert_encodes((x, w, bias, threshold), found, window)
        assert len(found[6]) < 0.5 * x.shape[0] * w.shape[0]


def test_zeros_are_decided_by_the_bias():
    x, w = np.zeros((3, 128), np.float32), draw(1, 128, 4)[1]
    threshold = np.array([1.0, 1.0, -1e-30, 0.0], np.float32)
    bias = np.array([1.0, np.nextafter(np.float32(1), np.float32(2)), 0.0, 0.0], np.float32)
    found = encode(x, w, bias, threshold)
    assert found[1].tolist() == [1, 2] * 3
    found = encode(draw(3, 128, 1)[0], np.zeros_like(w), bias, threshold)
    assert found[1].tolist() == [1, 2] * 3


def test_entries_just_above_their_limits_are_found():
    """Every pair once with a limit at its own pre-activation, less the rounding of float32."""
    x, w, bias, _, center = draw(64, 256, 64)
    pre, slack = pre_of(x, w, bias)
    for shift in range(0, 64, 7):
        at = (np.arange(64), (np.arange(64) + shift) % 64)
        threshold = np.full(64, np.inf, np.float32)
        threshold[at[1]] = (pre[at] - 2 * slack[at]).astype(np.float32)
        found = encode(x, w, bias, threshold, center)
        rows = np.repeat(np.arange(64), np.diff(found[0]))
        has = np.zeros((64, 64), bool)
        has[rows, found[1]] = True
        assert has[at].all()


def test_capacity():
    x, w, bias, threshold, center = draw(10, 128, 100)
    exact = encode(x, w, bias, threshold, center)
    nnz = len(exact[1])
    wide = encode(x, w, bias, threshold, center, max_nnz=nnz + 7)
    assert wide[4] == nnz
    for ours, wanted in zip(wide[1:4], exact[1:4], strict=True):
        assert (ours[:nnz] == wanted).all() and (ours[nnz:] == 0).all()
    tight = encode(x, w, bias, threshold, center, max_nnz=nnz - 1)
    assert tight[4] == nnz and tight[0].max() == nnz - 1
    assert np.isnan(tight[2]).all() and (tight[3] == 1).all() and (tight[1] == 0).all()


def test_tokens_without_candidates():
    x, w, bias, threshold, _ = draw(600, 128, 3)
    threshold[:] = 1e9
    x[[5, 599]] *= np.float32(100)
    threshold[1] = 100
    found = encode(x, w, bias, threshold)
    assert_encodes((x, w, bias, threshold), found)
    none = encode(x[:5], w, bias, np.full(3, np.inf, np.float32))
    assert none[0].tolist() == [0] * 6 and len(none[1]) == 0
