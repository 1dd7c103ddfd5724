"""The start of a run: scale and mean of the activations, thresholds, and their way back.

Training sees `(x - mean) * scale` with unit mean squared norm. With the pair (m_i, s_i) of the
input and (m_o, s_o) of the target, the same function of raw activations has

    b_enc / s_i - m_i @ W_enc,  threshold / s_i,  W_dec * s_i / s_o,  W_skip * s_i / s_o,
    b_dec / s_o + m_o - m_i @ (W_skip * s_i / s_o)

which for an SAE (one scale) leaves both matrices as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..modules import SAE, JumpReLU, Transcoder

TILE_BYTES = 16 << 20
ROWS = 1024
"""Tokens measured at a time."""


@dataclass(frozen=True)
class Affine:
    """`x -> (x - mean) * scale` of one site.

    Attributes:
        mean: `[d]` float32.
        scale: > 0.
    """

    mean: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """Scaled `x [n, d]` in float32 (float64 stays)."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide - self.mean.to(wide.dtype)).mul_(self.scale)

    def inverse(self) -> Affine:
        """The way back."""
        return Affine(-self.mean * self.scale, 1 / self.scale)


def measure(
    name: str, parts: Callable[[], Iterator[Tensor]], centred: bool, device: torch.device
) -> Affine:
    """The map that gives rows unit mean squared norm, about their mean or 0.

    Args:
        name: of the rows, for messages.
        parts: yields the rows, `[m, d]` at a time; called twice, for the same rows.
        centred: whether their mean is subtracted.
        device: of the result.

    Raises:
        ValueError: a value is not finite, or all rows are equal (or 0, when not centred).
    """
    mean, squares = moments(parts, centred, device)
    return Affine(mean.float(), unit_scale(name, float(squares.sum())))


def moments(
    parts: Callable[[], Iterator[Tensor]], centred: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`[d]` mean (0 unless `centred`) and mean squared deviation from it of the rows, in float64.

    Args:
        parts: as for `measure`.
        centred: likewise.
        device: of the result.
    """
    total, rows = torch.zeros((), dtype=torch.float64, device=device), 0
    for part in parts():
        total = total + part.to(device).sum(0, dtype=torch.float64)
        rows += len(part)
    mean = total / max(rows, 1) if centred else torch.zeros_like(total)
    squares = torch.zeros_like(mean)
    for part in parts():
        squares += (part.to(device).double() - mean).square_().sum(0)
    return mean, squares / max(rows, 1)


def unit_scale(name: str, norm: float) -> float:
    """The scale that brings a mean squared norm to 1.

    Args:
        name: of the rows, for messages.
        norm: their mean squared norm.

    Raises:
        ValueError: it is 0 or not finite.
    """
    if not 0 < norm < float("inf"):
        raise ValueError(
            f"train: {name} must be finite and not constant over the tokens that scale and mean "
            f"are estimated from; its mean squared norm is {norm}"
        )
    return float(norm**-0.5)


@torch.no_grad()
def start(
    module: SAE,
    x: Tensor,
    target: Tensor,
    init_l0: float | None,
    init_threshold: float,
    d_sae: int | None = None,
) -> None:
    """Set biases and thresholds from scaled tokens.

    b_dec = mean of the target, b_enc = -(mean of x) @ W_enc, and with `init_l0` every threshold at
    its latent's `1 - init_l0 / d_sae` quantile.

    Args:
        module: receives them.
        x: `[n, d_in]` scaled.
        target: `[n, d_out]` scaled.
        init_l0: wanted active latents per token, in (0, d_sae); None sets `init_threshold`.
        init_threshold: of every latent then.
        d_sae: latents of the whole dictionary, of which the module may hold a slice.
    """
    wide = module.b_dec.dtype
    module.b_dec.copy_(target.mean(0))
    module.b_enc.copy_(-image(x.mean(0).to(wide), module.W_enc))
    if module.threshold is None:
        return
    if init_l0 is None:
        module.threshold.fill_(init_threshold)
    else:
        module.threshold.copy_(thresholds(x, module.W_enc, module.b_enc, init_l0, d_sae))


@torch.no_grad()
def thresholds(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, l0: float, whole: int | None = None
) -> Tensor:
    """`[d_sae]` thresholds >= 0 with which each latent fires on the share `l0 / d_sae` of x.

    Latents are taken in slices, so that `[n, d_sae]` is never held.

    Args:
        x: `[n >= 2, d_in]`.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        l0: wanted mean active latents per token, in (0, whole).
        whole: latents of the whole dictionary, where these are some of them; default d_sae.
    """
    n, d_sae = x.shape[0], W_enc.shape[1]
    fires = min(max(round(n * l0 / (whole or d_sae)), 1), n - 1)
    width = max(TILE_BYTES // (x.element_size() * n), 1)
    found = x.new_empty(d_sae)  # results between the slices' buffers would split the heap
    for first in range(0, d_sae, width):
        latents = slice(first, first + width)
        pre = torch.addmm(b_enc[latents].to(x.dtype), x, W_enc[:, latents].to(x.dtype))
        largest = pre.topk(fires + 1, dim=0).values
        # Midway, not on a token's own value: there the gate would hang on the last bit.
        found[latents] = (largest[-2] + largest[-1]) / 2
    return found.clamp_(min=0).to(b_enc.dtype)


def image(mean: Tensor, W: Tensor) -> Tensor:
    """`mean [d] @ W [d, f]` in the dtype of mean, to which W is never widened as a whole."""
    if W.dtype == mean.dtype:
        return mean @ W
    width = min(max(TILE_BYTES // (mean.element_size() * len(mean)), 1), W.shape[1])
    found, wide = mean.new_empty(W.shape[1]), mean.new_empty(width, len(mean))
    for first in range(0, W.shape[1], width):  # one buffer: results between buffers split the heap
        part = W[:, first : first + width].t()
        torch.mv(wide[: len(part)].copy_(part), mean, out=found[first : first + width])
    return found


@torch.no_grad()
def fold_(module: SAE, source: Affine, target: Affine) -> None:
    """Turn `module`, trained on scaled activations, into the same function of raw ones.

    Args:
        module: changed in place; its bandwidth is divided by the scale too.
        source: the map of x.
        target: that of the target; the same for an SAE.
    """
    ratio = source.scale / target.scale
    wide = module.b_enc.dtype
    m_in, m_out = source.mean.to(wide), target.mean.to(wide)
    module.b_enc.div_(source.scale).sub_(image(m_in, module.W_enc))
    module.b_dec.div_(target.scale).add_(m_out)
    if ratio != 1:
        module.W_dec.mul_(ratio)
    if isinstance(module, Transcoder) and module.W_skip is not None:
        module.W_skip.mul_(ratio)
        module.b_dec.sub_(image(m_in, module.W_skip))
    if module.ema_threshold is not None:
        module.ema_threshold.div_(source.scale)
    if module.threshold is not None and isinstance(module.activation, JumpReLU):
        module.threshold.div_(source.scale)
        bandwidth = module.activation.bandwidth / source.scale
        module.activation = replace(module.activation, bandwidth=bandwidth)
