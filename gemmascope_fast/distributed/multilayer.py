"""`ShardedCrosscoder` and `ShardedCrossLayerTranscoder`: the latents of every layer are cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..multilayer.base import check_stack
from ..sparse import SparseActs
from . import encoding
from .acts import ShardedActs
from .base import Sharded
from .communication import enter, leave


class ShardedCrosscoder(Sharded):
    """A `Crosscoder` of which every rank has the same share of each layer's latents."""

    W_enc: nn.ParameterList
    b_dec: Tensor

    @property
    def n_layers(self) -> int:
        """Number of layers L."""
        return int(self.b_dec.shape[0])

    @property
    def d_model(self) -> int:
        """Width of each layer's x."""
        return int(self.b_dec.shape[1])

    def encode(self, x: Tensor, *, max_nnz: int | None = None) -> list[ShardedActs]:
        """Activations of `x [*batch, L, d_model]` per layer, each rank those of its latents.

        Collectives: those of `ShardedSAE.encode`, once for all layers.

        Raises:
            ValueError: x has the wrong shape, or `max_nnz` is given for a TopK or BatchTopK.
            CapacityError: more than `max_nnz` entries in a layer on a rank.
        """
        check_stack("encode", "x", x, self._local)
        encoding.check_capacity(self._local, max_nnz)
        self._debug("encode", "x", x)
        x = enter(x, self.tp_group)
        found = self._on_local(encoding.encode_layers, x, self.layout, max_nnz)
        once = not encoding.selects(self._local)
        return [ShardedActs(acts, self.layout, once) for acts in found]

    def decode(
        self,
        acts: Sequence[ShardedActs | SparseActs],
        *,
        dtype: torch.dtype | None = None,
        scatter_tokens: bool = False,
    ) -> Tensor:
        """Reconstruction `[*batch, L, d_model]`, the same on all ranks of "tp".

        Collectives and arguments are those of `ShardedSAE.decode`; all layers are one tensor. With
        `scatter_tokens` the result is `[rows, L, d_model]`.
        """
        return self._decoded(self._sources(acts), None, dtype, scatter_tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `[*batch, L, d_model]` in the dtype of x."""
        return self.decode(self.encode(x), dtype=x.dtype)

    def l0(self, acts: Sequence[ShardedActs]) -> Tensor:
        """`[*batch, L]`: active latents per token and layer; one all-reduce."""
        return leave(torch.stack([a.local.l0() for a in acts], -1), self.tp_group)

    def _sources(self, acts: Sequence[ShardedActs | SparseActs]) -> list[SparseActs]:
        if not isinstance(acts, Sequence) or len(acts) != self.n_layers:
            raise ValueError(f"decode: acts must be a sequence of n_layers={self.n_layers}")
        return [self._entries("decode", source) for source in acts]

    def _decoded(
        self,
        acts: list[SparseActs],
        x: Tensor | None,
        dtype: torch.dtype | None,
        scatter_tokens: bool,
    ) -> Tensor:
        recon = self._summed(encoding.decode_layers, acts, x, dtype, scatter_tokens)
        batch = recon.shape[:1] if scatter_tokens else acts[0].shape[:-1]
        return recon.reshape(*batch, self.n_layers, self.d_model)


class ShardedCrossLayerTranscoder(ShardedCrosscoder):
    """A `CrossLayerTranscoder`, likewise; every rank has the affine skips."""

    W_skip: nn.ParameterList | None

    def decode(
        self,
        acts: Sequence[ShardedActs | SparseActs],
        x: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        scatter_tokens: bool = False,
    ) -> Tensor:
        """`ShardedCrosscoder.decode`; with `x [*batch, L, d_model]` the skips are added.

        Raises:
            ValueError: there are skips, and x is missing or of another shape.
        """
        sources = self._sources(acts)
        if self._local.W_skip is None:
            return self._decoded(sources, None, dtype, scatter_tokens)
        if x is None:
            raise ValueError("decode: this transcoder has an affine skip connection: pass x")
        check_stack("decode", "x", x, self._local)
        if x.shape[:-2] != sources[0].shape[:-1]:
            expected = (*sources[0].shape[:-1], self.n_layers, self.d_model)
            raise ValueError(
                f"decode: x must have the shape that was encoded, {expected}, got {tuple(x.shape)}"
            )
        self._debug("decode", "x", x)
        return self._decoded(sources, x, dtype, scatter_tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `[*batch, L, d_model]` in the dtype of x."""
        return self.decode(self.encode(x), x, dtype=x.dtype)
