"""`LazyActs`: a `torch.Tensor` of shape `[*batch, d_sae]` whose storage is a `SparseActs`.

A trainer asks few things of its activations: which latents fired (`acts.bool().float().sum(0)`), L0
(`sum(-1)`), shapes, dtypes. Those are answered from the stored entries; every other use of the
tensor makes the dense one, and keeps none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..sparse import SparseActs


class LazyActs(torch.Tensor):
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

    def __init__(self, acts: SparseActs, dtype: torch.dtype) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyActs({self.acts!r}, dtype={self.dtype})"

    def dense(self) -> Tensor:
        """`[*batch, d_sae]`, with the autograd history of the entries' values."""
        return self.acts.to_dense().to(self.dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer from the entries, or of the dense tensor."""
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        answer = _SPARSE.get(func)
        if answer is not None and isinstance(args[0], LazyActs):
            found = answer(*args, **kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map_only(LazyActs, LazyActs.dense, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Serve what reaches the tensor from below Python, without its autograd history."""
        args, kwargs = tree_map_only(LazyActs, lambda t: t.dense().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _nonzero(lazy: LazyActs) -> LazyActs:
    return _marked(lazy, lazy.acts.values.detach() != 0)


def _marked(lazy: LazyActs, where: Tensor) -> LazyActs:
    """1 at the entries that `where` selects, as a boolean tensor."""
    acts = lazy.acts.detach()
    return LazyActs(acts._replace(values=where.to(acts.values.dtype)), torch.bool)


def _compared(ordering: Callable[[Tensor, Any], Tensor]) -> Callable[..., Any]:
    """A comparison with a number that zeros do not pass."""

    def answer(lazy: LazyActs, other: Any) -> Any:
        is_number = isinstance(other, (int, float)) and not isinstance(other, bool)
        if not is_number or bool(ordering(torch.zeros(()), other)):
            return NotImplemented
        return _marked(lazy, ordering(lazy.acts.values.detach(), other))

    return answer


def _float(lazy: LazyActs, **options: Any) -> Any:
    return NotImplemented if options else LazyActs(lazy.acts, torch.float32)


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


_METADATA = {
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point),
    *(torch.Tensor.__len__, torch.Tensor.nelement, torch.Tensor.ndimension),
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_sparse", "is_cuda")
    ),
}

_SPARSE: dict[Any, Callable[..., Any]] = {
    torch.Tensor.bool: _nonzero,
    torch.Tensor.float: _float,
    torch.Tensor.sum: _sum,
    torch.sum: _sum,
    torch.Tensor.detach: lambda lazy: LazyActs(lazy.acts.detach(), lazy.dtype),
    torch.Tensor.to_dense: lambda lazy: lazy.dense(),
    torch.Tensor.__gt__: _compared(torch.gt),
    torch.Tensor.gt: _compared(torch.gt),
    torch.gt: _compared(torch.gt),
    torch.Tensor.__ne__: _compared(torch.ne),
    torch.Tensor.ne: _compared(torch.ne),
    torch.ne: _compared(torch.ne),
}
