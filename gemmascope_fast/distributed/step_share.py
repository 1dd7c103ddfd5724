"""One rank's share of a training step on a mesh, in sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

KINDS = ("sae", "transcoder", "crosscoder", "clt")


@dataclass(frozen=True)
class StepShare:
    """One rank's share: `rows` tokens, `size` latents per layer."""

    kind: str
    d_in: int
    d_sae: int
    dp: int
    tp: int
    n_layers: int
    dtype: torch.dtype
    moments: str
    d_out: int
    rows: int
    size: int
    l0: float

    @property
    def sources(self) -> list[tuple[int, int]]:
        """Columns of encoder and decoder of every layer."""
        if self.kind in KINDS[:2]:
            return [(self.d_in, self.d_out)]
        return [(self.d_in, (self.n_layers - i) * self.d_in) for i in range(self.n_layers)]

    @property
    def width(self) -> int:
        """Columns of the reconstruction."""
        return self.sources[0][1]

    @property
    def columns(self) -> int:
        """Of all rows of memory that a latent of each layer has."""
        return sum(sum(pair) for pair in self.sources)

    @property
    def entries(self) -> int:
        """Active on this rank, in a layer."""
        return math.ceil(self.rows * self.l0 / self.tp / self.n_layers)

    @property
    def touched(self) -> int:
        """Latents of a layer here that fire in the batch of all ranks, each alike."""
        return self._fire(self.rows * self.dp)

    @property
    def fused(self) -> bool:
        """Whether the update is a fused step, without gradients in memory."""
        return self.dp == 1 and self.kind in KINDS[:2]

    @property
    def moved(self) -> int:
        """Least bytes that decode, gradients and update move: touched rows once a pass.

        Decode reads W_dec; the update reads and writes weights and second moments. Where it is not
        fused, the backward pass reads W_dec, gradients are written, and the update reads them.
        """
        own, touched, item = self._fire(self.rows), self.touched, self.dtype.itemsize
        moment = 1 if self.moments == "8bit" else max(item, 4)
        written = sum(columns for _, columns in self.sources)
        rows = own * written * item + 2 * touched * self.columns * (item + moment)
        if not self.fused:
            rows += own * (written + self.columns) * item + touched * self.columns * item
        tokens = self.rows * (2 * self.width + self.d_in * self.n_layers) * item
        return rows + tokens

    def _fire(self, tokens: int) -> int:
        """Latents of a layer here of which some token is active, each alike."""
        share = tokens * self.l0 / (self.d_sae * self.n_layers)
        return min(math.ceil(self.size * -math.expm1(-share)), self.size)

    @property
    def blocks(self) -> int:
        """Row blocks of the loss."""
        from ..training.planning import DEFAULT_LIMITS, ENTRY_BYTES

        return max(-(-self.entries * ENTRY_BYTES // DEFAULT_LIMITS.entry_bytes), 1)
