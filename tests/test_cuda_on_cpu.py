"""The emulation that runs CUDA kernels on a CPU: what it computes, and what it catches."""

from __future__ import annotations

import numpy as np
import pytest

testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")
emulated = testing.cuda_on_cpu
SEEDS = range(40)
RANDOM = range(1, 40)


def runs(seeds, function):
    """What `function` returns under each order of the threads."""
    try:
        for seed in seeds:
            testing.cuda_seed(seed)
            yield function()
    finally:
        testing.cuda_seed(0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_shared_memory_and_its_barrier(dynamic):
    given = np.arange(4 * 96, dtype=np.int32)
    wanted = given.reshape(4, 96)[:, ::-1].ravel()
    assert all(
        (r == wanted).all() for r in runs(SEEDS, lambda: emulated.reverse(given, dynamic, True))
    )
    missing = [r for r in runs(SEEDS, lambda: emulated.reverse(given, dynamic, False))]
    assert all((r != wanted).any() for r in missing)
    assert (missing[0][:48] == -1).all(), "0xFF is what shared memory begins with"


def test_a_missing_barrier_after_the_read_is_seen():
    given = np.random.default_rng(0).integers(0, 100, 5 * 96).astype(np.int32)
    assert all(
        (r == given.sum()).all() for r in runs(SEEDS, lambda: emulated.running_sums(given, True))
    )
    wrong = [
        (r != given.sum()).any() for r in runs(RANDOM, lambda: emulated.running_sums(given, False))
    ]
    assert np.mean(wrong) > 0.5


def test_shared_memory_is_new_in_every_block():
    for found in runs(SEEDS, lambda: emulated.unwritten(3)):
        assert (found == 0xFFFFFFFF).all()


def test_a_lost_update_is_seen():
    assert len(set(runs(RANDOM, emulated.lost_updates))) > 1


def test_the_order_of_threads_depends_on_the_seed_alone():
    orders = [tuple(r) for r in runs(SEEDS, emulated.claims)]
    assert orders[0] == tuple(range(96))
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(96)) for order in orders)
    assert orders == [tuple(r) for r in runs(SEEDS, emulated.claims)]


def test_named_barriers():
    t = np.arange(32)
    for found in runs(SEEDS, emulated.hand_over):
        assert (found == 3 * t * t).all()


def test_collectives_of_a_warp():
    v = np.random.default_rng(1).integers(1, 2**31, 32).astype(np.uint32)
    lane = np.arange(32)
    bits = (1 << lane).astype(np.int64)
    same = v[:, None] % 5 == v % 5
    wanted = [
        v[5],
        v[lane // 8 * 8 + (lane + 3) % 8],
        v[np.where(lane < 3, lane, lane - 3)],
        v[np.where(lane % 16 < 3, lane, lane - 3)],
        v[np.where(lane > 22, lane, lane + 9)],
        v[np.where(lane % 4 == 3, lane, lane + 1)].astype(np.int64) << 20,
        v[lane ^ 21],
        1,
        bits[v % 2 == 1].sum(),
        (v % 61 == 0).any(),
        1,
        (same * bits).sum(1),
        int(v.astype(np.int64).sum()) % 2**32,
        v.min(),
        v.max(),
        np.bitwise_or.reduce(v),
        np.bitwise_and.reduce(v | 0xFF),
        (v % 2).sum(),
        1,
        0,
        np.where(
            lane % 2 == 1,
            int(v[1::2].astype(np.int64).sum()) % 2**32,
            np.bitwise_xor.reduce(v[::2]),
        ),
    ]
    for found in runs(SEEDS, lambda: emulated.collectives(v)):
        for row, (got, want) in enumerate(zip(found, wanted, strict=True)):
            assert (got == want).all(), row


def test_atomics():
    v = np.random.default_rng(2).integers(-(2**20), 2**20, 96).astype(np.int32)
    u = v.view(np.uint32)
    start = np.array([5, 9, -9, -1, 0, 8, -1, 77, 3, 0, 0, 0], dtype=np.int32)
    signed = [5 + v.sum(), v.min(), v.max(), None, None, None, None, None, 3 + v.sum()]
    unsigned = [
        u.min(),
        u.max(),
        np.bitwise_or.reduce(u) | 8,
        np.bitwise_and.reduce(u),
        np.bitwise_xor.reduce(u) ^ 77,
    ]
    for found in runs(SEEDS, lambda: emulated.atomics(v, start)):
        assert [int(x) for x in found[[0, 1, 2, 8]]] == [signed[i] for i in (0, 1, 2, 8)]
        assert found[3:8].view(np.uint32).tolist() == unsigned
        assert found[10:].view(np.uint64) == u.astype(np.uint64).sum()


def test_every_thread_of_a_grid_runs_once():
    assert all((found == 1).all() for found in runs(range(4), emulated.places))


WRONG = {
    "lane skips": r"threads 0-6 wait in __shfl_sync at \S+:\d+ for the lanes 0xffffffff; "
    "threads 7-7 wait in __syncthreads",
    "lane ended": r"wait in __any_sync .*; threads 7-7 have ended",
    "other collective": "others wait in __(any|ballot)_sync .* calls __(any|ballot)_sync",
    "other mask": "for the lanes 0x55555555.*|for the lanes 0xffffffff",
    "not named": "thread [0-9]*[13579] .*__syncwarp with a mask that does not name the caller",
    "barrier skipped": "others wait in __syncthreads at .*, where this thread calls __syncthreads",
    "two barriers": "others wait in __syncthreads at .*, where this thread calls __syncthreads",
    "barrier against warp": "wait in __syncwarp .*wait in __syncthreads",
    "named barrier": "threads 0-95 wait at named barrier 1",
    "trap": "__trap",
    "outside": "a shuffle reads a lane outside its mask",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_reported(wrong):
    for seed in range(6):
        testing.cuda_seed(seed)
        with pytest.raises(RuntimeError, match="wrong_kernel, block .*" + WRONG[wrong]):
            emulated.wrong(wrong)
    testing.cuda_seed(0)
    assert (emulated.hand_over() == 3 * np.arange(32) ** 2).all(), (
        "and the next launch is not disturbed"
    )


def test_16_bit_floats_are_read_exactly():
    bits = np.arange(2**16, dtype=np.uint16)
    assert np.array_equal(
        emulated.widen(bits, True), bits.view(np.float16).astype(np.float32), equal_nan=True
    )
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(emulated.widen(bits, False), wide, equal_nan=True)


def test_16_bit_floats_are_rounded_to_nearest_even():
    torch = pytest.importorskip("torch")
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    steps = np.arange(-3, 4, dtype=np.int64)
    near = (
        (halves[:, None].view(np.uint32).astype(np.int64) + 2048 * steps).ravel().astype(np.uint32)
    )
    random = np.random.default_rng(3).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([near, near + 1, near - 1, random]).view(np.float32)
    values = values[~np.isnan(values)]
    with np.errstate(over="ignore"):
        wanted = values.astype(np.float16).view(np.uint16)
    assert (emulated.narrow(values, True) == wanted).all()
    wanted = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (emulated.narrow(values, False) == wanted).all()
    assert (emulated.narrow(np.array([np.nan], np.float32), True) == 0x7FFF).all()
