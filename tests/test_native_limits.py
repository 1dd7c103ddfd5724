"""What the ops do at the edges of memory: absent outputs, too little of it, sizes out of range."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from conftest import native_absent
from samples import decode_backward_args, encode_backward_args, problem, sae_backward_args

from gemmascope_fast import ops

OPS = tuple(ops.TABLE)
not_under_asan = pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="AddressSanitizer ends the process where an allocation fails",
)


def absent_outputs() -> dict[str, list]:
    """Arguments by op that ask for as little as it can be asked for."""
    p = problem()
    sae = sae_backward_args(p)
    return {
        "encode_backward": [*encode_backward_args(p)[:12], *[False] * 4],
        "decode_backward": [*decode_backward_args(p)[:7], *[False] * 3],
        "sae_backward": [*sae[:2], None, 0.0, *sae[4:-1], False],
        "jumprelu_encode": [*p.encoder, p.threshold, 0.0, None, False],
        "topk_encode": [*p.encoder, 3, False],
        "batchtopk_encode": [*p.encoder, 2.0, None, None, False],
    }


@pytest.mark.parametrize("name", absent_outputs())
def test_absent_outputs_do_not_share_a_tensor(backend, name):
    backend.opcheck(name, absent_outputs()[name], test_utils="test_schema")


@not_under_asan
@pytest.mark.parametrize("capacity", [10**15, 2**62])
def test_a_capacity_beyond_memory_names_op_and_bytes(capacity):
    if reason := native_absent(OPS):
        pytest.skip(reason)
    p = problem()
    size = f"{capacity * 4} bytes" if capacity == 10**15 else f"{2**63 - 1} bytes"
    calls = {
        "jumprelu_encode": (*p.encoder, p.threshold, 0.0, capacity, False),
        "batchtopk_encode": (*p.encoder, 2.0, None, capacity, False),
    }
    for name, args in calls.items():
        with pytest.raises(RuntimeError, match=rf"{name}: not enough memory for \D*{size}"):
            getattr(torch.ops.gemmascope_fast, name)(*args)


# Every entry is stored: 8 bytes of working memory each, 512 MiB, while 128 MiB are left.
EXHAUSTED = """
import resource, torch, gemmascope_fast
torch.set_num_threads({threads})
encode = torch.ops.gemmascope_fast.jumprelu_encode
def call(n):
    return encode(torch.ones(n, 16), W_enc, bias, bias - 1, 0.0, None, False)
W_enc, bias = torch.ones(16384, 16).t(), torch.zeros(16384)
call(64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
try:
    call(4096)
except RuntimeError as error:
    print(error)
print(int(call(64)[0][-1]))
"""


@not_under_asan
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize("threads", [1, 2])
def test_exhausted_working_memory_is_an_error_that_names_the_op(run_python, threads):
    if reason := native_absent(OPS):
        pytest.skip(reason)
    message, *_, stored = run_python(EXHAUSTED.format(threads=threads)).splitlines()
    assert message.startswith("jumprelu_encode: not enough memory")
    assert int(stored) == 64 * 16384  # the process goes on


@pytest.mark.parametrize("bandwidth", [float("inf"), 1e39, float("nan"), -1.0])
def test_bandwidth_must_be_a_finite_float32(bandwidth):
    # With an infinite threshold, threshold - bandwidth / 2 would be NaN and store every latent.
    if reason := native_absent(OPS):
        pytest.skip(reason)
    p = problem()
    args = (*p.encoder, torch.full_like(p.threshold, float("inf")), bandwidth, None, False)
    with pytest.raises(RuntimeError, match="jumprelu_encode: bandwidth must be in .*, got "):
        torch.ops.gemmascope_fast.jumprelu_encode(*args)


def test_float16_subnormals_survive_flushing_in_every_instruction_set():
    """The conversion instructions ignore the flag, so the generic code has to as well."""
    testing = pytest.importorskip("gemmascope_fast._testing")
    bits = torch.arange(2**16).view(256, 256)
    half = bits.to(torch.uint16).view(torch.float16)
    expected = half.float()
    source = bits.numpy().astype("uint16")
    assert torch.set_flush_denormal(True)
    try:
        for target in testing.SimdTarget.__members__.values():
            if not testing.simd_target_available(target):
                print(f"{target}: not on this processor")
                continue
            for widen in (testing.dot_widen, testing.row_widen):
                found = torch.from_numpy(widen(target, source, 2))
                assert torch.equal(found.nan_to_num(9e9), expected.nan_to_num(9e9)), target
    finally:
        torch.set_flush_denormal(False)
