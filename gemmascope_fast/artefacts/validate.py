"""What the tensors of an artefact must be, and the module they make.

Files describe their tensors under Gemma Scope 2's names:

    w_enc [d_in, d_sae]   b_enc [d_sae]   threshold [d_sae]   w_dec [d_sae, d_out]   b_dec [d_out]
    affine_skip_connection [d_in, d_out] (optional, transcoders), applied as x @ A
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from ..checks import FLOATS
from ..modules import SAE, JumpReLU, Transcoder

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
BLOCK_BYTES = 8 << 20  # resident beside the weights while they stream, up to three of them


class Spec(NamedTuple):
    """Declared shape and dtype of a stored tensor; dtype is its name when torch has none."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


@dataclass(frozen=True)
class Sizes:
    """Sizes that every tensor of an artefact agrees on."""

    d_in: int
    d_sae: int
    d_out: int
    affine: bool


class TensorFile(Protocol):
    """A file of named tensors, opened and checked against its declared sizes."""

    path: Path
    specs: dict[str, Spec]

    def blocks(self, name: str) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Pieces of a tensor: where they go, and their values on the CPU."""
        ...

    def default_dtype(self) -> torch.dtype:
        """Dtype of the weights when the caller names none."""
        ...

    def finish(self) -> None:
        """Raise unless everything read came from one intact file."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def check_dtype(op: str, dtype: Any) -> None:
    """A dtype argument is None or one that the ops support."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")


def check_tensors(where: str, specs: Mapping[str, Spec]) -> Sizes:
    """Names, dtypes and shapes fit together.

    Raises:
        ValueError: a tensor is missing, unknown, of another dtype or of another shape.
    """
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
    for name in ("w_enc", "w_dec"):
        if len(specs[name].shape) != 2 or min(specs[name].shape) < 1:
            raise ValueError(
                f"{where}: {name} must be a matrix, no size 0, got shape {specs[name].shape}"
            )
    d_in, d_sae = specs["w_enc"].shape
    d_out = specs["w_dec"].shape[1]
    expected = {"w_dec": (d_sae, d_out), "b_enc": (d_sae,), "threshold": (d_sae,)}
    expected |= {"b_dec": (d_out,), SKIP: (d_in, d_out)}
    for name, shape in expected.items():
        if name in specs and specs[name].shape != shape:
            raise ValueError(
                f"{where}: {name} must have shape {list(shape)} beside w_enc [{d_in}, {d_sae}] and "
                f"w_dec {list(specs['w_dec'].shape)}, got {list(specs[name].shape)}"
            )
    return Sizes(d_in, d_sae, d_out, SKIP in specs)


def agree(where: str, config: Mapping[str, Any], sizes: Sizes) -> None:
    """Config and tensors describe the same dictionary.

    Raises:
        ValueError: width, affine connection or type disagree.
    """
    width, affine = config.get("width"), config.get("affine_connection")
    if width is not None and width != sizes.d_sae:
        raise ValueError(f"{where}: the config's width is {width}, but w_enc has {sizes.d_sae}")
    if affine is not None and affine != sizes.affine:
        found = "a" if sizes.affine else "no"
        raise ValueError(f"{where}: affine_connection is {affine}, but there is {found} {SKIP}")
    if sizes.affine and config["type"] == "sae":
        raise ValueError(f"{where}: type is sae, but only a transcoder has {SKIP}")


def build(
    file: TensorFile,
    sizes: Sizes,
    *,
    transcoder: bool,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> SAE:
    """The module, its parameters streamed from the file.

    Raises:
        ValueError: the matrices differ in dtype and none is asked for, or a value is not finite.
    """
    where = f"load: {file.path}"
    stored = {file.specs[name].dtype for name in MATRICES if name in file.specs}
    if dtype is None and len(stored) > 1:
        names = ", ".join(sorted(map(str, stored)))
        raise ValueError(f"{where}: the matrices have dtypes {names}: choose one by dtype=")
    dtype = file.default_dtype() if dtype is None else dtype
    shape = (sizes.d_in, sizes.d_sae, JumpReLU())
    options: dict[str, Any] = {"d_out": sizes.d_out, "device": "meta", "dtype": dtype}
    if transcoder:
        module: SAE = Transcoder(*shape, affine=sizes.affine, **options)
    else:
        module = SAE(*shape, **options)
    for name in file.specs:
        attribute = PARAMETERS[name]
        like = getattr(module, attribute)  # on meta: shape, strides and dtype, no memory
        weight = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        for index, block in file.blocks(name):
            values, target = finite(where, name, block, weight.dtype), weight[index]
            if target.dim() == 2 and target.stride(0) == 1:  # a transpose: 2x faster in two steps
                target.t().copy_(values.t().contiguous())
            else:
                target.copy_(values)
            del block, values
        setattr(module, attribute, nn.Parameter(weight))
    file.finish()
    return module


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
    low, high = torch.aminmax(t)  # NaN wins, so two values tell; no mask is allocated
    return bool(torch.isfinite(low) & torch.isfinite(high))
