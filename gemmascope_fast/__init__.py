"""A compute backend for sparse autoencoders: sparse encoders, decoders and their gradients."""

from . import losses, reference, sources
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
from .training.metrics import Evaluation, evaluate
from .training.preset import Preset
from .training.runs import train
from .training.trainer import NonFiniteError
from .training.blocked import count_latents

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "BatchTopK",
    "CapacityError",
    "Evaluation",
    "JumpReLU",
    "NonFiniteError",
    "Preset",
    "Semantics",
    "SparseActs",
    "TopK",
    "Transcoder",
    "batchtopk_encode",
    "count_latents",
    "decode",
    "decode_",
    "evaluate",
    "jumprelu_encode",
    "load",
    "losses",
    "pre_at",
    "reference",
    "sources",
    "topk_encode",
    "train",
]
