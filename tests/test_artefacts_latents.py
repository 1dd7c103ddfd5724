"""`load(..., latents=slice(a, b))`: those latents, and nothing else read of a safetensors file."""

import os

import numpy as np
import pytest
import torch
from attacks import arrays
from attacks.published import dense_layers, layers, scope_1, scope_2, scope_2_layers

from gemmascope_fast import load
from gemmascope_fast.artefacts import gemma_scope_2, validate

pytestmark = pytest.mark.filterwarnings("ignore:.*threshold has negative values")
AXES = {"w_enc": 1, "w_dec": 0, "b_enc": 0, "threshold": 0}


def sliced(tensors, latents):
    """The tensors of these latents alone."""
    return {
        name: t.take(np.arange(t.shape[AXES[name]])[latents], AXES[name]) if name in AXES else t
        for name, t in tensors.items()
    }


def assert_alike(module, expected):
    ours, theirs = module.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) and ours[name].stride() == value.stride(), name


@pytest.mark.parametrize(
    "latents", [slice(0, 16), slice(None, 1), slice(69, 70), slice(33, None), slice(7, 41, 1)]
)
@pytest.mark.parametrize("format", ["npz", "fortran", "safetensors", "layers"])
@pytest.mark.parametrize("block", [1, validate.BLOCK_BYTES])
def test_a_range_is_a_smaller_artefact(latents, format, block, tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "BLOCK_BYTES", block)
    if format == "layers":
        shards = layers(3, 20, 70, affine=True)
        folder = scope_2_layers(tmp_path / "a", shards, type="clt")
        small = scope_2_layers(tmp_path / "b", [sliced(s, latents) for s in shards], type="clt")
    elif format == "safetensors":
        tensors = arrays(20, 70, 33) | {"affine_skip_connection": arrays(20, 33)["w_enc"]}
        folder = scope_2(tmp_path / "a", tensors)
        small = scope_2(tmp_path / "b", sliced(tensors, latents))
    else:
        stored = arrays(20, 70)
        if format == "fortran":
            stored = {k: np.asfortranarray(t) for k, t in stored.items()}
        folder = scope_1(tmp_path / "a" / "params.npz", stored)
        small = scope_1(tmp_path / "b" / "params.npz", sliced(stored, latents))
    module = load(folder, latents=latents)
    assert_alike(module, load(small))
    start, stop, _ = latents.indices(70)
    assert module.metadata["latents"] == [start, stop] and module.d_sae == stop - start


def test_a_prefix_of_several_layers_reconstructs_by_itself(tmp_path):
    shards = layers(3)
    module = load(scope_2_layers(tmp_path, shards, type="crosscoder"), latents=slice(0, 4))
    x = np.random.default_rng(1).standard_normal((30, 3, 6)).astype(np.float32)
    expected = dense_layers([sliced(shard, slice(0, 4)) for shard in shards], x)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach(), expected, atol=1e-5)


def test_metadata_name_the_latents_of_the_published_artefact(tmp_path):
    tensors = arrays()
    folder = scope_2(tmp_path / "a", tensors, type="sae", width=10, l0=3)
    assert "latents" not in load(folder).metadata
    assert "latents" not in load(folder, latents=slice(0, 10)).metadata
    part = load(folder, latents=slice(2, 9))
    part.save_pretrained(tmp_path / "b")
    assert load(tmp_path / "b").metadata == {"l0": 3, "latents": [2, 9]}
    again = load(tmp_path / "b", latents=slice(1, 3))
    assert again.metadata["latents"] == [3, 5]
    assert torch.equal(again.W_enc, torch.from_numpy(tensors["w_enc"][:, 3:5]))


@pytest.mark.parametrize("d_sae, latents", [(4096, slice(8, 24)), (300_000, slice(0, 1))])
def test_only_those_bytes_are_read(d_sae, latents, tmp_path, monkeypatch):
    folder = scope_2(tmp_path, arrays(20, d_sae))
    whole, read = [], gemma_scope_2.os.preadv

    def count(descriptor, buffers, offset):
        done = read(descriptor, buffers, offset)
        whole.append(done)
        return done

    monkeypatch.setattr(gemma_scope_2.os, "preadv", count)
    module = load(folder, latents=latents)
    assert sum(whole) == sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize(
    "latents, error, message",
    [
        (slice(0, 11), ValueError, r"0 <= start < stop <= d_sae=10 and no step, got slice\(0, 11"),
        (slice(-4, None), ValueError, r"latents must be slice\(start, stop\)"),
        (slice(None, -1), ValueError, r"latents must be slice\(start, stop\)"),
        (slice(3, 3), ValueError, r"latents must be slice\(start, stop\)"),
        (slice(10, None), ValueError, r"latents must be slice\(start, stop\)"),
        (slice(0, 8, 2), ValueError, "and no step"),
        (slice(8, 0, -1), ValueError, "and no step"),
        (slice(0.0, 4), TypeError, r"latents must be a slice of ints, got slice\(0.0"),
        (slice(True, 4), TypeError, "latents must be a slice of ints"),
        (16, TypeError, "latents must be a slice or None, got int"),
        ([0, 1], TypeError, "latents must be a slice or None, got list"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_other_latents_are_refused(latents, error, message, streamed, tmp_path):
    folder = scope_2(tmp_path, arrays())
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=f"load: .*{message}"):
        load(folder, latents=latents, streamed=streamed)
    assert len(os.listdir("/proc/self/fd")) == open_files
