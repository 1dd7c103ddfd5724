"""Questions that dashboards and circuit tracers ask, none answered by an `[n, d_sae]` tensor.

Of activations that are there: `top_latents`, `top_per_token`, `activations_of`, `to_sparse_coo`,
and over a stream of batches `TopActivations`. Of a module: `encode_latents`, `encode_coo`,
`decoder_rows`, `encoder_rows`, `steering_vector`, `fold_decoder_norm`. Of a matrix: `cosine_topk`.
"""

from .activations import TopLatents, activations_of, top_latents, top_per_token
from .coo import Coo, encode_coo, to_sparse_coo
from .folding import fold_decoder_norm
from .latents import encode_latents
from .rows import cosine_topk, decoder_rows, encoder_rows
from .steering import steering_vector
from .streaming import TopActivations

__all__ = [
    "Coo",
    "TopActivations",
    "TopLatents",
    "activations_of",
    "cosine_topk",
    "decoder_rows",
    "encode_coo",
    "encode_latents",
    "encoder_rows",
    "fold_decoder_norm",
    "steering_vector",
    "to_sparse_coo",
    "top_latents",
    "top_per_token",
]
