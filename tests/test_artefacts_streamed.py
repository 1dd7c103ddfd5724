"""`load(..., streamed=True)`: results of the loaded module, from the file, in bounded memory."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from attacks import arrays, tensors, write
from attacks.published import layers, scope_1, scope_2, scope_2_layers
from safetensors.numpy import save_file

from gemmascope_fast import SparseActs, StreamedLayers, StreamedSAE, jumprelu_encode, load, ops
from gemmascope_fast.artefacts import blockwise

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*threshold has negative values"),
    pytest.mark.skipif(bool(ops.NATIVE_MISSING), reason="the reference's sums have no fixed order"),
]


def artefact(kind, folder):
    """A folder of that kind and an x for it."""
    random = np.random.default_rng(1)
    if kind in ("clt", "crosscoder"):
        scope_2_layers(folder, layers(3, 20, 70, affine=kind == "clt"), type=kind)
        shape = (2, 15, 3, 20)
    else:
        made = arrays(20, 70, 33)
        if kind == "transcoder":
            made["affine_skip_connection"] = arrays(20, 33)["w_enc"]
        scope_2(folder, made, type="transcoder")
        shape = (2, 15, 20)
    return folder, torch.from_numpy(random.standard_normal(shape).astype(np.float32))


def assert_same(ours, theirs):
    """The same `SparseActs`, or lists of them, bit for bit."""
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_same(*pair)
        return
    assert ours.shape == theirs.shape
    for field in ("offsets", "indices", "values", "gate"):
        a, b = getattr(ours, field), getattr(theirs, field)
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7)), field


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder", "clt"])
@pytest.mark.parametrize("block", [1, 2000, blockwise.BLOCK_BYTES])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_the_results_of_the_loaded_module(kind, block, dtype, tmp_path, monkeypatch):
    """A block of 1 byte is one latent, and one token."""
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", block)
    folder, x = artefact(kind, tmp_path)
    module, streamed = load(folder, dtype=dtype), load(folder, dtype=dtype, streamed=True)
    assert type(streamed) is (StreamedSAE if kind in ("sae", "transcoder") else StreamedLayers)
    acts = streamed.encode(x)
    assert_same(acts, module.encode(x))
    with_x = (x,) if kind in ("transcoder", "clt") else ()
    for recon, expected in (
        (streamed.decode(acts, *with_x), module.decode(acts, *with_x)),
        (streamed.decode(acts, *with_x, dtype=torch.float32),)
        + (module.decode(acts, *with_x, dtype=torch.float32),),
        (streamed(x), module(x)),
    ):
        assert recon.dtype == expected.dtype and torch.equal(recon, expected)
    assert streamed.metadata == module.metadata and streamed.d_sae == module.d_sae


@pytest.mark.parametrize("kind", ["sae", "clt"])
@torch.no_grad()
def test_a_range_of_latents(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", 2000)
    folder, x = artefact(kind, tmp_path)
    options = {"latents": slice(31, 64)}
    module, streamed = load(folder, **options), load(folder, **options, streamed=True)
    assert_same(streamed.encode(x), module.encode(x))
    assert torch.equal(streamed(x), module(x))
    wide = load(folder, **options, streamed=True, dtype=torch.float64)
    torch.testing.assert_close(wide(x.double()), module.double()(x.double()))
    assert streamed.metadata == module.metadata and streamed.metadata["latents"] == [31, 64]


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder", "clt"])
@torch.no_grad()
def test_tokens_that_are_missing_silent_or_nan(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", 2000)
    folder, x = artefact(kind, tmp_path)
    module, streamed = load(folder), load(folder, streamed=True)
    x = x[0]
    x[3] = torch.nan
    x[5].view(-1)[0] = torch.inf
    assert_same(streamed.encode(x), module.encode(x))
    torch.testing.assert_close(streamed(x), module(x), rtol=0, atol=0, equal_nan=True)
    assert streamed(x).isnan()[3].all() and not streamed(x).isnan()[4].any()
    none = x[:0]
    assert_same(streamed.encode(none), module.encode(none))
    assert torch.equal(streamed(none), module(none))
    for file in module.state_dict():
        if "threshold" in file:
            module.get_parameter(file).fill_(torch.inf)
    silent = module.encode(x[4:5])
    with_x = (x[4:5],) if kind in ("transcoder", "clt") else ()
    assert torch.equal(streamed.decode(silent, *with_x), module.decode(silent, *with_x))


def test_padded_activations(tmp_path):
    folder, x = artefact("sae", tmp_path)
    module, streamed = load(folder).requires_grad_(False), load(folder, streamed=True)
    acts = jumprelu_encode(x, module.W_enc, module.b_enc, module.threshold, max_nnz=10_000)
    assert torch.equal(streamed.decode(acts), module.decode(acts))


def test_there_are_no_gradients(tmp_path):
    folder, x = artefact("transcoder", tmp_path)
    streamed = load(folder, streamed=True)
    acts = streamed.encode(x.requires_grad_())
    assert not acts.values.requires_grad and not streamed(x).requires_grad


def test_wrong_arguments(tmp_path):
    folder, x = artefact("clt", tmp_path / "clt")
    clt, sae = load(folder, streamed=True), load(artefact("sae", tmp_path / "s")[0], streamed=True)
    transcoder = load(artefact("transcoder", tmp_path / "t")[0], streamed=True)
    acts = clt.encode(x)
    for call, message in (
        (
            lambda: clt.encode(x[..., :2, :]),
            r"encode: x must have shape \[\*batch, n_layers=3, d_mo",
        ),
        (lambda: clt.decode(acts), "decode: this transcoder has an affine skip connection: pass x"),
        (
            lambda: clt.decode(acts, x[..., :19]),
            r"decode: x must have shape \[\*batch, n_layers=3,",
        ),
        (lambda: clt.decode(acts[:2], x), "decode: acts must be 3 SparseActs, one per layer"),
        (lambda: clt.decode([*acts[:2], acts[2][:1]], x), r"one batch, got \(1, 15, 70\)"),
        (lambda: transcoder.decode(acts[0]), "has an affine skip connection: pass x"),
        (
            lambda: transcoder.decode(acts[0], x[:1, :1, 0, :]),
            r"decode: x must have the shape that was encoded, \(2, 15, 20\), got \(1, 1, 20\)",
        ),
        (lambda: transcoder.decode("acts", x), "decode: acts must be a SparseActs, got str"),
        (lambda: sae.encode(x[..., :19]), r"x must have shape \[\*batch, d_in=20\]"),
        (lambda: sae.decode("acts"), "decode: acts must be 1 SparseActs"),
        (lambda: sae.decode(SparseActs.from_dense(torch.ones(2, 71))), r"d_sae=70\], one batch"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    bad = acts[0].detach()
    for index in (70, -1):
        bad.indices[3] = index
        with pytest.raises(ValueError, match=r"an index of acts is out of range \[0, d_sae=70\)"):
            sae.decode(bad)


def test_an_archive_is_refused(tmp_path):
    folder = scope_1(tmp_path / "params.npz", arrays())
    with pytest.raises(ValueError, match="streamed=True needs a safetensors file.*save_pretrained"):
        load(folder, streamed=True)
    with pytest.raises(TypeError, match="load: streamed must be a bool, got 1"):
        load(folder, streamed=1)


def test_values_are_checked_when_they_are_read(tmp_path):
    made = arrays()
    made["w_dec"][4, 2] = np.nan
    streamed = load(scope_2(tmp_path, made), streamed=True)
    acts = SparseActs.from_dense(torch.eye(10))
    assert torch.equal(
        streamed.decode(acts[:4]), torch.from_numpy(made["w_dec"] + made["b_dec"])[:4]
    )
    with pytest.raises(ValueError, match="decode: .*: w_dec must be finite, and holds NaN"):
        streamed.decode(acts)
    made["b_enc"][0] = np.inf
    with pytest.raises(ValueError, match="load: .*: b_enc must be finite"):
        load(scope_2(tmp_path, made), streamed=True)


def test_files_that_change(tmp_path):
    """Replaced: the old one is read on. Written to: an error. Closed: an error."""
    path = tmp_path / "params.safetensors"
    write(path, tensors.VALID)
    streamed, x = load(tmp_path, streamed=True), torch.randn(5, 6)
    expected = streamed(x)
    write(tmp_path / "new", tensors.safetensors(arrays(seed=1)))
    os.replace(tmp_path / "new", path)
    assert torch.equal(streamed(x), expected)
    streamed.close()
    with pytest.raises(ValueError, match="closed file"):
        streamed(x)
    streamed = load(tmp_path, streamed=True)
    acts = streamed.encode(x)
    write(path, tensors.VALID)
    os.utime(path, ns=(0, 0))
    for call in (lambda: streamed.encode(x), lambda: streamed.decode(acts)):
        with pytest.raises(ValueError, match="changed while it was read; load it again"):
            call()


# ---- a dictionary larger than memory

PEAK = """
import json, sys, time, torch, gemmascope_fast as gsf

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(key))

gsf.jumprelu_encode(torch.ones(1, 4), torch.ones(4, 4), torch.ones(4), torch.ones(4))
torch.set_grad_enabled(False)
before = status("VmRSS")
streamed = gsf.load(sys.argv[1], streamed=True)
x = torch.ones(3, streamed.d_in)
acts = streamed.encode(x)
recon = streamed.decode(acts)
part = gsf.load(sys.argv[1], latents=slice(200_000, 200_100))
print(json.dumps({
    "peak": status("VmHWM") - before,
    "indices": acts.indices[:2].tolist(),
    "values": acts.values[:2].tolist(),
    "recon": recon[0, :3].tolist(),
    "part": [part.encode(x).indices.tolist()[0], part.W_dec[7, 0].item()],
}))
"""


def sparse_file(path, d_in, d_sae, d_out):
    """A transcoder of zeros that occupy no disk, but for two latents, which are active."""
    shapes = {"w_enc": [d_in, d_sae], "w_dec": [d_sae, d_out], "b_enc": [d_sae]}
    shapes |= {"b_dec": [d_out], "threshold": [d_sae]}
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        entries[name] = tensors.entry(shape, [start, end])
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    write(path, len(header).to_bytes(8, "little") + header)
    os.truncate(path, path.stat().st_size + end)
    with open(path, "r+b") as file:

        def put(name, row, column, value):
            place = entries[name]["data_offsets"][0] + 4 * (row * shapes[name][-1] + column)
            file.seek(8 + len(header) + place)
            file.write(np.float32(value).tobytes())

        for latent, weight in ((7, 2), (200_007, 3)):
            put("w_enc", d_in - 1, latent, weight)
            put("w_dec", latent, 0, 10 * weight)
            put("w_dec", latent, 2, weight)
    return end


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_dictionary_larger_than_memory(tmp_path):
    """40 GiB of decoder, 256 MiB of encoder; what is resident is a block of 256 MiB and little."""
    size = sparse_file(tmp_path / "params.safetensors", 256, 262_144, 40_960)
    assert size > 40 << 30
    if os.stat(tmp_path / "params.safetensors").st_blocks * 512 > 1 << 30:
        pytest.skip("the file system stores zeros")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"peak: {found['peak'] / 2**20:.0f} MiB")
    assert found["indices"] == [7, 200_007] and found["values"] == [2.0, 3.0]
    assert found["recon"] == [2 * 20.0 + 3 * 30.0, 0.0, 2 * 2.0 + 3 * 3.0]
    assert found["part"] == [7, 30.0]
    assert found["peak"] < 400 << 20


def test_more_tokens_do_not_need_more_rows_at_a_time(tmp_path, monkeypatch):
    """300 latents of which each token has 100 active: a group of tokens has at most 128 rows."""
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", 128 * 20 * 4)
    save_file(arrays(20, 300), tmp_path / "params.safetensors")
    streamed, module = load(tmp_path, streamed=True), load(tmp_path).requires_grad_(False)
    random = torch.rand(40, 300)
    acts = SparseActs.from_dense(torch.where(random < random.sort(1)[0][:, 100:101], random, 0.0))
    gathered, rows = [], streamed._layer.file.rows

    def count(name, latents):
        gathered.append(latents.shape[0])
        return rows(name, latents)

    monkeypatch.setattr(streamed._layer.file, "rows", count)
    assert torch.equal(streamed.decode(acts), module.decode(acts))
    assert len(gathered) == 40 and set(gathered) == {100}
