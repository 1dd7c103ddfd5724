"""A run that begins with the weights of a module, which reads raw activations, and where to.

    W_enc, b_enc * s_i + s_i m_i @ W_enc, threshold * s_i, ...      `fold_` by the inverse maps

Training keeps decoder rows at unit norm, so rows are divided by theirs at the start, and encoder
and threshold multiplied by it: of a JumpReLU that changes activations and not what they write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..activations import BatchTopK, JumpReLU, TopK
from ..effective import decoder_norms
from ..modules import SAE, Transcoder
from ..multilayer import Crosscoder, CrossLayerTranscoder, MultiLayer
from ..queries.dictionary import dictionary
from ..queries.folding import fold_decoder_norm
from ..queries.rows import row_blocks
from .settings import OP, Settings

KINDS: dict[str, Any] = {
    "sae": SAE,
    "transcoder": Transcoder,
    "crosscoder": Crosscoder,
    "clt": CrossLayerTranscoder,
}
ACTIVATIONS: dict[str, type] = {"jumprelu": JumpReLU, "topk": TopK, "batchtopk": BatchTopK}

EQUAL = 0.01
"""Largest share by which norms of decoder rows may differ where latents are selected by size."""


def check_start(start: Any, settings: Settings, mesh: Any) -> None:
    """Raise, before any work, where a run of `settings` cannot begin with `start`.

    Raises:
        TypeError: it is of another class.
        ValueError: it has other sizes, another activation, semantics that training does not have,
            or no values; or another argument does not go with it.
    """
    if start is None:
        return
    kind, affine = KINDS[settings.kind], getattr(start, "W_skip", None) is not None
    if type(start) is not kind:
        raise TypeError(
            f"{OP}: start must be of class {kind.__name__}, as kind={settings.kind!r}, got "
            f"{type(start).__name__}"
        )
    if mesh is not None:
        raise ValueError(f"{OP}: start is for one device: drop mesh")
    if settings.init_l0 is not None:
        raise ValueError(f"{OP}: init_l0 calibrates thresholds, and start has its own: drop one")
    if start.b_dec.is_meta:
        raise ValueError(f"{OP}: start must have values, and is on the meta device")
    sizes = {"d_in": settings.d_in, "d_out": settings.d_out}
    if settings.layers is not None:
        sizes = {"n_layers": settings.layers, "d_model": settings.d_in}
    for name, size in (sizes | {"d_sae": settings.d_sae}).items():
        if getattr(start, name) != size:
            raise ValueError(f"{OP}: start must have {name}={size}, got {getattr(start, name)}")
    if affine != settings.affine:
        raise ValueError(
            f"{OP}: start must have an affine skip connection exactly where affine=True, got "
            f"affine={settings.affine} and a start {'with' if affine else 'without'} one"
        )
    _check_function(start, settings)


def _check_function(start: Any, settings: Settings) -> None:
    """`start` encodes as what is trained does, and writes no further."""
    semantics, activation = start.semantics, start.activation
    plain = not (semantics.center or semantics.rescale)
    if settings.activation == "jumprelu":
        plain = semantics.plain_forward
    if not plain or not isinstance(activation, ACTIVATIONS[settings.activation]):
        raise ValueError(
            f"{OP}: start must have activation={settings.activation!r} and Gemma Scope's "
            f"semantics, got {activation} with {semantics}: its to_jumprelu() is a start for "
            "activation='jumprelu'"
        )
    for at in range(settings.layers or 0):
        if start.outputs(at).start < at:
            raise ValueError(
                f"{OP}: start must not write backwards: its latents of layer {at} write to layer "
                f"{start.outputs(at).start}"
            )


@torch.no_grad()
def take(module: Any, start: Any, fold: Callable[[Any], None]) -> None:
    """Give `module` the weights of `start`, in its own units.

    Args:
        module: of the sizes of `start`; keeps its activation.
        start: reads raw activations.
        fold: turns a module that reads raw activations into one that reads scaled ones.

    Raises:
        ValueError: latents are selected by size, and the decoder's rows differ in norm.
    """
    given, activation = start.state_dict(), module.activation
    for name, t in module.state_dict().items():
        if name in given:  # all but running thresholds, where `start` has none
            t.copy_(given[name])
    fold(module)
    module.activation = activation
    if isinstance(activation, JumpReLU):
        fold_decoder_norm(module)
    else:
        _divide_rows(module)


def _divide_rows(module: Any) -> None:
    """Divide the decoder's rows by their one norm, which leaves the selection as it is."""
    layers = range(module.n_layers) if isinstance(module, MultiLayer) else [None]
    for layer in layers:
        held = dictionary(OP, module, layer)
        blocks = row_blocks(held.W_dec)
        norms = torch.cat([decoder_norms(held.W_dec[block]) for block in blocks])
        norm, low, high = norms.mean(), float(norms.min()), float(norms.max())
        if high - low > EQUAL * high:
            of_layer = "" if layer is None else f" of layer {layer}"
            raise ValueError(
                f"{OP}: start must have decoder rows of one norm{of_layer}, because "
                f"{module.activation} selects by size and training makes the norms 1; in scaled "
                f"units they are {low:.3g} to {high:.3g}"
            )
        held.W_dec.div_(norm)
        for t in (held.W_enc, held.b_enc, held.ema_threshold):
            if t is not None:
                t.mul_(norm)
