"""Loss and gradients of several layers on one block of rows.

    recon[j] = b_dec[j] (+ x[j] @ W_skip[j]) + sum_i acts[i] @ W_dec[i][:, j]     l0 = sum_i l0[i]

Layer after layer adds to one reconstruction; once the terms have been differentiated, each reads
its columns of `d_recon` in place. Layers decide by themselves between entries and tiles: entries
are kept between the two passes, a tile is made again unless it is the last, so that one exists at a
time. What happens inside a layer is that of `block_paths.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dense_paths
from .block_paths import add_skip, count_block, entry_counts, finish, observed_block, per_entry
from .entry_paths import backward
from .evaluation import Gradients, Inputs
from .objective import Objective


@dataclass(frozen=True)
class Joint(Inputs):
    """What the layers share: target, b_dec and the terms.

    Attributes:
        layers: inputs of each layer: x `[n, d]`, W_dec `[d_sae, m * d]`, and its own skip.
    """

    layers: tuple[Inputs, ...] = ()

    @property
    def d_sae(self) -> int:
        """Number of latents of all layers."""
        return sum(layer.d_sae for layer in self.layers)

    def reach(self, t: Tensor, at: int) -> Tensor:
        """The last columns of `t [..., L * d]`, which layer `at` writes to."""
        return t[..., t.shape[-1] - self.layers[at].tensors["W_dec"].shape[1] :]

    def own(self, t: Tensor, at: int) -> Tensor:
        """The columns of `t [..., L * d]` that are layer `at` itself."""
        d = t.shape[-1] // len(self.layers)
        return t[..., at * d : (at + 1) * d]

    def latents(self, t: Tensor, at: int) -> Tensor:
        """Those of layer `at` among all latents, `t [L * d_sae]`."""
        d_sae = self.layers[at].d_sae
        return t[at * d_sae : (at + 1) * d_sae]


class Sums(Gradients):
    """Gradients of what the layers share, and of each layer.

    Attributes:
        layers: of each layer.
    """

    def __init__(self, joint: Joint) -> None:
        super().__init__(joint)
        self.layers = [Gradients(layer) for layer in joint.layers]


class _Entries:
    """A layer on the sparse path."""

    def __init__(self, inputs: Inputs, rows: slice) -> None:
        self._inputs = inputs
        block = observed_block(inputs, inputs.tensors["x"][rows])
        self._block = block
        self.l0 = torch.segment_reduce(
            block.gate, "sum", offsets=block.offsets, unsafe=True, initial=0
        )

    def decode_(self, recon: Tensor) -> None:
        self._inputs.op("decode_")(recon, *self._block.entries, self._inputs.tensors["W_dec"])

    def counts(self) -> Tensor:
        return entry_counts(self._inputs, self._block)

    def release(self) -> None:
        """Entries are kept."""

    def backward(
        self,
        d_recons: Tensor,
        d_gates: dense_paths.Gates,
        objective: Objective,
        gradients: Gradients,
    ) -> Tensor:
        inputs, block = self._inputs, self._block
        d_values = objective.entries(inputs, block.values, block.indices.long(), gradients)
        incoming = (d_recons, d_values, per_entry(*d_gates, block))
        return backward(inputs, block, (inputs.d_sae,), incoming, gradients)


class _Dense:
    """A layer on the dense path."""

    def __init__(self, inputs: Inputs, rows: slice) -> None:
        self._inputs, self._rows = inputs, rows
        self._tile: dense_paths.Tile | None = dense_paths.dense_tile(inputs, rows)
        self.l0 = self._tile.l0

    def decode_(self, recon: Tensor) -> None:
        recon.addmm_(self._made().acts, self._inputs.wide("W_dec"))

    def counts(self) -> Tensor:
        return self._made().counts()

    def release(self) -> None:
        """Drop the tile, until it is wanted again."""
        self._tile = None

    def backward(
        self,
        d_recons: Tensor,
        d_gates: dense_paths.Gates,
        objective: Objective,
        gradients: Gradients,
    ) -> Tensor:
        inputs, tile = self._inputs, self._made()
        d_values = objective.entries(inputs, tile.acts, None, gradients)
        incoming = (d_recons, d_values, d_gates)
        self.release()
        return dense_paths.dense_backward(inputs, tile, (inputs.d_sae,), incoming, gradients)

    def _made(self) -> dense_paths.Tile:
        if self._tile is None:
            self._tile = dense_paths.dense_tile(self._inputs, self._rows)
        return self._tile


def layered_block(
    joint: Joint, rows: slice, dense: Sequence[bool], objective: Objective, sums: Sums
) -> None:
    """Add the rows' terms to `objective` and their gradients to `sums`.

    Args:
        joint: of the evaluation.
        rows: of the block.
        dense: which layers take the dense path.
        objective: receives the terms.
        sums: receives the gradients.
    """
    recon = joint.wide("b_dec").repeat(rows.stop - rows.start, 1)
    parts: list[_Entries | _Dense] = []
    counts: list[Tensor] = []
    for at, (layer, apart) in enumerate(zip(joint.layers, dense, strict=True)):
        if parts:
            parts[-1].release()
        parts.append(_Dense(layer, rows) if apart else _Entries(layer, rows))
        parts[-1].decode_(joint.reach(recon, at))
        add_skip(layer, layer.tensors["x"][rows], joint.own(recon, at)[None])
        if objective.needs_counts and objective.counts is None:
            counts.append(parts[-1].counts())
    l0 = torch.stack([part.l0 for part in parts]).sum(0)
    d_recons, d_l0 = objective.tokens(recon[None], l0, rows, sums)
    del recon
    d_counts = objective.latents(lambda: torch.cat(counts))
    if "b_dec" in joint.needs:
        sums.add("b_dec", d_recons[0].sum(0))
    for at in reversed(range(len(parts))):
        own = None if d_counts is None else joint.latents(d_counts, at)
        layer, into = joint.layers[at], sums.layers[at]
        d_x = parts[at].backward(joint.reach(d_recons, at), (d_l0, own), objective, into)
        finish(layer, layer.tensors["x"][rows], rows, joint.own(d_recons[0], at), d_x, into)


def count_layers(joint: Joint, parts: Sequence[tuple[slice, tuple[bool, ...]]]) -> Tensor:
    """`[L * d_sae]` int64: tokens of the blocks on which each latent is active."""
    total = torch.zeros(joint.d_sae, dtype=torch.int64, device=joint.tensors["target"].device)
    for rows, dense in parts:
        for at, (layer, apart) in enumerate(zip(joint.layers, dense, strict=True)):
            joint.latents(total, at).add_(count_block(layer, rows, apart))
    return total
