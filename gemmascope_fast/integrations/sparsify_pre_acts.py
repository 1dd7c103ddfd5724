"""`PreActs`: sparsify's `pre_acts [*batch, d_sae]`, which is computed when something reads it.

A coder reads it for AuxK, `torch.where(dead[None], pre_acts, -inf).topk(k)`, and for Multi-TopK,
`pre_acts.topk(k)`. Both are answered by an encoder, over the dead latents' weights alone for the
first. Any other use makes the dense tensor, which it is from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .lazy_tensor import LazyTensor


class PreActs(LazyTensor):
    """`relu(x @ weight.T + bias)`, `-inf` at latents outside `among`.

    Args:
        x: `[*batch, d_in]`.
        weight: `[d_sae, d_in]`.
        bias: `[d_sae]`.
        strict: pass no gradient.
        top: the encoder: `top(x, weight, bias, k, strict=, among=)` gives values and latents.
        among: latents that count, ascending; None for all.
    """

    parts: tuple[Tensor, Tensor, Tensor]
    strict: bool
    top: Callable[..., tuple[Tensor, Tensor]]
    among: Tensor | None
    versions: tuple[int, ...]
    differentiable: bool
    rounds: tuple[bool, torch.dtype]

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        strict: bool,
        top: Callable[..., tuple[Tensor, Tensor]],
        among: Tensor | None = None,
    ) -> PreActs:
        kind = weight.device.type
        rounded = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        low = torch.get_autocast_dtype(kind) if rounded else weight.dtype
        dtype = low if weight.dtype != torch.float64 else weight.dtype
        made: PreActs = torch.Tensor._make_wrapper_subclass(
            cls, (*x.shape[:-1], weight.shape[0]), dtype=dtype, device=weight.device
        )
        made.parts, made.strict, made.top, made.among = (x, weight, bias), strict, top, among
        made.versions = tuple(0 if t.is_inference() else t._version for t in made.parts)
        made.differentiable = torch.is_grad_enabled() and not strict
        made.rounds = (rounded, low)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PreActs(shape={tuple(self.shape)}, dtype={self.dtype}, computed when used)"

    def computed(self) -> Tensor:
        """The tensor, with its autograd history.

        Raises:
            RuntimeError: x or a weight has changed since.
        """
        self.check()
        x, weight, bias = self.parts
        rounded, low = self.rounds
        grad = torch.is_grad_enabled() and self.differentiable
        with (
            torch.set_grad_enabled(grad),
            torch.autocast(weight.device.type, dtype=low, enabled=rounded),
        ):
            pre = torch.nn.functional.linear(x, weight, bias).relu()
            if self.among is None:
                return pre
            living = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
            living[self.among] = False
            return pre.masked_fill(living, -math.inf)

    def largest(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of each token: values and latents."""
        self.check()
        kind, (rounded, low) = self.parts[1].device.type, self.rounds
        grad = torch.is_grad_enabled() and self.differentiable
        with torch.set_grad_enabled(grad), torch.autocast(kind, dtype=low, enabled=rounded):
            return self.top(*self.parts, k, strict=self.strict, among=self.among)

    def check(self) -> None:
        """Raise where x or a weight has changed in place since the encoder saw it."""
        if self.versions != tuple(0 if t.is_inference() else t._version for t in self.parts):
            raise RuntimeError(
                "pre_acts: the coder's input or weights changed after it encoded; read pre_acts "
                "before that, or encode again"
            )


def _where(condition: Any, pre: Any = None, other: Any = None, **options: Any) -> Any:
    """`torch.where(dead, pre, -inf)` of one mask for all tokens."""
    if options or not (isinstance(pre, PreActs) and pre.among is None):
        return NotImplemented
    if not isinstance(other, float) or other != -math.inf:
        return NotImplemented
    d_sae = pre.shape[-1]
    if isinstance(condition, PreActs) or condition.dtype != torch.bool:
        return NotImplemented
    if condition.shape not in ((d_sae,), (1, d_sae)) or pre.dim() != 2:
        return NotImplemented
    masked = PreActs(*pre.parts, pre.strict, pre.top, condition.reshape(-1).nonzero()[:, 0])
    masked.versions, masked.rounds = pre.versions, pre.rounds
    masked.differentiable = pre.differentiable
    return masked


def _topk(
    pre: PreActs,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
    **options: Any,
) -> Any:
    """The largest latents of each token; `torch.topk` sorts where it is asked to."""
    known = pre.shape[-1] if pre.among is None else pre.among.shape[0]
    if options or dim not in (-1, pre.dim() - 1) or not largest or not 0 <= k <= known:
        return NotImplemented
    if sorted and pre.device.type != "cpu":
        return NotImplemented
    return torch.return_types.topk(pre.largest(k))


PreActs.ANSWERS = {
    torch.where: _where,
    torch.Tensor.topk: _topk,
    torch.topk: _topk,
}
