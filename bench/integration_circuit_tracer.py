"""circuit-tracer's rows of bench_integrations.py: a JumpReLU transcoder, and two layers of one.

`FEATURES` maps names to functions of the arguments (n, d, d_sae, l0) that return a call; a call
returns numbers to compare. `install()` puts the backend in for the whole process. circuit-tracer is
not on PyPI: a checkout on PYTHONPATH, or pip install git+https://github.com/decoderesearch/...
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder
from torch import Tensor

from gemmascope_fast.integrations import circuit_tracer

Call = Callable[[], dict[str, float]]
LAYERS = 2
"""Of the cross-layer transcoder."""


def install() -> None:
    circuit_tracer.install()


def limit(x: Tensor, W_enc: Tensor, l0: int) -> float:
    """The threshold that leaves `l0` latents per token, between two pre-activations."""
    return float((x[:32] @ W_enc.t()).flatten().topk(32 * l0 + 1).values[-2:].mean())


def one_layer(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """A transcoder with decoder rows of norm 1, and a batch."""
    x = torch.randn(args.n, args.d)
    rows = torch.nn.functional.normalize(torch.randn(args.d_sae, args.d))
    theta = torch.full((args.d_sae,), limit(x, rows, args.l0))
    made = SingleLayerTranscoder(
        args.d, args.d_sae, JumpReLU(theta.to(dtype), 0.1), 0, device="cpu", dtype=dtype
    )
    made.W_enc.copy_(rows)
    made.W_dec.copy_(rows)
    return made, x.to(dtype)


def cross_layer(args: argparse.Namespace) -> tuple[Any, Tensor]:
    """Layers of d_sae / 4 latents, and a batch for each."""
    x = torch.randn(LAYERS, args.n, args.d)
    made = CrossLayerTranscoder(
        *(LAYERS, args.d_sae // 4, args.d),
        activation_function="jump_relu",
        lazy_decoder=False,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    for p in (made.W_enc, *made.W_dec):
        p.copy_(torch.nn.functional.normalize(torch.randn(p.shape), dim=-1))
    made.activation_function.threshold.fill_(limit(x[0], made.W_enc[0], args.l0))
    return made, x


def numbers(out: Any) -> dict[str, float]:
    """Norms of what a method returns, and the number of entries of sparse ones."""
    parts = (
        out if isinstance(out, tuple) else tuple(out.values()) if isinstance(out, dict) else [out]
    )
    found = {}
    for at, part in enumerate(parts):
        values = part.values() if part.is_sparse else part
        found[f"norm {at}"] = float(torch.linalg.vector_norm(values.float()))
        if part.is_sparse:
            found[f"entries {at}"] = float(len(values))
    return found


def row(method: str, dtype: torch.dtype = torch.float32) -> Callable[[argparse.Namespace], Call]:
    """A method of the single-layer transcoder."""

    @torch.no_grad()
    def make(args: argparse.Namespace) -> Call:
        made, x = one_layer(args, dtype)
        argument = made.encode_sparse(x)[0] if method == "decode_sparse" else x
        if method == "decode":
            argument = made.encode(x)
        return torch.no_grad()(lambda: numbers(getattr(made, method)(argument)))

    return make


@torch.no_grad()
def components(args: argparse.Namespace) -> Call:
    """What attribution asks of a cross-layer transcoder."""
    made, x = cross_layer(args)
    return torch.no_grad()(lambda: numbers(made.compute_attribution_components(x)))


HALF = torch.bfloat16
FEATURES = {
    "encode_sparse": row("encode_sparse"),
    "encode_sparse bf16": row("encode_sparse", HALF),
    "decode_sparse": row("decode_sparse"),
    "decode_sparse bf16": row("decode_sparse", HALF),
    "encode (dense)": row("encode"),
    "decode (dense)": row("decode"),
    "forward": row("forward"),
    "forward bf16": row("forward", HALF),
    "cross-layer components": components,
}
