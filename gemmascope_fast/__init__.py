"""A compute backend for sparse autoencoders: sparse encoders, decoders and their gradients."""

from . import losses, reference
from .activations import BatchTopK, JumpReLU, TopK
from .artefacts import load
from .functional import (
    batchtopk_encode,
    decode,
    decode_,
    jumprelu_encode,
    pre_at,
    topk_encode,
)
from .modules import SAE, Transcoder
from .reference import CapacityError
from .semantics import Semantics
from .sparse import SparseActs

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "BatchTopK",
    "CapacityError",
    "JumpReLU",
    "Semantics",
    "SparseActs",
    "TopK",
    "Transcoder",
    "batchtopk_encode",
    "decode",
    "decode_",
    "jumprelu_encode",
    "load",
    "losses",
    "pre_at",
    "reference",
    "topk_encode",
]
