"""What a fused optimizer serves: a module of one layer, or each layer of one with several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..activations import Activation
from ..modules import SAE
from ..multilayer.base import MultiLayer
from ..semantics import Semantics


class Layer:
    """Parameters of layer `at`, read from the module whenever they are asked for.

    The first layer stands for the parameters that the layers share, too.
    """

    semantics, centred = Semantics(), False

    def __init__(self, module: MultiLayer, at: int) -> None:
        self._module, self._at = module, at

    @property
    def W_enc(self) -> Tensor:
        """`[d_model, d_sae]`."""
        return self._module.W_enc[self._at]  # type: ignore[no-any-return]

    @property
    def W_dec(self) -> Tensor:
        """`[d_sae, m * d_model]`."""
        return self._module.W_dec[self._at]  # type: ignore[no-any-return]

    @property
    def b_enc(self) -> Tensor:
        """`[d_sae]`."""
        return self._module.b_enc[self._at]  # type: ignore[no-any-return]

    @property
    def threshold(self) -> Tensor | None:
        """`[d_sae]`, or None."""
        thresholds = self._module.threshold
        return None if thresholds is None else thresholds[self._at]

    @property
    def activation(self) -> Activation:
        """That of the module."""
        return self._module.activation

    @property
    def d_in(self) -> int:
        """Width of the layer's x."""
        return self._module.d_model

    @property
    def d_out(self) -> int:
        """Columns of a decoder row: all outputs that the layer writes to."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Latents of the layer."""
        return self._module.d_sae

    @property
    def deferred(self) -> Any:
        """What an optimizer put into this layer."""
        held = self._module.deferred
        return held[self._at] if held else None

    @deferred.setter
    def deferred(self, value: Any) -> None:
        held = list(self._module.deferred) or [None] * self._module.n_layers
        held[self._at] = value
        self._module.deferred = held

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the layer; the first has those that no layer owns."""
        lists = ("W_enc", "b_enc", "threshold", "W_dec")
        for name, p in self._module.named_parameters():
            owner, _, at = name.partition(".")
            if int(at) == self._at if owner in lists else self._at == 0:
                yield p


Part = SAE | Layer
"""An encoder with its decoder."""
