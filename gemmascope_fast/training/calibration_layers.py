"""The start of a run over several layers, and its way back.

Training sees every layer with unit mean squared norm: `(x_i - m_i) * s_i` of the input, and
`(y_j - n_j) * t_j` of the target (for a crosscoder the same maps). The same function of raw
activations has, with `W_dec[i][:, j]` what the latents of layer i write to layer j,

    b_enc_i / s_i - m_i @ W_enc_i,  threshold_i / s_i,  W_dec[i][:, j] * s_i / t_j,
    W_skip_j * s_j / t_j,  b_dec_j / t_j + n_j - m_j @ (W_skip_j * s_j / t_j)

Layers share one bandwidth: that of raw activations is divided by the geometric mean of the s_i. It
matters to further training only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..activations import JumpReLU
from ..multilayer import CrossLayerTranscoder, MultiLayer
from .calibration import image, moments, thresholds, unit_scale


@dataclass(frozen=True)
class LayersAffine:
    """`x_i -> (x_i - mean_i) * scale_i` of L sites.

    Attributes:
        mean: `[L, d]` float32.
        scale: L of them, each > 0.
    """

    mean: Tensor
    scale: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Scaled `[n, L, d]` of the rows `x [n, L * d]`, in float32 (float64 stays)."""
        wide = x if x.dtype == torch.float64 else x.float()
        scaled = wide.reshape(-1, *self.mean.shape) - self.mean.to(wide.dtype)
        for part, scale in zip(scaled.unbind(1), self.scale, strict=True):
            part.mul_(scale)  # a tensor of the scales would make CUDA wait for its copy
        return scaled

    def inverse(self) -> LayersAffine:
        """The way back."""
        scale = torch.tensor(self.scale, dtype=self.mean.dtype, device=self.mean.device)
        return LayersAffine(-self.mean * scale[:, None], tuple(1 / s for s in self.scale))


def measure_layers(
    name: str,
    parts: Callable[[], Iterator[Tensor]],
    centred: bool,
    device: torch.device,
    layers: int,
) -> LayersAffine:
    """The map that gives the rows of each layer unit mean squared norm, about their mean or 0.

    Args:
        name: of the rows, for messages.
        parts: yields the rows, `[m, layers * d]` at a time; called twice, for the same rows.
        centred: whether their mean is subtracted.
        device: of the result.
        layers: their number.

    Raises:
        ValueError: a value is not finite, or all rows of a layer are equal (or 0, when not
            centred).
    """
    mean, squares = moments(parts, centred, device)
    norms = squares.view(layers, -1).sum(1).tolist() if squares.dim() else [0.0]  # no rows at all
    scale = tuple(unit_scale(f"{name} of layer {at}", norm) for at, norm in enumerate(norms))
    return LayersAffine(mean.float().view(layers, -1), scale)


@torch.no_grad()
def start_layers(
    module: MultiLayer, x: Tensor, target: Tensor, init_l0: float | None, init_threshold: float
) -> None:
    """`calibration.start`, layer by layer.

    Args:
        module: receives biases and thresholds.
        x: `[n, L, d_model]` scaled.
        target: likewise.
        init_l0: wanted active latents per token, of all layers; None sets `init_threshold`.
        init_threshold: of every latent then.
    """
    wide, latents = module.b_dec.dtype, module.n_layers * module.d_sae
    module.b_dec.copy_(target.mean(0))
    for at, (W_enc, b_enc) in enumerate(zip(module.W_enc, module.b_enc, strict=True)):
        part = x[:, at]
        b_enc.copy_(-image(part.mean(0).to(wide), W_enc))
        if module.threshold is None:
            continue
        if init_l0 is None:
            module.threshold[at].fill_(init_threshold)
        else:
            module.threshold[at].copy_(thresholds(part, W_enc, b_enc, init_l0, latents))


@torch.no_grad()
def fold_layers_(module: MultiLayer, source: LayersAffine, target: LayersAffine) -> None:
    """Turn `module`, trained on scaled activations, into the same function of raw ones.

    Args:
        module: changed in place; its bandwidth too.
        source: the map of x.
        target: that of the target; the same for a crosscoder.
    """
    means = source.mean.to(module.b_dec.dtype)
    for at, (scale, mean) in enumerate(zip(source.scale, means, strict=True)):
        module.b_enc[at].div_(scale).sub_(image(mean, module.W_enc[at]))
        if module.threshold is not None:
            module.threshold[at].div_(scale)
        if module.ema_threshold is not None:
            module.ema_threshold[at].div_(scale)
        for block, output in enumerate(module.outputs(at)):
            module.decoder(at)[:, block].mul_(scale / target.scale[output])
        module.b_dec[at].div_(target.scale[at]).add_(target.mean[at])
        if isinstance(module, CrossLayerTranscoder) and module.W_skip is not None:
            W_skip = module.W_skip[at].mul_(scale / target.scale[at])
            module.b_dec[at].sub_(image(mean, W_skip))
    if isinstance(module.activation, JumpReLU):
        logs = [math.log(scale) for scale in source.scale]
        bandwidth = module.activation.bandwidth / math.exp(sum(logs) / len(logs))
        module.activation = replace(module.activation, bandwidth=bandwidth)
