"""`LazyActs`: a `torch.Tensor` of shape `[*batch, d_sae]` whose storage is a `SparseActs`.

A trainer asks few things of its activations: which latents fired (`acts.bool().float().sum(0)`), L0
(`sum(-1)`), shapes, dtypes. Those are answered from the stored entries; any other use makes the
dense tensor, which it is from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..sparse import SparseActs
from .lazy_tensor import LazyTensor


class LazyActs(LazyTensor):
    """Activations that become dense where a use of them needs it.

    Args:
        acts: entries; those of value 0 are zeros like all the rest.
        dtype: of the tensor; bool says which entries are not 0.
    """

    acts: SparseActs

    @staticmethod
    def __new__(cls, acts: SparseActs, dtype: torch.dtype) -> LazyActs:  # noqa: D102
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, acts.shape, dtype=dtype, device=acts.device
        )
        made.acts = acts
        return cast("LazyActs", made)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.dense()) if self.made else f"LazyActs({self.acts!r}, dtype={self.dtype})"

    def computed(self) -> Tensor:
        """`[*batch, d_sae]`, with the autograd history of the entries' values."""
        return self.acts.to_dense().to(self.dtype)


def _of_lazy(answer: Callable[..., Any]) -> Callable[..., Any]:
    """An answer about the first argument, if that is the lazy one."""
    return lambda first, *args, **options: (
        answer(first, *args, **options) if isinstance(first, LazyActs) else NotImplemented
    )


def _nonzero(lazy: LazyActs, **options: Any) -> Any:
    return NotImplemented if options else _marked(lazy, lazy.acts.values.detach() != 0)


def _marked(lazy: LazyActs, where: Tensor) -> LazyActs:
    """1 at the entries that `where` selects, as a boolean tensor."""
    acts = lazy.acts.detach()
    return LazyActs(acts._replace(values=where.to(acts.values.dtype)), torch.bool)


def _compared(ordering: Callable[[Tensor, Any], Tensor]) -> Callable[..., Any]:
    """A comparison with a number that zeros do not pass."""

    def answer(lazy: LazyActs, other: Any = None, **options: Any) -> Any:
        is_number = isinstance(other, (int, float)) and not isinstance(other, bool)
        if options or not is_number or bool(ordering(torch.zeros(()), other)):
            return NotImplemented
        return _marked(lazy, ordering(lazy.acts.values.detach(), other))

    return answer


def _float(lazy: LazyActs, **options: Any) -> Any:
    if options:
        return NotImplemented
    return lazy if lazy.dtype == torch.float32 else LazyActs(lazy.acts, torch.float32)


def _detach(lazy: LazyActs) -> LazyActs:
    detached = LazyActs(lazy.acts.detach(), lazy.dtype)
    detached.origin = lazy
    return detached


def _sum(lazy: LazyActs, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    """Over tokens (of a matrix), over latents, or over everything."""
    acts = lazy.acts
    if keepdim or options or lazy.dtype not in (torch.bool, torch.float32):
        return NotImplemented
    kind = torch.int64 if lazy.dtype == torch.bool else torch.float32
    if dim is None:
        return acts.values[: acts.nnz].sum().to(kind)
    if not isinstance(dim, int):
        return NotImplemented
    rank, values = len(acts.shape), acts.values
    if dim in (-1, rank - 1):
        by_token = values.new_zeros(acts.n + 1).index_add(0, acts.tokens(), values)
        return by_token[: acts.n].reshape(acts.shape[:-1]).to(kind)
    if rank == 2 and dim in (0, -2):
        by_latent = values.new_zeros(acts.d_sae + 1).index_add(0, acts.latents(), values)
        return by_latent[: acts.d_sae].to(kind)
    return NotImplemented


_requires_grad: Any = torch.Tensor.requires_grad  # a descriptor

_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.bool: _nonzero,
    torch.Tensor.float: _float,
    torch.Tensor.sum: _sum,
    torch.sum: _sum,
    torch.Tensor.detach: _detach,
    _requires_grad.__get__: lambda lazy: lazy.acts.values.requires_grad,
    torch.Tensor.to_dense: lambda lazy: lazy.dense(),
    torch.Tensor.__gt__: _compared(torch.gt),
    torch.Tensor.gt: _compared(torch.gt),
    torch.gt: _compared(torch.gt),
    torch.Tensor.__ne__: _compared(torch.ne),
    torch.Tensor.ne: _compared(torch.ne),
    torch.ne: _compared(torch.ne),
}
LazyActs.ANSWERS = {func: _of_lazy(answer) for func, answer in _ANSWERS.items()}
