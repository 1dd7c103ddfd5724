"""`gsf.explain()`: what it advises, with each condition made and unmade."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from screening import threads
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import explaining, ops

pytestmark = pytest.mark.skipif(bool(ops.NATIVE_MISSING), reason="the library is not built")
D, F = 256, 960


@pytest.fixture(autouse=True)
def screens(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Screening by its own rules, no note of another test, and the same width everywhere."""
    monkeypatch.delenv("GEMMASCOPE_FAST_SCREEN", raising=False)
    explaining._thread.__dict__.clear()
    yield
    explaining._thread.__dict__.clear()


def rows() -> Tensor:
    return torch.randn(F, D)


def told(x: Tensor, W_enc: Tensor | gsf.PackedEncoder) -> gsf.Explanation:
    gsf.topk_encode(x, W_enc, torch.zeros(F), 4)
    return gsf.explain()


def advised(said: gsf.Explanation, words: str) -> bool:
    found = [text for text in said.advice if words in text]
    assert len(found) <= 1 and all(f"-> {text[:40]}" in str(said) for text in found)
    assert max(map(len, str(said).splitlines())) <= 100
    return bool(found)


def needs_int8() -> None:
    if not told(torch.randn(64, D), rows().t()).int8:
        pytest.skip("this processor has no int8 dot products")


def test_float64_is_told_although_the_library_did_not_serve_it() -> None:
    x, W = torch.randn(40, D), rows()
    said = told(x.double(), W.t().double())
    assert (said.op, said.path, said.n, said.d_in, said.d_sae) == (
        "topk_encode",
        "reference",
        *(40, D, F),
    )
    assert advised(said, "pass float32, bfloat16 or float16")
    assert "plain PyTorch" in str(said) and "float64 is served by the reference" in str(said)
    said = told(x, W.t())
    assert said.path in ("screened", "direct") and not advised(said, "pass float32")


def test_weights_that_autocast_converts_are_told() -> None:
    x, W = torch.randn(40, D), rows()
    words = "autocast converts W_enc to bfloat16 in every call"
    with torch.autocast("cpu", torch.bfloat16):
        said = told(x, gsf.pack(W.t()))
        assert said.cast == "bfloat16" and not said.packed and advised(said, words)
        said = told(x, W.bfloat16().t())
        assert said.cast == "" and not advised(said, words)
    said = told(x, gsf.pack(W.t()))
    assert said.cast == "" and said.packed and not advised(said, words)


def test_a_row_major_encoder_is_told() -> None:
    x, W = torch.randn(40, D), rows()
    for W_enc, layout in (
        (W.t(), "feature-major"),
        (W.t().contiguous(), "row-major"),
        (torch.randn(F, 2 * D)[:, ::2].t(), "strided"),
    ):
        said = told(x, W_enc)
        assert said.layout == layout
        assert advised(said, f"W_enc is {layout}: store its transpose") == (W_enc.stride(0) != 1)
    again = told(x, W.t().contiguous().t().contiguous().t())
    assert again.layout == "feature-major"


def test_few_tokens_want_packed_weights() -> None:
    needs_int8()
    W = rows()
    for n, W_enc, expected in (
        (3, W.t(), True),
        (3, gsf.pack(W.t()), False),
        (256, W.t(), False),
    ):
        assert advised(told(torch.randn(n, D), W_enc), "gsf.pack(W_enc) once") == expected


def test_screening_switched_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W = torch.randn(64, D), rows()
    assert not advised(told(x, W.t()), "unset GEMMASCOPE_FAST_SCREEN")
    monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", "never")
    assert advised(told(x, W.t()), "unset GEMMASCOPE_FAST_SCREEN")


def test_a_common_part_of_x_wants_a_centre() -> None:
    needs_int8()
    W, common = rows(), 8 * torch.randn(D)
    x, b_enc = torch.randn(64, D) + common, -(common @ W.t())
    theta = torch.full((F,), 40.0)
    found = {}
    for name, W_enc in (
        ("packed", gsf.pack(W.t())),
        ("centred", gsf.pack(W.t(), center=x.mean(0))),
        ("neither", W.t()),
    ):
        gsf.jumprelu_encode(x, W_enc, b_enc, theta)
        found[name] = advised(gsf.explain(), "gsf.pack(W_enc, center=x.mean(0))")
    assert found == {"packed": True, "centred": False, "neither": False}
    gsf.jumprelu_encode(torch.randn(64, D), gsf.pack(W.t()), torch.zeros(F), theta)
    assert not advised(gsf.explain(), "center=x.mean(0)")


def test_nothing_is_advised_before_the_first_encode(run_python: Callable[..., str]) -> None:
    code = "import gemmascope_fast as g; print(g.explain().advice, g.explain(), sep='|')"
    expected = "()|no encoder of the compiled library has run in this thread"
    assert run_python(code, GEMMASCOPE_FAST_BACKEND="") == expected


def test_a_note_ends_with_the_next_encode_even_in_a_graph() -> None:
    x, W = torch.randn(40, D), rows()
    assert told(x.double(), W.t().double()).path == "reference"
    # what a compiled graph calls
    torch.ops.gemmascope_fast.topk_encode(x, W.t(), torch.zeros(F), 4, False, None)
    assert gsf.explain().path != "reference"


def test_tracing_takes_no_note() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def encode(*args: Tensor) -> Tensor:
        return gsf.topk_encode(*args, 4).values

    x, W, b_enc = torch.randn(40, D).double(), rows().t().double(), torch.zeros(F).double()
    graph = make_fx(encode, tracing_mode="symbolic")(x, W, b_enc)
    assert "topk_encode" in graph.code and not hasattr(explaining._thread, "note")
    graph(x, W, b_enc)
    encode(x, W, b_enc)
    assert explaining._thread.note.reference.op == "topk_encode"


def test_tokens_of_a_small_dictionary_are_cut_for_all_threads() -> None:
    """A block holds all its latents: cut by latents alone, one thread would have all the work."""
    W_enc, blocks = torch.randn(256, 64).t(), []
    with threads(2):
        for n in (1, 1000):
            gsf.topk_encode(torch.randn(n, 64), W_enc, torch.zeros(256), 4)
            blocks.append(gsf.explain().direct_blocks)
    assert blocks[0] == 1 and 8 <= blocks[1] <= 16
