"""CSR entries: the storage and structure that `SparseActs` builds on."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import ops
from .arguments import check_count
from .reference import CapacityError

TENSORS = ("offsets", "indices", "values", "gate")
OPTIONAL = ("needed", "threshold", "feature_offsets", "permutation")


class Entries:
    """Stored entries of `n` rows over `d_sae` latents; see `SparseActs` for the attributes."""

    __slots__ = (*TENSORS, *OPTIONAL, "shape", "padded")

    offsets: Tensor
    indices: Tensor
    values: Tensor
    gate: Tensor
    needed: Tensor | None
    threshold: Tensor | None
    feature_offsets: Tensor | None
    permutation: Tensor | None
    shape: tuple[int, ...]
    padded: bool

    def __init__(
        self,
        offsets: Tensor,
        indices: Tensor,
        values: Tensor,
        gate: Tensor,
        shape: tuple[int, ...],
        *,
        needed: Tensor | None = None,
        threshold: Tensor | None = None,
        feature_offsets: Tensor | None = None,
        permutation: Tensor | None = None,
        padded: bool = False,
    ) -> None:
        self.offsets, self.indices, self.values, self.gate = offsets, indices, values, gate
        self.shape = tuple(shape)
        self.needed, self.threshold = needed, threshold
        self.feature_offsets, self.permutation = feature_offsets, permutation
        self.padded = padded

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.shape[-1]

    @property
    def n(self) -> int:
        """Number of tokens: the product of the leading dimensions."""
        return math.prod(self.shape[:-1])

    @property
    def nnz(self) -> int:
        """Number of stored entries, window entries included, padding excluded."""
        return int(self.offsets[-1]) if self.padded else self.indices.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the entries."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={self.shape}, capacity={self.indices.shape[0]}, "
            f"dtype={self.dtype}, device={self.device}, requires_grad={self.values.requires_grad})"
        )

    def by_feature(self) -> tuple[Tensor, Tensor]:
        """`(feature_offsets [d_sae + 1], permutation)`: the entries by latent, computed once."""
        if self.feature_offsets is None or self.permutation is None:
            op = ops.overload("by_feature")
            self.feature_offsets, self.permutation = op(self.offsets, self.indices, self.d_sae)
        return self.feature_offsets, self.permutation

    def tokens(self) -> Tensor:
        """`[capacity]` int64: token of each entry, n for padding."""
        positions = torch.arange(self.indices.shape[0], device=self.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), positions, right=True)

    def latents(self) -> Tensor:
        """`[capacity]` int64: latent of each entry, d_sae for padding."""
        if not self.padded:
            return self.indices.long()
        positions = torch.arange(self.indices.shape[0], device=self.device)
        return torch.where(positions < self.offsets[-1], self.indices.long(), self.d_sae)

    def check(self) -> Self:
        """Raise `CapacityError` when a fixed capacity was too small; returns self."""
        if self.needed is not None and int(self.needed) > self.indices.shape[0]:
            raise CapacityError(
                f"{int(self.needed)} entries are needed, the capacity is "
                f"{self.indices.shape[0]}; pass max_nnz >= {int(self.needed)}"
            )
        return self

    def latent_range(self, start: int, end: int) -> Self:
        """`[*batch, end - start]`: the entries of latents `start <= j < end`, counted from 0.

        Raises:
            TypeError: an end is no int.
            ValueError: `0 <= start <= end <= d_sae` does not hold.
        """
        check_count("latent_range", "end", end, self.d_sae, "d_sae")
        check_count("latent_range", "start", start, end, "end")
        latents = self.latents()
        source = ((latents >= start) & (latents < end)).nonzero()[:, 0]
        offsets = row_offsets(self.tokens()[source], self.n)
        part = self._entries(source, offsets, (*self.shape[:-1], end - start))
        part.indices = part.indices - start
        return part

    def _valid(self, per_entry: Tensor) -> Tensor:
        """Return `per_entry` with the padding replaced by 0."""
        if not self.padded:
            return per_entry
        positions = torch.arange(per_entry.shape[0], device=self.device)
        return torch.where(positions < self.offsets[-1], per_entry, 0)

    def _keys(self) -> Tensor:
        nnz = self.nnz
        return self.tokens()[:nnz] * self.d_sae + self.indices[:nnz]

    def _keep(self, mask: Tensor) -> Self:
        source = mask.nonzero()[:, 0]
        return self._entries(source, row_offsets(self.tokens()[source], self.n), self.shape)

    def _entries(self, source: Tensor, offsets: Tensor, shape: tuple[int, ...]) -> Self:
        indices, values, gate = (t[source] for t in (self.indices, self.values, self.gate))
        return type(self)(offsets, indices, values, gate, shape, threshold=self.threshold)

    def _spread(self, op: str, name: str, given: Any, shape: tuple[int, ...]) -> Tensor:
        """`given`, a number or a tensor, broadcast to `shape`."""
        t = torch.as_tensor(given, dtype=self.dtype, device=self.device)
        fits = t.dim() <= len(shape) and all(
            mine in (1, size) for mine, size in zip(t.shape[::-1], shape[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"{op}: {name} must be a number or broadcast to {shape}, got {tuple(t.shape)}"
            )
        return t.expand(shape)

    def _with_entries(self, mine: Tensor, new: Tensor, value: Tensor) -> Self:
        """Entries `mine` (self's keys) and `new` (disjoint) merged into canonical order.

        A new entry is active when its value is not 0.
        """
        keys, order = torch.cat([mine, new]).sort()
        nnz = mine.shape[0]
        values = torch.cat([self.values[:nnz], value])[order]
        gates = torch.cat([self.gate[:nnz], (value.detach() != 0).to(self.gate.dtype)])[order]
        tokens = keys.div(max(self.d_sae, 1), rounding_mode="floor")
        latents = (keys - tokens * self.d_sae).to(torch.int32)
        return type(self)(
            row_offsets(tokens, self.n),
            latents,
            values,
            gates,
            self.shape,
            threshold=self.threshold,
        )

    def _replace(self, **changes: Any) -> Self:
        fields = {name: getattr(self, name) for name in (*TENSORS, *OPTIONAL)} | changes
        return type(self)(**fields, shape=self.shape, padded=self.padded)


def cumulative(lengths: Tensor) -> Tensor:
    """Exclusive prefix sums with the total last."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def row_offsets(tokens: Tensor, n: int) -> Tensor:
    """CSR offsets of ascending token ids."""
    return torch.searchsorted(tokens.contiguous(), torch.arange(n + 1, device=tokens.device))


def pad_mask(mask: Tensor, capacity: int) -> Tensor:
    """Extend a mask over valid entries with False for the padding."""
    return torch.nn.functional.pad(mask, (0, capacity - mask.shape[0]))


def latent_ids(
    op: str, latents: Any, d_sae: int, device: torch.device, *, distinct: bool = True
) -> Tensor:
    """Latents as int64, from integers or a `[d_sae]` mask; `distinct` refuses repetitions."""
    ids = torch.as_tensor(latents, device=device)
    if ids.dtype == torch.bool:
        if ids.shape != (d_sae,):
            raise ValueError(f"{op}: mask must have shape [d_sae={d_sae}], got {tuple(ids.shape)}")
        return ids.nonzero()[:, 0]
    if ids.numel() and (ids.is_floating_point() or ids.is_complex()):
        raise TypeError(f"{op}: latents must be integers or a mask, got {ids.dtype}")
    ids = ids.reshape(-1).to(torch.int64)
    bad = (ids < 0) | (ids >= d_sae)
    if bool(bad.any()):
        raise ValueError(f"{op}: latent {int(ids[bad][0])} is out of range [0, d_sae={d_sae})")
    if distinct and torch.unique(ids).shape[0] != ids.shape[0]:
        raise ValueError(f"{op}: latents must be distinct")
    return ids


def distinct_tokens(op: str, tokens: Tensor) -> Tensor:
    """Selected tokens, flat; naming one twice is an error."""
    flat = tokens.reshape(-1)
    ascending = flat.sort()[0]
    twice = ascending[1:][ascending[1:] == ascending[:-1]]
    if twice.numel():
        raise ValueError(f"{op}: rows select token {int(twice[0])} more than once")
    return flat


def check_topk(values: Any, indices: Any, d_sae: int) -> Tensor:
    """Arguments of `SparseActs.from_topk` fit together; returns `indices` as int64."""
    for name, t in (("values", values), ("indices", indices)):
        if not isinstance(t, Tensor):
            raise TypeError(f"from_topk: {name} must be a torch.Tensor, got {type(t).__name__}")
    check_count("from_topk", "d_sae", d_sae, 2**31 - 1, "2^31 - 1")
    if not values.is_floating_point():
        raise TypeError(f"from_topk: values must be floating point, got {values.dtype}")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"from_topk: indices must be integer, got {indices.dtype}")
    if values.shape != indices.shape or values.dim() == 0:
        raise ValueError(
            "from_topk: values and indices must have the same shape [*batch, k], got "
            f"{tuple(values.shape)} and {tuple(indices.shape)}"
        )
    latents: Tensor = indices.to(torch.int64)
    bad = (latents < 0) | (latents >= d_sae)
    if bool(bad.any()):
        raise ValueError(
            f"from_topk: index {int(latents[bad][0])} is out of range [0, d_sae={d_sae})"
        )
    return latents


def register_pytree(kind: type[Entries]) -> None:
    """Make `kind` a pytree whose leaves are its tensors.

    The number of tokens is a size of the leaves and not part of the structure, so that programs
    that `torch.export` made with a dynamic batch accept and return every number of tokens: the
    first batch dimension stands as -1 in the context and comes back from `offsets`.
    """

    def flatten(entries: Entries) -> tuple[list[Any], Any]:
        fields = [name for name in (*TENSORS, *OPTIONAL) if getattr(entries, name) is not None]
        shape = entries.shape
        if len(shape) > 1 and math.prod(shape[1:-1]) != 0:
            shape = (-1, *shape[1:])
        return [getattr(entries, name) for name in fields], (tuple(fields), shape, entries.padded)

    def flatten_with_keys(entries: Entries) -> tuple[list[Any], Any]:
        leaves, context = flatten(entries)
        keys = [pytree.GetAttrKey(name) for name in context[0]]
        return list(zip(keys, leaves, strict=True)), context

    def unflatten(leaves: Any, context: Any) -> Entries:
        names, shape, padded = context
        fields = dict(zip(names, leaves, strict=True))
        if shape[0] == -1 and isinstance(fields["offsets"], Tensor):
            n = fields["offsets"].shape[0] - 1
            shape = (n // math.prod(shape[1:-1]), *shape[1:])
        return kind(**fields, shape=shape, padded=padded)

    pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"gemmascope_fast.{kind.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=lambda c: (tuple(c[0]), tuple(c[1]), c[2]),  # JSON made lists of them
        flatten_with_keys_fn=flatten_with_keys,
    )
