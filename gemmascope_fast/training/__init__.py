"""Training: the terms of a loss; `SAE.loss` evaluates them in blocks of rows."""

from .losses import L0, LossTerm, Matryoshka, QuadraticL0, Reconstruction, Term, TokenStatistics
from .losses_batch import BatchTerm, Frequency, FrequencyL0, QuadraticMeanL0
from .losses_entries import L1, EntryTerm, Tanh
from .losses_weights import AuxK, MultiTopK, PreAct

__all__ = [
    "L0",
    "L1",
    "AuxK",
    "BatchTerm",
    "EntryTerm",
    "Frequency",
    "FrequencyL0",
    "LossTerm",
    "Matryoshka",
    "MultiTopK",
    "PreAct",
    "QuadraticL0",
    "QuadraticMeanL0",
    "Reconstruction",
    "Tanh",
    "Term",
    "TokenStatistics",
]
