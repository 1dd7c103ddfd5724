"""Numbers about the weights of an artefact, read in blocks: only vectors stay in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..artefacts.building import region
from ..artefacts.opening import Artefact
from ..artefacts.validate import TensorFile


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    min: float
    median: float
    max: float

    @staticmethod
    def of(t: Tensor) -> Spread:
        """Of a vector."""
        return Spread(float(t.min()), float(t.median()), float(t.max()))


@dataclass(frozen=True)
class Layer:
    """Numbers about one file of tensors.

    Attributes:
        encoder: norms of the latents' encoder vectors.
        decoder: norms of their decoder vectors, all outputs of a latent together.
        threshold: None without thresholds.
        negative: thresholds below 0.
        b_enc: of the encoder. b_dec: of the decoder.
        silent: latents whose encoder or decoder vector is 0.
        backwards: decoder elements other than 0 for outputs before the source; 0 for one layer.
        not_finite: the tensors that hold NaN or infinity.
    """

    encoder: Spread
    decoder: Spread
    threshold: Spread | None
    negative: int
    b_enc: Spread
    b_dec: Spread
    silent: int
    backwards: int
    not_finite: list[str]


def layers(artefact: Artefact) -> list[Layer]:
    """Numbers about each file of an artefact."""
    d_sae = artefact.sizes.d_sae
    found = [_layer(file, i, d_sae) for i, file in enumerate(artefact.files)]
    artefact.finish()
    return found


def _layer(file: TensorFile, source: int, d_sae: int) -> Layer:
    whole = slice(0, d_sae)
    sums = {
        name: torch.zeros(d_sae, dtype=torch.float64, device="cpu") for name in ("w_enc", "w_dec")
    }
    vectors = {
        name: torch.zeros(spec.shape, dtype=torch.float64, device="cpu")
        for name, spec in file.specs.items()
        if len(spec.shape) == 1
    }
    not_finite, backwards = [], 0
    for name in file.specs:
        finite = True
        for index, block in file.blocks(name, region(file, name, whole)):
            low, high = torch.aminmax(block)
            finite &= bool(low.isfinite() & high.isfinite())
            if name in vectors:
                vectors[name][index] = block.double()
            elif name in sums:
                axis = 1 if name == "w_enc" else 0
                own = index[axis] if len(index) > axis else slice(None)
                squares = block.double().square()
                sums[name][own] += squares.sum(0) if axis else squares.flatten(1).sum(1)
            if name == "w_dec" and block.dim() == 3:
                backwards += int(block[:, :source].count_nonzero())
        if not finite:
            not_finite.append(name)
    theta = vectors.get("threshold")
    encoder, decoder = sums["w_enc"].sqrt(), sums["w_dec"].sqrt()
    return Layer(
        encoder=Spread.of(encoder),
        decoder=Spread.of(decoder),
        threshold=None if theta is None else Spread.of(theta),
        negative=0 if theta is None else int((theta < 0).sum()),
        b_enc=Spread.of(vectors["b_enc"]),
        b_dec=Spread.of(vectors["b_dec"]),
        silent=int(((encoder == 0) | (decoder == 0)).sum()),
        backwards=backwards,
        not_finite=not_finite,
    )
