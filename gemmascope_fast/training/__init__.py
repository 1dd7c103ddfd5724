"""Training: the terms of a loss; `SAE.loss` evaluates them in blocks of rows."""

from .losses import L0, QuadraticL0, Reconstruction, Term, TokenStatistics

__all__ = ["L0", "QuadraticL0", "Reconstruction", "Term", "TokenStatistics"]
