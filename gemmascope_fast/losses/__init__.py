"""Losses on sparse activations: plain differentiable functions, none with an `[n, d_sae]` tensor.

Each is a scalar: the mean over tokens of a value per token, unless its formula says otherwise.
`gemmascope_fast.training` has the same losses as terms of `SAE.loss`, where memory stays bounded.

Four are not linear in the batch: `quadratic_mean_l0`, `frequency`, `frequency_l0` (of the batch's
firing counts) and `fvu`. Under gradient accumulation or data parallelism the first three take
`counts` and `tokens`, the totals over every part of the batch: the value is then that of the whole,
and the mean of the parts' gradients is the whole's gradient, as for a loss that is a mean over
tokens (parts of unequal size weigh by their tokens, likewise).
"""

from .dead import auxk, pre_act
from .prefixes import matryoshka, multi_topk
from .reconstruction import fvu, mse, normalised_mse, squared_error
from .sparsity import (
    frequency,
    frequency_l0,
    l0,
    l1,
    quadratic_l0,
    quadratic_mean_l0,
    tanh,
)

__all__ = [
    "auxk",
    "frequency",
    "frequency_l0",
    "fvu",
    "l0",
    "l1",
    "matryoshka",
    "mse",
    "multi_topk",
    "normalised_mse",
    "pre_act",
    "quadratic_l0",
    "quadratic_mean_l0",
    "squared_error",
    "tanh",
]
