"""The module that an artefact makes: its parameters, streamed in blocks into their final layout."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import parts
from ..modules import SAE, JumpReLU, Transcoder
from ..multilayer import Crosscoder, CrossLayerTranscoder
from .opening import Artefact
from .validate import PARAMETERS, SKIP, Region, TensorFile, finite

Module = SAE | Crosscoder | CrossLayerTranscoder

VECTORS = ("b_enc", "threshold")


def build(artefact: Artefact, latents: slice, dtype: torch.dtype, device: torch.device) -> Module:
    """The module of these latents, its matrices in `dtype`.

    Raises:
        ValueError: a value is not finite.
    """
    make = _single if artefact.sizes.n_layers is None else _layered
    module = make(artefact, latents, dtype, device)
    artefact.finish()
    return module


def region(file: TensorFile, name: str, latents: slice) -> Region:
    """The part of a tensor that belongs to these latents."""
    whole = [slice(0, size) for size in file.specs[name].shape]
    axis = {"w_enc": 1, "w_dec": 0, "b_enc": 0, "threshold": 0}.get(name)
    if axis is not None:
        whole[axis] = latents
    return tuple(whole)


def read(weight: Tensor, file: TensorFile, name: str, latents: slice) -> Tensor:
    """Fill `weight` from the file.

    Raises:
        ValueError: a value is not finite.
    """
    for index, block in file.blocks(name, region(file, name, latents)):
        _place(weight[index], file, name, block)
        if name == "threshold" and bool((block < 0).any()):
            warnings.warn(
                f"load: {file.path}: threshold has negative values, by which latents are active "
                "below 0",
                stacklevel=2,
            )
    return weight


def empty_encoder(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`W_enc [d_in, d_sae]`, one contiguous row of memory per latent."""
    return torch.empty(shape[::-1], dtype=dtype, device=device).t()


def vectors_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of biases and threshold beside matrices of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _place(target: Tensor, file: TensorFile, name: str, block: Tensor) -> None:
    values = finite(f"load: {file.path}", name, block, target.dtype)
    if target.dim() == 2 and target.stride(0) == 1:  # a transpose: 2x faster in two steps
        target.t().copy_(values.t().contiguous())
    else:
        target.copy_(values)


def _single(artefact: Artefact, latents: slice, dtype: torch.dtype, device: torch.device) -> SAE:
    """An SAE or a transcoder."""
    (file,), sizes = artefact.files, artefact.sizes
    shape = (sizes.d_in, latents.stop - latents.start, artefact.activation)
    options: dict[str, Any] = {"d_out": sizes.d_out, "device": "meta", "dtype": dtype}
    options["semantics"] = artefact.semantics
    with parts():
        if artefact.config["type"] == "transcoder":
            module: SAE = Transcoder(*shape, affine=sizes.affine, **options)
        else:
            module = SAE(*shape, **options)
    for name in file.specs:
        like = getattr(module, PARAMETERS[name])  # on meta: shape, strides and dtype, no memory
        weight = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        setattr(module, PARAMETERS[name], nn.Parameter(read(weight, file, name, latents)))
    return module


def _layered(
    artefact: Artefact, latents: slice, dtype: torch.dtype, device: torch.device
) -> Crosscoder | CrossLayerTranscoder:
    """A crosscoder or a CLT, the zero outputs of its decoders left out."""
    sizes, F = artefact.sizes, latents.stop - latents.start
    narrow: dict[str, Any] = {"dtype": vectors_dtype(dtype), "device": device}
    found: dict[str, list[Tensor]] = {PARAMETERS[name]: [] for name in artefact.files[0].specs}
    packed = []
    for layer, file in enumerate(artefact.files):
        W_dec, triangular = _decoder(file, layer, latents, dtype, device)
        W_enc = empty_encoder((sizes.d_in, F), dtype, device)
        found["W_dec"].append(W_dec)
        found["W_enc"].append(read(W_enc, file, "w_enc", latents))
        for name in VECTORS:
            found[name].append(read(torch.empty(F, **narrow), file, name, latents))
        found["b_dec"].append(read(torch.empty(sizes.d_out, **narrow), file, "b_dec", latents))
        if sizes.affine:
            W_skip = torch.empty(sizes.d_in, sizes.d_out, dtype=dtype, device=device)
            found["W_skip"].append(read(W_skip, file, SKIP, latents))
        packed.append(triangular)
    shape = (len(packed), sizes.d_in, F, JumpReLU())
    options: dict[str, Any] = {"packed": packed, "device": "meta", "dtype": dtype}
    if artefact.config["type"] == "clt":
        module: Any = CrossLayerTranscoder(*shape, affine=sizes.affine, **options)
    else:
        module = Crosscoder(*shape, **options)
    module.b_dec = nn.Parameter(torch.stack(found.pop("b_dec")))
    for name, tensors in found.items():
        setattr(module, name, nn.ParameterList(map(nn.Parameter, tensors)))
    return module  # type: ignore[no-any-return]


def _decoder(
    file: TensorFile, layer: int, latents: slice, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, bool]:
    """`[F, m * d]` of one source layer, and whether the outputs before it are left out.

    They are when all of them are exactly 0, which is known when the last block was read: else the
    file is read again.
    """
    packed = _outputs(file, layer, latents, dtype, device)
    if packed is not None:
        return packed, True
    whole = _outputs(file, 0, latents, dtype, device)
    assert whole is not None
    return whole, False


def _outputs(
    file: TensorFile, first: int, latents: slice, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The decoder's outputs from `first` on, or None if one before it is not 0."""
    _, layers, d = file.specs["w_dec"].shape
    shape = (latents.stop - latents.start, layers - first, d)
    weight = torch.empty(shape, dtype=dtype, device=device)
    for index, block in file.blocks("w_dec", region(file, "w_dec", latents)):
        if bool(block[:, :first].any()):
            return None
        _place(weight[index[0]], file, "w_dec", block[:, first:])
    return weight.flatten(1)
