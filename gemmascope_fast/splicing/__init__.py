"""Dictionaries inside a running model: read, replaced, edited and measured there."""

from .capturing import Captured, Reading, capture
from .evaluation import evaluate
from .measuring import ModelEvaluation
from .replacing import Splice, SpliceContext, splice

__all__ = [
    "Captured",
    "ModelEvaluation",
    "Reading",
    "Splice",
    "SpliceContext",
    "capture",
    "evaluate",
    "splice",
]
