"""`gsf.estimate_memory`: the most memory that a training run takes, from its sizes alone.

    peak = weights + max over phases of what the phase holds besides

with the phases statistics, start (calibration), step, and resume. Bytes of a step: the optimizer's
state, the gradients' buffers (none in a fused step), a few `[n, d]` matrices, and either the stored
entries of a block or, while the support is dense, the tiles of the dense path. Data that the caller
holds, and Python with its libraries, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import as_device, check_count
from ..packing import screened_width
from ..reference import MOMENT_BLOCK
from .calibration import ROWS, TILE_BYTES
from .preset import find_preset
from .settings import Settings, prefixes

OP = "estimate_memory"
GIB = 1 << 30
OPTIONS = {
    *("preset", "rows", "moments", "fused", "init_l0", "matryoshka", "kind", "affine", "dtype"),
    *("autocast", "precision", "layers"),
}
BATCH_COPIES, ROW_COPIES, GROUP_COPIES, AUX_COPIES = 1, 4, 6, 5
"""Matrices that exist at once, for x and as many for the target: of the batch; of a block of rows,
reconstruction, error, gradient and what the allocator keeps of freed ones; for every prefix of a
Matryoshka run but the whole; and for AuxK. Measured."""

LARGE_BYTES, LARGE_COPIES, LARGE_APART, LARGE_WIDENED = 32 << 20, 1.75, 0.25, 0.75
"""glibc returns a freed matrix from this size on at once: then so many of a block, and so many more
where the target is not x, and where it is widened from 16 bits. Measured."""

REFERENCE_COPIES, REFERENCE_TILES = 6, 4
"""What the reference, which serves float64, holds of a matrix of weights in the optimizer's step,
and of `[n, d_sae]` where a TopK or BatchTopK has to be dense. Measured."""

MARGIN, MARGIN_BYTES = 0.02, 8 << 20
"""What allocators hold beyond what was asked for: a share, and a constant. Measured."""

EARLY_SURPLUS = 1.3
"""Largest L0 of early training over that of the calibrated start, measured."""

DEAD_SHARE = 1 / 2
"""Share of latents that AuxK may find dead at once. It holds their weights and gradients; a run in
which more die takes more."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training run at its peak.

    Attributes:
        weights: parameters.
        source: what the source holds beside the caller's tensors.
        phases: by name, what is held besides, part by part.
    """

    weights: int
    source: int
    phases: dict[str, dict[str, int]]

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak_bytes(self) -> int:
        """Upper bound of the bytes held at any time."""
        held = self.weights + self.source + sum(self.phases[self.worst].values())
        return int(held * (1 + MARGIN)) + MARGIN_BYTES

    def __str__(self) -> str:
        held = {"weights": self.weights, "source": self.source} | self.phases[self.worst]
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items() if size)
        return f"{self.peak_bytes / GIB:.2f} GiB at its peak ({self.worst}): {parts}"


def estimate_memory(
    *,
    d_in: int,
    d_sae: int,
    batch_size: int = 4096,
    d_out: int | None = None,
    steps: int = 1_000_000,
    activation: str = "jumprelu",
    target_l0: float | None = None,
    k: float | None = None,
    device: torch.device | str = "cpu",
    source_bytes: int = 0,
    resume: bool = False,
    **options: Any,
) -> MemoryEstimate:
    """Upper bound of the memory that `train` takes with the same arguments.

    `peak_bytes` is the sum of weights, optimizer state and the largest phase: calibration at the
    start, a training step (the densest, in early training), or reading a checkpoint.

    Args:
        d_in: width of x, of each layer.
        d_sae: number of latents, of each layer.
        batch_size: tokens per step.
        d_out: width of a transcoder's target; default `d_in`.
        steps: of the run.
        activation: as for `train`.
        target_l0: as for `train`; default 100 for jumprelu.
        k: as for `train`; default 100 for topk and batchtopk.
        device: where it trains.
        source_bytes: that the source holds on that device, beside tensors of the caller.
        resume: whether a checkpoint may be read on the way.
        options: `layers`, the number of those of a crosscoder or CLT, and other arguments of
            `train`: preset, rows, moments, fused, init_l0, matryoshka, kind, affine, dtype,
            autocast, precision.

    Returns:
        The estimate; printing it names the parts.

    Raises:
        TypeError: an argument has the wrong type, or is none of `train`'s.
        ValueError: an argument is out of range.
    """
    place = as_device(OP, device)
    check_count(OP, "d_sae", d_sae)
    check_count(OP, "source_bytes", source_bytes)
    if activation == "jumprelu":
        target_l0 = min(100.0, d_sae / 2) if target_l0 is None else target_l0
    elif k is None:
        k = min(100, d_sae)
    unknown = set(options) - OPTIONS
    if unknown:
        raise TypeError(f"{OP}: unknown arguments {', '.join(sorted(unknown))}")
    given = {name: value for name, value in options.items() if value is not None}
    given["preset"] = find_preset(given.get("preset", "gemma_scope_2"), OP)
    if "matryoshka" in given:
        given["matryoshka"] = prefixes(OP, given["matryoshka"])
    settings = Settings(
        *(d_in, d_in if d_out is None else d_out, d_sae, steps),
        activation=activation,
        target_l0=target_l0,
        k=k,
        batch_size=batch_size,
        op=OP,
        **given,
    )
    return estimate(settings, place, source_bytes, resume)


def estimate(
    settings: Settings, device: torch.device, source_bytes: int, resume: bool
) -> MemoryEstimate:
    """`estimate_memory` of a run's settings."""
    s = settings
    wide, width = max(s.dtype.itemsize, 4), max(widths(s))
    matrix = sum(s.d_sae * (s.d_in + columns) for columns in decoders(s))
    vectors = wide * (2 * s.latents + widths(s)[1]) + 8 * s.latents
    skip = len(decoders(s)) * s.d_in * s.d_out if s.affine else 0
    weights = (matrix + skip) * s.dtype.itemsize + vectors
    moments = optimizer_bytes(s)
    tiles = 2 * min(TILE_BYTES, wide * s.preset.calibration_tokens * s.d_sae)
    start = {
        "sample": 3 * wide * s.preset.calibration_tokens * width,
        "quantiles": tiles if s.start_l0 is not None else 0,
    }
    codes = s.d_sae * (screened_width(s.d_in) + 8)
    kept = s.precision == "screened" and device.type == "cuda"
    step = {"optimizer": moments, "codes": codes * kept} | _step(s, device, matrix + skip, vectors)
    statistics = {"statistics": 4 * 8 * ROWS * width}
    phases = {"statistics": statistics, "start": start, "step": step}
    if resume:  # one matrix of the weights on its way, then the moments as they are read
        phases["resume"] = {"optimizer": moments, "checkpoint": max(moments, weights // 2)}
    return MemoryEstimate(weights, source_bytes, phases)


def decoders(s: Settings) -> list[int]:
    """Columns of each layer's decoder, the causal triangle packed."""
    return [at * s.d_out for at in range(s.layers or 1, 0, -1)]


def widths(s: Settings) -> tuple[int, int]:
    """Of the rows of x and of the target, all layers together."""
    return s.d_in * (s.layers or 1), s.d_out * (s.layers or 1)


def _step(s: Settings, device: torch.device, matrix: int, vectors: int) -> dict[str, int]:
    """What a training step holds at its densest."""
    from .planning import CROSSOVER, DEFAULT_LIMITS, ENTRY_BYTES  # it imports sympy

    wide = max(s.dtype.itemsize, 4)
    spans = s.batch_size if s.activation != "jumprelu" else DEFAULT_LIMITS.span_rows
    rows = min(s.batch_size, spans)
    whole, block = _batch(s, device, rows)
    held = {"batch": whole + block, "vectors": 4 * vectors}
    others = len(s.matryoshka or (s.d_sae,)) - 1
    held["prefixes"] = GROUP_COPIES * others * wide * rows * s.d_out
    largest = matrix if s.layers is None else s.d_sae * (s.d_in + decoders(s)[0])
    cast = s.autocast not in (None, s.dtype)
    held["cast"] = matrix * s.autocast.itemsize if cast and s.autocast is not None else 0
    held["reference"] = _reference(s, largest) if wide == 8 else 0
    density = _density(s)
    crossover = CROSSOVER.get(device.type, 0.0) if wide == 4 else 0.0
    if density > crossover and s.activation == "jumprelu":
        tile = min(DEFAULT_LIMITS.tile_bytes, rows * s.d_sae * wide)
        held["dense tiles"] = 4 * tile  # two of numbers, three of booleans, one of the library's
        held["gradients"] = matrix * wide
        held["widened"] = matrix * wide if s.dtype.itemsize < wide else 0
        if s.layers is not None:  # some of them turn sparse first, and are kept while others go on
            entries = int(rows * crossover * s.latents * ENTRY_BYTES)
            held["entries"] = min(entries, DEFAULT_LIMITS.entry_bytes)
        return held
    entries = int(rows * density * s.latents * ENTRY_BYTES)
    blocks = -(-s.batch_size // rows)
    if s.activation != "batchtopk":
        blocks *= -(-entries // DEFAULT_LIMITS.entry_bytes)
        entries = min(entries, DEFAULT_LIMITS.entry_bytes)
    held["entries"] = entries
    if s.activation != "jumprelu" and s.preset.auxk > 0:
        held["gradients"] = matrix * wide
        held["auxk"] = _auxk(s, matrix, entries)
    elif not s.fused or blocks > 1:
        held["gradients"] = matrix * s.dtype.itemsize
        part = largest * s.dtype.itemsize  # a layer's, which comes when half of its block is gone
        held["a block's gradients"] = 0 if blocks == 1 else max(part - block // 2, 0)
    else:
        held["gradients"] = wide * s.d_in * s.d_out * s.affine * (s.layers or 1)
    return held


def _reference(s: Settings, matrix: int) -> int:
    """What the plain PyTorch of the ops holds, in float64."""
    tiles = 0 if s.activation == "jumprelu" else REFERENCE_TILES * s.batch_size * s.d_sae
    return 8 * (REFERENCE_COPIES * matrix // 2 + tiles)


def _batch(s: Settings, device: torch.device, rows: int) -> tuple[int, int]:
    """Bytes of a batch's matrices, and of those of `rows` of it that are a block."""
    width = max(s.dtype.itemsize, 4) * sum(widths(s))
    large = device.type == "cpu" and width * rows // 2 >= LARGE_BYTES
    batch = BATCH_COPIES * width * s.batch_size
    if not large:
        return batch, ROW_COPIES * width * rows
    apart = s.kind != "sae"  # else x is the target, and is there once
    copies = LARGE_COPIES + LARGE_APART * apart + LARGE_WIDENED * (s.dtype.itemsize < 4)
    return batch if apart else batch // 2, int(copies * width * rows)


def _auxk(s: Settings, matrix: int, entries: int) -> int:
    """What AuxK holds beyond the step's entries: a dictionary of the dead, and its entries."""
    from .planning import DEFAULT_LIMITS, ENTRY_BYTES

    wide = max(s.dtype.itemsize, 4)
    dead = int(DEAD_SHARE * s.d_sae)
    made = s.batch_size * min(s.k_aux, dead) * (s.layers or 1) * ENTRY_BYTES
    made = min(made, DEFAULT_LIMITS.entry_bytes)
    rows = AUX_COPIES * wide * s.batch_size * widths(s)[1]
    return rows + max(made - entries, 0) + int(2 * wide * DEAD_SHARE * matrix)


def _density(s: Settings) -> float:
    """Share of latents that are active on a token, where there are most."""
    if s.activation != "jumprelu":
        assert s.k is not None
        return s.k / s.d_sae
    if s.start_l0 is None:
        return 0.5
    return min(EARLY_SURPLUS * max(s.start_l0, s.target_l0 or 0.0) / s.latents, 1.0)


def optimizer_bytes(s: Settings) -> int:
    """State of Adam: moments (the first only with beta1 > 0), and when each row was touched."""
    wide = max(s.dtype.itemsize, 4)
    first = wide if s.preset.beta1 > 0 else 0
    held = 0
    of_layer = ((s.d_sae, s.d_in), (s.d_in * s.affine, s.d_out))
    of_decoders = ((s.d_sae, columns) for columns in decoders(s))
    for rows, columns in (*of_decoders, *(of_layer * len(decoders(s)))):
        codes = rows * (columns + -(-columns // MOMENT_BLOCK))
        held += 8 * rows + (codes if s.moments == "8bit" else wide * rows * columns)
        held += first * rows * columns
    return held + (wide + first) * (2 * s.latents + widths(s)[1])
