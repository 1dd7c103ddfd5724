"""What `shard` returns: `ShardedSAE`, `ShardedTranscoder`, and those of several layers.

Collectives over "tp" of each call are counted in the docstrings. x, target and everything computed
of a reconstruction are equal on all ranks of "tp"; the ranks of "dp" have tokens of their own, and
nothing but a BatchTopK's selection and `loss` crosses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_encoder, skip_input
from ..sparse import SparseActs
from ..training.blocked import sae_loss
from ..training.losses import DEFAULT_TERMS, LossTerm, check_terms
from ..training.losses_weights import WeightTerm
from . import encoding
from .acts import ShardedActs
from .base import Sharded
from .communication import enter
from .peers import Peers


class ShardedSAE(Sharded):
    """An `SAE` whose latents lie on several ranks; `shard` makes it."""

    W_enc: Tensor
    W_dec: Tensor

    @property
    def d_in(self) -> int:
        """Width of x."""
        return int(self.W_enc.shape[0])

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return int(self.W_dec.shape[1])

    @property
    def semantics(self) -> Any:
        """Those of every part."""
        return self._local.semantics

    def encode(self, x: Tensor, *, max_nnz: int | None = None) -> ShardedActs:
        """Activations of x, each rank those of its latents.

        Collectives: none for a JumpReLU; TopK one all-gather of `[n, min(k, largest shard)]`
        values; BatchTopK as `selection.keep_batchtopk` says. Backward: one all-reduce of d_x where
        x requires grad, and one of `[d_in]` where the semantics centre x by a trainable b_dec.

        Args:
            x: `[*batch, d_in]`, the same on all ranks of "tp".
            max_nnz: fixed capacity of each rank's entry arrays; for a JumpReLU only.

        Raises:
            ValueError: x has the wrong width, or `max_nnz` is given for a TopK or BatchTopK.
            CapacityError: more than `max_nnz` entries on a rank.
        """
        local = self._local
        check_encoder("encode", x, local.W_enc, local.b_enc)
        encoding.check_capacity(local, max_nnz)
        self._debug("encode", "x", x)
        group, centred = self.tp_group, local.semantics.centers(local.activation) and local.centred
        changed = {"b_dec": lambda b: enter(b, group)} if centred else {}
        x = enter(x, group)
        acts = self._on_local(encoding.encode, x, self.layout, max_nnz, **changed)
        return ShardedActs(acts, self.layout, once=not encoding.selects(local))

    def decode(
        self,
        acts: ShardedActs | SparseActs,
        *,
        dtype: torch.dtype | None = None,
        scatter_tokens: bool = False,
    ) -> Tensor:
        """Reconstruction `[*batch, d_out]`, the same on all ranks of "tp".

        Collectives: one all-reduce of `[n, d_out]` in the dtype of the sums (float32, or float64
        if an operand is), rounded once afterwards; backward none. With `scatter_tokens` a
        reduce-scatter instead, and backward an all-gather of d_recon.

        Args:
            acts: of `encode`, or of the whole dictionary (`gathered()`, edited perhaps), of which
                each rank takes its latents.
            dtype: of the result; default that of `W_dec`.
            scatter_tokens: return `[rows, d_out]`, the tokens `rows(n)` of this rank only, for
                a model whose activations are sharded along the sequence.

        Raises:
            TypeError: `acts` are neither.
            ValueError: they are of another dictionary.
        """
        return self._decoded(self._entries("decode", acts), None, dtype, scatter_tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `[*batch, d_out]` in the dtype of x."""
        return self.decode(self.encode(x), dtype=x.dtype)

    def loss(
        self, x: Tensor, target: Tensor | None = None, terms: Sequence[LossTerm] = DEFAULT_TERMS
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`SAE.loss` of the batch of all ranks: the same loss and metrics on each of them.

        A term that reads firing rates sees those of the whole, and names latents by their global
        number. `dense_blocks` counts the blocks that this rank's latents took densely.

        Collectives over "tp": per block one all-reduce of the reconstruction `[n_block, d_out]`
        and one of l0 `[n_block]`, TopK and BatchTopK their selection besides; per loss one of the
        blocks' sizes for a JumpReLU, one of d_x where x requires grad (or is centred by a trainable
        b_dec), one of the values of terms over activations where there are such, and one
        all-gather of counts `[largest shard]` for terms of the firing rates. Over "dp", where it
        has several ranks, all-reduces of the number of tokens, of `[d_out + 1]` for the mean of the
        targets, of their deviation, of the sums of the terms, and of counts `[local latents]` for
        terms of firing rates without `counts` of their own; a BatchTopK its selection.
        Backward: none; over "dp" gradients are the ranks' summands.

        Raises:
            ValueError: a term is not served over several ranks; it is named.
            Exception: as `SAE.loss`.
        """
        check_terms("loss", terms)
        check_sharded("loss", terms)
        self._debug("loss", "x", x, everywhere=True)
        peers = Peers(self.layout)
        found = self._on_local(lambda view: sae_loss(view, x, target, terms, whole=peers))
        return found  # type: ignore[no-any-return]

    def _decoded(
        self, acts: SparseActs, x: Tensor | None, dtype: torch.dtype | None, scatter_tokens: bool
    ) -> Tensor:
        recon = self._summed(encoding.decode, acts, x, dtype, scatter_tokens)
        return recon if scatter_tokens else recon.reshape(*acts.shape[:-1], self.d_out)


class ShardedTranscoder(ShardedSAE):
    """A `Transcoder` whose latents lie on several ranks; every rank has the affine skip."""

    W_skip: Tensor | None

    def decode(
        self,
        acts: ShardedActs | SparseActs,
        x: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        scatter_tokens: bool = False,
    ) -> Tensor:
        """`ShardedSAE.decode`; with `x [*batch, d_in]` the skip is added, computed on every rank.

        Raises:
            ValueError: there is a skip connection, and x is missing or of another shape.
        """
        entries = self._entries("decode", acts)
        if self.W_skip is None:
            return self._decoded(entries, None, dtype, scatter_tokens)
        x = skip_input("decode", x, entries, self._local.W_skip)
        self._debug("decode", "x", x)
        return self._decoded(entries, x, dtype, scatter_tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `[*batch, d_out]` in the dtype of x."""
        return self.decode(self.encode(x), x, dtype=x.dtype)


def check_sharded(op: str, terms: Sequence[LossTerm]) -> None:
    """The terms are served where latents lie on several ranks."""
    for term in terms:
        if isinstance(term, WeightTerm) and not term.among_peers:
            raise ValueError(
                f"{op}: {term.name} is not served over several ranks: {type(term).__name__} has no "
                "among_peers"
            )
