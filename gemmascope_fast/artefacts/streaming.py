"""`load(..., streamed=True)`: dictionaries that stay in their files, for those larger than memory.

In memory are biases, thresholds and affine skips. Per call:

    encode   reads all of `w_enc`, `BLOCK_BYTES` of latents at a time; each block is encoded by the
             ordinary op, and the CSR blocks are joined. One call with many tokens reads as much as
             one with few.
    decode   reads the rows of `w_dec` of the latents that are active, for as many tokens at a time
             as have `BLOCK_BYTES` of them (one token at least), and decodes by the ordinary op.

An entry depends on its latent alone and a token's sum on its entries in order, so the results are
those of the loaded module, to the bit where the op has one order of summation (the CPU). There are
no gradients. The page cache keeps what was read as long as there is memory for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_float, skip_input
from ..functional import decode
from ..multilayer import multi_decode
from ..sparse import SparseActs
from .blockwise import Layer, decoded
from .opening import Artefact


class Streamed:
    """A dictionary in its files, which stay open until `close`."""

    metadata: dict[str, Any]

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self.metadata = {}

    @property
    def d_sae(self) -> int:
        """Number of latents (of each source layer)."""
        return self._layers[0].d_sae

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices once they are read."""
        return self._layers[0].dtype

    def close(self) -> None:
        """Let go of the files."""
        for layer in self._layers:
            layer.file.close()


class StreamedSAE(Streamed):
    """An SAE or transcoder in its file: `recon = act(x @ W_enc + b_enc) @ W_dec + b_dec`.

    Attributes:
        b_enc: `[d_sae]`. threshold: `[d_sae]`. b_dec: `[d_out]`.
        W_skip: `[d_in, d_out]` of an affine transcoder, else None.
        metadata: as of a loaded module.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__([layer])
        self._layer = layer
        self.b_enc, self.threshold, self.b_dec = layer.b_enc, layer.threshold, layer.b_dec
        self.W_skip = layer.W_skip
        self.d_in, self.d_out = layer.d_in, layer.b_dec.shape[0]

    def encode(self, x: Tensor) -> SparseActs:
        """Sparse activations of `x [*batch, d_in]`, without gradients; reads all of `w_enc`."""
        return self._layer.encode(x)

    @torch.no_grad()
    def decode(
        self, acts: SparseActs, x: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Reconstruction `[*batch, d_out]`; reads the decoder's rows of active latents.

        Args:
            acts: of shape `[*batch, d_sae]`.
            x: `[*batch, d_in]`, for an affine skip.
            dtype: of the result; default that of the weights.

        Raises:
            ValueError: there is a skip connection and x is missing or of another shape, or acts is
                of another width.
        """
        if self.W_skip is not None:
            x = skip_input("decode", x, acts, self.W_skip)
        dtype = self.dtype if dtype is None else dtype

        def one(part: Sequence[SparseActs], weights: Sequence[Tensor], tokens: slice) -> Tensor:
            return decode(part[0], weights[0], self.b_dec, dtype=dtype)

        recon = decoded([acts], self._layers, one).view(*acts.shape[:-1], self.d_out)
        if self.W_skip is None or x is None:
            return recon
        return recon + (x.to(self.W_skip.dtype) @ self.W_skip).to(recon.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruction `[*batch, d_out]` in the dtype of x."""
        return self.decode(self.encode(x), x, dtype=x.dtype)


class StreamedLayers(Streamed):
    """A crosscoder or CLT in its files; see `Crosscoder` and `CrossLayerTranscoder`.

    Whether a decoder is causal is not looked at: rows are read with all their outputs.

    Attributes:
        b_dec: `[L, d_model]`.
        W_skip: L of `[d_model, d_model]` of an affine CLT, else None.
        metadata: as of a loaded module.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.n_layers, self.d_model = len(layers), layers[0].d_in
        self.b_dec = torch.stack([layer.b_dec for layer in layers])
        skips = [layer.W_skip for layer in layers if layer.W_skip is not None]
        self.W_skip = skips or None

    def encode(self, x: Tensor) -> list[SparseActs]:
        """Sparse activations of `x [*batch, L, d_model]`, one per source layer."""
        self._check("encode", x)
        parts = zip(self._layers, x.unbind(-2), strict=True)
        return [layer.encode(part) for layer, part in parts]

    @torch.no_grad()
    def decode(
        self,
        acts: Sequence[SparseActs],
        x: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Reconstruction `[*batch, L, d_model]`; reads the decoders' rows of active latents.

        Args:
            acts: L of shape `[*batch, d_sae]`.
            x: `[*batch, L, d_model]`, for the affine skips.
            dtype: of the result; default that of the weights.

        Raises:
            ValueError: there is a skip connection and x is missing or of another shape, or acts
                are not one per layer.
        """
        skip: Tensor | None = None
        if self.W_skip is not None:
            if x is None:
                raise ValueError("decode: this transcoder has an affine skip connection: pass x")
            self._check("decode", x)
            parts = zip(x.unbind(-2), self.W_skip, strict=True)
            skip = torch.stack([part.to(W.dtype) @ W for part, W in parts], -2)
            skip = skip.view(-1, *self.b_dec.shape)
        dtype = self.dtype if dtype is None else dtype

        def one(part: Sequence[SparseActs], weights: Sequence[Tensor], tokens: slice) -> Tensor:
            own = None if skip is None else skip[tokens]
            return multi_decode(part, weights, self.b_dec, skip=own, dtype=dtype)

        recon = decoded(acts, self._layers, one)
        return recon.view(*acts[0].shape[:-1], *self.b_dec.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruction `[*batch, L, d_model]` in the dtype of x."""
        return self.decode(self.encode(x), x, dtype=x.dtype)

    def _check(self, op: str, x: Tensor) -> None:
        check_float(op, "x", x)
        if tuple(x.shape[-2:]) != tuple(self.b_dec.shape):
            raise ValueError(
                f"{op}: x must have shape [*batch, n_layers={self.n_layers}, "
                f"d_model={self.d_model}], got {tuple(x.shape)}"
            )


def stream(
    artefact: Artefact, latents: slice, dtype: torch.dtype, device: torch.device
) -> StreamedSAE | StreamedLayers:
    """The artefact, whose files it keeps open.

    Raises:
        ValueError: a file is no safetensors file, or a value that is read is not finite.
    """
    layers = [Layer(file, latents, dtype, device) for file in artefact.files]
    artefact.finish()
    return StreamedSAE(layers[0]) if artefact.sizes.n_layers is None else StreamedLayers(layers)
