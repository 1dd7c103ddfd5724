"""Attacks on folders of SAELens and sparsify: tensors and `cfg.json`."""

import json

import numpy as np

from . import arrays, write
from .tensors import entry, framed, safetensors

ARRAYS = arrays()
CONFIGS = {
    "saelens": {
        "architecture": "jumprelu",
        "d_in": 6,
        "d_sae": 10,
        "apply_b_dec_to_input": False,
        "metadata": {"sae_lens_version": "6.54.12"},
    },
    "sparsify": {"activation": "topk", "num_latents": 10, "k": 3, "d_in": 6},
}
WEIGHTS = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors"}
TENSORS = {
    "saelens": {k.replace("w_", "W_"): v for k, v in ARRAYS.items()},
    "sparsify": {
        "encoder.weight": ARRAYS["w_enc"].T.copy(),
        "encoder.bias": ARRAYS["b_enc"],
        "W_dec": ARRAYS["w_dec"],
        "b_dec": ARRAYS["b_dec"],
    },
}
TENSORS["saelens"]["threshold"] = abs(ARRAYS["threshold"])
VALID = {peer: safetensors(tensors) for peer, tensors in TENSORS.items()}
COMPLETE = "must be a complete safetensors file"


def duplicated(data, name):
    """The file with a tensor described twice."""
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    twice = json.dumps({name: entries[name]})[:-1] + "," + json.dumps(entries)[1:]
    return framed(twice.encode(), data[8 + size :])


def _tensors(peer, encoder, bias):
    """Attacks on the tensors, whatever their names."""
    valid, file = TENSORS[peer], VALID[peer]

    def replaced(name, array):
        return safetensors(valid | {name: array})

    half, nan = valid[encoder].astype(np.float16), np.full(10, np.nan, np.float32)
    size = valid[encoder].nbytes
    return {
        "empty": (b"", COMPLETE),
        "header of 90 MB": (framed(b"{}", length=90_000_000), "header must have at most"),
        "header cut": (file[:60], COMPLETE),
        "cut": (file[:-1], COMPLETE),
        "overlap": (safetensors(valid, {"b_dec": entry([6], [0, 24])}), COMPLETE),
        "oversized": (safetensors(valid, {encoder: entry([1 << 40, 6], [0, size])}), COMPLETE),
        "duplicate key": (duplicated(file, "b_dec"), "header: an object has a key twice"),
        "another width": (replaced(bias, ARRAYS["b_enc"][:9]), rf"{bias} must be .* \[10\]"),
        "transposed": (replaced(encoder, valid[encoder].T.copy()), f"{encoder} must be floating"),
        "integers": (replaced(bias, np.arange(10, dtype=np.int32)), f"{bias} must .* got I32"),
        "two dtypes": (replaced(encoder, half), "choose one by dtype="),
        "NaN": (replaced(bias, nan), "b_enc must be finite, and holds NaN"),
        "unknown": (replaced("extra", nan), "'extra' is unknown"),
        "missing": (safetensors({bias: valid[bias]}), "is missing"),
    }


def _thresholds(value):
    threshold = TENSORS["saelens"]["threshold"].copy()
    threshold[4] = value
    return safetensors(TENSORS["saelens"] | {"threshold": threshold})


def _config(peer, **changes):
    return json.dumps(CONFIGS[peer] | changes).encode()


def _configs(peer):
    """Attacks on the config, beside valid tensors."""
    return {
        "config empty": (b"", "must be UTF-8 JSON"),
        "config a list": (b"[]", "must be a JSON object, got list"),
        "config with NaN": (b'{"d_in": NaN}', "NaN is not JSON"),
        "config with a key twice": (b'{"d_in": 6, "d_in": 6}', "has a key twice"),
        "config nested": (b"[" * 30_000, "nested at most 16 deep|must be UTF-8 JSON"),
        "config too big": (_config(peer, note="x" * 70_000), "at most 65536 bytes"),
        "d_in as text": (_config(peer, d_in="6"), r"d_in must be an int in \[1, .*, got '6'"),
        "d_in huge": (_config(peer, d_in=10**400), "d_in must be an int in"),
        "latents a number": (_config(peer, latents=3), r"latents must be \[start, stop\]"),
        "latents as text": (_config(peer, latents=["a", 2]), r"latents must be \[start, stop\]"),
        "l0 as text": (_config(peer, l0="20"), "l0 must be a number >= 0"),
        "l0 beyond floats": (_config(peer, l0=10**400), "l0 must be a number >= 0"),
        "model name a list": (_config(peer, model_name=[1]), "model_name must be a string"),
    }


CASES = {  # peer and name: bytes of the tensors, bytes of the config, the message that refuses them
    **{
        ("saelens", name): (data, _config("saelens"), message)
        for name, (data, message) in {
            **_tensors("saelens", "W_enc", "b_enc"),
            "NaN threshold": (_thresholds(np.nan), "threshold must be finite"),
            "threshold of -inf": (_thresholds(-np.inf), "threshold must be finite"),
        }.items()
    },
    **{
        ("sparsify", name): (data, _config("sparsify"), message)
        for name, (data, message) in _tensors("sparsify", "encoder.weight", "encoder.bias").items()
    },
    **{
        (peer, name): (VALID[peer], text, message)
        for peer in VALID
        for name, (text, message) in _configs(peer).items()
    },
    **{
        ("saelens", f"version {version!r}"): (
            VALID["saelens"],
            _config("saelens", sae_lens_version=version),
            "sae_lens_version must be a string, got",
        )
        for version in (6, 6.5, True, [6], {"major": 6})
    },
    ("saelens", "version inside"): (
        VALID["saelens"],
        _config("saelens", metadata={"sae_lens_version": 6}),
        "sae_lens_version must be a string, got 6",
    ),
    ("sparsify", "expansion beyond"): (
        VALID["sparsify"],
        _config("sparsify", num_latents=0, expansion_factor=2**31 - 1),
        r"encoder.weight must be floating point of shape \[12884901882, 6\]",
    ),
}


def make(case, folder):
    data, text, _ = CASES[case]
    write(folder / WEIGHTS[case[0]], data)
    write(folder / "cfg.json", text)
