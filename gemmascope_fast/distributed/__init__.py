"""Dictionaries whose latents lie on several devices, on `torch.distributed`."""

from .acts import ShardedActs
from .base import Sharded
from .modules import ShardedSAE, ShardedTranscoder
from .multilayer import ShardedCrosscoder, ShardedCrossLayerTranscoder
from .sharding import load, shard

__all__ = [
    "Sharded",
    "ShardedActs",
    "ShardedCrossLayerTranscoder",
    "ShardedCrosscoder",
    "ShardedSAE",
    "ShardedTranscoder",
    "load",
    "shard",
]
