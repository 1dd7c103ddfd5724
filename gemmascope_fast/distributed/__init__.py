"""Dictionaries whose latents lie on several devices, on `torch.distributed`."""

from .acts import ShardedActs
from .base import Sharded
from .clipping import clip_grad_norm_
from .estimate import MeshEstimate, Rates, estimate
from .export import save_pretrained
from .failure import RankError
from .launch import mesh_of_torchrun
from .modules import ShardedSAE, ShardedTranscoder
from .multilayer import ShardedCrosscoder, ShardedCrossLayerTranscoder
from .sharding import load, shard

__all__ = [
    "MeshEstimate",
    "RankError",
    "Rates",
    "Sharded",
    "ShardedActs",
    "ShardedCrossLayerTranscoder",
    "ShardedCrosscoder",
    "ShardedSAE",
    "ShardedTranscoder",
    "clip_grad_norm_",
    "estimate",
    "load",
    "mesh_of_torchrun",
    "save_pretrained",
    "shard",
]
