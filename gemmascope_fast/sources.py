"""Sources of activations for `train`: in memory, on disk, or live from a model."""

from .training.hooks import ModelSource, capture
from .training.shards import ShardSource, write_shards
from .training.sources import Block, Source, TensorSource

__all__ = [
    "Block",
    "ModelSource",
    "ShardSource",
    "Source",
    "TensorSource",
    "capture",
    "write_shards",
]
