"""Dictionaries inside a running model: read, replaced, edited and measured there."""

from .capturing import Captured, Reading, capture
from .replacing import Splice, SpliceContext, splice

__all__ = ["Captured", "Reading", "Splice", "SpliceContext", "capture", "splice"]
