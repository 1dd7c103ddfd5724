"""TopK of few tokens: the CUDA kernels that write all keys and select from them, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import assert_entries, topk_support
from selection import NO_VIEW, select, tensors, testing
from test_cuda_select import D_SAE, matrices

NAN, INF = float("nan"), float("inf")
GROUP = 32


@pytest.fixture(autouse=True)
def order():
    """Restore the order of threads."""
    yield
    testing.cuda_seed(0)


def keys_of(pre: torch.Tensor) -> torch.Tensor:
    """[n, groups, 32] order-preserving keys, int64: bits of positive numbers, NaN above all."""
    n, d_sae = pre.shape
    keys = torch.where(pre > 0, pre.view(torch.int32).long(), 0)
    keys[pre.isnan()] = 0x7FC00000
    return torch.nn.functional.pad(keys, (0, -d_sae % GROUP)).reshape(n, -1, GROUP)


def selected(keys: torch.Tensor, k: int, in_memory: bool = False, **places):
    given = keys.numpy().astype(np.uint32), keys.amax(-1).numpy().astype(np.uint32)
    return tensors(select.topk_few(*given, k, in_memory, **places)) + NO_VIEW


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("name", matrices())
def test_the_k_best_are_exact(name, in_memory):
    pre = matrices()[name]
    for seed, k in enumerate((1, 7, 33, D_SAE - 1, D_SAE)):
        testing.cuda_seed(seed)
        assert_entries(selected(keys_of(pre), k, in_memory), topk_support(pre, k))


@pytest.mark.parametrize("d_sae", [1, 31, 32, 33, 64])
def test_groups_of_any_number(d_sae):
    pre = torch.randn(3, d_sae)
    for k in {1, d_sae // 2, d_sae} - {0}:
        assert_entries(selected(keys_of(pre), k), topk_support(pre, k))


def test_more_groups_and_more_latents_than_shared_memory_holds():
    draw = torch.Generator().manual_seed(0)
    pre = torch.randn(2, 8200 * GROUP, generator=draw)  # 8,192 keys fit
    pre[1] = (2 * pre[1]).round()  # the k best are ties in most groups
    for k in (3, 300):
        assert_entries(selected(keys_of(pre), k), topk_support(pre, k))


def test_ties_at_the_limit_of_groups_go_to_the_smaller_latent():
    """The 3rd of the highest keys is 2.0, and all but the first two of its latents lose."""
    pre = torch.full((1, 8 * GROUP), -1.0)
    pre[0, 5 * GROUP] = 3.0
    pre[0, [40, 41, 70, 200, 201]] = 2.0
    found = selected(keys_of(pre), 3)
    assert found[1].tolist() == [40, 41, 5 * GROUP] and found[2].tolist() == [2.0, 2.0, 3.0]


def test_only_groups_that_can_hold_a_best_entry_are_read():
    """Keys of the others are invalid here, and would be selected."""
    keys = keys_of(torch.rand(1, 40 * GROUP) + 1)
    highest = keys.amax(-1)
    cut = highest[0].sort(descending=True).values[6]
    given = keys.clone()
    given[highest < cut] = 0x7FC00000
    found = select.topk_few(
        given.numpy().astype(np.uint32), highest.numpy().astype(np.uint32), 7, False
    )
    pre = keys.int().view(torch.float32).reshape(1, -1)
    assert_entries(tensors(found) + NO_VIEW, topk_support(pre, 7))


def test_rows_go_where_they_belong():
    pre = torch.randn(3, 100)
    which = torch.tensor([4, 0, 2])
    offsets, latents, values, gate, *_ = selected(
        keys_of(pre), 5, which=which.numpy().astype(np.int64), rows=6
    )
    for row, to in enumerate(which.tolist()):
        assert offsets[to + 1] == 5 * (to + 1)
        own = slice(5 * to, 5 * to + 5)
        only = torch.tensor([0, 5]), latents[own], values[own], gate[own], *NO_VIEW
        assert_entries(list(only), topk_support(pre[row : row + 1], 5))
    assert offsets[0] == 0


# ---- the keys


def product(n: int, d: int, d_sae: int, seed: int = 0):
    """Integers, so that sums are exact in any order."""
    draw = torch.Generator().manual_seed(seed)
    x, W = (torch.randint(-4, 5, (rows, d), generator=draw).float() for rows in (n, d_sae))
    bias = torch.randint(-8, 9, (d_sae,), generator=draw) / 4
    return x, W, bias, x @ W.t() + bias


@pytest.mark.parametrize(
    "n, d, d_sae",
    [(1, 1, 1), (16, 0, 70), (7, 128, 64), (16, 1000, 257), (9, 136, 96), (2, 40, 33)],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_keys_of_a_product(n, d, d_sae, dtype):
    x, W, bias, pre = product(n, d, d_sae)
    for seed in range(2):
        testing.cuda_seed(seed)
        keys, highest = testing.cuda_few_keys(x.numpy(), W.numpy(), dtype, bias.numpy())
        expected = keys_of(pre)
        assert (keys == expected.flatten(1).numpy()).all()
        assert (highest == expected.amax(-1).numpy()).all()


def test_keys_of_invalid_numbers():
    x, W, bias, _ = product(13, 40, 150)
    bias[[3, 60, 149]] = torch.tensor([NAN, INF, -INF])
    x[5, 7], x[2, 1] = NAN, INF
    pre = x @ W.t() + bias
    keys, highest = testing.cuda_few_keys(x.numpy(), W.numpy(), "bfloat16", bias.numpy())
    assert (keys == keys_of(pre).flatten(1).numpy()).all()
    assert (highest == keys_of(pre).amax(-1).numpy()).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_keys_are_the_bits_of_the_encoder_s_values(dtype):
    draw = torch.Generator().manual_seed(1)
    x, W = (torch.randn(rows, 300, generator=draw) for rows in (16, 130))
    bias, bound = torch.randn(130, generator=draw), torch.zeros(16)
    given = x.numpy(), W.numpy(), dtype
    keys, _ = testing.cuda_few_keys(*given, bias.numpy())
    offsets, indices, values, *_ = testing.cuda_encode_tiles(
        *(x.numpy(), W.numpy(), dtype + ":few", bias.numpy(), bound.numpy(), True, 0.0),
        *((0, 130), 16 * 130, -1),
    )
    rows = np.repeat(np.arange(16), np.diff(offsets))
    assert (keys > 0).sum() == len(indices) > 500
    assert (keys[rows, indices] == values.view(np.uint32)).all()
