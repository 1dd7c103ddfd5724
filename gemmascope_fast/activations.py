"""The activations of a module: JumpReLU, TopK, BatchTopK."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JumpReLU:
    """`pre * H(pre - threshold)` with a trainable threshold per latent.

    Args:
        bandwidth: width of the straight-through window, in units of the pre-activations.
        init_threshold: initial value of every threshold.
    """

    bandwidth: float = 0.001
    init_threshold: float = 0.001


@dataclass(frozen=True)
class TopK:
    """The k largest of `relu(pre)` per token."""

    k: int


@dataclass(frozen=True)
class BatchTopK:
    """The `int(k * n)` largest positive entries of a batch of n tokens."""

    k: float


Activation = JumpReLU | TopK | BatchTopK
