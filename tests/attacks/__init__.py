"""Hostile files, made on the fly: each case writes one and names the error that must refuse it."""

from pathlib import Path

import numpy as np

D_IN, D_SAE, D_OUT = 6, 10, 4


def arrays(d_in=D_IN, d_sae=D_SAE, d_out=None, seed=0):
    """A small dictionary under Gemma Scope 2's names; thresholds negative, 0 and positive."""
    random = np.random.default_rng(seed)
    d_out = d_in if d_out is None else d_out
    shapes = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_out), "b_enc": (d_sae,)}
    shapes |= {"b_dec": (d_out,), "threshold": (d_sae,)}
    made = {k: random.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    made["threshold"][:3] = (0.0, -0.5, 1e-3)
    return made


def write(path: Path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
