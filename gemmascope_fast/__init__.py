"""A compute backend for sparse autoencoders: sparse encoders, decoders and their gradients."""

from . import optim, reference
from .artefacts import load
from .functional import (
    batchtopk_encode,
    decode,
    decode_,
    jumprelu_encode,
    pre_at,
    topk_encode,
)
from .modules import SAE, BatchTopK, JumpReLU, TopK, Transcoder
from .optim import clip_grad_norm_
from .reference import CapacityError
from .sparse import SparseActs

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "BatchTopK",
    "CapacityError",
    "JumpReLU",
    "SparseActs",
    "TopK",
    "Transcoder",
    "batchtopk_encode",
    "clip_grad_norm_",
    "decode",
    "decode_",
    "jumprelu_encode",
    "load",
    "optim",
    "pre_at",
    "reference",
    "topk_encode",
]
