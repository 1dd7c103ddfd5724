"""The circuit-tracer integration without circuit-tracer: codes, sums of rows, the version gate."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import native_absent
from torch import Tensor

from gemmascope_fast.integrations import circuit_tracer
from gemmascope_fast.integrations import circuit_tracer_ops as entries

ABSENT = native_absent(("jumprelu_encode", "topk_encode", "decode"))
N, D, LATENTS = 60, 16, 256
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(dtype: torch.dtype) -> Problem:
    """Sums exact in float32, many of them between two numbers of bfloat16 at the threshold."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int, span: int) -> Tensor:
        return torch.randint(-span, span + 1, shape, generator=generator).float()

    x, W_enc = whole(N, D, span=160) / 64, whole(LATENTS, D, span=2) / 4
    b_enc, theta = whole(LATENTS, span=4) / 4 - 2, whole(LATENTS, span=2) / 2 + 2
    theta[::9] = -0.5
    b_enc[::9] -= 4
    return x.to(dtype), W_enc.to(dtype), b_enc.to(dtype), theta.to(dtype)


def dense_gate(pre: Tensor, theta: Tensor) -> Tensor:
    return pre * (pre > theta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("late", [False, True], ids=["bias inside", "late bias"])
def test_gates_see_what_the_dtype_leaves_of_a_sum(dtype: torch.dtype, late: bool) -> None:
    x, W_enc, b_enc, theta = problem(dtype)
    product = x.float() @ W_enc.float().t()
    pre = product.to(dtype) + b_enc if late else (product + b_enc.float()).to(dtype)
    expected = dense_gate(pre, theta)
    acts = entries.encode(x, W_enc, b_enc, entries.Gate(theta), late_bias=late)
    assert acts is not None and acts.dtype == dtype
    tokens, latents, values = entries.coo(acts, slice(2, 5))
    expected[2:5] = 0
    sparse = expected.to_sparse()
    assert torch.equal(torch.stack([tokens, latents]), sparse.indices())
    assert torch.equal(values, sparse.values())
    assert (values < 0).any()  # above a threshold below 0
    exact = product + b_enc.float()
    unlike = (exact > theta.float()) != (pre > theta)
    assert bool(unlike.any()) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("late", [False, True], ids=["bias inside", "late bias"])
def test_a_late_bias_changes_numbers(late: bool) -> None:
    """What the two orders of rounding are for: they differ."""
    x, W_enc, b_enc, theta = problem(torch.bfloat16)
    b_enc = b_enc + 0.0078125
    product = x.float() @ W_enc.float().t()
    pre = {
        True: product.bfloat16() + b_enc,
        False: (product + b_enc.float()).bfloat16(),
    }
    assert not torch.equal(pre[True], pre[False])
    acts = entries.encode(x, W_enc, b_enc, entries.Gate(theta), late_bias=late)
    assert acts is not None
    dense = torch.zeros(N, LATENTS, dtype=torch.bfloat16)
    assert torch.equal(entries.fill(dense, acts), dense_gate(pre[late], theta))


def test_topk_keeps_the_largest_of_any_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "BLOCK", 4 * LATENTS)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, N // 2, D, generator=generator)
    W_enc = torch.randn(LATENTS, D, generator=generator)
    b_enc = torch.full((LATENTS,), -6.0)
    pre = F.linear(x, W_enc, b_enc)
    positive = (pre > 0).sum(-1)
    assert (positive < 20).sum() > 8 and (positive >= 20).sum() > 8
    top = pre.topk(20)
    expected = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    acts = entries.encode(x, W_enc, b_enc, entries.Gate(b_enc, k=20))
    assert acts is not None and acts.shape == pre.shape
    found = entries.fill(torch.zeros_like(pre), acts)
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_or_not_sparse_is_left_to_others(bad: float) -> None:
    x, W_enc, b_enc, theta = problem(torch.float32)
    few, many = entries.Gate(theta), entries.Gate(torch.full_like(theta, -20.0))
    assert entries.encode(x, W_enc, b_enc, few) is not None
    assert entries.encode(x, W_enc, b_enc, many) is None
    assert entries.encode(x, W_enc, b_enc, entries.Gate(b_enc, k=LATENTS // 2)) is None
    x[3, 2] = bad
    for late in (False, True):
        assert entries.encode(x, W_enc, b_enc, few, late_bias=late) is None
    assert entries.encode(x, W_enc, b_enc, entries.Gate(b_enc, k=9)) is None


def test_an_empty_batch() -> None:
    _, W_enc, b_enc, theta = problem(torch.float32)
    for gate in (entries.Gate(theta), entries.Gate(theta, k=9)):
        acts = entries.encode(torch.zeros(0, D), W_enc, b_enc, gate)
        assert acts is not None and acts.shape == (0, LATENTS) and acts.nnz == 0
    assert entries.sum_rows(torch.zeros(0, D), torch.zeros(0, dtype=torch.int64), 3).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_added_by_target_and_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    at = torch.randint(0, 7, (300,), generator=generator)
    at[at == 4] = 5  # nothing goes to 4
    rows = torch.randn(300, D, generator=generator).to(dtype).requires_grad_()
    found = entries.sum_rows(rows, at, 7)
    expected = torch.zeros(7, D).index_add(0, at, rows.float())
    assert found.dtype == dtype
    bounds = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (2**-8, 1e-5)}[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=bounds[0], atol=bounds[1])
    weights = torch.randn(7, D, generator=generator).to(dtype)
    (gradient,) = torch.autograd.grad((found * weights).sum(), rows)
    assert torch.equal(gradient, weights[at])


# ---- the gate


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where packages named circuit_tracer can be put; an installed one comes back."""
    monkeypatch.syspath_prepend(str(tmp_path))
    installed = forget()
    yield tmp_path
    forget()
    sys.modules.update(installed)


def forget() -> dict[str, ModuleType]:
    importlib.invalidate_caches()
    names = [name for name in sys.modules if name.split(".")[0] == "circuit_tracer"]
    return {name: sys.modules.pop(name) for name in names}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / "circuit_tracer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for package in ("", "attribution/", "transcoder/"):
        (folder / "circuit_tracer" / f"{package}__init__.py").touch()


REUPLOAD = {
    "_version.py": "__version__ = '0.5.0'\n",
    "attribution/attribute.py": "",
    "transcoder/x.py": "",
}


def sources(**changed: str) -> dict[str, str]:
    """Classes with the signatures that are needed, but for `changed`."""
    texts: dict[str, str] = {}
    for place, methods in circuit_tracer.SIGNATURES.items():
        module, kind = place.split(".")
        body = ""
        for name, parameters in methods.items():
            given = changed.get(f"{kind}_{name}", parameters)
            body += f"    def {name}({', '.join(given.split())}): ...\n" if given else "    pass\n"
        texts[module] = texts.get(module, "") + f"class {kind}:\n{body}"
    return {f"transcoder/{module}.py": text for module, text in texts.items()}


@pytest.mark.skipif(
    importlib.util.find_spec("circuit_tracer") is not None, reason="circuit-tracer is installed"
)
def test_an_absent_host_is_refused() -> None:
    with pytest.raises(
        ImportError, match=r"not installed: pip install git\+https://github.com/dec"
    ):
        circuit_tracer.install()


def test_the_package_of_that_name_on_pypi_is_refused(host: Path) -> None:
    write(host, REUPLOAD | sources())
    for call in (circuit_tracer.install, lambda: circuit_tracer.accelerate(None)):
        with pytest.raises(ImportError, match="the one on PyPI is a separate project of that name"):
            call()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"SingleLayerTranscoder_encode": "self x"},
            r"SingleLayerTranscoder.encode takes \(self x\)",
        ),
        (
            {"CrossLayerTranscoder__get_encoder_weights": ""},
            "weights takes .absent., not .self layer",
        ),
        (
            {"JumpReLU___init__": "self threshold"},
            r"takes \(self threshold\), not \(self threshold b",
        ),
    ],
    ids=["another signature", "a method is gone", "another activation"],
)
def test_a_host_with_other_methods_is_refused(
    host: Path, changed: dict[str, str], message: str
) -> None:
    write(host, {"attribution/attribute_transformerlens.py": ""} | sources(**changed))
    with pytest.raises(ImportError, match=message) as refusal:
        circuit_tracer.install()
    assert "circuit-tracer 0.4 or 0.5 of https://github.com/decoderesearch" in str(refusal.value)


def test_nothing_to_uninstall() -> None:
    circuit_tracer.uninstall()
