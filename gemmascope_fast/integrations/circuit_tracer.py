"""circuit-tracer 0.4 and 0.5 on this backend: its transcoders encode and decode sparsely, in place.

    from gemmascope_fast.integrations import circuit_tracer
    circuit_tracer.install()                      # every transcoder of the process
    with circuit_tracer.accelerate(model): ...    # those of one model, for the length of the block

`encode`, `decode`, `forward`, `encode_sparse` and `decode_sparse` of `SingleLayerTranscoder`, and
`encode`, `encode_layer`, `encode_sparse`, `select_decoder_vectors`, `compute_reconstruction` and
`forward` of `CrossLayerTranscoder` are replaced; `TranscoderSet`, the attribution and the
interventions call them. What they return is the host's: dense tensors where it has them, COO
tensors coalesced and in its order elsewhere, and then no `[n, d_sae]` tensor is made on the way. A
lazy encoder is read when the host reads it; of a lazy decoder only rows of active latents are.
Passed on to the host: activations denser than a quarter, dtypes other than float32 and bfloat16,
autocast, values that are not finite, other activation functions, methods overridden by others.

Numerically: float32 sums in another order, of which bfloat16 results are rounded as the host rounds
them, so that gates agree; reconstructions add in float32 and round once, where the host rounds
after each addition in bfloat16; bfloat16 pre-activations that tie for a TopK are told apart by the
float32 sums.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

from .patching import Changes, Installation

PACKAGE = "circuit_tracer"
SOURCE = "https://github.com/decoderesearch/circuit-tracer"
HOW = f"pip install git+{SOURCE}@v0.5.0"
SIGNATURES = {
    "single_layer_transcoder.SingleLayerTranscoder": {
        "encode": "self input_acts apply_activation_function",
        "encode_sparse": "self input_acts zero_positions",
        "decode": "self acts input_acts",
        "decode_sparse": "self sparse_acts input_acts",
        "forward": "self input_acts",
        "compute_skip": "self input_acts",
        "_get_decoder_vectors": "self feat_ids",
    },
    "cross_layer_transcoder.CrossLayerTranscoder": {
        "encode": "self x",
        "encode_layer": "self x layer_id apply_activation_function",
        "encode_sparse": "self x zero_positions",
        "select_decoder_vectors": "self features",
        "compute_reconstruction": "self pos_ids layer_ids decoder_vectors input_acts",
        "forward": "self x",
        "apply_activation_function": "self layer_id features",
        "_get_decoder_vectors": "self layer_id feat_ids",
        "_get_encoder_weights": "self layer_id",
    },
    "single_layer_transcoder.TranscoderSet": {"__iter__": "self"},
    "activation_functions.JumpReLU": {"__init__": "self threshold bandwidth"},
}
"""What is replaced and read of the host: methods and their parameters."""

_installation = Installation()


def install() -> Changes:
    """Serve every transcoder of this process, until `uninstall` or the end of a with block.

    Returns:
        The changes, a context manager that undoes them; none where it is installed already.

    Raises:
        ImportError: circuit-tracer is not there, or is not one that this was written for.
    """
    _check_host()
    from .circuit_tracer_host import replaced

    def make(changes: Changes) -> None:
        for kind, methods in _places():
            for serve in methods:
                name = serve.__name__
                changes.attribute(kind, name, replaced(vars(kind)[name], serve))

    return _installation.begin(make)


def uninstall() -> None:
    """Give the transcoders their own methods back; without `install`, nothing happens."""
    _installation.end()


def accelerate(obj: Any) -> Changes:
    """Serve one transcoder, or those of a set or a replacement model.

    Args:
        obj: a `SingleLayerTranscoder`, `CrossLayerTranscoder` or `TranscoderSet`, or what holds one
            as `transcoders`: a `ReplacementModel` of either backend.

    Returns:
        The changes, a context manager that undoes them.

    Raises:
        ImportError: circuit-tracer is not there, or is not one that this was written for.
        TypeError: `obj` is, and holds, none of them.
    """
    _check_host()
    from .circuit_tracer_host import replaced

    changes = Changes()
    for transcoder in _transcoders(obj):
        for kind, methods in _places():
            if isinstance(transcoder, kind):
                own = {m.__name__: (getattr(transcoder, m.__name__).__func__, m) for m in methods}
                ours = {name: replaced(*given).__get__(transcoder) for name, given in own.items()}
                changes.methods(transcoder, ours)
    return changes


def _places() -> Iterator[tuple[type, tuple[Any, ...]]]:
    """The host's classes and what is replaced in each."""
    from . import circuit_tracer_cross as cross
    from . import circuit_tracer_host as host
    from . import circuit_tracer_single as single

    yield host.Single, single.METHODS
    yield host.Cross, cross.METHODS


def _transcoders(obj: Any) -> list[Any]:
    from .circuit_tracer_host import Cross, Set, Single

    held = getattr(obj, "transcoders", obj) if not isinstance(obj, Set) else obj
    held = getattr(held, "_module", held)  # nnsight's envoy of a module
    if isinstance(held, Set):
        return list(held)
    if isinstance(held, (Single, Cross)):
        return [held]
    raise TypeError(
        "accelerate: obj must be a circuit-tracer SingleLayerTranscoder, CrossLayerTranscoder, "
        f"TranscoderSet or ReplacementModel, got {type(obj).__name__}"
    )


def _check_host() -> None:
    """The package is decoderesearch's, and has what is read of it.

    Versions do not tell: 0.5.0 calls itself 0.4.1, and another package has its name on PyPI.
    """
    refusal = f"gemmascope_fast.integrations: circuit-tracer 0.4 or 0.5 of {SOURCE} is needed"
    try:
        spec = importlib.util.find_spec(f"{PACKAGE}.attribution.attribute_transformerlens")
    except ModuleNotFoundError as error:
        raise ImportError(f"{refusal}, and not installed: {HOW}") from error
    where = importlib.import_module(PACKAGE).__file__
    if spec is None:
        raise ImportError(
            f"{refusal}; {where} is another package or version (the one on PyPI is a separate "
            f"project of that name): pip uninstall circuit-tracer && {HOW}"
        )
    for place, methods in SIGNATURES.items():
        module, kind = place.split(".")
        found = getattr(importlib.import_module(f"{PACKAGE}.transcoder.{module}"), kind, None)
        for name, expected in methods.items():
            if _parameters(found, name) != expected:
                raise ImportError(
                    f"{refusal}; in {where} {kind}.{name} takes ({_parameters(found, name)}), not "
                    f"({expected}): {HOW}"
                )


def _parameters(kind: Any, name: str) -> str:
    method = getattr(kind, name, None)
    return " ".join(inspect.signature(method).parameters) if callable(method) else "absent"
