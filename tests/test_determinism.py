"""The same inputs give the same bits; and sizes near 2^31 give the right shapes."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest
import torch
import torch.utils._pytree as pytree
from conftest import native_absent
from oracle import assert_all_same
from samples import jumprelu_entries, problem, sae_backward_args, samples
from torch._subclasses import FakeTensorMode

import gemmascope_fast as gsf
from gemmascope_fast import ops

OPS = tuple(ops.TABLE)


def column_major(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t() if t.dim() > 1 else t


def workload() -> dict[str, list]:
    """Arguments by op and case: several tasks per thread, odd sizes, every dtype and layout."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    problems = {
        **{f"{k}": problem(60, 83, 411, 45, x_dtype=k, w_dtype=k) for k in kinds},
        "strided": problem(60, 83, 411, 45).map(column_major),
        "few tokens": problem(2, 640, 411, 640),
        "aligned": problem(33, 64, 304, 64),
    }
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or the matrix products of the inputs would depend on it
    for label, p in problems.items():
        inputs = samples(p)
        ends = (50, 200, p.W_dec.shape[0])
        inputs["sae_backward"].append(sae_backward_args(p, sets=3, group_ends=ends))
        for name, cases in inputs.items():
            found |= {f"{name} [{label}] {i}": args for i, args in enumerate(cases)}
    torch.set_num_threads(threads)
    return found


def run_everything(namespace: str, inputs: dict[str, list]) -> dict[str, list[torch.Tensor]]:
    """Every output of every op on the whole workload, arguments that it writes included."""
    found = {}
    for key, args in inputs.items():
        name = key.split()[0]
        op = getattr(getattr(torch.ops, namespace), name).default
        written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None]
        args = [pytree.tree_map(torch.clone, a) if i in written else a for i, a in enumerate(args)]
        outputs = pytree.tree_leaves([op(*args), [args[i] for i in written]])
        found[key] = [t for t in outputs if t is not None]
    return found


def digests(namespace: str) -> dict[str, str]:
    """A hash of the bytes of each op's outputs."""
    found = {}
    for name, outputs in run_everything(namespace, workload()).items():
        seen = hashlib.sha256()
        for t in outputs:
            seen.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found[name] = seen.hexdigest()
    return found


def print_digests(threads: int = 2) -> None:
    """What the fresh interpreters below run."""
    torch.set_num_threads(threads)
    json.dump(digests(ops.NAMESPACE), sys.stdout)


def test_run_to_run_and_one_thread_or_two(backend):
    namespace = ops.NAMESPACE if backend.native else ops.REFERENCE
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        inputs = workload()
        first, again = run_everything(namespace, inputs), run_everything(namespace, inputs)
        for name, outputs in first.items():
            assert_all_same(again[name], outputs, [f"{name} again"] * len(outputs))
        if not backend.native:
            return  # the reference's matrix products may depend on the number of threads
        for threads in (1, 3, 5):
            torch.set_num_threads(threads)
            other = run_everything(namespace, inputs)
            for name, outputs in first.items():
                assert_all_same(other[name], outputs, [f"{name}, {threads} threads"] * len(outputs))
    finally:
        torch.set_num_threads(before)


def test_instruction_sets_threads_and_dirty_memory_agree(run_python):
    """Fresh interpreters: generic against the others, one thread, a perturbed malloc."""
    reason = native_absent(OPS)
    if reason:
        pytest.skip(reason)
    testing = pytest.importorskip("gemmascope_fast._testing")
    variants = {"generic": {"GEMMASCOPE_FAST_CPU": "generic"}}
    for name in ("avx2", "avx2_vnni", "avx512", "avx512_amx", "neon"):
        if testing.simd_target_available(getattr(testing.SimdTarget, name)):
            variants[name] = {"GEMMASCOPE_FAST_CPU": name}
        else:
            print(f"{name}: not on this processor")
    variants["dirty memory"] = {"MALLOC_PERTURB_": "165"}
    code = "import test_determinism as t; t.print_digests({})"
    wanted = json.loads(run_python(code.format(1)))
    assert len(wanted) > 100
    for name, env in variants.items():
        found = json.loads(run_python(code.format(2), **env))
        differing = sorted(key for key in wanted if found[key] != wanted[key])
        assert not differing, f"{name} differs from the default in {differing}"


def test_an_unknown_instruction_set_is_an_error(run_python):
    reason = native_absent(OPS)
    if reason:
        pytest.skip(reason)
    code = (
        "import torch, samples\nfrom gemmascope_fast import ops\n"
        "try: torch.ops.gemmascope_fast.topk_encode(*samples.samples()['topk_encode'][0])\n"
        "except RuntimeError as error: print(error)"
    )
    message = run_python(code, GEMMASCOPE_FAST_CPU="sse9")
    assert (
        "GEMMASCOPE_FAST_CPU=sse9: expected generic, avx2, avx2_vnni, avx512, avx512_amx or neon"
        in message
    )


def test_poison_reaches_the_memory_of_the_compiled_library():
    reason = native_absent(("jumprelu_encode",))
    if reason:
        pytest.skip(reason)
    assert torch.empty(3).isnan().all()
    p = problem()
    nnz = jumprelu_entries(p)[1].shape[0]
    encode = torch.ops.gemmascope_fast.jumprelu_encode.default
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        padded = encode(*p.encoder, p.threshold, 0.4, 900, True)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::fill_"] == calls["aten::empty"] == len(padded)
    for t in padded[1:4]:
        assert t.shape == (900,) and not t[nnz:].any()


def test_the_batch_changes_no_bit(backend):
    """A token's entries and reconstruction do not depend on the tokens beside it."""
    if not backend.native:
        pytest.skip("the reference's matrix product may depend on the batch")
    p = problem(67, 83, 611, 45)
    whole = gsf.jumprelu_encode(*p.encoder, p.threshold)
    recon = gsf.decode(whole, p.W_dec, p.b_dec)
    for rows in (slice(0, 1), slice(3, 8), slice(66, 67), slice(10, 60)):
        part = gsf.jumprelu_encode(p.x[rows], p.W_enc, p.b_enc, p.threshold)
        mine = [part.indices, part.values, gsf.decode(part, p.W_dec, p.b_dec)]
        assert_all_same(mine, [whole[rows].indices, whole[rows].values, recon[rows]])


# ---- sizes beyond 2^31, without allocating them


def test_shapes_beyond_int32(backend):
    n, d, d_sae, capacity = 8192, 5376, 2**20, 2**32 + 5
    with FakeTensorMode():
        x, W_enc = torch.empty(n, d), torch.empty(d_sae, d).t()
        b_enc = torch.empty(d_sae)
        encode = backend.op("jumprelu_encode")
        entries = encode(x, W_enc, b_enc, b_enc, 0.1, capacity, True)
        assert [tuple(t.shape) for t in entries] == [
            *((n + 1,), (capacity,), (capacity,), (capacity,), ()),
            *((d_sae + 1,), (capacity,)),
        ]
        assert [t.dtype for t in entries[:2]] == [torch.int64, torch.int32]
        top = backend.op("topk_encode")(x, W_enc, b_enc, d_sae // 2, True)
        assert top[1].shape == top[5].shape == (n * d_sae // 2,) and n * d_sae // 2 == 2**32
        offsets, indices, values, gate, _, *view = entries
        W_dec = torch.empty(d_sae, d)
        recon = backend.op("decode")(offsets, indices, values, W_dec, None, *view, torch.bfloat16)
        assert recon.shape == (n, d) and recon.dtype == torch.bfloat16
        d_values, d_W_dec, d_b_dec = backend.op("decode_backward")(
            recon, offsets, indices, values, W_dec, *view, True, True, True
        )
        assert (d_values.shape, d_W_dec.shape, d_b_dec.shape) == ((capacity,), (d_sae, d), (d,))
        d_x, d_W_enc, d_b_enc, d_threshold = backend.op("encode_backward")(
            *(d_values, None, x, W_enc, b_enc, 0.1, offsets, indices, values, gate, *view),
            *[True] * 4,
        )
        assert d_W_enc.shape == (d, d_sae) and d_W_enc.stride() == (1, d)
        assert (d_x.shape, d_b_enc.shape, d_threshold.shape) == ((n, d), (d_sae,), (d_sae,))
        assert d_W_enc.numel() > 2**32
