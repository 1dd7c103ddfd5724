"""The recorded trace: what it holds, how it is sampled to other batch sizes, how it is recorded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import firing_trace  # noqa: E402

import gemmascope_fast as gsf  # noqa: E402


def test_the_trace_is_small_and_states_its_dictionary() -> None:
    trace = firing_trace.recorded()
    assert firing_trace.FILE.stat().st_size < 200_000
    assert trace.d_sae == 8192 and len(trace.counts) == 2048
    assert 20 < float(trace.counts.float().mean()) < 45
    parts = trace.indices.split(trace.counts.tolist())
    assert all((latents.diff() > 0).all() for latents in parts)


def test_it_gives_whole_tokens_none_twice_before_all_came_once() -> None:
    counts, indices = torch.tensor([2, 0, 1, 3]), torch.tensor([1, 5, 2, 0, 3, 4])
    trace = firing_trace.Trace(counts, indices, 6)
    tokens = {(1, 5), (), (2,), (0, 3, 4)}
    found, latents = trace.sample(10, torch.Generator().manual_seed(0))
    rows = [tuple(part.tolist()) for part in latents.split(found.tolist())]
    assert set(rows[:4]) == set(rows[4:8]) == tokens and set(rows[8:]) < tokens
    orders = {
        tuple(trace.sample(4, torch.Generator().manual_seed(s))[0].tolist()) for s in range(8)
    }
    assert len(orders) > 1, "the order is drawn"


def test_a_file_whose_parts_disagree_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trace.safetensors"
    parts = {"counts": torch.tensor([1, 1]), "indices": torch.tensor([7, 3])}
    save_file(parts, file, {"d_sae": "7"})
    with pytest.raises(ValueError, match="counts, indices and d_sae=7 disagree"):
        firing_trace.recorded(file)


def test_recording_keeps_the_latents_of_held_out_tokens(tmp_path: Path) -> None:
    """A demo's folder in small: its dictionary and its activations."""
    torch.manual_seed(0)
    sae = gsf.SAE(16, 64, gsf.JumpReLU(bandwidth=0.1, init_threshold=1.0))
    demo, out = tmp_path / "demo", tmp_path / "trace.safetensors"
    sae.save_pretrained(demo / "sae")
    x = torch.randn(400, 16)
    empty = {"tokens": torch.zeros(400).long(), "spans": torch.zeros(400, 2).long()}
    (demo / "work").mkdir()
    held = {"x": x, **empty, "block": torch.tensor(10)}
    save_file(held, demo / "work" / "activations-1.safetensors")
    assert firing_trace.main([str(demo), "--out", str(out), "--tokens", "5"]) == 0
    trace = firing_trace.recorded(out)
    held_out = torch.cat([x[100:110], x[300:310]])  # the 11th of every 20 blocks
    with torch.no_grad():
        expected = sae.encode(held_out[[0, 4, 9, 14, 19]])
    assert torch.equal(trace.counts, expected.offsets.diff().long()) and trace.d_sae == 64
    assert torch.equal(trace.indices, expected.indices.long()) and len(trace.indices) > 5
    with pytest.raises(FileNotFoundError, match="holds no finished demo: run `make demo`"):
        firing_trace.record(tmp_path, out, 5)
