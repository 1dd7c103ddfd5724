"""Valid files with bytes changed: each reader refuses them or returns finite values of the shapes.

`test_artefacts_hostile` does the same for single-layer files of Gemma Scope 1 and 2.
"""

import json

import pytest
import torch
from attacks import acts, peers, write
from attacks.published import layers
from attacks.tensors import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from test_artefacts_hostile import CUTS, EDITS, mutate

import gemmascope_fast as gsf
from gemmascope_fast.commands.tokens import TokenFile

pytestmark = pytest.mark.filterwarnings("ignore:.*threshold has negative values")
fuzz = settings(max_examples=60, derandomize=True, deadline=None, database=None)
CLT = {"type": "clt", "architecture": "jump_relu", "width": 30, "l0": 3}
LAYERS = {
    f"params_layer_{i}.safetensors": safetensors(t) for i, t in enumerate(layers(affine=True))
}
FOLDERS = {
    "clt": LAYERS | {"config.json": json.dumps(CLT).encode()},
    **{
        peer: {name: peers.VALID[peer], "cfg.json": peers._config(peer, l0=3, latents=[2, 12])}
        for peer, name in peers.WEIGHTS.items()
    },
}


@st.composite
def damages(draw):
    """`change(data)`: bytes changed in the header or anywhere, an element not finite, the end cut.

    Changed bytes alone hardly ever make a NaN.
    """
    edits, cut, head = draw(EDITS), draw(CUTS), draw(st.booleans())
    where = draw(st.floats(0, 1, exclude_max=True))
    special = draw(st.sampled_from([b"", b"", b"\0\0\xc0\x7f", b"\0\0\x80\xff"]))  # NaN, -inf

    def change(data):
        start = 8 + int.from_bytes(data[:8], "little") if data[:1] != b"{" else len(data)
        if special and start < len(data):
            at = start + int(where * (len(data) - start)) // 4 * 4
            return data[:at] + special + data[at + 4 :]
        size = start if head else len(data)
        return mutate(data[:size], edits, 0) + data[size : max(size, len(data) - cut)]

    return change


def parameters(module):
    """Name: shape."""
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


@pytest.mark.parametrize("kind", FOLDERS)
@fuzz
@given(damage=damages(), which=st.integers(0, 9))
def test_folders(kind, damage, which, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / kind
    for name, data in FOLDERS[kind].items():
        write(folder / name, data)
    valid = parameters(gsf.load(folder))
    name = sorted(FOLDERS[kind])[which % len(FOLDERS[kind])]
    write(folder / name, damage(FOLDERS[kind][name]))
    for options in ({}, {"latents": slice(2, 5)}):
        try:
            module = gsf.load(folder, **options)
        except ValueError as error:
            assert str(error).startswith("load: ") and len(str(error)) < 600
            continue
        assert options or parameters(module) == valid
        assert module.d_sae == (3 if options else 10)
        assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
        json.dumps(module.metadata)


@fuzz
@given(damage=damages())
def test_activations(damage, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "acts"
    write(path, damage(acts.VALID))
    try:
        found = gsf.load_acts(path)
    except ValueError as error:
        assert str(error).startswith("load_acts: ") and len(str(error)) < 600
        return
    assert found.nnz == 3 and found.n == 2
    assert found.indices.max() < found.d_sae < 2**31
    assert found[1].nnz + found[0].nnz == 3  # in order


@fuzz
@given(damage=damages())
def test_tokens(damage, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tokens"
    write(path, damage(peers.VALID["saelens"]))
    try:
        file = TokenFile(path, "W_dec", (6,))
    except ValueError as error:
        assert len(str(error)) < 600
        return
    assert file.rows(7, 10).shape == (3, 6) and file.n == 10
