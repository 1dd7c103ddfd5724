"""Encoding and decoding with weights that are read from a file, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..entries import cumulative, row_offsets
from ..functional import jumprelu_encode
from ..sparse import SparseActs
from .building import empty_encoder, read, vectors_dtype
from .gemma_scope_2 import SafetensorsFile
from .validate import SKIP, TensorFile, finite

BLOCK_BYTES = 256 << 20  # of weights in memory at a time


class Layer:
    """One file: the encoder of its latents, and rows of its decoder.

    Raises:
        ValueError: it is no safetensors file, or a value is not finite.
    """

    def __init__(
        self, file: TensorFile, latents: slice, dtype: torch.dtype, device: torch.device
    ) -> None:
        if not isinstance(file, SafetensorsFile):
            raise ValueError(
                f"load: {file.path}: streamed=True needs a safetensors file, whose rows can be "
                "read one by one: load it, and save_pretrained to another folder first"
            )
        self.file, self.latents, self.dtype, self.device = file, latents, dtype, device
        self.d_in: int = file.specs["w_enc"].shape[0]
        self.d_sae: int = latents.stop - latents.start
        self.b_enc = self._read("b_enc", self.d_sae)
        self.threshold = self._read("threshold", self.d_sae)
        self.b_dec = self._read("b_dec", *file.specs["b_dec"].shape)
        self.W_skip = None
        if SKIP in file.specs:
            self.W_skip = self._read(SKIP, *file.specs[SKIP].shape, dtype=dtype)

    def _read(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = vectors_dtype(self.dtype) if dtype is None else dtype
        weight = torch.empty(shape, dtype=dtype, device=self.device)
        return read(weight, self.file, name, self.latents)

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseActs:
        """Sparse activations `[*batch, d_sae]`."""
        self.file.finish()
        step = min(self.d_sae, max(1, BLOCK_BYTES // (self.d_in * self.dtype.itemsize)))
        buffer = empty_encoder((self.d_in, step), self.dtype, self.device)
        parts = []
        for start in range(0, self.d_sae, step):
            own = slice(start, min(start + step, self.d_sae))
            first = self.latents.start
            W_enc = buffer[:, : own.stop - start]
            read(W_enc, self.file, "w_enc", slice(first + start, first + own.stop))
            parts.append(jumprelu_encode(x, W_enc, self.b_enc[own], self.threshold[own]))
        return joined(parts)

    def rows(self, latents: Tensor) -> Tensor:
        """`[len(latents), *]`: the decoder's rows, all outputs of a row side by side."""
        if latents.numel() > 0 and not 0 <= int(latents[0]) <= int(latents[-1]) < self.d_sae:
            raise ValueError(f"decode: an index of acts is out of range [0, d_sae={self.d_sae})")
        block = self.file.rows("w_dec", latents.cpu() + self.latents.start)
        where = f"decode: {self.file.path}"
        return finite(where, "w_dec", block, self.dtype).to(self.device).flatten(1)


def joined(parts: Sequence[SparseActs]) -> SparseActs:
    """One `SparseActs` of blocks of latents, in canonical order.

    A token whose pre-activations are NaN stores the first of them, as the encoder has it.
    """
    lengths = [part.offsets.diff() for part in parts]
    offsets = cumulative(torch.stack(lengths).sum(0))
    indices, values, gate = (
        torch.empty(int(offsets[-1]), dtype=t.dtype, device=t.device)
        for t in (parts[0].indices, parts[0].values, parts[0].gate)
    )
    free, first = offsets[:-1].clone(), 0  # next place of each token, latents before the block
    for part, length in zip(parts, lengths, strict=True):
        shift = (free - part.offsets[:-1]).repeat_interleave(length)
        places = shift + torch.arange(part.nnz, device=shift.device)
        indices[places], values[places], gate[places] = part.indices + first, part.values, part.gate
        free, first = free + length, first + part.d_sae
    acts = SparseActs(offsets, indices, values, gate, (*parts[0].shape[:-1], first))
    nan = values.isnan()
    if not bool(nan.any()):
        return acts
    tokens, seen = acts.tokens(), cumulative(nan.long())
    kept = ~nan | (seen[1:] - seen[offsets[tokens]] == 1)
    entries = (indices[kept], values[kept], gate[kept])
    return SparseActs(row_offsets(tokens[kept], acts.n), *entries, acts.shape)


Decode = Callable[[Sequence[SparseActs], Sequence[Tensor], slice], Tensor]


def decoded(acts: Sequence[SparseActs], layers: Sequence[Layer], one: Decode) -> Tensor:
    """`one` over groups of tokens, with the decoder rows that each group needs."""
    if len(acts) != len(layers) or any(not isinstance(a, SparseActs) for a in acts):
        raise ValueError(f"decode: acts must be {len(layers)} SparseActs, one per layer")
    for a, layer in zip(acts, layers, strict=True):
        if a.shape != (*acts[0].shape[:-1], layer.d_sae):
            raise ValueError(
                f"decode: acts must have shape [*batch, d_sae={layer.d_sae}], one batch, got "
                f"{a.shape}"
            )
        layer.file.finish()
    parts = []
    for tokens in _groups(acts, layers[0].b_dec.numel() * len(layers) * layers[0].dtype.itemsize):
        chosen = [_compact(a, tokens) for a in acts]
        weights = [layer.rows(latents) for layer, (_, latents) in zip(layers, chosen, strict=True)]
        parts.append(one([part for part, _ in chosen], weights, tokens))
    return torch.cat(parts)


def _groups(acts: Sequence[SparseActs], row_bytes: int) -> Iterator[slice]:
    """Runs of tokens whose entries have `BLOCK_BYTES` of decoder rows; an empty one if none."""
    ends = torch.stack([a.offsets for a in acts]).sum(0)
    n, budget, start = acts[0].n, BLOCK_BYTES // row_bytes, 0
    while start < n or n == 0:
        limit = int(ends[start]) + budget
        stop = int(torch.searchsorted(ends, limit, right=True)) - 1
        stop = min(n, max(start + 1, stop))
        yield slice(start, stop)
        if n == 0:
            return
        start = stop


def _compact(acts: SparseActs, tokens: slice) -> tuple[SparseActs, Tensor]:
    """The tokens' entries over the latents that they have, and those latents, ascending."""
    offsets = acts.offsets[tokens.start : tokens.stop + 1]
    own = slice(int(offsets[0]), int(offsets[-1]))
    latents, indices = torch.unique(acts.indices[own].long(), return_inverse=True)
    entries = (indices.to(torch.int32), acts.values[own], acts.gate[own])
    shape = (tokens.stop - tokens.start, latents.shape[0])
    return SparseActs(offsets - own.start, *entries, shape), latents
