"""Every op on whole numbers, against the reference.

Each sum is then exact in float32, so that the serving implementation and the reference must agree
to the last bit, in values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .. import ops


def self_test(name: str, device: str) -> str:
    """Compare what serves op `name` with the reference; "pass" or what went wrong."""
    expected = _run(name, getattr(getattr(torch.ops, ops.REFERENCE), name).default, device)
    try:
        found = _run(name, ops.overload(name), device)
    except Exception as error:  # any failure of the op under test is a finding to report
        return f"{type(error).__name__}: {error}"
    for at, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(ours, theirs):
            return f"tensor {at} of {len(expected)} differs from the reference"
    return "pass"


def _run(name: str, op: Callable[..., Any], device: str) -> list[Tensor]:
    """Outputs of the op on its sample, then the gradients of its floating-point inputs."""
    differentiable = ops.TABLE[name].differentiable and not name.endswith("_backward")

    def fresh(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a.clone().requires_grad_(differentiable and a.is_floating_point())
        return a

    args = pytree.tree_map(fresh, list(_sample(name, device)))
    result = op(*args)
    outputs = [result] if isinstance(result, Tensor) else list(result or args[:1])
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    roots = [t for t in outputs if t.requires_grad]
    if not roots:
        return outputs
    seeds = [torch.arange(t.numel(), device=device).view(t.shape).to(t) % 5 - 1 for t in roots]
    return outputs + list(torch.autograd.grad(roots, leaves, seeds))


def _sample(name: str, device: str) -> tuple[Any, ...]:
    """Arguments of op `name`: whole numbers, 6 tokens of width 20, 40 latents."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int, low: int = -3, high: int = 4) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float().to(device)

    x, W_enc, W_dec = whole(6, 20), whole(40, 20).t(), whole(40, 12)
    b_enc, theta, b_dec = whole(40), whole(40, low=10, high=20), whole(12)
    encoded = ops.TABLE["jumprelu_encode"].reference(x, W_enc, b_enc, theta, 8.0, None, True)
    offsets, indices, values, gate, _, *transpose = encoded
    entries, d_values, d_gate = (offsets, indices, values), whole(len(values)), whole(len(values))
    rows, latents = torch.tensor([[5, 0, 5], [39, 0, 7]], device=device)
    rates, rule = [0.5, 0.0, 0.75, 1.0], [1, 0, 0, 0, 0]
    samples: dict[str, tuple[Any, ...]] = {
        "jumprelu_encode": (x, W_enc, b_enc, theta, 8.0, None, True),
        "topk_encode": (x, W_enc, b_enc, 5, True),
        "batchtopk_encode": (x, W_enc, b_enc, 4.5, None, None, True),
        "decode": (*entries, W_dec, b_dec, *transpose, torch.float32),
        "decode_": (whole(6, 12), *entries, W_dec),
        "encode_backward": (
            *(d_values, d_gate, x, W_enc, theta, 8.0, *entries, gate, *transpose),
            *(True, True, True, True),
        ),
        "decode_backward": (whole(6, 12), *entries, W_dec, *transpose, True, True, True),
        "sae_backward": (
            *(x, W_enc, theta, 8.0, W_dec, whole(2, 6, 12), [16, 40], *entries, gate),
            *(d_values, d_gate, *transpose, True),
        ),
        "pre_at": (x, W_enc, b_enc, rows, latents),
        "by_feature": (offsets, indices, 40),
        "adam_step_": (W_dec, _adam_state(W_dec), whole(40, 12), rates, rule),
        "fused_sparse_step": (
            *(x, W_enc, theta, 8.0, W_dec, whole(2, 6, 12), [16, 40], *entries, gate),
            *(d_values, d_gate, *transpose, _adam_state(W_enc.t()), _adam_state(W_dec)),
            *(rates, rates, rule, rule),
        ),
    }
    return samples[name]


def _adam_state(rows: Tensor) -> list[Tensor]:
    """State of Adam without a first moment before the first step."""
    absent, steps = rows.new_empty(0), torch.zeros(len(rows), dtype=torch.int64)
    return [absent, torch.zeros_like(rows), absent.to(torch.uint8), steps.to(rows.device)]
