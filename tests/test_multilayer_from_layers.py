"""`from_layers`: one module of several layers, of dictionaries over single ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_same

import gemmascope_fast as gsf
from gemmascope_fast import Crosscoder, CrossLayerTranscoder, JumpReLU

L, D, F = 3, 20, 37
KINDS = ["crosscoder", "clt", "affine clt"]


def dictionary(kind: str, at: int, **options: Any) -> Any:
    """A single layer, every parameter random, its hook points those of layer 5 + 4 at."""
    options = {"activation": JumpReLU(0.1 * 2**at, 0.2), "dtype": torch.float32} | options
    sizes = options.pop("sizes", (D, F))
    if kind == "crosscoder":
        made: Any = gsf.SAE(*sizes, **options)
    else:
        made = gsf.Transcoder(*sizes, affine=kind == "affine clt", **options)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.add_((0.03 if name == "threshold" else 0.2) * torch.randn(p.shape))
    made.metadata = {"l0": 10.0 + at, "model_name": "m", "extra": at}
    made.metadata["hf_hook_point_in"] = f"model.layers.{5 + 4 * at}.output"
    return made


def parts(kind: str, **options: Any) -> list[Any]:
    return [dictionary(kind, at, **options) for at in range(L)]


def joined(kind: str) -> Any:
    return Crosscoder if kind == "crosscoder" else CrossLayerTranscoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_layers_compute(kind: str, dtype: torch.dtype) -> None:
    singles, x = parts(kind, dtype=dtype), torch.randn(4, 13, L, D)
    state = torch.get_rng_state()
    module = joined(kind).from_layers(singles)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(module) is joined(kind) and module.W_dec[1].dtype == dtype
    assert [W.shape[1] for W in module.W_dec] == [L * D, 2 * D, D]
    with torch.no_grad():
        acts = module.encode(x)
        given = (acts,) if kind == "crosscoder" else (acts, x)
        recon = module.decode(*given, dtype=torch.float32)
        for at, single in enumerate(singles):
            own = single.encode(x[:, :, at])
            assert own.nnz > 100
            assert_same(acts[at].indices, own.indices)
            assert_same(acts[at].values, own.values)
            also = (own,) if kind == "crosscoder" else (own, x[:, :, at])
            expected = single.decode(*also, dtype=torch.float32)
            tight = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
            torch.testing.assert_close(recon[:, :, at], expected, **tight)
            block = module.decoder(at)
            assert_same(block[:, 0].detach(), single.W_dec.detach())
            assert not block[:, 1:].any()
        module.W_enc[0].zero_()
        assert bool(singles[0].W_enc.any())
    assert all(p.requires_grad for p in module.parameters())


def test_the_layers_share_a_bandwidth_and_tell_where_they_are(tmp_path: Path) -> None:
    module = Crosscoder.from_layers(tuple(parts("crosscoder")))
    assert module.activation.bandwidth == pytest.approx(0.2)  # of 0.1, 0.2, 0.4
    assert module.metadata == {
        "l0": 33.0,
        "model_name": "m",
        "hf_hook_point_in": "model.layers.{5,9,13}.output",
    }
    module.save_pretrained(tmp_path)
    for p, q in zip(gsf.load(tmp_path).parameters(), module.parameters(), strict=True):
        assert_same(p.detach(), q.detach())
    some = parts("crosscoder", activation=JumpReLU(0.0))
    some[1].metadata = {"model_name": "other", "l0": "many", "hf_hook_point_in": 3}
    module = Crosscoder.from_layers(some)
    assert module.activation.bandwidth == 0 and module.metadata == {}


def test_what_is_no_jumprelu_goes_through_its_own_conversion() -> None:
    semantics = gsf.Semantics.preset("saelens_6")
    singles = parts("crosscoder", activation=gsf.BatchTopK(3.0), semantics=semantics)
    x = torch.randn(50, L, D)
    for at, single in enumerate(singles):
        for _ in range(3):
            single.encode(x[:, at])
        single.eval()
    with torch.no_grad():
        recon = Crosscoder.from_layers([single.to_jumprelu() for single in singles])(x)
        expected = torch.stack([single(x[:, at]) for at, single in enumerate(singles)], 1)
    torch.testing.assert_close(recon, expected, rtol=1e-4, atol=1e-4)


def with_one(kind: str, other: str | None = None, **options: Any) -> list[Any]:
    """Layers of which the second is another."""
    made = parts(kind)
    made[1] = dictionary(other or kind, 1, **options)
    return made


SAELENS = gsf.Semantics.preset("saelens_6")
WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("crosscoder", lambda: dictionary("crosscoder", 0), TypeError, "must be a sequence, got SAE"),
    ("crosscoder", lambda: [], ValueError, "must not be empty"),
    ("crosscoder", lambda: parts("clt"), TypeError, "[0] must be of class SAE, got Transcoder"),
    (
        "clt",
        lambda: with_one("clt", "crosscoder"),
        TypeError,
        "[1] must be of class Transcoder, go",
    ),
    (
        "crosscoder",
        lambda: with_one("crosscoder", sizes=(D + 1, F)),
        ValueError,
        "[1] must have d_in=20, got 21",
    ),
    (
        "crosscoder",
        lambda: with_one("crosscoder", sizes=(D, F + 1)),
        ValueError,
        "[1] must have d_sae=37, got 38",
    ),
    ("clt", lambda: parts("clt", d_out=9), ValueError, "[0] must have d_out=20, got 9"),
    (
        "clt",
        lambda: with_one("clt", dtype=torch.bfloat16),
        ValueError,
        "[1] must have dtype=torch.float32, got torch.bfloat16",
    ),
    (
        "clt",
        lambda: with_one("clt", "affine clt"),
        ValueError,
        "[1] must have affine=False, got Tr",
    ),
    (
        "crosscoder",
        lambda: with_one("crosscoder", activation=gsf.TopK(2)),
        ValueError,
        "[1] must be a JumpReLU of Gemma Scope's semantics, got TopK(k=2)",
    ),
    (
        "crosscoder",
        lambda: with_one("crosscoder", semantics=SAELENS),
        ValueError,
        "pass its to_jumprelu()",
    ),
]


@pytest.mark.parametrize(("kind", "make", "error", "text"), WRONG, ids=[w[3][:40] for w in WRONG])
def test_errors_name_the_layer(kind: str, make: Any, error: type[Exception], text: str) -> None:
    named = f"{joined(kind).__name__}.from_layers: dictionaries"
    with pytest.raises(error, match=f"^{re.escape(named)}.*{re.escape(text)}"):
        joined(kind).from_layers(make())
