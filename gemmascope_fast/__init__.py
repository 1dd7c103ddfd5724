"""A compute backend for sparse autoencoders: sparse encoders, decoders and their gradients."""

from typing import TYPE_CHECKING, Any

from . import losses, optim, queries, reference, sources
from .activations import BatchTopK, JumpReLU, TopK
from .artefacts import StreamedLayers, StreamedSAE, load
from .artefacts.acts_files import load_acts
from .auditing import Audit, audit
from .explaining import Explanation, explain
from .functional import (
    batchtopk_encode,
    decode,
    decode_,
    jumprelu_encode,
    pre_at,
    topk_encode,
)
from .integrations.wrap import wrap
from .modules import SAE, Transcoder
from .multilayer import Crosscoder, CrossLayerTranscoder, multi_decode
from .optim import clip_grad_norm_
from .packing import PackedEncoder, pack
from .reference import CapacityError
from .semantics import Semantics
from .sparse import SparseActs
from .splicing import ModelEvaluation, SpliceContext, capture, evaluate, splice
from .training.memory import MemoryEstimate, estimate_memory
from .training.metrics import Evaluation
from .training.preset import Preset
from .training.runs import train
from .training.trainer import NonFiniteError
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import distributed

__all__ = [
    "SAE",
    "Audit",
    "BatchTopK",
    "CapacityError",
    "CrossLayerTranscoder",
    "Crosscoder",
    "Evaluation",
    "Explanation",
    "JumpReLU",
    "MemoryEstimate",
    "ModelEvaluation",
    "NonFiniteError",
    "PackedEncoder",
    "Preset",
    "Semantics",
    "SparseActs",
    "SpliceContext",
    "StreamedLayers",
    "StreamedSAE",
    "TopK",
    "Transcoder",
    "audit",
    "batchtopk_encode",
    "capture",
    "clip_grad_norm_",
    "decode",
    "decode_",
    "distributed",
    "estimate_memory",
    "evaluate",
    "explain",
    "jumprelu_encode",
    "load",
    "load_acts",
    "losses",
    "multi_decode",
    "optim",
    "pack",
    "pre_at",
    "queries",
    "reference",
    "sources",
    "splice",
    "topk_encode",
    "train",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """`distributed` at its first use: importing DTensor doubles the import time."""
    if name != "distributed":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module(".distributed", __name__)
