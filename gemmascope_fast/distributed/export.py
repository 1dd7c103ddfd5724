"""One Gemma Scope 2 artefact from the slices of all ranks, of which none ever holds the whole.

The first rank makes each file as a single process does (header, temporary name, sync, renames); in
place of the tensors it leaves room, into which every rank of the first copy writes its byte ranges.
Of `w_enc [d_in, d_sae]` a slice of the latents is a part of every row; of the others it is one
range.
The folder has to be on a file system that all ranks see.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import as_path
from ..artefacts import writing
from ..artefacts.plans import Plan
from ..artefacts.validate import check_dtype, finite, rows_per_block
from ..artefacts.writing_gemma_scope_2 import plan
from ..artefacts.writing_tensors import OP, Stored, header_of, in_order
from ..durable import sync
from .base import Sharded
from .exchange import everyone
from .failure import RankError
from .layout import Layout

_NOTHING = Plan({}, "", b"")
"""What a rank without latents has to write."""

LATENT_DIMS = {"w_enc": 1, "w_dec": 0, "b_enc": 0, "threshold": 0}
"""Dimension over the latents of each tensor of a file; the others are the same on all ranks."""


def save_pretrained(
    module: Sharded,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    **metadata: Any,
) -> None:
    """Write a sharded module as one artefact that `load` reads; called by all ranks.

    Args:
        module: what `shard`, `load` or `train` returned; a JumpReLU.
        path: folder, made if it is missing, on a file system that all ranks see.
        dtype: of the matrices in the file; None keeps the module's.
        metadata: config values: model_name, l0, ...

    Raises:
        OSError: a file cannot be written. What was there before stays.
        RankError: another rank failed; names it.
        TypeError: the module is not sharded.
        ValueError: the format cannot express the module, or a value is not finite.
    """
    if not isinstance(module, Sharded):
        raise TypeError(
            f"distributed.save_pretrained: module must be what shard, load or train returned, got "
            f"{type(module).__name__}"
        )
    write(module.local, module.layout, path, dtype, metadata)


def write(
    local: Any,
    layout: Layout,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None,
    metadata: Mapping[str, Any],
) -> None:
    """`save_pretrained` of the slice `local`."""
    slices, failure = _NOTHING, None
    try:
        check_dtype(OP, dtype)
        folder = as_path(OP, "path", path)
        if layout.rank == 0 or layout.latents.start < layout.latents.stop:
            slices = plan(local, dtype, metadata, layout.d_sae)
    except Exception as error:
        failure = error
    _together(layout, failure)
    if dist.get_rank() != layout.first:
        _follow(slices, layout)
        return
    lead = _Lead(slices, layout)
    try:
        writing.write_plan(folder, lead.whole, lead)
    except Exception as error:  # every rank has to hear of it
        failure = error
    if not lead.known:
        _said([None, failure and f"{type(failure).__name__}: {failure}"], layout)
    if failure is not None:
        raise failure


class _Lead:
    """What the first rank does in place of writing the tensors of a file.

    Attributes:
        known: whether all ranks know already that it failed.
    """

    known = False

    def __init__(self, slices: Plan, layout: Layout) -> None:
        self._slices, self._layout = slices, layout
        whole = {
            name: {key: _whole(key, t, layout.d_sae) for key, t in tensors.items()}
            for name, tensors in slices.tensors.items()
        }
        self.whole = Plan(whole, slices.config, slices.text)
        self._left = list(whole)

    def __call__(
        self, file: IO[bytes], tensors: Mapping[str, Stored], metadata: Mapping[str, str]
    ) -> None:
        """Write the header, make room, and have every rank fill in its own."""
        header = header_of(in_order(tensors), metadata)
        file.write(header)
        file.truncate(len(header) + sum(t.nbytes for t in tensors.values()))
        sync(file)
        name = self._left.pop(0)
        _said([name, (file.name, len(header))], self._layout)
        self.known = True
        _filled(self._slices.tensors[name], Path(file.name), len(header), self._layout)
        self.known = False


def _follow(slices: Plan, layout: Layout) -> None:
    """What the other ranks do: fill in file after file, until the first rank is done."""
    while True:
        name, said = _said([None, None], layout)
        if name is None and said is None:
            return
        if name is None:
            raise RankError(f"{OP}: rank {layout.first} failed: {said}", [layout.first])
        path, start = said
        _filled(slices.tensors.get(name, {}), Path(path), start, layout)


def _said(message: list[Any], layout: Layout) -> list[Any]:
    """What the first rank of the mesh says to all of it."""
    for group in (layout.dp_group, layout.tp_group):  # to the first of every copy, which pass it on
        if group is not None and group.size() > 1:
            dist.broadcast_object_list(message, group=group, group_src=0)
    return message


def _filled(slices: Mapping[str, Stored], path: Path, start: int, layout: Layout) -> None:
    """Write this rank's ranges of a file, and wait for the others.

    Raises:
        RankError: another rank failed.
    """
    failure: Exception | None = None
    try:
        if layout.dp_group is None or layout.dp_group.rank() == 0:
            with open(path, "r+b") as file:
                _fill(file, slices, start, layout)
                sync(file)
    except Exception as error:
        failure = error
    _together(layout, failure)


def _together(layout: Layout, failure: Exception | None) -> None:
    """Wait for all ranks; where one has failed, raise on all of them."""
    said = everyone((dist.get_rank(), failure and f"{type(failure).__name__}: {failure}"), layout)
    if failure is not None:
        raise failure
    failed = {rank: text for rank, text in sorted(said) if text is not None}
    if failed:
        texts = [f"rank {rank} failed: {text}" for rank, text in failed.items()]
        raise RankError(f"{OP}: {'; '.join(texts)}", [*failed])


def _fill(file: IO[bytes], slices: Mapping[str, Stored], start: int, layout: Layout) -> None:
    for name, t in in_order(slices).items():
        dim, whole = LATENT_DIMS.get(name), _whole(name, t, layout.d_sae)
        if dim is not None or layout.rank == 0:
            step = rows_per_block(t.shape, t.dtype.itemsize)
            for first in range(0, t.shape[0], step):
                rows = t.rows(first, min(first + step, t.shape[0])).cpu()
                block = finite(OP, t.parameter, rows, t.dtype).contiguous()
                _place(file, block, first, start, dim, whole, layout.latents.start)
        start += whole.nbytes


def _place(
    file: IO[bytes],
    block: Tensor,
    first: int,
    start: int,
    dim: int | None,
    whole: Stored,
    latent: int,
) -> None:
    """Write rows `first, first + 1, ...` of a slice that begins at `latent`."""
    columns = whole.nbytes // whole.shape[0]  # bytes of a row of the whole
    flat = block.view(-1).view(torch.uint8)  # by itself a column need not have stride 1
    data = flat.view(len(block), -1).numpy()
    if dim == 1:
        for at, row in enumerate(data, first):
            _write_at(file, row.data, start + at * columns + latent * whole.dtype.itemsize)
    else:
        _write_at(file, data.data, start + (first + (latent if dim == 0 else 0)) * columns)


def _write_at(file: IO[bytes], data: memoryview, offset: int) -> None:
    data, written = data.cast("B"), 0
    while written < data.nbytes:  # at most 2 GiB at a time
        written += os.pwrite(file.fileno(), data[written:], offset + written)


def _whole(name: str, t: Stored, d_sae: int) -> Stored:
    """What the file declares of the tensor of which `t` is a slice."""
    dim, shape = LATENT_DIMS.get(name), list(t.shape)
    if dim is not None:
        shape[dim] = d_sae
    return t._replace(shape=tuple(shape))
