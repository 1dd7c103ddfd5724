"""Activations on disk: safetensors shards beside a JSON manifest, memory-mapped and shuffled.

    folder/manifest.json       {"format": "activation-shards", "version": 1, "d_in": 2304,
                                "d_out": null, "special_tokens": [2, 0], "shards": [
                                {"file": "shard-00000.safetensors", "rows": 262144}, ...]}
    folder/shard-*.safetensors x [rows, d_in]; optional: target [rows, d_out], mask [rows],
                               tokens [rows] (rows of special tokens are left out)

A pass over the folder shuffles runs of `CHUNK` consecutive rows, so that reads stay long; a block
is the next `block_rows` of them, shuffled row by row.
"""

from __future__ import annotations

import hashlib
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
from .sources import Block, Source, generator, kept_rows

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 64 << 20  # bytes
FORMAT, VERSION = "activation-shards", 1
CHUNK = 1024
"""Consecutive rows that stay together until the shuffle inside a block: 4.5 MiB at width 1152."""
SPREAD = 4
"""Runs per rank from which on ranks read runs of their own: their batches differ little in size."""
FLOAT_CODES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


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
        self._manifest, self._digest = _read_manifest(self._folder)
        self.d_in, self.d_out = self._manifest["d_in"], self._manifest["d_out"]
        self._special = torch.tensor(
            self._manifest["special_tokens"], dtype=torch.int64, device="cpu"
        )
        self._files = [self._folder / shard["file"] for shard in self._manifest["shards"]]
        rows = [shard["rows"] for shard in self._manifest["shards"]]
        if sum(rows) == 0:
            raise ValueError(f"train: {self._folder / MANIFEST} lists no rows")
        self._itemsize = max(
            _check_shard(path, count, self.d_in, self.d_out)
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
                    wanted = _ROWS if ours[chunk] else _ROWS[2:]
                    part = {name: file.get_slice(name)[span] for name in wanted if name in names}
                    if not ours[chunk]:
                        kept.append(torch.full_like(self._kept(part, count), -1))
                        continue
                    for name in ("x", "target")[: 1 if self.d_out is None else 2]:
                        if name not in held:
                            held[name] = part[name].new_empty(rows, part[name].shape[1])
                        held[name][at : at + count] = part[name]
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


_ROWS = ("x", "target", "mask", "tokens")


def write_shards(
    folder: str | os.PathLike[str],
    parts: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    special_tokens: Iterable[int] = (),
) -> ShardSource:
    """Write activations as one shard per part, the manifest last.

    Args:
        folder: made if missing; must not hold a manifest.
        parts: each `x [rows, d_in]`, or a mapping with `x` and, as wanted, `target [rows, d_out]`,
            `mask [rows]`, `tokens [rows]`; the same keys and widths in every part.
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
        tensors = {"x": part} if isinstance(part, Tensor) else dict(part)
        found = _check_part(number, tensors)
        if widths is not None and widths != found:
            raise ValueError(f"write_shards: part {number} must be like part 0, {widths}: {found}")
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
    text = json.dumps({**manifest, "special_tokens": list(special_tokens), "shards": shards})
    temporary = root / f".{MANIFEST}.{os.getpid()}.tmp"
    temporary.write_text(text)
    os.replace(temporary, root / MANIFEST)
    return ShardSource(root)


def _check_part(number: int, tensors: Mapping[str, Tensor]) -> tuple[int, int | None, list[str]]:
    x = tensors.get("x")
    if x is None or x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"write_shards: part {number} must have a floating-point x [rows, d_in]")
    unknown = set(tensors) - set(_ROWS)
    if unknown:
        raise ValueError(f"write_shards: part {number} has unknown keys {sorted(unknown)}")
    for name, t in tensors.items():
        if t.shape[0] != x.shape[0] or t.dim() != (2 if name in ("x", "target") else 1):
            raise ValueError(
                f"write_shards: {name} of part {number} must have {x.shape[0]} rows, got shape "
                f"{tuple(t.shape)}"
            )
    target = tensors.get("target")
    return x.shape[1], None if target is None else target.shape[1], sorted(tensors)


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"train: source must be a folder of shards with a {MANIFEST}, there is none in {folder}"
        )
    if path.stat().st_size > MANIFEST_LIMIT:
        raise ValueError(f"train: {path} must be at most {MANIFEST_LIMIT} bytes")
    text = path.read_bytes()
    try:
        read = json.loads(text)
    except ValueError as error:
        raise ValueError(f"train: {path} is not JSON: {error}") from error
    if not isinstance(read, dict) or (read.get("format"), read.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"train: {path} must have format {FORMAT!r}, version {VERSION}")
    read.setdefault("special_tokens", [])
    read.setdefault("d_out", None)
    valid = _size(read.get("d_in")) and (read["d_out"] is None or _size(read["d_out"]))
    special, shards = read["special_tokens"], read.get("shards")
    valid = valid and isinstance(special, list) and all(type(i) is int for i in special)
    valid = valid and isinstance(shards, list) and all(map(_valid_shard, shards))
    if not valid:
        raise ValueError(
            f"train: {path} must have d_in, d_out (or null), special_tokens (ids) and shards, "
            'each {"file": a name in the folder, "rows": a number}'
        )
    return read, hashlib.sha256(text).hexdigest()


def _size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _valid_shard(shard: Any) -> bool:
    if not isinstance(shard, dict) or not isinstance(name := shard.get("file"), str):
        return False
    rows = shard.get("rows")
    return Path(name).name == name and type(rows) is int and rows >= 0


def _check_shard(path: Path, rows: int, d_in: int, d_out: int | None) -> int:
    """Compare the header of a shard with the manifest; return the bytes of an element."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"train: {path} must be a regular file")
    wanted = {"x": [rows, d_in]} | ({} if d_out is None else {"target": [rows, d_out]})
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                shape = wanted.pop(name, [rows] if name in ("mask", "tokens") else None)
                if shape is not None and part.get_shape() != shape:
                    raise ValueError(
                        f"train: {name} of {path} must have shape {shape}, got {part.get_shape()}"
                    )
                if name in ("x", "target") and part.get_dtype() not in FLOAT_CODES:
                    raise ValueError(f"train: {name} of {path} must be floating point")
            itemsize = FLOAT_CODES[file.get_slice("x").get_dtype()] if "x" not in wanted else 0
    except SafetensorError as error:
        raise ValueError(f"train: {path} is not a safetensors file: {error}") from error
    if wanted:
        raise ValueError(f"train: {path} lacks {', '.join(sorted(wanted))}")
    return itemsize
