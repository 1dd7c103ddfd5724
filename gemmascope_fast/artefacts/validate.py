"""What the tensors of an artefact must be.

Files describe their tensors under Gemma Scope 2's names:

    w_enc [d_in, d_sae]   b_enc [d_sae]   threshold [d_sae]   w_dec [d_sae, d_out]   b_dec [d_out]
    affine_skip_connection [d_in, d_out] (optional, transcoders), applied as x @ A

Source layer i of L of a crosscoder or a CLT has the same names in a file of its own, with
`w_dec [d_sae, L, d]` over the absolute output layers, `b_dec [d]` of output layer i, d_in = d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..checks import FLOATS

SKIP = "affine_skip_connection"
PARAMETERS = {  # name in the file: name in the module
    "w_enc": "W_enc",
    "w_dec": "W_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "threshold",
    SKIP: "W_skip",
}
MATRICES = ("w_enc", "w_dec", SKIP)
BLOCK_BYTES = 2 << 20  # resident beside the weights while they stream, up to four of them
NOMINAL = 100  # a width over several layers is nominal: F was rounded down, by less than a 100th


class Spec(NamedTuple):
    """Declared shape and dtype of a stored tensor; dtype is its name when torch has none."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


@dataclass(frozen=True)
class Sizes:
    """Sizes that every tensor of an artefact agrees on.

    `n_layers` is None for a single-layer artefact; else d_sae is per source layer.
    """

    d_in: int
    d_sae: int
    d_out: int
    affine: bool
    n_layers: int | None = None


Region = tuple[slice, ...]
"""The part of a tensor from `start` to `stop` of each dimension."""


class TensorFile(Protocol):
    """A file of named tensors, opened and checked against its declared sizes."""

    path: Path
    specs: dict[str, Spec]

    def blocks(self, name: str, region: Region) -> Iterator[tuple[Region, Tensor]]:
        """Pieces of a region: where they go in it, and their values until the next one."""
        ...

    def default_dtype(self) -> torch.dtype:
        """Dtype of the weights when the caller names none."""
        ...

    def finish(self) -> None:
        """Raise unless everything read came from one intact file."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


def check_dtype(op: str, dtype: Any) -> None:
    """A dtype argument is None or one that the ops support."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")


def check_tensors(where: str, specs: Mapping[str, Spec]) -> Sizes:
    """Names, dtypes and shapes of a single-layer artefact fit together.

    Raises:
        ValueError: a tensor is missing, unknown, of another dtype or of another shape.
    """
    _check_names(where, specs)
    _check_matrices(where, specs, {"w_enc": 2, "w_dec": 2})
    d_in, d_sae = specs["w_enc"].shape
    d_out = specs["w_dec"].shape[1]
    _check_shapes(where, specs, {"w_dec": (d_sae, d_out), "b_dec": (d_out,), SKIP: (d_in, d_out)})
    return Sizes(d_in, d_sae, d_out, SKIP in specs)


def check_layer(where: str, specs: Mapping[str, Spec]) -> Sizes:
    """Names, dtypes and shapes of one source layer of a crosscoder or CLT fit together.

    Raises:
        ValueError: a tensor is missing, unknown, of another dtype or of another shape.
    """
    _check_names(where, specs)
    _check_matrices(where, specs, {"w_enc": 2, "w_dec": 3})
    d, d_sae = specs["w_enc"].shape
    n_layers = specs["w_dec"].shape[1]
    _check_shapes(where, specs, {"w_dec": (d_sae, n_layers, d), "b_dec": (d,), SKIP: (d, d)})
    return Sizes(d, d_sae, d, SKIP in specs, n_layers)


def check_alike(files: Sequence[TensorFile]) -> None:
    """The files of all source layers hold tensors of the same shapes and dtypes.

    Raises:
        ValueError: two differ.
    """
    first = files[0]
    for file in files:
        for name in PARAMETERS:
            ours, theirs = file.specs.get(name), first.specs.get(name)
            if ours != theirs:
                raise ValueError(
                    f"load: {file.path}: {name} must be as in {first.path.name}, "
                    f"{_spelled(theirs)}, got {_spelled(ours)}: the layers do not belong together"
                )


def _spelled(spec: Spec | None) -> str:
    return "none" if spec is None else f"{list(spec.shape)} of {spec.dtype}"


def _check_names(where: str, specs: Mapping[str, Spec]) -> None:
    """All tensors of the format, no others, floating point."""
    missing = [name for name in PARAMETERS if name not in specs and name != SKIP]
    unknown = sorted(name for name in specs if name not in PARAMETERS)
    if missing or unknown:
        got = ", ".join(sorted(specs)[:10])[:200]
        fault = f"lacks {', '.join(missing)}" if missing else f"has unknown {unknown[0]!r:.80}"
        raise ValueError(
            f"{where}: the tensors must be {', '.join(PARAMETERS)} (the last optional); the file "
            f"{fault}; it holds: {got}"
        )
    for name, spec in specs.items():
        if spec.dtype not in FLOATS:
            raise ValueError(
                f"{where}: {name} must be floating point, 16 bits or more, got {spec.dtype}"
            )


def _check_matrices(where: str, specs: Mapping[str, Spec], dims: Mapping[str, int]) -> None:
    """Numbers of dimensions, none of them empty."""
    for name, count in dims.items():
        if len(specs[name].shape) != count or min(specs[name].shape) < 1:
            kind = "a matrix" if count == 2 else f"of {count} dimensions [d_sae, n_layers, d]"
            raise ValueError(
                f"{where}: {name} must be {kind}, no size 0, got shape {specs[name].shape}"
            )


def _check_shapes(
    where: str, specs: Mapping[str, Spec], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Every tensor has the shape that goes with `w_enc` and `w_dec`."""
    d_in, d_sae = specs["w_enc"].shape
    for name, shape in {"b_enc": (d_sae,), "threshold": (d_sae,), **expected}.items():
        if name in specs and specs[name].shape != shape:
            raise ValueError(
                f"{where}: {name} must have shape {list(shape)} beside w_enc [{d_in}, {d_sae}] and "
                f"w_dec {list(specs['w_dec'].shape)}, got {list(specs[name].shape)}"
            )


def agree(where: str, config: Mapping[str, Any], sizes: Sizes) -> None:
    """Config and tensors describe the same dictionary.

    Raises:
        ValueError: width, affine connection or type disagree.
    """
    width, affine, kind = config.get("width"), config.get("affine_connection"), config["type"]
    layers = 1 if sizes.n_layers is None else sizes.n_layers
    slack = 0 if width is None or sizes.n_layers is None else width // NOMINAL
    if width is not None and not 0 <= width - layers * sizes.d_sae <= slack:
        found = f"w_enc has {sizes.d_sae}"
        found += "" if sizes.n_layers is None else f" in each of {layers} files"
        raise ValueError(f"{where}: the config's width is {width}, but {found}")
    if affine is not None and affine != sizes.affine:
        found = "a" if sizes.affine else "no"
        raise ValueError(f"{where}: affine_connection is {affine}, but there is {found} {SKIP}")
    if sizes.affine and kind in ("sae", "crosscoder"):
        raise ValueError(f"{where}: type is {kind}, but only a transcoder or clt has {SKIP}")


def weights_dtype(files: Sequence[TensorFile], dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that the matrices get.

    Raises:
        ValueError: the matrices differ in dtype and none is asked for.
    """
    if dtype is not None:
        return dtype
    specs = files[0].specs  # as those of the others
    stored = {specs[name].dtype for name in MATRICES if name in specs}
    if len(stored) > 1:
        names = ", ".join(sorted(map(str, stored)))
        raise ValueError(
            f"load: {files[0].path}: the matrices have dtypes {names}: choose one by dtype="
        )
    return files[0].default_dtype()


def latent_range(latents: Any, d_sae: int) -> slice:
    """The latents from `start` to `stop` that a caller asks for; all of them for None.

    Raises:
        TypeError: `latents` is no slice of ints.
        ValueError: the slice is empty, has a step, or leaves the dictionary.
    """
    if latents is None:
        return slice(0, d_sae)
    if not isinstance(latents, slice):
        raise TypeError(f"load: latents must be a slice or None, got {type(latents).__name__}")
    ends = (latents.start, latents.stop, latents.step)
    if any(isinstance(end, bool) or not isinstance(end, (int, type(None))) for end in ends):
        raise TypeError(f"load: latents must be a slice of ints, got {latents}")
    start = 0 if latents.start is None else latents.start
    stop = d_sae if latents.stop is None else latents.stop
    if latents.step not in (None, 1) or not 0 <= start < stop <= d_sae:
        raise ValueError(
            f"load: latents must be slice(start, stop) with 0 <= start < stop <= d_sae={d_sae} "
            f"and no step, got {latents}"
        )
    return slice(start, stop)


def finite(where: str, name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """`block` as `dtype`.

    Raises:
        ValueError: it holds NaN or infinity, or its range exceeds that of `dtype`.
    """
    cast = block.to(dtype)
    if not _all_finite(cast):
        if _all_finite(block):
            raise ValueError(f"{where}: {name} has values beyond the range of {dtype}")
        raise ValueError(f"{where}: {name} must be finite, and holds NaN or infinity")
    return cast


def rows_per_block(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows of a block: about `BLOCK_BYTES`, at least 16 so that a transposed copy fills lines."""
    row = itemsize * math.prod(shape[1:])
    return max(16, BLOCK_BYTES // row)


def _all_finite(t: Tensor) -> bool:
    if t.numel() == 0:
        return True
    low, high = torch.aminmax(t)  # NaN wins, so two values tell; no mask is allocated
    return bool(torch.isfinite(low) & torch.isfinite(high))
