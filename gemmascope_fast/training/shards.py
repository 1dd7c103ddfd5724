"""Activations on disk: safetensors shards beside a JSON manifest, memory-mapped and shuffled.

    folder/manifest.json       {"format": "activation-shards", "version": 1, "d_in": 2304,
                                "d_out": null, "special_tokens": [2, 0], "shards": [
                                {"file": "shard-00000.safetensors", "rows": 262144}, ...]}
    folder/shard-*.safetensors x [rows, d_in]; optional: target [rows, d_out], mask [rows],
                               tokens [rows] (rows of special tokens are left out)

Of several layers the manifest has `"layers": L` and d_in = L * d; x and target are [rows, L, d].

A pass over the folder shuffles runs of `CHUNK` consecutive rows, so that reads stay long; a block
is the next `block_rows` of them, shuffled row by row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..arguments import check_count
from .rows import Array, from_numpy, kept_rows
from .shard_format import FORMAT, MANIFEST, ROWS, VERSION, check_part, check_shard, read_manifest
from .sources import Block, Source, generator

CHUNK = 1024
"""Consecutive rows that stay together until the shuffle inside a block: 4.5 MiB at width 1152."""
SPREAD = 4
"""Runs per rank from which on ranks read runs of their own: their batches differ little in size."""


@dataclass(frozen=True)
class _Chunk:
    shard: int
    start: int
    stop: int


class ShardSource(Source):
    """Activations of a folder that `write_shards` wrote, or one of the same format.

    Args:
        folder: holds the manifest and the shards.
        block_rows: rows held in memory at once, >= 1; the larger, the better the shuffle.

    Raises:
        OSError: a file is missing or cannot be read.
        TypeError: `block_rows` is not an int.
        ValueError: the manifest or a shard does not have the format.
    """

    def __init__(self, folder: str | os.PathLike[str], *, block_rows: int = 1 << 18) -> None:
        check_count("train", "block_rows", block_rows)
        if block_rows < 1:
            raise ValueError(f"train: block_rows must be >= 1, got {block_rows}")
        self._folder = Path(folder)
        self._manifest, self._digest = read_manifest(self._folder)
        self.d_in, self.d_out = self._manifest["d_in"], self._manifest["d_out"]
        self.layers = self._manifest["layers"]
        self._special = torch.tensor(
            self._manifest["special_tokens"], dtype=torch.int64, device="cpu"
        )
        self._files = [self._folder / shard["file"] for shard in self._manifest["shards"]]
        rows = [shard["rows"] for shard in self._manifest["shards"]]
        if sum(rows) == 0:
            raise ValueError(f"train: {self._folder / MANIFEST} lists no rows")
        self._itemsize = max(
            check_shard(path, count, self._manifest)
            for path, count in zip(self._files, rows, strict=True)
        )
        self._chunks = [
            _Chunk(shard, start, min(start + CHUNK, count))
            for shard, count in enumerate(rows)
            for start in range(0, count, CHUNK)
        ]
        self._rows, self._block_rows = sum(rows), block_rows
        self._per_block = max(block_rows // CHUNK, 1)

    def block(self, seed: int, index: int) -> Block:
        """The next `block_rows` rows of a shuffled pass, read and shuffled."""
        return self._shuffled(seed, index, self._chosen(seed, index), 0, 1)

    def part(self, seed: int, index: int, rank: int, ranks: int) -> Block:
        """Every `ranks`-th run of the block is read by this rank; masks and tokens are by all.

        A block of less than `SPREAD` runs per rank is read by every rank.
        """
        chosen = self._chosen(seed, index)
        if len(chosen) < SPREAD * ranks:
            return super().part(seed, index, rank, ranks)
        return self._shuffled(seed, index, chosen, rank, ranks)

    def place(self, seed: int, index: int, row: int, share: tuple[int, int] = (0, 1)) -> str:
        """The shard and the row of it."""
        chosen, (rank, ranks) = self._chosen(seed, index), share
        for chunk in chosen[rank::ranks] if len(chosen) >= SPREAD * ranks else chosen:
            if row < chunk.stop - chunk.start:
                return f"row {chunk.start + row} of {self._files[chunk.shard].name}"
            row -= chunk.stop - chunk.start
        return super().place(seed, index, row, share)

    def identity(self) -> dict[str, Any]:
        """Digest of the manifest; a change inside a shard of the same size is not seen."""
        return {"kind": "shards", "digest": self._digest, "block_rows": self._block_rows}

    def held_bytes(self, device: torch.device) -> int:
        """One block, the parts it is put together from, and its order."""
        rows = min(self._per_block * CHUNK, self._rows)
        width = self.d_in + (self.d_out or 0)
        return rows * (width * self._itemsize + 16) if device.type == "cpu" else 0

    def _chosen(self, seed: int, index: int) -> list[_Chunk]:
        """The runs of rows of a block, in the order of the shards."""
        per_pass = -(-len(self._chunks) // self._per_block)
        passes, part = divmod(index, per_pass)
        order = torch.randperm(
            len(self._chunks), generator=generator(seed, "pass", passes), device="cpu"
        )
        chosen = order[part * self._per_block : (part + 1) * self._per_block].sort().values
        return [self._chunks[at] for at in chosen.tolist()]

    def _shuffled(
        self, seed: int, index: int, chosen: list[_Chunk], rank: int, ranks: int
    ) -> Block:
        own = [at % ranks == rank for at in range(len(chosen))]
        x, target, kept = self._read(chosen, own)
        shuffle = torch.randperm(len(kept), generator=generator(seed, "block", index), device="cpu")
        return Block(x, target, kept[shuffle])

    def _read(self, chunks: list[_Chunk], own: list[bool]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows of the `own` chunks, and of all which are kept: rows of x, -1 if not our own."""
        rows = sum(c.stop - c.start for c, ours in zip(chunks, own, strict=True) if ours)
        held: dict[str, Tensor] = {}
        kept, at, ours = [], 0, dict(zip(chunks, own, strict=True))
        for shard in dict.fromkeys(chunk.shard for chunk in chunks):
            with torch.device("cpu"), safe_open(self._files[shard], framework="pt") as file:
                names = set(file.keys())
                for chunk in (c for c in chunks if c.shard == shard):
                    span, count = slice(chunk.start, chunk.stop), chunk.stop - chunk.start
                    wanted = ROWS if ours[chunk] else ROWS[2:]
                    part = {name: file.get_slice(name)[span] for name in wanted if name in names}
                    if not ours[chunk]:
                        kept.append(torch.full_like(self._kept(part, count), -1))
                        continue
                    for name in ("x", "target")[: 1 if self.d_out is None else 2]:
                        read = part[name].flatten(1)
                        if name not in held:
                            held[name] = read.new_empty(rows, read.shape[1])
                        held[name][at : at + count] = read
                    kept.append(self._kept(part, count) + at)
                    at += count
        return held["x"], held.get("target"), torch.cat(kept)

    def _kept(self, part: Mapping[str, Tensor], rows: int) -> Tensor:
        keep = torch.ones(rows, dtype=torch.bool, device="cpu")
        if "mask" in part:
            keep &= part["mask"] != 0
        if "tokens" in part:
            keep &= ~torch.isin(part["tokens"].long(), self._special)
        return kept_rows(keep, rows)


def write_shards(
    folder: str | os.PathLike[str],
    parts: Iterable[Array | Mapping[str, Array]],
    *,
    special_tokens: Iterable[int] = (),
) -> ShardSource:
    """Write activations as one shard per part, the manifest last.

    Args:
        folder: made if missing; must not hold a manifest.
        parts: each `x [rows, d_in]`, or a mapping with `x` and, as wanted, `target [rows, d_out]`,
            `mask [rows]`, `tokens [rows]`; the same keys and widths in every part. Of several
            layers x and target are `[rows, L, d]`. Tensors, or arrays of numpy.
        special_tokens: ids (BOS, EOS, PAD, image positions) whose rows are left out in training.

    Returns:
        The source that reads the folder.

    Raises:
        FileExistsError: the folder has a manifest.
        OSError: the file system refuses.
        ValueError: there is no part, or parts do not fit together.
    """
    root = Path(folder)
    if (root / MANIFEST).exists():
        raise FileExistsError(f"write_shards: {root / MANIFEST} exists: choose another folder")
    root.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    widths: tuple[Any, ...] | None = None
    for number, part in enumerate(parts):
        named = part if isinstance(part, Mapping) else {"x": part}
        tensors = {key: from_numpy(t) for key, t in named.items()}
        found = check_part(number, tensors)
        if widths is not None and widths != found:
            raise ValueError(
                f"write_shards: part {number} must be like part 0, {_said(widths)}; got "
                f"{_said(found)}"
            )
        widths = found
        name = f"shard-{number:05d}.safetensors"
        contiguous = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
        try:
            save_file(contiguous, root / name)
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"write_shards: {root / name} was not written: {error}") from error
        shards.append({"file": name, "rows": tensors["x"].shape[0]})
    if widths is None:
        raise ValueError("write_shards: parts must hold at least one part")
    manifest = {"format": FORMAT, "version": VERSION, "d_in": widths[0], "d_out": widths[1]}
    if widths[2] is not None:
        manifest["layers"] = widths[2]
    text = json.dumps({**manifest, "special_tokens": list(special_tokens), "shards": shards})
    temporary = root / f".{MANIFEST}.{os.getpid()}.tmp"
    temporary.write_text(text)
    os.replace(temporary, root / MANIFEST)
    return ShardSource(root)


def _said(part: tuple[Any, ...]) -> str:
    """What `check_part` found, in words."""
    d_in, d_out, layers, names = part
    return f"d_in={d_in}, d_out={d_out}, layers={layers}, tensors {', '.join(names)}"
