"""Batches that read W range of latents by range: every token's sum has the bits it has alone.

A token alone is below the size from which entries are reordered (`csrc/cpu/token_runs.cpp`): 32 MiB
of rows, eight entries per token, an entry for every second latent.
"""

from __future__ import annotations

import pytest
import torch
from oracle import assert_all_same

OPS = ("decode", "decode_", "decode_backward", "encode_backward")
N, D, D_SAE = 96, 1030, 700


def entries(order: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """offsets, indices, values: 60 to 139 entries per token, none for two of them."""
    lengths = torch.randint(60, 140, (N,))
    lengths[3] = lengths[N - 1] = 0
    rows = [torch.randint(D_SAE, (int(size),)) for size in lengths]  # some of them twice
    if order == "ascending":
        rows = [row.sort().values for row in rows]
    elif order == "descending":
        rows = [row.sort(descending=True).values for row in rows]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    indices = torch.cat(rows).to(torch.int32)
    return offsets, indices, torch.randn(len(indices))


def alone(offsets: torch.Tensor, r: int) -> tuple[torch.Tensor, slice]:
    begin, end = int(offsets[r]), int(offsets[r + 1])
    return torch.tensor([0, end - begin]), slice(begin, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["ascending", "descending", "any"])
def test_every_token_has_the_bits_it_has_alone(backend, order, dtype):
    if not backend.native:
        pytest.skip("only the compiled library reorders entries")
    offsets, indices, values = entries(order)
    W = torch.randn(D_SAE, 2 * D if dtype != torch.float32 else D).to(dtype)  # 4 KB per row
    bias, g = torch.randn(W.shape[1]), torch.randn(N, W.shape[1])
    assert indices.numel() * W.shape[1] * W.element_size() > 32 << 20
    decode, in_place = backend.op("decode"), backend.op("decode_")
    recon = decode(offsets, indices, values, W, bias, None, None, dtype)
    added = g.to(dtype, copy=True)
    in_place(added, offsets, indices, values, W)
    backward = backend.op("decode_backward")
    d_values = backward(g, offsets, indices, values, W, None, None, True, False, False)[0]
    for r in range(N):
        own, part = alone(offsets, r)
        args = (own, indices[part], values[part])
        target = g[r : r + 1].to(dtype, copy=True)
        in_place(target, *args, W)
        mine = [
            decode(*args, W, bias, None, None, dtype)[0],
            target[0],
            backward(g[r : r + 1], *args, W, None, None, True, False, False)[0],
        ]
        assert_all_same(mine, [recon[r], added[r], d_values[part]])


def test_one_thread_or_three(backend):
    if not backend.native:
        pytest.skip("only the compiled library reorders entries")
    offsets, indices, values = entries("ascending")
    W, before = torch.randn(D_SAE, D), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            args = (offsets, indices, values, W, None, None, None, torch.float32)
            found.append(backend.op("decode")(*args))
    finally:
        torch.set_num_threads(before)
    assert_all_same(found[1:], [found[0]] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_input_gradient_has_the_bits_of_every_token_alone(backend, dtype):
    if not backend.native:
        pytest.skip("only the compiled library reorders entries")
    offsets, indices, d_values = entries("any")
    W_enc = torch.randn(D_SAE, 2 * D).to(dtype).t()
    x, gate = torch.randn(N, 2 * D), torch.ones(len(indices))
    needs = (None, None, True, False, False, False)

    def d_x(x, offsets, indices, d_values, gate):
        entries = (offsets, indices, d_values, gate)
        return backend.op("encode_backward")(d_values, None, x, W_enc, None, 0.0, *entries, *needs)

    whole = d_x(x, offsets, indices, d_values, gate)[0]
    for r in range(N):
        own, part = alone(offsets, r)
        mine = d_x(x[r : r + 1], own, indices[part], d_values[part], gate[part])[0]
        assert_all_same([mine[0]], [whole[r]])
