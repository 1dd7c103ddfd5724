"""Untrusted files of the other formats: SAELens, sparsify."""

import tracemalloc

import pytest
import torch
from attacks import peers, write

import gemmascope_fast as gsf


def refused(read, path, message, op="load"):
    """`read` refuses by one short error, before it allocates what is declared."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is ValueError and peak < 16 << 20
    assert str(caught.value).startswith(f"{op}: ") and len(str(caught.value)) < 600


@pytest.mark.parametrize("case", peers.CASES, ids="-".join)
def test_attack_on_a_peer(case, tmp_path):
    peers.make(case, tmp_path)
    refused(gsf.load, tmp_path, peers.CASES[case][2])


@pytest.mark.parametrize("peer", peers.VALID)
def test_the_attacked_peers_are_valid_otherwise(peer, tmp_path):
    write(tmp_path / peers.WEIGHTS[peer], peers.VALID[peer])
    write(tmp_path / "cfg.json", peers._config(peer, l0=20, latents=[3, 13]))
    module = gsf.load(tmp_path, latents=slice(2, 5))
    assert torch.equal(module.W_enc, torch.from_numpy(peers.ARRAYS["w_enc"][:, 2:5]))
    assert module.metadata["latents"] == [5, 8]


@pytest.mark.parametrize("version, old", [("5.10.7", True), ("6.0.0", False), ("10.1", False)])
def test_versions_of_saelens_are_numbers(version, old, tmp_path):
    """Before 6 the activation had a field of its own; 10 is not before 6."""
    config = {"activation_fn": "tanh-relu", "metadata": {"sae_lens_version": version}}
    write(tmp_path / peers.WEIGHTS["saelens"], peers.VALID["saelens"])
    write(tmp_path / "cfg.json", peers._config("saelens", **config))
    if old:
        refused(gsf.load, tmp_path, "activation_fn must be relu or topk")
    else:
        assert gsf.load(tmp_path).d_sae == 10
