"""Where activations come from: blocks of shuffled rows, each a function of (seed, index).

A source numbers its blocks 0, 1, 2, ... without end. Block `index` holds the same rows in the same
order whenever it is asked for, so that a run which was stopped regenerates the one block it was in
and goes on with the row after the last. Rows of special tokens are left out by the source.

Several ranks read one source together: `part` is a block in the same order, of which a rank holds
some rows. A batch of all ranks is the batch of one process, whatever their number.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_device
from .rows import check_layers, check_rows, from_numpy, kept_rows, row_shape

EMPTY_BLOCKS = 64
"""Consecutive blocks without a row after which a stream gives up."""


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """Random numbers of one purpose, such as `generator(seed, "order", block)`."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Block:
    """Rows in the order in which they are trained on.

    Attributes:
        x: `[m, d_in]` activations, any floating-point dtype.
        target: `[m, d_out]`, or None where x is its own target.
        order: `[r]` int64 rows of x; rows that it leaves out are not trained on, and -1 stands for
            a row that another rank holds.
    """

    x: Tensor
    target: Tensor | None
    order: Tensor

    def __len__(self) -> int:
        return self.order.shape[0]

    def take(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows `start:stop` of the order, as `(x, target)`, without those of other ranks."""
        rows = self.order[start:stop]
        rows = rows[rows >= 0].to(self.x.device)
        return self.x[rows], None if self.target is None else self.target[rows]


class Source(ABC):
    """Activations as an endless sequence of blocks.

    Attributes:
        d_in: width of x; of several layers that of all of them together, `L * d`.
        d_out: width of the target, None where x is its own target.
        layers: L where a row is the activations of L layers, one after the other; None of one.
        repeatable: whether a block has the same bits on every rank that asks for it.
    """

    d_in: int
    d_out: int | None
    layers: int | None = None
    repeatable: bool = True

    @abstractmethod
    def block(self, seed: int, index: int) -> Block:
        """Block `index >= 0` of the order that `seed` chooses: the same rows every time."""

    def part(self, seed: int, index: int, rank: int, ranks: int) -> Block:
        """`block(seed, index)` with the rows of `rank` of `ranks`: here every `ranks`-th of them.

        A source whose rows cost something overrides this, so that each rank makes its own only.
        Every row belongs to one rank, and the order has the length of the block's.
        """
        block = self.block(seed, index)
        mine = torch.arange(len(block), device=block.order.device) % ranks == rank
        return replace(block, order=torch.where(mine, block.order, -1))

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells these activations from others, as JSON; a resumed run compares it."""

    def place(self, seed: int, index: int, row: int, share: tuple[int, int] = (0, 1)) -> str:
        """Where `row` of the x of block `index`, or of a rank's part of it, comes from."""
        return f"row {row} of block {index} as the source made it"

    def metadata(self) -> dict[str, Any]:
        """What the result's config can say of its origin: model_name, hf_hook_point_in, ..."""
        return {}

    def held_bytes(self, device: torch.device) -> int:
        """Bytes on `device` that a block takes beyond what the caller holds; 0 if unknown."""
        return 0


class TensorSource(Source):
    """Activations in memory; each block is one shuffled pass over all of them.

    Args:
        x: `[N, d_in]`, or of several layers `[N, L, d]`, floating point, strided, on any device;
            an array of numpy, too.
            Layers that are not contiguous (`[L, N, d]` transposed) are copied.
        target: `[N, d_out]` for transcoders, `[N, L, d]` for those across layers, on the same
            device.
        mask: `[N]` bool or integer; rows where it is 0 (special tokens, padding) are left out.

    Raises:
        TypeError: a tensor is not floating point, or the mask is.
        ValueError: shapes or devices disagree, or no row is left.
    """

    def __init__(self, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None):
        x, target, mask = from_numpy(x), from_numpy(target), from_numpy(mask)
        check_rows("x", x)
        if target is not None:
            check_rows("target", target)
            if target.shape[0] != x.shape[0]:
                raise ValueError(
                    f"train: target must have as many rows as x, {x.shape[0]}, got "
                    f"{target.shape[0]}"
                )
            check_layers("train", "target", target, x)
            check_device("train", "target", target, x)
        self.x = x.detach().flatten(1)
        self.target = None if target is None else target.detach().flatten(1)
        self.d_in = self.x.shape[1]
        self.d_out = None if self.target is None else self.target.shape[1]
        self.layers = x.shape[1] if x.dim() == 3 else None
        held, given = (
            [t for t in pair if t is not None] for pair in ((self.x, self.target), (x, target))
        )
        self._copies = [
            t for t, own in zip(held, given, strict=True) if t.data_ptr() != own.data_ptr()
        ]
        self._kept = (
            torch.arange(x.shape[0], device="cpu") if mask is None else kept_rows(mask, x.shape[0])
        )
        if len(self._kept) == 0:
            raise ValueError(f"train: source must have at least one row to train on, of {len(x)}")

    def block(self, seed: int, index: int) -> Block:
        """Pass `index` over the kept rows."""
        order = torch.randperm(
            len(self._kept), generator=generator(seed, "pass", index), device="cpu"
        )
        return Block(self.x, self.target, self._kept[order])

    def identity(self) -> dict[str, Any]:
        """Shape, dtype and a digest of up to 64 rows spread over the tensor."""
        rows = torch.linspace(
            0, len(self._kept) - 1, min(64, len(self._kept)), dtype=torch.float64, device="cpu"
        )
        rows = self._kept[rows.long()].to(self.x.device)
        digest = hashlib.sha256(repr(self._kept.shape).encode())
        for t in (self.x, self.target):
            if t is not None:
                digest.update(t[rows].cpu().contiguous().view(torch.uint8).numpy().tobytes())
        held = [t for t in (self.x, self.target) if t is not None]
        shapes = [[len(t), *row_shape(t.shape[1], self.layers)] for t in held]
        return {"kind": "tensor", "shapes": shapes, "digest": digest.hexdigest()}

    def place(self, seed: int, index: int, row: int, share: tuple[int, int] = (0, 1)) -> str:
        """The row of the tensor."""
        return f"row {row}"

    def held_bytes(self, device: torch.device) -> int:
        """Order of a pass and its generator's permutation, in main memory; copies of layers."""
        copied = sum(t.nbytes for t in self._copies if t.device.type == device.type)
        return copied + (16 * len(self._kept) if device.type == "cpu" else 0)


class Stream:
    """The rows of a source, one batch after the other.

    Args:
        source: of the rows.
        seed: chooses their order.
        position: (block, rows of it that have been taken), from `position` of another stream, of
            any number of ranks.
        share: (rank, ranks) that read the source together; `next` and `peek` count the rows of
            all, and return those of this rank.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        position: tuple[int, int] = (0, 0),
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._source, self._seed, self._share = source, seed, share
        self._index, self._taken = position
        self._last: list[tuple[int, Tensor]] = []
        self._block = self._load()
        if self._taken > len(self._block):
            raise ValueError(
                f"train: block {self._index} has {len(self._block)} rows, and the run that is "
                f"resumed took {self._taken}: the source has changed"
            )

    @property
    def position(self) -> tuple[int, int]:
        """(block, rows of it that have been taken): where the next row comes from."""
        if self._taken == len(self._block):
            return self._index + 1, 0
        return self._index, self._taken

    def peek(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows `start:stop` of those that come next in the current block; the position stays."""
        left = len(self._block) - self._taken
        start, stop = min(start, left), min(stop, left)
        return self._block.take(self._taken + start, self._taken + stop)

    def next(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Take the next `rows` rows: `(x [rows, d_in], target [rows, d_out] or None)`.

        Raises:
            ValueError: the source ran dry, or a block does not fit the source's widths.
        """
        parts, empty, self._last = [], 0, []
        while rows > 0:
            left = len(self._block) - self._taken
            if left == 0:
                empty = empty + 1 if len(self._block) == 0 else 0
                if empty > EMPTY_BLOCKS:
                    raise ValueError(f"train: {EMPTY_BLOCKS} blocks of the source have no rows")
                del self._block  # before the next one is made
                self._index, self._taken = self._index + 1, 0
                self._block = self._load()
                continue
            count = min(rows, left)
            parts.append(self._block.take(self._taken, self._taken + count))
            taken = self._block.order[self._taken : self._taken + count]
            self._last.append((self._index, taken[taken >= 0]))
            self._taken += count
            rows -= count
        if len(parts) == 1:
            return parts[0]
        targets = [t for _, t in parts if t is not None]
        return torch.cat([x for x, _ in parts]), torch.cat(targets) if targets else None

    def blame(self, **tensors: Tensor | None) -> str:
        """Of tensors made from what `next` returned last, the first row that is not finite."""
        for name, t in tensors.items():
            bad = [] if t is None else (~t.isfinite()).flatten(1).any(1).nonzero()[:1, 0].tolist()
            for at in bad:
                for index, rows in self._last:
                    if at < len(rows):
                        place = int(rows[at])
                        where = self._source.place(self._seed, index, place, self._share)
                        return f"{name} is not finite in {where} of the source"
                    at -= len(rows)
        return "the activations are finite, the weights have diverged"

    def _load(self) -> Block:
        source = self._source
        if self._share[1] == 1:
            block = source.block(self._seed, self._index)
        else:
            block = source.part(self._seed, self._index, *self._share)
        if block.x.dim() != 2 or block.x.shape[1] != source.d_in:
            raise ValueError(
                f"train: block {self._index} must have x [m, {source.d_in}], got "
                f"{tuple(block.x.shape)}"
            )
        width = None if block.target is None else block.target.shape[1]
        if width != source.d_out:
            raise ValueError(
                f"train: block {self._index} must have a target of width {source.d_out}, got "
                f"{width}"
            )
        return block
