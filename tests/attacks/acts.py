"""Attacks on what `encode` writes and `load_acts` reads."""

import numpy as np

from . import write
from .peers import COMPLETE, duplicated
from .tensors import entry, framed, safetensors

SHAPE = np.array([2, 10])


def vectors(**changes):
    made = {
        "offsets": np.array([0, 2, 3]),
        "indices": np.array([1, 4, 0], np.int32),
        "values": np.array([1, 2, 3], np.float32),
        "shape": SHAPE,
    }
    return {k: v for k, v in (made | changes).items() if v is not None}


def file(header=None, **changes):
    return safetensors(vectors(**changes), header)


def empty(*shape):
    """A file of no entries."""
    none = {"indices": np.zeros(0, np.int32), "values": np.zeros(0, np.float32)}
    return file(offsets=np.zeros(1, np.int64), shape=np.array(shape), **none)


VALID = file()
CASES = {  # name: bytes of the file, the message that refuses them
    "empty": (b"", COMPLETE),
    "cut": (VALID[:-1], COMPLETE),
    "header cut": (VALID[:60], COMPLETE),
    "header of 90 MB": (framed(b"{}", length=90_000_000), "header must have at most"),
    "overlap": (file({"values": entry([3], [0, 12])}), COMPLETE),
    "oversized": (file({"indices": entry([1 << 40], [24, 36], "I32")}), COMPLETE),
    "duplicate key": (duplicated(VALID, "values"), "header: an object has a key twice"),
    "missing": (file(shape=None), "'shape' is missing"),
    "unknown": (file(x=SHAPE), "'x' is unknown"),
    "a layer and none": (file(**{"layer_0.offsets": SHAPE}), "is (unknown|missing)"),
    "a gap in layers": (
        safetensors({f"layer_1.{k}": v for k, v in vectors().items()}),
        "'layer_0.indices' is missing",
    ),
    "a matrix": (file(values=np.ones((3, 1), np.float32)), "values must be a float32 or float64"),
    "16 bits": (file(values=np.ones(3, np.float16)), "values must be a float32 .* got F16"),
    "wide indices": (file(indices=np.array([1, 4, 0])), "indices must be a int32 vector"),
    "no sizes": (file(shape=SHAPE[:0]), "shape must hold 1 to 64 sizes"),
    "300,000 sizes": (file(shape=np.full(300_000, 2)), "shape must hold 1 to 64 sizes"),
    "negative size": (file(shape=np.array([-2, 10])), "shape must hold sizes >= 0"),
    "too many latents": (file(shape=np.array([2, 1 << 31])), "the last below 2.31"),
    "too many tokens": (file(shape=np.array([1 << 62, 10])), "shape must hold sizes"),
    "overflow beside 0": (empty(0, 1 << 62, 10), "shape must hold sizes"),
    "other tokens": (file(shape=np.array([3, 10])), r"offsets must have n \+ 1 = 4 .* got 3"),
    "other values": (file(values=np.ones(2, np.float32)), "values must have 3 elements"),
    "falling offsets": (file(offsets=np.array([0, 4, 3])), "offsets must ascend from 0 to the 3"),
    "offsets beyond": (file(offsets=np.array([0, 1 << 62, 3])), "offsets must ascend"),
    "negative offset": (file(offsets=np.array([0, -1, 3])), "offsets must ascend"),
    "negative latent": (file(indices=np.array([-1, 4, 0], np.int32)), r"be in \[0, d_sae=10\)"),
    "latent beyond": (file(indices=np.array([1, 10, 0], np.int32)), r"be in \[0, d_sae=10\)"),
    "latent twice": (file(indices=np.array([4, 4, 0], np.int32)), "ascend inside each token"),
    "falling latents": (file(indices=np.array([4, 1, 0], np.int32)), "ascend inside each token"),
}


def make(name, path):
    write(path, CASES[name][0])
