"""The op table: one row per op, and its registration.

The maths of each row is in `reference.py`, its gradient in `autograd.py`, its native code in
`csrc/cpu/<op>.cpp`, `csrc/cuda/<op>.cu` and `kernels/<op>.py`. Two namespaces carry the table:
`NAMESPACE`, served by the fastest implementation of each device, and `REFERENCE`, always the
plain-PyTorch one (float64, comparison, last resort). `TRITON` is for the compiled CUDA kernels to
call where dense products are faster.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference, triton_launchers
from .autograd import gradients
from .costs import COSTS, Cost
from .fakes import FAKES

NAMESPACE = "gemmascope_fast"
REFERENCE = "gemmascope_fast_reference"
TRITON = "gemmascope_fast_triton"

SCHEMAS: dict[str, str] = {
    "jumprelu_encode": (
        "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, float bandwidth, "
        "int? max_nnz, bool by_feature, Tensor? packed=None) -> (Tensor offsets, Tensor indices, "
        "Tensor values, Tensor gate, Tensor needed, Tensor feature_offsets, Tensor permutation)"
    ),
    "topk_encode": (
        "(Tensor x, Tensor W_enc, Tensor b_enc, int k, bool by_feature, Tensor? packed=None) -> "
        "(Tensor offsets, Tensor indices, Tensor values, Tensor gate, Tensor feature_offsets, "
        "Tensor permutation)"
    ),
    "batchtopk_encode": (
        "(Tensor x, Tensor W_enc, Tensor b_enc, float k, float? guess, int? max_nnz, "
        "bool by_feature, Tensor? packed=None) -> (Tensor offsets, Tensor indices, Tensor values, "
        "Tensor gate, Tensor needed, Tensor threshold, Tensor feature_offsets, Tensor permutation)"
    ),
    "decode": (
        "(Tensor offsets, Tensor indices, Tensor values, Tensor W_dec, Tensor? b_dec, "
        "Tensor? feature_offsets, Tensor? permutation, ScalarType dtype) -> Tensor"
    ),
    "decode_": (
        "(Tensor(a!) recon, Tensor offsets, Tensor indices, Tensor values, Tensor W_dec) -> ()"
    ),
    "encode_backward": (
        "(Tensor? d_values, Tensor? d_gate, Tensor x, Tensor W_enc, Tensor? threshold, "
        "float bandwidth, Tensor offsets, Tensor indices, Tensor values, Tensor gate, "
        "Tensor? feature_offsets, Tensor? permutation, bool need_x, bool need_W_enc, "
        "bool need_b_enc, bool need_threshold) "
        "-> (Tensor d_x, Tensor d_W_enc, Tensor d_b_enc, Tensor d_threshold)"
    ),
    "decode_backward": (
        "(Tensor d_recon, Tensor offsets, Tensor indices, Tensor values, Tensor W_dec, "
        "Tensor? feature_offsets, Tensor? permutation, bool need_values, bool need_W_dec, "
        "bool need_b_dec) -> (Tensor d_values, Tensor d_W_dec, Tensor d_b_dec)"
    ),
    "sae_backward": (
        "(Tensor x, Tensor W_enc, Tensor? threshold, float bandwidth, Tensor W_dec, "
        "Tensor d_recon, int[] group_ends, Tensor offsets, Tensor indices, Tensor values, "
        "Tensor gate, Tensor? d_values, Tensor? d_gate, Tensor feature_offsets, "
        "Tensor permutation, bool need_x) -> (Tensor d_x, Tensor d_W_enc, Tensor d_b_enc, "
        "Tensor d_threshold, Tensor d_W_dec, Tensor d_b_dec)"
    ),
    "pre_at": "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor rows, Tensor latents) -> Tensor",
    "by_feature": (
        "(Tensor offsets, Tensor indices, int d_sae) "
        "-> (Tensor feature_offsets, Tensor permutation)"
    ),
    "adam_step_": (
        "(Tensor(a!) weight, Tensor(b!)[] state, Tensor gradient, float[] rates, int[] rule) -> ()"
    ),
    "fused_sparse_step": (
        "(Tensor x, Tensor(a!) W_enc, Tensor? threshold, float bandwidth, Tensor(b!) W_dec, "
        "Tensor d_recon, int[] group_ends, Tensor offsets, Tensor indices, Tensor values, "
        "Tensor gate, Tensor? d_values, Tensor? d_gate, Tensor feature_offsets, "
        "Tensor permutation, Tensor(c!)[] encoder_state, Tensor(d!)[] decoder_state, "
        "float[] encoder_rates, float[] decoder_rates, int[] encoder_rule, int[] decoder_rule) "
        "-> (Tensor d_b_enc, Tensor d_threshold, Tensor d_b_dec)"
    ),
}


@dataclass(frozen=True)
class Op:
    """One row: schema, reference, fake, gradient, cost model."""

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cost: Callable[..., Cost]
    differentiable: bool


TABLE: dict[str, Op] = {
    name: Op(
        name,
        schema,
        getattr(reference, name),
        FAKES[name],
        COSTS[name],
        name in gradients(None),
    )
    for name, schema in SCHEMAS.items()
}

WRITING = ("decode_", "adam_step_", "fused_sparse_step")
"""The ops that write arguments."""

BACKENDS = ("reference", "triton", "native")
BACKEND = os.environ.get("GEMMASCOPE_FAST_BACKEND", "")
"""The forced backend, or "" for the best one of each device."""

_libraries: list[Any] = []


def _outside_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Run `reference` without autocast: the public functions have cast x and weights already.

    Inside, autocast would round the float32 products to its own dtype, gate decisions included.
    """

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return reference(*args)

    return run


def _count_writes(library: Any, op: Any) -> None:
    """Make `op` bump the versions of the arguments that it writes.

    Without it autograd would not notice that a tensor saved for a backward pass has changed.
    """
    below = torch._C._after_ADInplaceOrView_keyset
    marks = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]

    def run(keys: Any, *args: Any) -> Any:
        for written, argument in zip(marks, args, strict=True):
            if written:
                torch.autograd.graph.increment_version(argument)
        return op.redispatch(keys & below, *args)

    library.impl(op._schema.name.split("::")[1], run, "ADInplaceOrView", with_keyset=True)


def _register(namespace: str) -> None:
    """Define every op of the table in `namespace`, with reference, fake and gradient.

    A forced backend does not get the reference as its fallback: an op it cannot serve is an error.
    """
    library: Any = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    forced = namespace == NAMESPACE and BACKEND in ("native", "triton")
    for op in TABLE.values():
        library.define(op.name + op.schema)
        if not forced:
            kernel = _outside_autocast(op.reference)
            library.impl(op.name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{op.name}", op.fake, lib=library)
    for name in WRITING:
        _count_writes(library, getattr(getattr(torch.ops, namespace), name).default)
    rules = gradients(getattr(torch.ops, namespace))
    for name, (setup_context, backward) in rules.items():
        torch.library.register_autograd(
            f"{namespace}::{name}", backward, setup_context=setup_context, lib=library
        )


def _load_native() -> str:
    """Import the compiled library, which registers itself; return why it is absent, or ""."""
    try:
        importlib.import_module("gemmascope_fast._C")
    except ModuleNotFoundError as error:
        if error.name != "gemmascope_fast._C":
            raise
        return "the compiled library is not built (run `make build`)"
    return ""


_triton: set[tuple[str, str]] = set()


def _register_triton(key: str) -> None:
    """Serve from Triton every op that has no compiled implementation for dispatch key `key`."""
    for name in TABLE:
        launcher = None if _has_kernel(name, key) else triton_launchers.launcher(name)
        if launcher is not None:
            _libraries[-1].impl(name, _outside_autocast(launcher), key)
            _triton.add((name, key))


def _offer_triton() -> None:
    """Let compiled CUDA kernels hand ops to Triton (`csrc/cuda/dense_products.h`)."""
    if not torch._C._dispatch_has_kernel(f"{TRITON}::set_rates"):
        return  # compiled without CUDA
    library: Any = torch.library.Library(TRITON, "FRAGMENT")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    for op in TABLE.values():
        if _has_kernel(op.name, "CUDA") and (op.name, "CUDA") not in _triton:
            launcher = triton_launchers.launcher(op.name)
            if launcher is not None:
                library.define(op.name + op.schema)
                library.impl(op.name, _outside_autocast(launcher), "CUDA")
    torch.ops.gemmascope_fast_triton.set_rates(triton_launchers.dense_rates())


def _has_kernel(name: str, key: str) -> bool:
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
    return found


def _start() -> str:
    if BACKEND not in ("", *BACKENDS):
        raise ImportError(
            f"GEMMASCOPE_FAST_BACKEND={BACKEND!r} is unknown: expected one of "
            f"{', '.join(BACKENDS)}, or unset"
        )
    if BACKEND == "triton" and not triton_launchers.FOUND:
        raise ImportError("GEMMASCOPE_FAST_BACKEND=triton: triton is not installed")
    _register(REFERENCE)
    _register(NAMESPACE)
    if BACKEND == "reference":
        return "GEMMASCOPE_FAST_BACKEND=reference"
    if BACKEND == "triton":
        _register_triton("CUDA")
        if triton_launchers.INTERPRETED:
            _register_triton("CPU")
        return "GEMMASCOPE_FAST_BACKEND=triton"
    missing = _load_native()
    if missing and BACKEND == "native":
        raise ImportError(f"GEMMASCOPE_FAST_BACKEND=native: {missing}")
    if triton_launchers.FOUND and not BACKEND:
        _register_triton("CUDA")
        _offer_triton()
    return missing


NATIVE_MISSING = _start()
"""Why the compiled library does not serve this process; empty when it does."""


def overload(name: str, *tensors: Tensor) -> Any:
    """Return the callable that serves op `name` for these tensors: native, or the reference."""
    if forward_ad._current_level >= 0 and any(_is_dual(t) for t in tensors):
        raise NotImplementedError(
            f"{name}: forward-mode derivatives (torch.func.jvp, forward_ad) are not supported; "
            "use reverse mode"
        )
    if any(t.dtype == torch.float64 for t in tensors):
        if BACKEND in ("native", "triton"):
            raise TypeError(
                f"{name}: float64 is served by the reference only, and "
                f"GEMMASCOPE_FAST_BACKEND={BACKEND} forbids it"
            )
        return getattr(getattr(torch.ops, REFERENCE), name).default
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def call(serve: Callable[..., Any], *args: Any) -> Any:
    """Call an overload.

    Without gradients below autograd's dispatch key: its kernel would pass everything to Python and
    back, which takes 9 us.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return serve(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return serve(*args)


def _is_dual(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


@functools.cache
def implementation(name: str, device_type: str) -> str:
    """Name what serves op `name` on a device type: "native", "triton", "reference" or "none"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    if (name, key) in _triton:
        return "triton"
    if _has_kernel(name, key):
        return "native"
    return "reference" if _has_kernel(name, "CompositeExplicitAutograd") else "none"
