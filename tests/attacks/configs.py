"""Attacks on `config.json`, beside valid tensors of width 10."""

import json

from . import write
from .tensors import VALID

DEEP = '{"a":' * 40 + "1" + "}" * 40


def text(**changes):
    return json.dumps({"type": "sae", "architecture": "jump_relu", "width": 10} | changes).encode()


CASES = {  # name: bytes of config.json, the message that refuses them
    "empty": (b"", "must be UTF-8 JSON"),
    "cut": (text()[:-5], "must be UTF-8 JSON"),
    "UTF-16": (text().decode().encode("utf-16"), "must be UTF-8 JSON"),
    "binary": (b"\x00\xff" * 50, "must be UTF-8 JSON"),
    "too big": (text(note="x" * 70_000), "at most 65536 bytes"),
    "nested 40 deep": (DEEP.encode(), "nested at most 16 deep"),
    "nested 30,000 deep": (b"[" * 30_000, "nested at most 16 deep|must be UTF-8 JSON"),
    "a list": (b'[{"type": "sae"}]', "must be a JSON object, got list"),
    "a string": (b'"sae"', "must be a JSON object, got str"),
    "NaN": (b'{"l0": NaN}', "NaN is not JSON"),
    "infinity": (b'{"l0": -Infinity}', "-Infinity is not JSON"),
    "overflowing number": (b'{"l0": 1e999}', "l0 must be a number >= 0, got inf"),
    "number of 5000 digits": (b'{"l0": ' + b"9" * 5000 + b"}", "must be UTF-8 JSON"),
    "duplicate key": (b'{"type": "sae", "type": "transcoder"}', "has a key twice"),
    "duplicate key inside": (b'{"x": {"a": 1, "a": 2}}', "has a key twice"),
    "type unknown": (
        text(type="tokenizer"),
        "type must be sae, transcoder, crosscoder or clt, got 'tok",
    ),
    "type a list": (text(type=["sae"]), "type must be"),
    "type null": (text(type=None), "type must be"),
    "crosscoder": (
        text(type="crosscoder"),
        "type is crosscoder, whose tensors are in params_layer_0",
    ),
    "clt": (text(type="clt"), "type is clt, whose tensors are in params_layer_0.safetensors, "),
    "TopK": (text(architecture="topk"), "architecture must be 'jump_relu', .* got 'topk'"),
    "ReLU": (text(architecture="relu"), "architecture must be"),
    "architecture null": (text(architecture=None), "architecture must be"),
    "activation elsewhere": (text(activation_fn="topk"), "activation_fn must be 'jump_relu'"),
    "b_dec subtracted": (text(apply_b_dec_to_input=True), "apply_b_dec_to_input must be false"),
    "width as text": (text(width="10"), "width must be an int >= 1, got '10'"),
    "width true": (text(width=True), "width must be an int >= 1, got True"),
    "width fractional": (text(width=10.0), "width must be an int"),
    "width negative": (text(width=-10), "width must be an int >= 1"),
    "width another": (text(width=16384), "width is 16384, but w_enc has 10"),
    "width of 4000 digits": (text(width=10**4000), "width must be an int >= 1, got 1000"),
    "l0 negative": (text(l0=-1), "l0 must be a number >= 0"),
    "l0 beyond floats": (text(l0=10**400), "l0 must be a number >= 0, got 1000"),
    "l0 boolean": (text(l0=True), "l0 must be a number >= 0"),
    "l0 as text": (text(l0="20"), "l0 must be a number >= 0"),
    "affine as text": (text(affine_connection="yes"), "affine_connection must be true or false"),
    "affine without tensor": (
        text(affine_connection=True),
        "affine_connection is True, but there is no affine_skip_connection",
    ),
    "model name a list": (text(model_name=["a"]), "model_name must be a string"),
    "hook a number": (text(hf_hook_point_in=3), "hf_hook_point_in must be a string"),
    "latents a number": (
        text(latents=3),
        r"latents must be \[start, stop\] with 0 <= start < stop",
    ),
    "latents backwards": (text(latents=[7, 7]), "latents must be"),
    "latents negative": (text(latents=[-1, 7]), "latents must be"),
    "latents of three": (text(latents=[0, 1, 2]), "latents must be"),
    "latents boolean": (text(latents=[False, 7]), "latents must be"),
    "long value": (text(type="x" * 5000), r"got 'x{70,}\.\.\.$"),
}


def make(name, folder):
    write(folder / "params.safetensors", VALID)
    write(folder / "config.json", CASES[name][0])
