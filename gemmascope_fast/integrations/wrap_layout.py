"""Where a home-made module keeps its weights: attribute paths, and which side is which."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from ..arguments import check_count

EncoderLayout = Literal["[d_in, d_sae]", "[d_sae, d_in]"]
DecoderLayout = Literal["[d_sae, d_out]", "[d_out, d_sae]"]
LAYOUTS = {
    "encoder": ("[d_in, d_sae]", "[d_sae, d_in]"),
    "decoder": ("[d_sae, d_out]", "[d_out, d_sae]"),
}
"""As the ops take a matrix, and transposed."""


def at(module: nn.Module, name: str, path: Any) -> Any:
    """What an attribute path leads to."""
    if not isinstance(path, str):
        raise TypeError(f"wrap: {name} must be an attribute path, got {type(path).__name__}")
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise AttributeError(
                f"wrap: {name}={path!r}: {type(found).__name__} has no attribute {part!r}"
            )
        found = getattr(found, part)
    return found


def weight_of(layer: Any) -> Tensor:
    """The matrix of a layer, or the matrix itself."""
    return layer.weight if isinstance(layer, nn.Linear) else layer


def check_tensors(matrices: dict[str, Any], vectors: dict[str, Any]) -> None:
    """The paths lead to matrices and vectors, and no bias is named twice."""
    for name, layer in matrices.items():
        weight = weight_of(layer)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
            raise TypeError(
                f"wrap: {name} must lead to an nn.Linear or a floating-point matrix, got "
                f"{tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__}"
            )
        named = vectors.get(f"{name}_bias")
        if isinstance(layer, nn.Linear) and layer.bias is not None and named is not None:
            raise ValueError(
                f"wrap: {name}_bias must not be given: the nn.Linear at {name} has a bias"
            )
    for name, vector in vectors.items():
        if not isinstance(vector, Tensor) or not vector.is_floating_point() or vector.dim() != 1:
            raise TypeError(
                f"wrap: {name} must lead to a floating-point vector, got "
                f"{tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__}"
            )


def latents_of(matrices: dict[str, Any], vectors: dict[str, Any], given: int | None) -> int | None:
    """The number of latents, from whatever names it; None where only shapes are known."""
    if given is not None:
        return int(check_count("wrap", "d_sae", given))
    for name in ("threshold", "encoder_bias"):
        if name in vectors:
            return int(vectors[name].shape[0])
    encoder, decoder = matrices["encoder"], matrices["decoder"]
    if isinstance(encoder, nn.Linear):
        return encoder.out_features
    if isinstance(decoder, nn.Linear):
        return decoder.in_features
    shared = set(encoder.shape) & set(decoder.shape)
    if "decoder_bias" in vectors and len(shared) == 2:
        shared -= {vectors["decoder_bias"].shape[0]}
    return int(shared.pop()) if len(shared) == 1 else None


def transposed(name: str, layer: Any, layout: Any, latents: int | None) -> bool:
    """Whether a matrix is stored as the transpose of `[d_in, d_sae]` or `[d_sae, d_out]`."""
    layouts = LAYOUTS[name]
    if isinstance(layer, nn.Linear):
        if layout is not None:
            raise ValueError(f"wrap: {name}_layout must not be given: {name} is an nn.Linear")
        return True
    if layout is not None:
        if layout not in layouts:
            raise ValueError(
                f"wrap: {name}_layout must be one of {' or '.join(layouts)}, got {layout!r}"
            )
        return bool(layout == layouts[1])
    shape = tuple(layer.shape)
    if latents is None or shape == (latents, latents):
        why = "is square" if shape[0] == shape[1] else "fits both ways"
        raise ValueError(
            f"wrap: {name} of shape {list(shape)} {why}: pass {name}_layout="
            f"{layouts[0]!r} or {layouts[1]!r}" + ("" if latents else ", or d_sae")
        )
    if latents not in shape:
        raise ValueError(f"wrap: {name} must have a side of d_sae={latents}, got {list(shape)}")
    return bool(shape[0 if name == "encoder" else 1] == latents)
