"""The weights of a dictionary over several layers: made, moved, frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..activations import Activation, BatchTopK, JumpReLU, check_activation
from ..arguments import check_size, present_device
from ..checks import check_float_dtype
from ..freezing import Freezable
from ..initial import unit_rows_
from ..packing import PackedEncoder, Precision, pack
from ..pretrained import Pretrained
from ..semantics import Semantics

EXACT = ("b_enc", "threshold")  # parameter lists that are never rounded to 16 bits


class Weights(Pretrained, Freezable):
    """Parameters of L layers, and how they move; see `MultiLayer`."""

    W_enc: nn.ParameterList
    b_enc: nn.ParameterList
    threshold: nn.ParameterList | None
    W_dec: nn.ParameterList
    b_dec: nn.Parameter
    ema_threshold: Tensor | None
    semantics = Semantics()
    packed: list[PackedEncoder] | None = None
    deferred: Sequence[Any] = ()  # of each layer, a fused optimizer's: loss leaves its work to step

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        d_sae: int,
        activation: Activation | None = None,
        *,
        packed: bool | Sequence[bool] = True,
        ema_decay: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        n_layers = check_size(kind, "n_layers", n_layers)
        d_model, d_sae = check_size(kind, "d_model", d_model), check_size(kind, "d_sae", d_sae)
        flags = [packed] * n_layers if isinstance(packed, bool) else list(packed)
        if len(flags) != n_layers or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(
                f"{kind}: packed must be a bool, or one for each of the {n_layers} layers, got "
                f"{packed!r}"
            )
        activation = JumpReLU() if activation is None else activation
        check_activation(kind, activation, d_sae)
        check_float_dtype(kind, "dtype", dtype)
        device = None if device is None else present_device(kind, device)
        self.metadata = {}
        self.semantics = Semantics(ema_decay=ema_decay)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def empty(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        layers = range(n_layers)
        columns = [(n_layers - i if flags[i] else n_layers) * d_model for i in layers]
        self.W_enc = _parameters(empty(d_sae, d_model, dtype=dtype).t() for _ in layers)
        self.b_enc = _parameters(empty(d_sae) for _ in layers)
        self.W_dec = _parameters(empty(d_sae, m, dtype=dtype) for m in columns)
        self.b_dec = nn.Parameter(empty(n_layers, d_model))
        self.activation = activation
        jumps = isinstance(self.activation, JumpReLU)
        self.threshold = _parameters(empty(d_sae) for _ in layers) if jumps else None
        running = isinstance(self.activation, BatchTopK) and ema_decay is not None
        ema = torch.full((n_layers,), -1.0, dtype=torch.float64, device=device)
        self.register_buffer("ema_threshold", ema if running else None)
        self.reset_parameters(generator)

    @property
    def n_layers(self) -> int:
        """Number of layers L."""
        return len(self.W_enc)

    @property
    def d_model(self) -> int:
        """Width of each layer's x."""
        return int(self.W_enc[0].shape[0])

    @property
    def d_sae(self) -> int:
        """Number of latents of each layer."""
        return int(self.W_enc[0].shape[1])

    def outputs(self, layer: int) -> range:
        """The layers that the latents of `layer` write to: itself and later ones, or all."""
        return range(self.n_layers - self.W_dec[layer].shape[1] // self.d_model, self.n_layers)

    def decoder(self, layer: int) -> Tensor:
        """`[d_sae, len(outputs(layer)), d_model]`: a view of `W_dec[layer]`, output by output."""
        W_dec: Tensor = self.W_dec[layer]
        return W_dec.view(self.d_sae, -1, self.d_model)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights."""
        self.unfreeze()
        for layer, (W_enc, W_dec) in enumerate(zip(self.W_enc, self.W_dec, strict=True)):
            own = self.decoder(layer)[:, layer - self.outputs(layer).start]
            W_dec.zero_()
            unit_rows_(own, generator)
            W_enc.copy_(own.t())
        for zero in (*self.b_enc, self.b_dec):
            zero.zero_()
        if isinstance(self.activation, JumpReLU):
            for threshold in self.threshold or ():
                threshold.fill_(self.activation.init_threshold)

    def freeze(
        self,
        *,
        center: Tensor | None = None,
        check: bool = False,
        precision: Precision = "exact",
    ) -> Self:
        """`SAE.freeze`, layer by layer.

        Args:
            center: `[L, d_model]`, a typical x, as for `pack`.
            check: as for `pack`.
            precision: as for `pack`.
        """
        self.unfreeze()
        if center is not None and tuple(center.shape) != (self.n_layers, self.d_model):
            raise ValueError(
                f"freeze: center must have shape [n_layers={self.n_layers}, "
                f"d_model={self.d_model}], got {tuple(center.shape)}"
            )
        centers = [None] * self.n_layers if center is None else center.unbind(0)
        packed = [
            pack(W, center=c, check=check, precision=precision)
            for W, c in zip(self.W_enc, centers, strict=True)
        ]
        self.eval().requires_grad_(False)
        self.packed = packed
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Serve `to`, `half`, ...; biases and thresholds are never rounded to 16 bits."""
        running = self.ema_threshold

        def kept(t: Tensor) -> Tensor:
            moved = fn(t)
            if t is running:
                return moved if moved.dtype == t.dtype else t.to(moved.device)
            rounded = moved.dtype in (torch.bfloat16, torch.float16)
            wide = torch.float32 if t.dtype == torch.float64 else t.dtype
            return t.to(moved.device, wide) if rounded else moved

        for name, child in self.named_children() if recurse else ():
            child._apply(kept if name in EXACT else fn)  # type: ignore[no-untyped-call]
        return super()._apply(kept, recurse=False)

    def _encoder(self, layer: int) -> Tensor | PackedEncoder:
        """The weights of a layer, with their codes if the module is frozen."""
        W_enc: Tensor = self.W_enc[layer]
        if self.packed is None:
            return W_enc
        packed = self.packed[layer]
        if packed.W_enc is not W_enc or (torch.is_grad_enabled() and W_enc.requires_grad):
            raise RuntimeError(
                f"encode: frozen W_enc[{layer}] was replaced or requires gradients again; call "
                "unfreeze()"
            )
        return packed

    def extra_repr(self) -> str:
        """Shapes and activation, for `repr`."""
        sizes = f"n_layers={self.n_layers}, d_model={self.d_model}, d_sae={self.d_sae}"
        return f"{sizes}, {self.activation}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _parameters(tensors: Iterable[Tensor]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(t) for t in tensors])
