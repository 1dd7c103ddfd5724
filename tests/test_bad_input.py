"""Bad arguments: every message names the op, the argument, what was expected and what came."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from samples import jumprelu_entries, problem, samples

import gemmascope_fast as gsf
from gemmascope_fast import checks, ops

OPS = tuple(ops.TABLE)

# ---- the public functions

P = problem(n=5)
LONG = torch.zeros(1, dtype=torch.int64)


def acts(**changes):
    entries = dict(zip(("offsets", "indices", "values", "gate"), jumprelu_entries(P), strict=False))
    return gsf.SparseActs(**(entries | changes), shape=(5, 37))


ENCODERS = {
    "jumprelu_encode": lambda x, W, b: gsf.jumprelu_encode(x, W, b, P.threshold),
    "topk_encode": lambda x, W, b: gsf.topk_encode(x, W, b, 3),
    "batchtopk_encode": lambda x, W, b: gsf.batchtopk_encode(x, W, b, 3),
    "pre_at": lambda x, W, b: gsf.pre_at(x, W, b, LONG, LONG),
}
BAD_ENCODER_INPUTS = [
    ((P.x.int(), P.W_enc, P.b_enc), TypeError, "x must be float32, .*, got torch.int32"),
    ((P.x.bool(), P.W_enc, P.b_enc), TypeError, "x must be float32, .*, got torch.bool"),
    ((P.x.cfloat(), P.W_enc, P.b_enc), TypeError, "x must be float32, .*, got torch.complex64"),
    ((P.x.tolist(), P.W_enc, P.b_enc), TypeError, "x must be a torch.Tensor, got list"),
    ((P.x, P.W_enc.long(), P.b_enc), TypeError, "W_enc must be float32, .*, got torch.int64"),
    ((P.x, None, P.b_enc), TypeError, "W_enc must be a torch.Tensor, got NoneType"),
    ((P.x, P.W_enc, P.b_enc.int()), TypeError, "b_enc must be float32, .*, got torch.int32"),
    ((P.x[0, 0], P.W_enc, P.b_enc), ValueError, "x must have at least one dimension"),
    ((P.x, P.W_enc.t(), P.b_enc), ValueError, r"x must have shape .*d_in=37\], W_enc"),
    ((P.x, P.W_enc[0], P.b_enc), ValueError, r"W_enc must have shape .*, got \(37,\)"),
    (
        (P.x[:, :5], P.W_enc, P.b_enc),
        ValueError,
        r"x must have shape .*d_in=23\], W_enc .* \[23, 37\]; got \(5, 5\)",
    ),
    ((P.x, P.W_enc, P.b_enc[:5]), ValueError, r"b_enc must have shape \[37\], got \(5,\)"),
    ((P.x, P.W_enc, P.b_enc[None]), ValueError, r"b_enc must have shape \[37\], got \(1, 37\)"),
    ((P.x.to("meta"), P.W_enc, P.b_enc), ValueError, "x is on meta, the weights are on cpu"),
    ((P.x, P.W_enc, P.b_enc.to("meta")), ValueError, "b_enc is on meta, the weights are on cpu"),
]


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(("args", "kind", "message"), BAD_ENCODER_INPUTS, ids=range(15))
def test_encoder_arguments(name, args, kind, message):
    with pytest.raises(kind, match=f"^{name}: {message}"):
        ENCODERS[name](*args)


JUMPRELU = {
    "threshold must have": ({"threshold": P.threshold[:3]}, ValueError),
    "threshold must be float32": ({"threshold": P.threshold.int()}, TypeError),
    "threshold is on meta": ({"threshold": P.threshold.to("meta")}, ValueError),
    "bandwidth must be finite and >= 0, got -0.5": ({"bandwidth": -0.5}, ValueError),
    "bandwidth must be finite and >= 0, got nan": ({"bandwidth": float("nan")}, ValueError),
    "bandwidth must be finite and >= 0, got inf": ({"bandwidth": float("inf")}, ValueError),
    "max_nnz must be >= 0, got -1": ({"max_nnz": -1}, ValueError),
    "max_nnz must be an int or None, got float": ({"max_nnz": 3.0}, TypeError),
    "max_nnz must be an int or None, got bool": ({"max_nnz": True}, TypeError),
}


@pytest.mark.parametrize("message", JUMPRELU)
def test_jumprelu_arguments(message):
    changes, kind = JUMPRELU[message]
    with pytest.raises(kind, match=f"^jumprelu_encode: {re.escape(message)}"):
        gsf.jumprelu_encode(*P.encoder, **({"threshold": P.threshold} | changes))


@pytest.mark.parametrize("k", [-1, 38, 2.0, True, "3", None])
def test_topk_k(k):
    kind = ValueError if type(k) is int else TypeError
    wanted = r"k must be in \[0, d_sae=37\], got" if kind is ValueError else "k must be an int, got"
    with pytest.raises(kind, match=f"^topk_encode: {wanted}"):
        gsf.topk_encode(*P.encoder, k)


@pytest.mark.parametrize("k", [-0.5, float("nan"), float("inf"), "3", None, True])
def test_batchtopk_k(k):
    kind = ValueError if type(k) is float else TypeError
    wanted = "k must be finite and >= 0" if kind is ValueError else "k must be a number"
    with pytest.raises(kind, match=f"^batchtopk_encode: {wanted}"):
        gsf.batchtopk_encode(*P.encoder, k)
    with pytest.raises(ValueError, match="^batchtopk_encode: max_nnz must be >= 0, got -2"):
        gsf.batchtopk_encode(*P.encoder, 1, max_nnz=-2)


def test_a_cuda_graph_needs_a_capacity(monkeypatch):
    x = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    checks.check_max_nnz("jumprelu_encode", None, x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    checks.check_max_nnz("jumprelu_encode", 0, x)
    with pytest.raises(RuntimeError, match="^jumprelu_encode: a CUDA graph .*: pass max_nnz$"):
        checks.check_max_nnz("jumprelu_encode", None, x)
    assert gsf.jumprelu_encode(P.x, P.W_enc, P.b_enc, P.threshold).n == 5


DECODE = {
    "acts must be a SparseActs, got Tensor": ((P.x, P.W_dec, P.b_dec), TypeError),
    "W_dec must be float32": ((acts(), P.W_dec.int(), P.b_dec), TypeError),
    "W_dec must have shape [d_sae=37, d_out], got (19, 37)": (
        (acts(), P.W_dec.t(), P.b_dec),
        ValueError,
    ),
    "acts is on cpu, the weights are on meta": ((acts(), P.W_dec.to("meta"), None), ValueError),
    "b_dec must have shape [19], got (7,)": ((acts(), P.W_dec, P.b_dec[:7]), ValueError),
    "b_dec must be float32": ((acts(), P.W_dec, P.b_dec.int()), TypeError),
    "b_dec is on meta": ((acts(), P.W_dec, P.b_dec.to("meta")), ValueError),
}


@pytest.mark.parametrize("message", DECODE)
def test_decode_arguments(message):
    args, kind = DECODE[message]
    with pytest.raises(kind, match=f"^decode: {re.escape(message)}"):
        gsf.decode(*args)


def test_decode_dtype(backend):
    with pytest.raises(TypeError, match="^decode: dtype must be .*float16.*, got torch.int32"):
        gsf.decode(acts(), P.W_dec, dtype=torch.int32)


def test_decode_in_place_arguments(backend):
    recon = torch.zeros(5, 19)
    with pytest.raises(
        ValueError, match=r"^decode_: recon must have shape \(5, 19\), got \(5, 9\)"
    ):
        gsf.decode_(recon[:, :9], acts(), P.W_dec)
    with pytest.raises(TypeError, match="^decode_: recon must be float32, .*, got torch.int32"):
        gsf.decode_(recon.int(), acts(), P.W_dec)
    with pytest.raises(ValueError, match="^decode_: recon is on meta, the weights are on cpu"):
        gsf.decode_(recon.to("meta"), acts(), P.W_dec)
    split = gsf.SparseActs(*jumprelu_entries(problem(n=6))[:4], (2, 3, 37))
    with pytest.raises(ValueError, match="^decode_: recon .*view"):
        gsf.decode_(torch.zeros(3, 2, 19).transpose(0, 1), split, P.W_dec)
    with pytest.raises(RuntimeError, match="overlap itself|single memory location"):
        gsf.decode_(recon[:1].expand(5, 19), acts(), P.W_dec)


@pytest.mark.parametrize("name", ["rows", "latents"])
def test_pre_at_pairs(name):
    def call(bad):
        good = {"rows": LONG, "latents": LONG}
        return gsf.pre_at(*P.encoder, **(good | {name: bad}))

    for bad in (LONG.float(), LONG.bool(), [0]):
        with pytest.raises(TypeError, match=f"^pre_at: {name} must be an integer tensor"):
            call(bad)
    for bad in (torch.zeros(2, dtype=torch.int64), LONG[None], LONG[0]):
        with pytest.raises(ValueError, match="^pre_at: rows and latents must be 1-D of equal"):
            call(bad)
    with pytest.raises(ValueError, match=f"^pre_at: {name} is on meta"):
        call(LONG.to("meta"))


def test_float16_warns_once_that_gemma_overflows_it():
    def caught():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")
            for _ in range(2):
                gsf.topk_encode(P.x.half(), P.W_enc, P.b_enc, 3)
        return [str(w.message) for w in seen]

    assert caught() == [
        "float16 overflows at 65504, below the residual stream of Gemma 3; prefer bfloat16"
    ]
    large = torch.full((1, 23), 1e5).half()
    with pytest.warns(UserWarning, match="float16 overflows"):
        result = gsf.topk_encode(large, P.W_enc.abs(), P.b_enc, 3)
    assert result.values.isinf().all()


def test_float64_under_a_forced_native_backend_is_refused(monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "native")
    with pytest.raises(TypeError, match="float64 is served by the reference only"):
        gsf.topk_encode(P.x.double(), P.W_enc, P.b_enc, 3)


# ---- indices and offsets at the op level


@pytest.fixture
def refuses(backend):
    """A GPU does not wait to look: it skips what is out of range, see test_triton_*.py."""
    if backend.gpu_terms:
        pytest.skip("bad indices are skipped, not refused")


READERS = {
    "decode": (1, 0),
    "decode_": (2, 1),
    "encode_backward": (7, 6),
    "decode_backward": (2, 1),
    "sae_backward": (8, 7),
    "fused_sparse_step": (8, 7),
    "by_feature": (1, 0),
}
"""Positions of indices and offsets among the arguments of each op that reads entries."""


@pytest.mark.parametrize("bad", [37, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("name", READERS)
def test_bad_indices(backend, refuses, name, bad):
    for args in samples(P)[name]:
        at, _ = READERS[name]
        indices = args[at].clone()
        for position in (indices.shape[0] - 1, 0, 3):
            indices[position] = bad
        changed = [*args[:at], indices, *args[at + 1 :]]
        indices[0] = 0
        with pytest.raises(
            RuntimeError,
            match=rf"^{name}: indices\[3\] = {bad} is out of range \[0, d_sae=37\)",
        ):
            backend.op(name)(*changed)


@pytest.mark.parametrize("name", READERS)
def test_bad_offsets(backend, refuses, name):
    args = samples(P)[name][0]
    _, at = READERS[name]
    good, capacity = args[at], args[READERS[name][0]].shape[0]
    cases = [
        (0, 1, r"offsets\[0\] = 1, expected 0"),
        (2, int(good[3]) + 1, r"offsets\[3\] = \d+ is less than offsets\[2\] = \d+"),
        (5, capacity + 1, rf"offsets\[5\] = {capacity + 1} exceeds len\(indices\)={capacity}"),
        (1, -4, r"offsets\[1\] = -4 is less than offsets\[0\] = 0"),
    ]
    for position, value, message in cases:
        offsets = good.clone()
        offsets[position] = value
        with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
            backend.op(name)(*args[:at], offsets, *args[at + 1 :])


def test_decode_in_place_leaves_recon_unchanged_on_error(backend, refuses):
    bad = acts()
    bad.indices[-1] = 37
    recon = torch.randn(5, 19)
    before = recon.clone()
    with pytest.raises(RuntimeError, match=r"indices\[\d+\] = 37 is out of range"):
        gsf.decode_(recon, bad, P.W_dec)
    assert torch.equal(recon, before)


@pytest.mark.parametrize("bad", [37, -1, 2**40])
def test_bad_pairs(backend, refuses, bad):
    good = torch.zeros(6, dtype=torch.int64)
    wrong = good.clone()
    wrong[[2, 4]] = bad
    for args, name, end in (((wrong, good), "rows", 5), ((good, wrong), "latents", 37)):
        with pytest.raises(RuntimeError, match=rf"^pre_at: {name}\[2\].* {bad}\b") as caught:
            backend.op("pre_at")(*P.encoder, *args)
        assert re.search(rf"\[0, \w*=?{end}\)", str(caught.value))


@pytest.mark.parametrize(
    "name", ["encode_backward", "decode_backward", "sae_backward", "fused_sparse_step"]
)
def test_a_feature_view_of_other_entries_is_refused(backend, name):
    if not backend.native:
        pytest.skip("the reference does not read the view")
    at = {"encode_backward": 10, "decode_backward": 5}.get(name, 13)
    args = samples(P)[name][0]
    feature_offsets, permutation = args[at], args[at + 1]
    swapped = permutation.clone()
    swapped[[0, -1]] = swapped[[-1, 0]]
    beyond = permutation.clone()
    beyond[2] = 2**40
    short = feature_offsets.clone()
    short[-1] -= 1
    for view in ((feature_offsets, swapped), (feature_offsets, beyond), (short, permutation)):
        with pytest.raises(RuntimeError, match=rf"^{name}: (permutation|feature_offsets)\["):
            backend.op(name)(*args[:at], *view, *args[at + 2 :])


# ---- shapes and dtypes at the op level

TENSORS = {
    name: [i for i, a in enumerate(args[0]) if isinstance(a, torch.Tensor)]
    for name, args in samples(P).items()
}


@pytest.mark.parametrize("name", ops.TABLE)
def test_no_op_accepts_a_wrong_shape_or_integer_dtype(backend, name):
    """One argument at a time: one element short, one dimension more, another kind of number."""
    if not backend.native:
        pytest.skip("the reference leaves shapes to PyTorch; the public functions check them")
    args = samples(P)[name][0]
    schema = ops.overload(name)._schema.arguments
    for i in TENSORS[name]:
        t, argument = args[i], schema[i].name
        if name == "decode" and argument in ("feature_offsets", "permutation"):
            continue  # only its gradient reads them
        other = t.double() if t.is_floating_point() else t.float()
        wrong = [t[None], t.narrow(0, 0, t.shape[0] - 1), other]
        if (argument == "x" and "encode" in name and "backward" not in name) or name == "pre_at":
            wrong.pop(1)  # fewer rows, or fewer pairs of both
        if argument == "offsets" and name in ("decode", "by_feature"):
            wrong.pop(1)
        for value in wrong:
            with pytest.raises(RuntimeError, match=f"^{name}: "):
                backend.op(name)(*args[:i], value, *args[i + 1 :])


@pytest.mark.parametrize("name", ["jumprelu_encode", "topk_encode", "batchtopk_encode", "pre_at"])
def test_more_latents_than_an_int32_index_reaches(backend, name):
    if not backend.native:
        pytest.skip("the reference would form the whole matrix")
    d_sae = 2**31
    args = [torch.zeros(1, 1), torch.zeros(1, 1).expand(1, d_sae), torch.zeros(1).expand(d_sae)]
    args += {
        "jumprelu_encode": [torch.zeros(1).expand(d_sae), 0.0, None, False],
        "topk_encode": [1, False],
        "batchtopk_encode": [1.0, None, None, False],
        "pre_at": [LONG, LONG],
    }[name]
    with pytest.raises(RuntimeError, match=rf"^{name}: d_sae must be below 2\^31 .* {d_sae}"):
        backend.op(name)(*args)
