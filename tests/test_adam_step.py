"""adam_step_: Adam on touched and live rows, the same bits on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import assert_all_same, assert_same
from samples import adam_state
from torch import Tensor

from gemmascope_fast import reference

OPS = ("adam_step_",)
RATES = [0.01, 0.0, 0.9, 1e-8]
FOREVER = 2**62


def sparse_gradient(r: int, c: int, at: int, share: float = 0.4) -> Tensor:
    g = torch.Generator().manual_seed(100 + at)
    rows = torch.rand(r, 1, generator=g) < share
    return torch.randn(r, c, generator=g) * rows


def run(op: Any, weight: Tensor, steps: int, moments: str = "fp32", **rule: Any) -> list[Tensor]:
    """Weight and state after `steps` steps; `rule`: rates, tail, remove_parallel, unit_norm."""
    rates = rule.get("rates", RATES)
    state = adam_state(weight, moments, rates[1])
    weight = weight.clone()
    flags = [int(rule.get(name, False)) for name in ("remove_parallel", "unit_norm")]
    for step in range(1, steps + 1):
        gradient = sparse_gradient(*weight.shape, step).to(rule.get("dtype", weight.dtype))
        op(weight, state, gradient, rates, [step, rule.get("tail", 0), *flags, rule.get("seed", 7)])
    return [weight, *state]


@pytest.mark.parametrize("rates", [RATES, [0.01, 0.8, 0.9, 1e-8], [1.0, 0.0, 0.0, 0.0]])
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 15, 16, 130, 257])
def test_backends_agree_bit_for_bit(backend, rates, moments, dtype, columns):
    if backend.interpreted and (columns, rates[0]) not in [(15, 1.0), (257, 0.01)]:
        pytest.skip("interpreted: two widths, each with rates of its own")
    weight = torch.randn(9, columns).to(dtype)
    tail = 3 if rates[1] else 0
    for flags in ({"dtype": torch.float32}, {"dtype": torch.bfloat16, "seed": -3 << 40}):
        ours = run(backend.op("adam_step_"), weight, 6, moments, rates=rates, tail=tail, **flags)
        assert_all_same(
            ours, run(reference.adam_step_, weight, 6, moments, rates=rates, tail=tail, **flags)
        )
        assert not torch.equal(ours[0], weight) and ours[2].any()


@pytest.mark.parametrize("beta1", [0.0, 0.8])
def test_equals_dense_adam_over_hundreds_of_steps(beta1):
    weight = torch.randn(11, 7, dtype=torch.float64)
    rates = [3e-3, beta1, 0.97, 1e-8]
    ours = run(reference.adam_step_, weight, 400, rates=rates, tail=FOREVER if beta1 else 0)[0]
    dense = torch.nn.Parameter(weight.clone())
    adam = torch.optim.Adam([dense], lr=3e-3, betas=(beta1, 0.97))
    for step in range(1, 401):
        dense.grad = sparse_gradient(11, 7, step).double()
        adam.step()
    assert (ours - dense.detach()).abs().max() < 1e-12
    assert (ours - weight).abs().max() > 0.1


def test_rows_without_gradient_are_not_touched(backend):
    weight = torch.randn(6, 20)
    before, state = weight.clone(), adam_state(weight)
    gradient = torch.zeros(6, 20)
    gradient[2, 19], gradient[4] = 1e-30, -0.0
    state[1][4] = 5.0
    backend.op("adam_step_")(weight, state, gradient, RATES, [1, 0, 0, 1, 0])
    assert state[3].tolist() == [0, 0, 1, 0, 0, 0]
    kept = [0, 1, 3, 4, 5]
    assert_same(weight[kept], before[kept])
    assert_same(state[1][kept], torch.tensor([0, 0, 0, 5.0, 0])[:, None].expand(5, 20).clone())


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_step_in_which_no_row_has_a_gradient_changes_nothing(backend, moments):
    weight = torch.randn(6, 20).bfloat16()
    before, state = weight.clone(), adam_state(weight, moments)
    backend.op("adam_step_")(weight, state, torch.zeros(6, 20), RATES, [1, 0, 1, 1, 0])
    assert_all_same([weight, *state], [before, *adam_state(weight, moments)])


@pytest.mark.parametrize("gap", [1, 2, 50])
def test_moments_decay_by_the_steps_since_the_touch(backend, gap):
    weight = torch.zeros(1, 3)
    state = adam_state(weight)
    op, gradient = backend.op("adam_step_"), torch.tensor([[1.0, 2.0, 0.0]])
    op(weight, state, gradient, RATES, [4, 0, 0, 0, 0])
    op(weight, state, gradient, RATES, [4 + gap, 0, 0, 0, 0])
    once = (1 - 0.9) * gradient.double().square()
    torch.testing.assert_close(state[1].double(), once * 0.9**gap + once, rtol=1e-6, atol=0)


def test_live_rows_move_until_their_tail_ends(backend):
    weight = torch.zeros(2, 4)
    rates, op = [0.1, 0.5, 0.9, 1e-8], backend.op("adam_step_")
    state = adam_state(weight, beta1=0.5)
    gradient = torch.tensor([[1.0], [0.0]]).expand(2, 4)
    moved = []
    for step in range(1, 8):
        before = weight.clone()
        op(weight, state, gradient if step == 1 else 0 * gradient, rates, [step, 3, 0, 0, 0])
        moved.append((weight != before).any(1).tolist())
    assert moved == [[True, False]] * 4 + [[False, False]] * 3
    assert state[3].tolist() == [1, 0]
    op(weight, state, gradient, rates, [8, 3, 0, 0, 0])  # moments stood still since step 4
    expected = 0.5 * 0.5**3 * 0.5**4 + 0.5
    assert_same(state[0][0], torch.full((4,), expected))


@pytest.mark.parametrize("columns", [20, 300])
def test_parallel_component_and_unit_norm(backend, columns):
    weight = torch.nn.functional.normalize(torch.randn(5, columns))
    flags = {"remove_parallel": True, "unit_norm": True}
    single, double = (run(backend.op("adam_step_"), weight, 5, **flags)[0] for _ in range(2))
    assert_same(single, double)
    expected = run(reference.adam_step_, weight.double(), 5, **flags, dtype=torch.float64)[0]
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.norm(dim=1), torch.ones(5), rtol=2e-7, atol=0)
    # a gradient along the row alone: nothing is left of it
    weight, gradient = torch.full((1, 16), 0.25), torch.full((1, 16), 3.0)
    backend.op("adam_step_")(weight, adam_state(weight), gradient, RATES, [1, 0, 1, 0, 0])
    assert_same(weight, torch.full((1, 16), 0.25))


def test_a_row_of_zeros_keeps_its_direction(backend):
    weight = torch.zeros(2, 16)
    gradient = torch.tensor([[0.0], [1.0]]).expand(2, 16)
    backend.op("adam_step_")(weight, adam_state(weight), gradient, RATES, [1, 0, 1, 1, 0])
    assert_same(weight[0], torch.zeros(16))
    torch.testing.assert_close(weight[1], torch.full((16,), -0.25))


def test_nan_and_inf_reach_only_their_rows(backend):
    for moments in ("fp32", "8bit"):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.ones(4, 40, dtype=dtype)
            state = adam_state(weight, moments)
            gradient = torch.ones(4, 40)
            gradient[1, 3], gradient[2, 5] = math.nan, math.inf
            for step in (1, 2):
                backend.op("adam_step_")(weight, state, gradient, RATES, [step, 0, 0, 0, 0])
                gradient = torch.ones(4, 40)
            assert weight[[0, 3]].isfinite().all()
            assert weight[1].isnan().tolist() == [k == 3 for k in range(40)], (moments, dtype)
            assert weight[2].isnan().tolist() == [k == 5 for k in range(40)], (moments, dtype)


# ---- 8-bit moments, stochastic rounding


def test_philox_known_answers():
    words = reference.random_words(torch.zeros(1, dtype=torch.int64), 4, 0, 0)
    assert [f"{int(w):08x}" for w in words[0]] == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]


def test_random_words_differ_by_seed_step_row_and_column():
    rows = torch.arange(64)
    drawn = [
        reference.random_words(rows + (row << 32), 65, step, seed)
        for step, seed, row in ((1, 5, 0), (2, 5, 0), (1, 6, 0), (1, 5, 1), (1, 5 << 32, 0))
    ]
    words = torch.stack(drawn).flatten()
    assert words.unique().numel() > 0.999 * words.numel()
    assert abs((words.double() / 2**32).mean() - 0.5) < 0.01


@pytest.mark.parametrize("largest", [1.0, 1.9375, 3e-20, 1e-30, 3e38])
def test_codes_are_unbiased_and_close(largest):
    v = torch.tensor([0.0, 2.0**-20, 0.003, 0.3, 0.77, 1.0]) * largest
    rows = torch.arange(20_000)
    many = v.expand(20_000, 6).contiguous()
    codes, exponents = reference.encode_moment(many, reference.random_words(rows, 6, 1, 3))
    decoded = reference.decode_moment(codes, exponents).double()
    error = (decoded - many.double()).abs()
    assert (error <= many.double() / 8).all()
    assert (decoded[:, 0] == 0).all()
    mean, truth = decoded.mean(0)[2:], many[0, 2:].double()
    assert ((mean - truth).abs() <= 0.002 * truth).all()


def test_bf16_rounding_is_unbiased_and_exact_where_it_can_be():
    w = torch.tensor([1.0, 1.001, -3.3, 1e-30, 0.0])
    random = reference.random_words(torch.arange(40_000), 5, 1, 3)
    rounded = reference.round_stochastically(w.expand(40_000, 5).contiguous(), random).double()
    assert (rounded[:, [0, 4]] == w[[0, 4]].double()).all()
    assert ((rounded.mean(0) - w.double()).abs() <= 1e-4 * w.abs()).all()
    assert rounded[:, 1].unique().tolist() == [1.0, 1.0078125]


def test_small_updates_survive_bf16(backend):
    """Updates of 1e-4 relative to the weight, which rounding to nearest would lose."""
    if backend.interpreted:
        pytest.skip("interpreted: 300 steps take a minute; their bits are compared above")
    weight = torch.ones(8, 256, dtype=torch.bfloat16)
    state, gradient = adam_state(weight, "8bit"), torch.ones(8, 256)
    for step in range(1, 301):
        rates = [1e-4, 0.0, 0.99, 1e-8]
        backend.op("adam_step_")(weight, state, gradient, rates, [step, 0, 0, 0, 1])
    assert abs(weight.double().mean() - (1 - 0.03)) < 0.001


# ---- layouts, bad input


@pytest.mark.parametrize("layout", ["expanded", "transposed", "bf16", "sliced"])
def test_any_gradient_layout(backend, layout):
    weight = torch.randn(70, 33)
    gradient = sparse_gradient(70, 33, 1)
    given = {
        "expanded": lambda: gradient[:, :1].expand(70, 33),
        "transposed": lambda: gradient.t().contiguous().t(),
        "bf16": lambda: gradient.bfloat16(),
        "sliced": lambda: torch.cat([gradient, gradient], 1)[:, :33],
    }[layout]()
    results = []
    for g in (given, given.float().contiguous()):
        mine, state = weight.clone(), adam_state(weight)
        backend.op("adam_step_")(mine, state, g, RATES, [1, 0, 0, 0, 0])
        results.append([mine, *state])
    assert_all_same(*results)


def test_wide_strides_of_weight_and_state(backend):
    weight, gradient = torch.randn(10, 33), sparse_gradient(10, 33, 1)
    padded = torch.full((10, 50), 9.0)
    mine, state = padded[:, 5:38].copy_(weight), adam_state(weight)
    state[1] = torch.full((10, 40), 0.0)[:, :33]
    backend.op("adam_step_")(mine, state, gradient, RATES, [1, 0, 0, 0, 0])
    wanted, other = weight.clone(), adam_state(weight)
    backend.op("adam_step_")(wanted, other, gradient, RATES, [1, 0, 0, 0, 0])
    assert_same(mine.clone(), wanted)
    assert (padded[:, :5] == 9).all() and (padded[:, 38:] == 9).all()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty(backend, shape):
    weight = torch.ones(shape)
    backend.op("adam_step_")(weight, adam_state(weight), torch.ones(shape), RATES, [1, 0, 1, 1, 0])
    assert weight.shape == shape


BAD = [
    (0, torch.ones(3, 4, dtype=torch.float16), "weight must be float32 or bfloat16"),
    (0, torch.ones(4, 3).t(), "weight must have one contiguous row of memory per latent"),
    (2, torch.ones(4, 3), r"gradient must have shape \[3, 4\], got \[4, 3\]"),
    (2, torch.ones(3, 4).int(), "gradient must be float32, bfloat16 or float16"),
    (3, [0.1, 0.0], r"rates must be \[lr, beta1, beta2, eps\], got 2"),
    (3, [-1.0, 0.0, 0.9, 0.0], "lr must be >= 0, got -1"),
    (3, [0.1, 1.0, 0.9, 0.0], r"beta1 must be in \[0, 1\), got 1"),
    (3, [0.1, 0.0, math.nan, 0.0], r"beta2 must be in \[0, 1\), got nan"),
    (3, [0.1, 0.0, 0.9, -1.0], "eps must be >= 0, got -1"),
    (3, [0.1, 0.5, 0.9, 0.0], r"exp_avg must have shape \[3, 4\], got \[0\]"),
    (4, [1, 0], "rule must be"),
    (4, [0, 0, 0, 0, 0], "step must be >= 1, got 0"),
    (4, [1, -1, 0, 0, 0], "tail must be >= 0, got -1"),
]


@pytest.mark.parametrize(("at", "value", "message"), BAD, ids=lambda v: str(v)[:24])
def test_bad_arguments_change_nothing(backend, at, value, message):
    if backend.name == "reference":
        pytest.skip("the reference does not check")
    weight = torch.ones(3, 4)
    args = [weight, adam_state(weight), torch.ones(3, 4), RATES, [1, 0, 0, 0, 0]]
    args[at] = value
    with pytest.raises(RuntimeError, match=f"^adam_step_: .*{message}"):
        backend.op("adam_step_")(*args)
    assert (weight == 1).all() and not args[1][1].any() and not args[1][3].any()


STATES = [
    (0, None, "state must be .*, got 3 tensors"),
    (1, torch.zeros(3, 5), r"exp_avg_sq must have shape \[3, 4\]"),
    (1, torch.zeros(3, 4).double(), "exp_avg_sq must be Float, got Double"),
    (1, torch.zeros(4, 3).t(), "exp_avg_sq must have contiguous rows"),
    (1, torch.zeros(3, 4, dtype=torch.uint8), r"exponents must have shape \[3, 1\]"),
    (3, torch.zeros(3), "touched_at must be Long"),
    (3, torch.zeros(6, dtype=torch.int64)[::2], "touched_at must be contiguous"),
]


@pytest.mark.parametrize(("at", "value", "message"), STATES, ids=lambda v: str(v)[:24])
def test_bad_state_changes_nothing(backend, at, value, message):
    if backend.name == "reference":
        pytest.skip("the reference does not check")
    weight = torch.ones(3, 4)
    state = adam_state(weight)
    if value is None:
        del state[0]
    else:
        state[at] = value
        state[2] = torch.zeros(0, 0, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"^adam_step_: {message}"):
        backend.op("adam_step_")(weight, state, torch.ones(3, 4), RATES, [1, 0, 0, 0, 0])
    assert (weight == 1).all()
