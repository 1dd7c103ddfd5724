"""`module.freeze()` and `module.screen()`: codes of an encoder that stays, or that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from .activations import Activation, check_activation
from .checks import check_vector
from .effective import effective
from .packing import PackedEncoder, Precision, pack
from .screening import Screen


class Freezable(nn.Module):
    """A module whose encoder may be packed; whatever changes its weights drops the codes.

    Attributes:
        activation: checked where it is assigned.
    """

    activation: Activation
    packed: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            check_activation(type(self).__name__, value, cast("Any", self).d_sae)
        super().__setattr__(name, value)

    def unfreeze(self) -> Self:
        """Drop the codes of `freeze`; parameters require gradients again."""
        if self.packed is not None:
            self.packed = None
            self.requires_grad_(True)
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Serve assignments: a parameter that replaces another has no codes."""
        self.unfreeze()
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.unfreeze()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*args, **options)


class Frozen(Freezable):
    """The part of a module that packs its encoder."""

    W_enc: nn.Parameter
    packed: PackedEncoder | None = None
    screened: Screen | None = None

    def freeze(
        self,
        *,
        center: Tensor | None = None,
        check: bool = False,
        precision: Precision = "exact",
    ) -> Self:
        """Promise that the weights stay, so that `encode` can use codes made once (`pack`).

        Parameters stop requiring gradients and the module goes to evaluation mode. Moving,
        converting, loading or replacing weights undoes it, as `unfreeze` does; editing them in
        place breaks the promise, which `check=True` finds out in every call.

        Args:
            center: as for `pack`.
            check: as for `pack`.
            precision: as for `pack`; "exact" changes nothing on a GPU.
        """
        self.unfreeze()
        with torch.no_grad():
            given = effective(cast("Any", self), self.W_enc.new_zeros(0, self.W_enc.shape[0]))
            packed = pack(given.W_enc, center=center, check=check, precision=precision)
        self.eval().requires_grad_(False)
        self.packed = packed
        return self

    def screen(self, *, center: Tensor | None = None, check: bool = False) -> Self:
        """Let a module that trains encode by int8 codes of its weights, on CUDA.

        What `pack(precision="screened")` does for weights that stay: `encode` and `loss` may miss 1
        entry in 10^6; what they store is exact, the straight-through window included. A BatchTopK
        takes the threshold of the batch before as its guess. Codes follow the weights:
        `gsf.optim.Adam` quantises the latents again that its step moved (fused or not), and after a
        step of any other `torch.optim.Optimizer` or any other change that autograd's version
        counter sees, the next call quantises all of them. Edits through `.data` and replays of CUDA
        graphs are not seen: call `screen` again after them; `check=True` finds them out.

        On a CPU it changes nothing, as there every encoder is screened, exactly; neither does it on
        devices that `pack` makes no codes for, in torch.compile's graphs and in CUDA graphs. Codes
        take 1 byte per weight and are no part of `state_dict`; copies make their own.

        Args:
            center: `[d_in]` a typical x, as for `pack`; it stays the same.
            check: keep a checksum per latent and compare it in every call, which reads all weights.

        Raises:
            TypeError, ValueError: `center` is no vector of that size on the weights' device.
        """
        if center is not None:
            check_vector("screen", "center", center, self.W_enc.shape[0], self.W_enc)
            center = center.detach().float()
        self.screened = Screen(center, check)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.screened is not None:  # torch swaps no parameter that a weak reference has
            self.screened.drop()
        return super()._apply(fn, recurse)

    def unscreen(self) -> Self:
        """Drop the codes of `screen`."""
        self.screened = None
        return self
