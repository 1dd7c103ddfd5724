"""What `integrations.circuit_tracer` reads of lazy weights, and the memory it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip(
    "circuit_tracer",
    reason="circuit-tracer is not installed: pip install "
    "git+https://github.com/decoderesearch/circuit-tracer@v0.5.0",
)
from circuit_tracer.transcoder import cross_layer_transcoder as cross  # noqa: E402
from circuit_tracer.transcoder import single_layer_transcoder as single  # noqa: E402
from circuit_tracer_hosts import (  # noqa: E402, F401
    D,
    F,
    L,
    N,
    cross_calls,
    cross_layer,
    one_layer,
    passed_on,
    restored,
    same,
    single_calls,
)

from gemmascope_fast.integrations import circuit_tracer  # noqa: E402

# ---- lazy weights


class Reads:
    """Reads of safetensors files by tensor: None for a whole one, else the number of rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int | None]] = []
        for module in (single, cross):
            monkeypatch.setattr(module, "safe_open", self._open(module.safe_open))

    def _open(self, stock: Any) -> Any:
        reads = self.seen

        class Slice:
            def __init__(self, name: str, inner: Any) -> None:
                self.name, self.inner = name, inner

            def __getitem__(self, rows: Any) -> Tensor:
                reads.append((self.name, len(rows) if isinstance(rows, Tensor) else None))
                return self.inner[rows]

        class Open:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.manager = stock(*args, **kwargs)

            def __enter__(self) -> Open:
                self.file = self.manager.__enter__()
                return self

            def __exit__(self, *args: Any) -> None:
                self.manager.__exit__(*args)

            def get_tensor(self, name: str) -> Tensor:
                reads.append((name, None))
                return self.file.get_tensor(name)

            def get_slice(self, name: str) -> Slice:
                return Slice(name, self.file.get_slice(name))

        return Open

    def __call__(self, call: Callable[[], Any]) -> list[tuple[str, int | None]]:
        self.seen.clear()
        with torch.no_grad():
            call()
        return list(self.seen)


def test_a_lazy_layer_is_read_once_and_by_active_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed_on: list[str]
) -> None:
    kept = one_layer("jumprelu", skip=True)
    kept.to_safetensors(str(tmp_path / "layer.safetensors"))
    load = getattr(single, "load_transcoder", None) or single.load_relu_transcoder
    lazy = load(str(tmp_path / "layer.safetensors"), 0, device=torch.device("cpu"))
    assert lazy.lazy_encoder and lazy.lazy_decoder
    x, reads = torch.randn(N, D), Reads(monkeypatch)
    with torch.no_grad():
        dense, found = kept.encode(x), kept.encode_sparse(x)[0]
        expected = {name: call() for name, call in single_calls(kept, x).items()}
    active, later = (int((f != 0).any(0).sum()) for f in (dense, found.to_dense()))
    assert later < len(found.values()) and active < F
    with circuit_tracer.install():
        passed_on.clear()
        assert reads(lambda: lazy.encode(x)) == [("W_enc", None)]
        assert reads(lambda: lazy.encode_sparse(x)) == [("W_enc", None)]
        assert reads(lambda: lazy.decode(dense, x)) == [("W_dec", active)]
        assert reads(lambda: lazy.decode_sparse(found, x)) == [("W_dec", later)]
        assert reads(lambda: lazy(x)) == [("W_enc", None), ("W_dec", active)]
        with torch.no_grad():
            for name, call in single_calls(lazy, x).items():
                same(call(), expected[name], name)
        assert passed_on == []
    assert reads(lambda: lazy.decode(dense, x)) == [("W_dec", None)]  # as the host has it


def test_a_lazy_cross_layer_one_is_read_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed_on: list[str]
) -> None:
    kept = cross_layer("jumprelu")
    kept.to_safetensors(str(tmp_path))
    options = {"lazy_encoder": True, "lazy_decoder": True, "dtype": torch.float32}
    lazy = cross.load_clt(str(tmp_path), device=torch.device("cpu"), **options)
    x, reads = torch.randn(L, N, D), Reads(monkeypatch)
    with torch.no_grad():
        found = kept.encode_sparse(x)[0]
        expected = {name: call() for name, call in cross_calls(kept, x).items()}
    rows = (found.to_dense() != 0).any(1).sum(1).tolist()
    encoders = [(f"W_enc_{i}", None) for i in range(L)]
    decoders = [(f"W_dec_{i}", rows[i]) for i in range(L)]
    with circuit_tracer.install():
        passed_on.clear()
        assert reads(lambda: lazy.encode(x)) == encoders
        assert reads(lambda: lazy.encode_layer(x[1], 1)) == encoders[1:2]
        assert reads(lambda: lazy.encode_sparse(x)) == encoders
        assert reads(lambda: lazy.decode(found)) == decoders
        assert reads(lambda: lazy.select_decoder_vectors(found)) == decoders
        with torch.no_grad():
            for name, call in cross_calls(lazy, x).items():
                same(call(), expected[name], name)
        assert passed_on == []


@pytest.mark.parametrize("empty", [None, 0, 1], ids=str)
def test_gradients_and_lazy_decoders_change_no_bit(empty: int | None, tmp_path: Path) -> None:
    """bfloat16: in memory or lazy, under autograd or not, also where a layer has no entries."""
    kept = cross_layer("relu", torch.bfloat16)
    with torch.no_grad():
        kept.b_enc.sub_(0 if empty is None else 100 * (torch.arange(L) == empty)[:, None])
    kept.to_safetensors(str(tmp_path))
    lazy = cross.load_clt(str(tmp_path), device=torch.device("cpu"))
    x = torch.randn(L, N, D, dtype=torch.bfloat16)
    whole = slice(0, 0)
    with circuit_tracer.install():
        outs = [made.decode(made.encode(x)) for made in (kept, lazy)]
        with torch.no_grad():
            outs += [made.decode(made.encode(x)) for made in (kept, lazy)]
            outs.append(lazy(x))
            outs.append(lazy.compute_attribution_components(x, whole)["reconstruction"])
    grads = []
    for out in outs[:2]:
        (gradient,) = torch.autograd.grad(
            out.square().sum(), [kept.b_enc if out is outs[0] else lazy.b_enc]
        )
        grads.append(gradient)
    assert all(torch.equal(out, outs[0]) for out in outs) and outs[0].std() > 0.1
    assert torch.equal(*grads) and grads[0].any()


# ---- memory


class Largest(TorchDispatchMode):
    """`bytes`: of the largest storage that an operation made."""

    def __init__(self, *outside: Tensor) -> None:
        super().__init__()
        self.bytes = 0
        self.outside = {t.untyped_storage()._cdata for t in outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.layout is torch.strided:
                if t.untyped_storage()._cdata not in self.outside:
                    self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def largest(call: Callable[[], Any], *outside: Tensor) -> int:
    with torch.no_grad(), Largest(*outside) as seen:
        call()
    return seen.bytes


def test_no_tensor_of_n_times_d_sae_on_the_way() -> None:
    n, d, d_sae = 512, 8, 8192
    one = single.SingleLayerTranscoder(
        d, d_sae, torch.nn.functional.relu, 0, device="cpu", dtype=torch.float32
    )
    many = cross.CrossLayerTranscoder(
        2, d_sae, d, lazy_decoder=False, device=torch.device("cpu"), dtype=torch.float32
    )
    with torch.no_grad():
        for p in [*one.parameters(), *many.parameters()]:
            p.normal_()
        one.b_enc.sub_(10)
        many.b_enc.sub_(10)
    x = torch.randn(2, n, d)
    outside = (x, *one.parameters(), *many.parameters())
    found, features = one.encode_sparse(x[0])[0].detach(), many.encode_sparse(x)[0].detach()
    calls: dict[str, Callable[[], Any]] = {
        "encode_sparse": lambda: one.encode_sparse(x[0]),
        "decode_sparse": lambda: one.decode_sparse(found.coalesce()),
        "forward": lambda: one(x[0]),
        "cross encode_sparse": lambda: many.encode_sparse(x),
        "cross decode": lambda: many.decode(features.coalesce()),
        "cross forward": lambda: many(x),
        "components": lambda: many.compute_attribution_components(x),
    }
    dense = 4 * n * d_sae
    stock = {name: largest(call, *outside) for name, call in calls.items()}
    assert all(stock[name] >= dense for name in calls if "decode" not in name), stock
    with circuit_tracer.install():
        sizes = {name: largest(call, *outside) for name, call in calls.items()}
        assert all(0 < size < dense / 8 for size in sizes.values()), sizes
        assert largest(lambda: one.encode(x[0]), *outside) == dense
        assert largest(lambda: many.encode(x), *outside) == 2 * dense
        acts = one.encode(x[0])
        assert largest(lambda: one.decode(acts), *outside, acts) < dense / 8
