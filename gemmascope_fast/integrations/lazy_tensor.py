"""`LazyTensor`: a `torch.Tensor` without storage, made dense by the uses that need its elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class LazyTensor(torch.Tensor):
    """A tensor of known shape and dtype whose elements `dense` computes, and nothing keeps.

    Attributes:
        ANSWERS: functions of torch that are answered otherwise, with the arguments of the call;
            NotImplemented asks for the dense tensor.
    """

    ANSWERS: ClassVar[Mapping[Any, Callable[..., Any]]] = {}

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def dense(self) -> Tensor:
        """The elements, with their autograd history."""
        raise TypeError(f"{type(self).__name__} does not say how its elements are computed")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer what needs no elements, or of the dense tensor."""
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if args and func in cls.ANSWERS:
            found = cls.ANSWERS[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map_only(LazyTensor, lambda t: t.dense(), (args, kwargs))
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
        detached = (args, kwargs or {})
        args, kwargs = tree_map_only(LazyTensor, lambda t: t.dense().detach(), detached)
        return func(*args, **kwargs)


_METADATA = {
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point),
    *(torch.Tensor.__len__, torch.Tensor.nelement, torch.Tensor.ndimension),
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_sparse", "is_cuda")
    ),
}
