"""Attacks on `params.safetensors`: its header, and tensors that do not fit together."""

import json

import numpy as np

from . import arrays, write

CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "int32": "I32"}
CODES |= {"int64": "I64"}


def safetensors(tensors, header=None, **codes):
    """The format written by hand; `header` overrides entries, `codes` the dtype codes."""
    entries, body = {}, b""
    for name, array in tensors.items():
        start, body = len(body), body + array.tobytes()
        code = codes.get(name, CODES.get(array.dtype.name))
        offsets = [start, len(body)]
        entries[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": offsets}
    return framed(json.dumps(entries | (header or {})).encode(), body)


def framed(header, body=b"", length=None):
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAE = arrays()
VALID = safetensors(SAE)
BF16 = SAE | {"w_dec": SAE["w_dec"].astype(np.float16)}
NAN = np.where(SAE["w_enc"] > 1, np.nan, SAE["w_enc"]).astype(np.float32)
COMPLETE = "must be a complete safetensors file"


def duplicated(first, second):
    """`w_enc` described twice, by what overrides its entry."""
    size = int.from_bytes(VALID[:8], "little")
    entries = json.loads(VALID[8 : 8 + size])
    twice = [json.dumps({"w_enc": entries["w_enc"] | e})[1:-1] for e in (first, second)]
    del entries["w_enc"]
    header = "{" + ",".join([*twice, json.dumps(entries)[1:]])
    return framed(header.encode(), VALID[8 + size :])


CASES = {  # name: bytes of params.safetensors, the message that refuses them
    "empty file": (b"", COMPLETE),
    "seven bytes": (b"\0" * 7, COMPLETE),
    "header of 2^63 bytes": (framed(b"{}", length=1 << 63), "header must have at most"),
    "header of 90 MB": (framed(b"{}", length=90_000_000), "header must have at most"),
    "an array of numpy": (b"\x93NUMPY\x01\0v\0{'descr'", "not a safetensors file: the header must"),
    "header beyond the file": (framed(b"{}", length=1000), COMPLETE),
    "header cut": (VALID[:60], COMPLETE),
    "body cut": (VALID[:-1], COMPLETE),
    "body too long": (VALID + b"\0", COMPLETE),
    "header is no JSON": (framed(b"\xff" * 64), COMPLETE),
    "header nested": (framed(b'{"a":' + b"[" * 100_000), COMPLETE),
    "pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "header must have at most|complete"),
    "overlap": (safetensors(SAE, {"b_dec": entry([6], [0, 24])}), COMPLETE),
    "shape beyond the data": (safetensors(SAE, {"w_enc": entry([1 << 62, 8], [0, 240])}), COMPLETE),
    "negative shape": (safetensors(SAE, {"w_enc": entry([-6, -10], [0, 240])}), COMPLETE),
    "duplicate key": (duplicated({}, {}), "header: an object has a key twice"),
    "duplicate key, shorter": (duplicated({"data_offsets": [0, 8]}, {}), "has a key twice"),
    "unknown dtype": (safetensors(SAE, w_enc="Q8"), COMPLETE),
    "integers": (safetensors(SAE, w_enc="I32"), "w_enc must be floating point.*I32"),
    "8 bits": (
        safetensors(SAE | {"b_dec": np.zeros(6, np.uint8)}, b_dec="F8_E4M3"),
        "b_dec must be floating point, 16 bits or more, got F8_E4M3",
    ),
    "no tensors": (framed(b"{}"), "lacks w_enc, w_dec"),
    "no threshold": (
        safetensors({k: v for k, v in SAE.items() if k != "threshold"}),
        "lacks threshold",
    ),
    "unknown tensor": (
        safetensors(SAE | {"log_scale": SAE["b_dec"]}),
        "has unknown 'log_scale'",
    ),
    "uppercase": (safetensors({k.upper(): v for k, v in SAE.items()}), "lacks w_enc"),
    "decoder of several layers": (
        safetensors(SAE | {"w_dec": np.zeros((10, 3, 6), np.float32)}),
        "w_dec must be a matrix",
    ),
    "transposed decoder": (
        safetensors(SAE | {"w_dec": SAE["w_dec"].T.copy()}),
        r"w_dec must have shape \[10, 10\] beside w_enc \[6, 10\]",
    ),
    "encoder of no latents": (
        safetensors(SAE | {"w_enc": np.zeros((6, 0), np.float32)}),
        "w_enc must be a matrix, no size 0",
    ),
    "bias as a matrix": (
        safetensors(SAE | {"b_enc": SAE["b_enc"][None]}),
        r"b_enc must have shape \[10\].*got \[1, 10\]",
    ),
    "b_dec of the wrong side": (
        safetensors(SAE | {"b_dec": SAE["b_enc"]}),
        r"b_dec must have shape \[6\]",
    ),
    "skip of the wrong shape": (
        safetensors(SAE | {"affine_skip_connection": SAE["w_enc"]}),
        r"affine_skip_connection must have shape \[6, 6\]",
    ),
    "two dtypes": (safetensors(BF16), "choose one by dtype="),
    "NaN": (safetensors(SAE | {"w_enc": NAN}), "w_enc must be finite, and holds NaN"),
    "infinite bias": (
        safetensors(SAE | {"b_dec": np.full(6, -np.inf, np.float32)}),
        "b_dec must be finite",
    ),
    "threshold beyond float32": (
        safetensors(SAE | {"threshold": np.full(10, -1e39)}),
        "threshold has values beyond the range of torch.float32",
    ),
}


def make(name, folder):
    write(folder / "params.safetensors", CASES[name][0])
