"""`wrap`: a sparse autoencoder of somebody's own making, by the ops of this library.

    acts = act((x - b_dec, where centred) @ W_enc + b_enc)      recon = acts @ W_dec + b_dec

The weights are views of the module's own parameters, taken anew in every call: gradients land in
the parameters, and moving, loading or replacing those needs no second `wrap`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..activations import Activation, JumpReLU, TopK, check_activation
from ..effective import decoded, encoded
from ..semantics import Semantics, as_semantics
from ..sparse import SparseActs
from .wrap_layout import (
    DecoderLayout,
    EncoderLayout,
    at,
    check_tensors,
    latents_of,
    transposed,
    weight_of,
)


@dataclass(frozen=True)
class Paths:
    """Where a module keeps what; True as a layout means that the parameter is transposed."""

    encoder: str
    decoder: str
    encoder_bias: str | None
    decoder_bias: str | None
    threshold: str | None
    encoder_transposed: bool
    decoder_transposed: bool


class Wrapped(nn.Module):
    """A module whose `encode`, `decode` and `forward` are this library's; see `wrap`.

    Attributes:
        module: the module that was wrapped; `parameters()` are its own.
        activation: what selects.
        semantics: how it encodes and differentiates.
    """

    centred = True
    deferred: Any = None
    packed: Any = None
    ema_threshold: Any = None

    def __init__(
        self, module: nn.Module, paths: Paths, activation: Activation, semantics: Semantics
    ) -> None:
        super().__init__()
        self.module = module
        self.paths = paths
        self.activation = activation
        self.semantics = semantics
        self.training = module.training

    @property
    def W_enc(self) -> Tensor:
        """`[d_in, d_sae]`, a view of the module's parameter."""
        weight = weight_of(at(self.module, "encoder", self.paths.encoder))
        return weight.t() if self.paths.encoder_transposed else weight

    @property
    def W_dec(self) -> Tensor:
        """`[d_sae, d_out]`, a view of the module's parameter."""
        weight = weight_of(at(self.module, "decoder", self.paths.decoder))
        return weight.t() if self.paths.decoder_transposed else weight

    @property
    def b_enc(self) -> Tensor:
        """`[d_sae]`; zeros for a module without."""
        return self._bias("encoder", self.paths.encoder_bias, self.d_sae)

    @property
    def b_dec(self) -> Tensor:
        """`[d_out]`; zeros for a module without."""
        return self._bias("decoder", self.paths.decoder_bias, self.d_out)

    @property
    def threshold(self) -> Tensor | None:
        """`[d_sae]` of a JumpReLU, else None."""
        if self.paths.threshold is None:
            return None
        return cast("Tensor", at(self.module, "threshold", self.paths.threshold))

    @property
    def d_in(self) -> int:
        """Width of x."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.W_dec.shape[1]

    def theta(self) -> Tensor:
        """`[d_sae]` thresholds of a JumpReLU in units of the pre-activations, differentiable."""
        threshold = cast("Tensor", self.threshold)
        return threshold if self.semantics.threshold == "direct" else threshold.exp()

    def observe(self, smallest: Tensor | None) -> None:
        """Do nothing: there is no running threshold."""

    def encode(self, x: Tensor, *, max_nnz: int | None = None) -> SparseActs:
        """Sparse activations of `x [*batch, d_in]`.

        Raises:
            ValueError: x has the wrong width, or `max_nnz` is given for TopK.
            CapacityError: more than `max_nnz` entries.
        """
        if isinstance(self.activation, TopK) and max_nnz is not None:
            raise ValueError("encode: TopK always stores k entries per token; drop max_nnz")
        return encoded(cast("Any", self), x, max_nnz)

    def decode(self, acts: SparseActs, *, dtype: torch.dtype | None = None) -> Tensor:
        """Reconstruction `[*batch, d_out]`; `dtype` defaults to that of the decoder."""
        return decoded(cast("Any", self), acts, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `[*batch, d_out]` in the dtype of x."""
        return self.decode(self.encode(x), dtype=x.dtype)

    def extra_repr(self) -> str:
        """Shapes and activation, for `repr`."""
        return f"d_in={self.d_in}, d_sae={self.d_sae}, d_out={self.d_out}, {self.activation}"

    def _bias(self, part: str, path: str | None, size: int) -> Tensor:
        if path is not None:
            return cast("Tensor", at(self.module, f"{part}_bias", path))
        layer = at(self.module, part, getattr(self.paths, part))
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            return layer.bias
        weight = weight_of(layer)
        return weight.new_zeros(size, dtype=torch.promote_types(weight.dtype, torch.float32))


def wrap(
    module: nn.Module,
    *,
    encoder: str,
    decoder: str,
    activation: Activation,
    encoder_bias: str | None = None,
    decoder_bias: str | None = None,
    threshold: str | None = None,
    d_sae: int | None = None,
    encoder_layout: EncoderLayout | None = None,
    decoder_layout: DecoderLayout | None = None,
    center: bool = False,
    semantics: Semantics | str = "gemma_scope_2",
) -> Wrapped:
    """Encode and decode with a module's parameters by this library's ops.

    Paths are those of attributes, as "decoder.weight" or "layers.0". An `nn.Linear` says itself
    which side is which, and brings its bias; the side of a bare parameter's latents follows from
    `d_sae`, a bias or thresholds of the encoder, or the other matrix. Where that leaves both ways
    open, a layout has to be named.

    Args:
        module: holds the parameters; it is neither copied nor changed.
        encoder: path of an `nn.Linear`, or of a parameter `[d_in, d_sae]` or `[d_sae, d_in]`.
        decoder: path of an `nn.Linear`, or of a parameter `[d_sae, d_out]` or `[d_out, d_sae]`.
        activation: `JumpReLU`, `TopK` or `BatchTopK`.
        encoder_bias: path of `[d_sae]`, beside a bare parameter.
        decoder_bias: path of `[d_out]`, beside a bare parameter, or of one that a Linear lacks.
        threshold: path of `[d_sae]`, for a `JumpReLU`; a buffer that must not train is fine.
        d_sae: number of latents.
        encoder_layout: of a bare encoder.
        decoder_layout: of a bare decoder.
        center: the encoder sees `x - b_dec`.
        semantics: `Semantics`, or the name of a preset, whose `center` counts too; running
            thresholds of a BatchTopK are not kept.

    Returns:
        A module with `encode`, `decode` and `forward`, whose parameters are those of `module`.

    Raises:
        TypeError: an argument has the wrong type.
        AttributeError: a path leads nowhere.
        ValueError: shapes disagree, a layout is ambiguous, or a bias or threshold is missing or
            has nothing to do.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"wrap: module must be a torch.nn.Module, got {type(module).__name__}")
    check_activation("wrap", activation)
    if isinstance(activation, JumpReLU) != (threshold is not None):
        raise ValueError(
            f"wrap: {activation} {'needs' if threshold is None else 'has no'} threshold"
        )
    chosen = as_semantics("wrap", semantics)
    found = {
        name: at(module, name, path) for name, path in (("encoder", encoder), ("decoder", decoder))
    }
    vectors = {
        name: at(module, name, path)
        for name, path in (
            *(("encoder_bias", encoder_bias), ("decoder_bias", decoder_bias)),
            ("threshold", threshold),
        )
        if path is not None
    }
    check_tensors(found, vectors)
    latents = latents_of(found, vectors, d_sae)
    turned = (
        transposed("encoder", found["encoder"], encoder_layout, latents),
        transposed("decoder", found["decoder"], decoder_layout, latents),
    )
    paths = Paths(encoder, decoder, encoder_bias, decoder_bias, threshold, *turned)
    made = Wrapped(module, paths, activation, chosen.with_(center=center or chosen.center))
    _check_shapes(made)
    return made


def _check_shapes(made: Wrapped) -> None:
    """What the module holds fits together."""
    W_enc, W_dec, d_sae = made.W_enc, made.W_dec, made.d_sae
    check_activation("wrap", made.activation, d_sae)
    if W_dec.shape[0] != d_sae:
        raise ValueError(
            f"wrap: decoder must be [d_sae={d_sae}, d_out] where encoder is {list(W_enc.shape)}, "
            f"got {list(W_dec.shape)}"
        )
    sizes = {"encoder_bias": (made.b_enc, d_sae), "decoder_bias": (made.b_dec, made.d_out)}
    if made.threshold is not None:
        sizes["threshold"] = (made.threshold, d_sae)
    for name, (vector, size) in sizes.items():
        if vector.shape != (size,):
            raise ValueError(f"wrap: {name} must have {size} elements, got {list(vector.shape)}")
    if made.semantics.centers(made.activation):
        _check_centre(made)


def _check_centre(made: Wrapped) -> None:
    layer = at(made.module, "decoder", made.paths.decoder)
    has_bias = isinstance(layer, nn.Linear) and layer.bias is not None
    if made.paths.decoder_bias is None and not has_bias:
        raise ValueError("wrap: center needs a decoder_bias, which x is centred by")
    if made.d_in != made.d_out:
        raise ValueError(f"wrap: center needs d_in == d_out, got {made.d_in} and {made.d_out}")
