"""A compute backend for sparse autoencoders: sparse encoders, decoders and their gradients."""

from . import losses, optim, reference
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
from .optim import clip_grad_norm_
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
    "clip_grad_norm_",
    "decode",
    "decode_",
    "jumprelu_encode",
    "load",
    "losses",
    "optim",
    "pre_at",
    "reference",
    "topk_encode",
]
