"""`save_pretrained(format=...)`: the libraries themselves read the files and compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peer
import pytest
import torch
from peer import D, F, batch, close
from torch import Tensor, nn

import gemmascope_fast as gsf
from gemmascope_fast import Semantics

SEMANTICS = {
    "plain": Semantics(),
    "centred": Semantics.preset("saelens_6"),
    "log": Semantics(threshold="log"),
    "non_strict": Semantics(gate="non_strict"),
}


def made(activation: Any, semantics: Semantics, **options: Any) -> gsf.SAE:
    """Random weights; the thresholds are positive however they are stored."""
    ours = peer.module(activation, semantics, 0, **options).eval()
    with torch.no_grad():
        if ours.threshold is not None and semantics.threshold == "log":
            ours.threshold.log_()
    return ours


def transcoder(activation: Any, affine: bool, d_out: int, semantics: Semantics) -> gsf.Transcoder:
    """A skip that is its own transpose in no way: a wrong orientation shows."""
    torch.manual_seed(1)
    ours = gsf.Transcoder(D, F, activation, d_out=d_out, affine=affine, semantics=semantics)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
        if ours.threshold is not None:
            ours.threshold.abs_()
    return ours.eval()


def dense(ours: gsf.SAE, x: Tensor) -> Tensor:
    acts = ours.encode(x).to_dense()
    assert 0 < (acts != 0).float().mean() < 0.9
    return acts


# ---- SAELens


@pytest.fixture
def sae_lens() -> Any:
    return pytest.importorskip("sae_lens", reason="sae-lens is not installed: see `make peers`")


def check_saelens(library: Any, ours: gsf.SAE, folder: Path, architecture: str, **save: Any) -> Any:
    ours.save_pretrained(folder, format="saelens", **save)
    theirs = library.SAE.load_from_disk(folder)
    assert theirs.cfg.architecture() == architecture
    x = batch(0)
    with torch.no_grad():
        acts = theirs.encode(x)
        mine = dense(ours, x)
        assert torch.equal(mine != 0, acts != 0)
        close(mine, acts, "acts")
        close(ours(x), theirs(x), "recon")
    return theirs


@pytest.mark.parametrize("name", SEMANTICS)
def test_a_jumprelu_of_saelens(name: str, sae_lens: Any, tmp_path: Path) -> None:
    ours = made(gsf.JumpReLU(), SEMANTICS[name])
    theirs = check_saelens(sae_lens, ours, tmp_path, "jumprelu")
    assert theirs.cfg.apply_b_dec_to_input == (name == "centred")


def test_a_batchtopk_of_saelens_after_folding(sae_lens: Any, tmp_path: Path) -> None:
    ours = made(gsf.BatchTopK(5), Semantics.preset("saelens_6")).train()
    for seed in range(3):
        ours.encode(batch(seed))
    folded = ours.eval().to_jumprelu()
    theirs = check_saelens(sae_lens, folded, tmp_path, "jumprelu")
    close(ours(batch(4)), theirs(batch(4)), "recon")


@pytest.mark.parametrize("name", ["plain", "centred"])
def test_a_topk_of_saelens(name: str, sae_lens: Any, tmp_path: Path) -> None:
    ours = made(gsf.TopK(5), SEMANTICS[name])
    theirs = check_saelens(sae_lens, ours, tmp_path, "topk")
    assert theirs.cfg.rescale_acts_by_decoder_norm == (name == "centred")


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("d_out", [D, D + 3])
def test_a_transcoder_of_saelens(affine: bool, d_out: int, sae_lens: Any, tmp_path: Path) -> None:
    ours = transcoder(gsf.JumpReLU(), affine, d_out, Semantics())
    architecture = "jumprelu_skip_transcoder" if affine else "jumprelu_transcoder"
    check_saelens(sae_lens, ours, tmp_path, architecture)


def test_16_bits_keep_the_thresholds_of_saelens(sae_lens: Any, tmp_path: Path) -> None:
    ours = made(gsf.JumpReLU(), Semantics()).to(torch.bfloat16)
    theirs = check_saelens(sae_lens, ours.float(), tmp_path, "jumprelu", dtype=torch.bfloat16)
    assert torch.equal(theirs.threshold, ours.threshold)


def test_metadata_for_saelens(sae_lens: Any, tmp_path: Path) -> None:
    ours = transcoder(gsf.JumpReLU(), False, D, Semantics())
    points = [f"model.layers.7.{n}_feedforward_layernorm.output" for n in ("pre", "post")]
    ours.metadata = {"l0": 20, "hf_hook_point_in": points[0], "hf_hook_point_out": points[1]}
    ours.save_pretrained(tmp_path, format="saelens", model_name="google/gemma-3-1b-pt")
    found = sae_lens.SAE.load_from_disk(tmp_path).cfg.metadata
    assert (found.hf_hook_name, found.hf_hook_name_out) == tuple(points)
    assert (found.hook_name, found.hook_name_out) == (
        "blocks.7.hook_mlp_in",
        "blocks.7.hook_mlp_out",
    )
    assert (found.model_name, found.l0) == ("google/gemma-3-1b-pt", 20)


@pytest.mark.parametrize(
    "architecture", ["standard", "jumprelu", "topk", "skip_transcoder", "jumprelu_skip_transcoder"]
)
def test_what_saelens_writes(architecture: str, sae_lens: Any, tmp_path: Path) -> None:
    """Negative thresholds too, which the library rectifies."""
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "k": 5, "d_out": D + 1}
    config["apply_b_dec_to_input"] = "transcoder" not in architecture
    theirs = sae_lens.SAE.from_dict(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
        theirs.save_model(tmp_path)
        ours, x = gsf.load(tmp_path), batch(0)
        assert torch.equal(dense(ours, x) != 0, theirs.encode(x) != 0)
        close(ours(x), theirs(x), "recon")


# ---- sparsify


@pytest.fixture
def sparsify() -> Any:
    return pytest.importorskip("sparsify", reason="eai-sparsify is not installed: see `make peers`")


def check_sparsify(library: Any, ours: gsf.SAE, folder: Path, **save: Any) -> Any:
    ours.save_pretrained(folder, format="sparsify", **save)
    theirs: nn.Module = library.SparseCoder.load_from_disk(folder)
    x = batch(0)
    with torch.no_grad():
        found = theirs.encode(x)
        acts = torch.zeros(len(x), F).scatter(1, found.top_indices, found.top_acts)
        mine = dense(ours, x)
        assert torch.equal(mine != 0, acts != 0)
        close(mine, acts, "acts")
        close(ours(x), theirs(x).sae_out, "recon")
    return theirs


@pytest.mark.parametrize("preset", ["gemma_scope_2", "sparsify_1_3"])
def test_an_sae_of_sparsify(preset: str, sparsify: Any, tmp_path: Path) -> None:
    """One that is not centred becomes one that is."""
    theirs = check_sparsify(sparsify, made(gsf.TopK(5), Semantics.preset(preset)), tmp_path)
    assert not theirs.cfg.transcode and theirs.cfg.k == 5


@pytest.mark.parametrize("affine", [False, True])
def test_a_transcoder_of_sparsify(affine: bool, sparsify: Any, tmp_path: Path) -> None:
    ours = transcoder(gsf.TopK(5), affine, D, Semantics.preset("sparsify_1_3"))
    theirs = check_sparsify(sparsify, ours, tmp_path)
    assert theirs.cfg.transcode and theirs.cfg.skip_connection == affine


def test_16_bits_of_sparsify(sparsify: Any, tmp_path: Path) -> None:
    """The file's dtype is the coder's; by default it does not round the biases."""
    ours = made(gsf.TopK(5), Semantics.preset("sparsify_1_3")).to(torch.bfloat16).float()
    assert check_sparsify(sparsify, ours, tmp_path / "wide").dtype == torch.float32
    ours.to(torch.bfloat16).save_pretrained(tmp_path / "a", format="sparsify")
    assert sparsify.SparseCoder.load_from_disk(tmp_path / "a").dtype == torch.float32
    ours.save_pretrained(tmp_path / "b", format="sparsify", dtype=torch.bfloat16)
    assert sparsify.SparseCoder.load_from_disk(tmp_path / "b").dtype == torch.bfloat16


@pytest.mark.parametrize("transcode", [False, True])
def test_what_sparsify_writes(transcode: bool, sparsify: Any, tmp_path: Path) -> None:
    options = {"transcode": transcode, "skip_connection": transcode}
    theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=5, **options))
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
        theirs.save_to_disk(tmp_path)
        ours, x = gsf.load(tmp_path), batch(0)
        close(ours(x), theirs(x).sae_out, "recon")
