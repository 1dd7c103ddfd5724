"""`Semantics`: the named choices in which libraries of sparse autoencoders differ.

    theta = threshold, or exp(threshold)                  gate = pre > theta, or pre >= theta
    d_pre       += in the window, where asked: w(u) / bandwidth * (s * d_acts + d_gate)
    d_theta[j]   = -sum_i w(u) / bandwidth * (s * d_acts + d_gate),   u = (pre - theta) / bandwidth

with the kernel w (a unit rectangle by default) and the slope s (theta by default, or pre). Every
choice composes from the ops of the table: in floating point `pre >= theta` is `pre > theta'`, with
theta' the number below theta; another kernel widens the window of stored entries and weighs them by
their pre-activations, which `pre_at` gives. Nothing here forms an `[n, d_sae]` tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from .activations import Activation, JumpReLU
from .arguments import check_count, check_number

CHOICES: dict[str, tuple[str, ...]] = {
    "gate": ("strict", "non_strict"),
    "threshold": ("direct", "log", "exp"),
    "kernel": ("rectangle", "closed_rectangle", "triangular", "epanechnikov", "quartic", "cosine"),
    "slope": ("threshold", "pre"),
    "gate_window": ("both", "active"),
    "l0_square": ("token", "batch"),
    "l0_normalisation": ("2/target", "1/target^2"),
    "auxk_normalisation": ("none", "residual", "target"),
    "ema_start": ("first", "zero"),
}
"""The values of every field that is a name."""


@dataclass(frozen=True)
class Semantics:
    """How a module encodes and differentiates; the default is Gemma Scope 2's.

    Args:
        gate: "strict" (`pre > theta`) or "non_strict" (`pre >= theta`).
        threshold: the parameter is theta ("direct"), or its logarithm: "log" starts at that of the
            activation's `init_threshold`, "exp" at -3.
        kernel: w. "rectangle" `|u| < 1/2`, "closed_rectangle" `|u| <= 1/2`; of support `|u| < 1`
            and integral 1: "triangular" `1 - |u|`, "epanechnikov" `3/4 (1 - u^2)`, "quartic"
            `15/16 (1 - u^2)^2`, "cosine" `pi/4 cos(pi u / 2)`.
        slope: s, the factor of `d_acts` in the pseudo-derivative: "threshold" or "pre".
        gradient_to_x: whether the window passes the negative of theta's gradient to pre, hence to
            x, W_enc and b_enc.
        gate_window: entries through which `d_gate` reaches theta: "both" sides, or "active" only.
        center: the encoder of an SAE (not of a transcoder) sees `x - b_dec`.
        center_jumprelu: whether `center` holds for a JumpReLU too.
        rescale: TopK and BatchTopK select among `pre * |W_dec[j]|`; `decode` divides by the norms.
        zero_gradient: selected entries whose ReLU is 0 pass a gradient to pre (TopK, BatchTopK).
        ema_decay: of BatchTopK's running threshold, in [0, 1): evaluation mode then encodes with it
            as a JumpReLU. None: BatchTopK in evaluation mode too.
        ema_start: the running threshold is the "first" batch's at first, or starts at "zero".
        l0_square: the library's quadratic L0 penalty squares each "token" (`losses.quadratic_l0`)
            or the "batch" mean (`losses.quadratic_mean_l0`).
        l0_normalisation: of that penalty.
        auxk_normalisation: of `losses.auxk` in that library, see `auxk_options`.
        auxk_scaled: likewise.
        auxk_rectified: likewise.
        auxk_encoder_gradient: likewise.
        multi_topk_encoder_gradient: of `losses.multi_topk` in that library.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a name is unknown, or `ema_decay` out of range.
    """

    gate: str = "strict"
    threshold: str = "direct"
    kernel: str = "rectangle"
    slope: str = "threshold"
    gradient_to_x: bool = False
    gate_window: str = "both"
    center: bool = False
    center_jumprelu: bool = True
    rescale: bool = False
    zero_gradient: bool = False
    ema_decay: float | None = None
    ema_start: str = "first"
    l0_square: str = "token"
    l0_normalisation: str = "2/target"
    auxk_normalisation: str = "none"
    auxk_scaled: bool = True
    auxk_rectified: bool = True
    auxk_encoder_gradient: bool = True
    multi_topk_encoder_gradient: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in CHOICES and value not in CHOICES[field.name]:
                raise ValueError(
                    f"Semantics: {field.name} must be one of {', '.join(CHOICES[field.name])}, "
                    f"got {value!r}"
                )
            if field.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"Semantics: {field.name} must be a bool, got {value!r}")
        if (
            self.ema_decay is not None
            and check_number("Semantics", "ema_decay", self.ema_decay) >= 1
        ):
            raise ValueError(f"Semantics: ema_decay must be in [0, 1), got {self.ema_decay}")

    @classmethod
    def preset(cls, name: str, *, strict_compat: bool = False, **changes: Any) -> Self:
        """The choices of a library, by name.

        Never reproduced: what SAELens and dictionary_learning's inference do with negative
        thresholds (they rectify too); NaN of SAELens' TopK when a decoder row is 0; in
        dictionary_learning, a running threshold that falls when nothing is active, one for TopK,
        and L0 gradients of every inactive latent where a threshold is below half the bandwidth.

        Args:
            name: "gemma_scope_2", "saelens_6", "sparsify_1_3" or "dictionary_learning_0_1".
            strict_compat: reproduce that library's known bugs too: in sparsify, selected zeros pass
                a gradient, and AuxK and Multi-TopK none to the encoder; in dictionary_learning, the
                L0 reaches the threshold through active entries only.
            changes: fields to set otherwise.

        Raises:
            TypeError: a field of `changes` does not exist.
            ValueError: the name is unknown, or a change out of range.
        """
        if name not in PRESETS:
            raise ValueError(f"Semantics: preset must be one of {', '.join(PRESETS)}, got {name!r}")
        bugs = BUGS.get(name, {}) if strict_compat else {}
        return cls(**{**PRESETS[name], **bugs, **changes})

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields set otherwise."""
        return replace(self, **changes)

    @property
    def own_gradient(self) -> bool:
        """Whether the window's gradient is the ops' own: rectangle, slope theta, to theta only."""
        plain = self.kernel == "rectangle" and self.slope == "threshold"
        return plain and not self.gradient_to_x and self.gate_window == "both"

    @property
    def plain_forward(self) -> bool:
        """Whether a JumpReLU's parameters mean what Gemma Scope's files mean by them."""
        plain = (self.gate, self.threshold) == ("strict", "direct")
        return plain and not (self.center and self.center_jumprelu)

    def centers(self, activation: Activation) -> bool:
        """Whether the encoder of an SAE with this activation sees `x - b_dec`."""
        return self.center and (self.center_jumprelu or not isinstance(activation, JumpReLU))

    def auxk_options(self) -> dict[str, Any]:
        """Keywords of `losses.auxk` and of the term `AuxK` in that library."""
        return {
            "normalisation": self.auxk_normalisation,
            "scaled": self.auxk_scaled,
            "rectified": self.auxk_rectified,
            "encoder_gradient": self.auxk_encoder_gradient,
        }

    def emission(self, bandwidth: float) -> float:
        """Width of the window of entries to store, for this kernel of `bandwidth`."""
        if self.kernel == "rectangle":
            return bandwidth
        return bandwidth * (1 + 2**-20 if self.kernel == "closed_rectangle" else 2)

    def weight(self, pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        """`w(u) / bandwidth`, of broadcast shape; 0 for what is not finite."""
        half = bandwidth / 2
        if self.kernel == "rectangle":
            inside = ((pre > theta - half) & (pre < theta + half)).to(pre.dtype)
            return inside / bandwidth
        if self.kernel == "closed_rectangle":
            inside = ((pre >= theta - half) & (pre <= theta + half)).to(pre.dtype)
            return inside / bandwidth
        u = (pre - theta) / bandwidth
        shapes: dict[str, Callable[[Tensor], Tensor]] = {
            "triangular": lambda u: 1 - u.abs(),
            "epanechnikov": lambda u: 0.75 * (1 - u * u),
            "quartic": lambda u: 0.9375 * (1 - u * u).square(),
            "cosine": lambda u: math.pi / 4 * (math.pi / 2 * u).cos(),
        }
        return torch.where(u.abs() < 1, shapes[self.kernel](u), 0.0) / bandwidth

    def stored(self, theta: float) -> float:
        """The initial parameter of a threshold that starts at `theta`.

        Raises:
            ValueError: theta has no logarithm, and is to be stored as that.
        """
        if self.threshold == "exp":
            return -3.0
        if self.threshold == "log":
            return math.log(check_number("JumpReLU", "init_threshold", theta, positive=True))
        return theta

    def moved(self, running: Tensor, smallest: Tensor) -> Tensor:
        """`decay * running + (1 - decay) * smallest`; `smallest` where running is negative.

        A `smallest` that is not finite, of a batch in which nothing is active, moves nothing.
        """
        decay = 0.0 if self.ema_decay is None else self.ema_decay
        target = smallest.to(running)
        moved = torch.where(running < 0, target, decay * running + (1 - decay) * target)
        return torch.where(moved.isfinite(), moved, running)

    def annealed_k(self, step: int, k: float, *, start: float, steps: int) -> int:
        """K at a step of a run that starts wide: linear from `start` to k over `steps` steps.

        `round(start + (k - start) * min(step / steps, 1))`, never below k.

        Args:
            step: optimizer steps done, >= 0.
            k: final latents per token.
            start: first latents per token, >= k.
            steps: steps of the annealing, >= 0; 0 is k at once.

        Raises:
            TypeError: an argument is not a number.
            ValueError: an argument is out of range.
        """
        op = "annealed_k"
        check_count(op, "step", step)
        check_count(op, "steps", steps)
        k, start = check_number(op, "k", k), check_number(op, "start", start)
        if start < k:
            raise ValueError(f"{op}: start must be >= k={k}, got {start}")
        done = 1.0 if step >= steps else step / steps
        return max(round(start + (k - start) * done), math.ceil(k))


PRESETS: dict[str, dict[str, Any]] = {
    "gemma_scope_2": {},
    "saelens_6": {
        "center": True,
        "rescale": True,
        "ema_decay": 0.99,
        "ema_start": "zero",
        "auxk_rectified": False,
    },
    "sparsify_1_3": {"center": True, "auxk_normalisation": "target"},
    "dictionary_learning_0_1": {
        "center": True,
        "center_jumprelu": False,
        "ema_decay": 0.999,
        "l0_square": "batch",
        "l0_normalisation": "1/target^2",
        "auxk_normalisation": "residual",
        "auxk_scaled": False,
    },
}
"""The fields in which each library differs from the default.

`center` is a setting in SAELens, on by default. A transcoder is never centred.
"""

BUGS: dict[str, dict[str, Any]] = {
    "sparsify_1_3": {
        "zero_gradient": True,
        "auxk_encoder_gradient": False,
        "multi_topk_encoder_gradient": False,
    },
    "dictionary_learning_0_1": {"gate_window": "active"},
}


def as_semantics(op: str, given: Any) -> Semantics:
    """`given`, or the preset that it names."""
    if isinstance(given, str):
        return Semantics.preset(given)
    if not isinstance(given, Semantics):
        raise TypeError(f"{op}: semantics must be a Semantics or a str, got {type(given).__name__}")
    return given
