"""The activations of a module: JumpReLU, TopK, BatchTopK."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .arguments import check_count, check_number, plain_fields


@dataclass(frozen=True)
class JumpReLU:
    """`pre * H(pre - threshold)` with a trainable threshold per latent.

    Args:
        bandwidth: width of the straight-through window, in units of the pre-activations; finite,
            >= 0.
        init_threshold: initial value of every threshold; finite.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of range.
    """

    bandwidth: float = 0.001
    init_threshold: float = 0.001

    def __post_init__(self) -> None:
        plain_fields(self)
        check_number("JumpReLU", "bandwidth", self.bandwidth)
        check_number("JumpReLU", "init_threshold", self.init_threshold, negative=True)


@dataclass(frozen=True)
class TopK:
    """The k largest of `relu(pre)` per token.

    Args:
        k: entries per token, >= 0; at most the `d_sae` of the module that has it.

    Raises:
        TypeError: k is no int.
        ValueError: k is negative.
    """

    k: int

    def __post_init__(self) -> None:
        plain_fields(self)
        check_count("TopK", "k", self.k)


@dataclass(frozen=True)
class BatchTopK:
    """The `int(k * n)` largest positive entries of a batch of n tokens.

    Args:
        k: mean entries per token, finite, >= 0; may be fractional.

    Raises:
        TypeError: k is no number.
        ValueError: k is out of range.
    """

    k: float

    def __post_init__(self) -> None:
        plain_fields(self)
        check_number("BatchTopK", "k", self.k)


Activation = JumpReLU | TopK | BatchTopK

_part: ContextVar[bool] = ContextVar("part", default=False)


def check_activation(op: str, activation: Any, d_sae: int | None = None) -> Activation:
    """Return `activation`, one that `d_sae` latents can have."""
    if not isinstance(activation, (JumpReLU, TopK, BatchTopK)):
        raise TypeError(
            f"{op}: activation must be JumpReLU, TopK or BatchTopK, got {type(activation).__name__}"
        )
    if isinstance(activation, TopK):
        check_count(op, "k", activation.k, None if _part.get() else d_sae, "d_sae")
    return activation


@contextmanager
def parts() -> Iterator[None]:
    """Let modules have the activation of a whole of which they hold some latents."""
    token = _part.set(True)
    try:
        yield
    finally:
        _part.reset(token)
