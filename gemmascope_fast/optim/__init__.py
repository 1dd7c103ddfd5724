"""Optimizers for dictionaries: Adam on touched rows, alone or fused into the backward pass."""

from .adam import Adam
from .clipping import clip_grad_norm_
from .coo import set_grad_format

__all__ = ["Adam", "clip_grad_norm_", "set_grad_format"]
