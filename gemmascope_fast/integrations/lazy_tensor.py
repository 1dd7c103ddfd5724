"""`LazyTensor`: a `torch.Tensor` whose elements are computed by the first use that needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class LazyTensor(torch.Tensor):
    """A tensor of known shape and dtype whose elements `computed` gives when they are needed.

    They are kept then, and are the tensor from then on: whatever is written to them or to a view of
    them stays, as in any tensor.

    Attributes:
        ANSWERS: functions of torch that need no elements, with the arguments of the call, until
            there are elements; NotImplemented asks for them.
        origin: the tensor whose elements this one shares, detached; None for one of its own.
    """

    ANSWERS: ClassVar[Mapping[Any, Callable[..., Any]]] = {}
    origin: LazyTensor | None = None
    _kept: Tensor | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def computed(self) -> Tensor:
        """The elements, with their autograd history."""
        raise TypeError(f"{type(self).__name__} does not say how its elements are computed")

    @property
    def made(self) -> bool:
        """Whether there are elements, which somebody may have written to."""
        return self._kept is not None or (self.origin is not None and self.origin.made)

    def dense(self) -> Tensor:
        """The elements, the same tensor at every call; gradients pass where they would."""
        if self._kept is None:
            if self.origin is not None:
                self._kept = self.origin.dense().detach()
            else:
                with torch.inference_mode(False), torch.enable_grad():
                    self._kept = self.computed()
        return self._kept

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
        lazy = [t for t in tree_leaves((args, kwargs)) if isinstance(t, LazyTensor)]
        if not any(t.made for t in lazy):
            if func in _METADATA:
                return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
            if args and func in cls.ANSWERS:
                found = cls.ANSWERS[func](*args, **kwargs)
                if found is not NotImplemented:
                    return found
        _refuse(func, args, kwargs)
        args, kwargs = tree_map_only(LazyTensor, lambda t: t.dense(), (args, kwargs))
        found = func(*args, **kwargs)
        return next((t for t in lazy if t.dense() is found), found)

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


def _refuse(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where the gradient of a host's loss is asked for, in which the elements take no part.

    Raises:
        RuntimeError: `register_hook`, `retain_grad` and `torch.autograd.grad(loss, acts)` of
            elements that have an autograd history.
    """
    if func is torch.autograd.grad:
        asked = args[1] if len(args) > 1 else kwargs["inputs"]
    else:
        asked = args[:1] if func in (Tensor.register_hook, Tensor.retain_grad) else ()
    for t in tree_leaves(asked):
        if isinstance(t, LazyTensor) and t.dense().grad_fn is not None and t.origin is None:
            raise RuntimeError(
                f"{func.__name__}: the host's loss is computed without these dense activations, so "
                "their gradient would lack its part; use a hook of the host's on its activations, "
                "or the host without this backend"
            )


_METADATA = {
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point),
    *(torch.Tensor.__len__, torch.Tensor.nelement, torch.Tensor.ndimension),
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_sparse", "is_cuda")
    ),
}
