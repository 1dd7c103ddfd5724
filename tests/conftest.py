"""Fixtures of every test: the backend, poisoned memory, a fixed seed, a fresh interpreter.

A module that takes `backend` names in `OPS` the ops it exercises. Each of its tests then runs once
on the plain-PyTorch reference and once on the compiled library, at the op level (`backend.op`) and
at the functional level (the public functions follow the backend too). In a process of its own, with
`TRITON_INTERPRET=1 GEMMASCOPE_FAST_BACKEND=triton`, the tests run on the Triton kernels instead;
with `GEMMASCOPE_FAST_TEST_DEVICE=cuda`, on whatever serves that device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transport import on_device, with_storage

from gemmascope_fast import ops

TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Backend:
    """What serves the ops of one test: "reference", "native", "triton" or "device"."""

    name: str

    @property
    def native(self) -> bool:
        return self.name == "native"

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter runs the kernels: a thousand times slower than anything else."""
        return self.name == "triton"

    @property
    def gpu_terms(self) -> bool:
        """What a GPU promises holds: bad indices are skipped, an overflow makes the values NaN."""
        return self.name in ("triton", "device")

    def op(self, name: str) -> Any:
        """The op `name` of the table, called positionally on CPU tensors."""
        namespace = ops.REFERENCE if self.name == "reference" else ops.NAMESPACE
        op = getattr(getattr(torch.ops, namespace), name).default
        return on_device(op, torch.device(DEVICE)) if self.name == "device" else op

    def opcheck(self, name: str, args: Sequence[Any], **options: Any) -> None:
        """`torch.library.opcheck` of op `name` where its arguments live."""
        namespace = ops.REFERENCE if self.name == "reference" else ops.NAMESPACE
        op = getattr(getattr(torch.ops, namespace), name).default
        if self.name == "device":
            args = [
                with_storage(a, torch.device(DEVICE)) if isinstance(a, torch.Tensor) else a
                for a in args
            ]
        torch.library.opcheck(op, args, **options)


def native_absent(names: tuple[str, ...]) -> str:
    """Why the compiled library cannot serve these ops on a CPU, or ""."""
    if ops.NATIVE_MISSING:
        return ops.NATIVE_MISSING
    absent = [name for name in names if ops.implementation(name, "cpu") != "native"]
    return f"no native CPU implementation of {', '.join(absent)}" if absent else ""


DEVICE = os.environ.get("GEMMASCOPE_FAST_TEST_DEVICE", "")
INTERPRETED = ops.BACKEND == "triton" and not DEVICE
BACKENDS = ["device"] if DEVICE else ["triton"] if INTERPRETED else ["reference", "native"]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    if request.param == "device":
        chosen, overload = Backend("device"), ops.overload
        monkeypatch.setattr(ops, "BACKEND", "")  # float64 truths come from the reference
        monkeypatch.setattr(
            ops, "overload", lambda name, *t: on_device(overload(name, *t), torch.device(DEVICE))
        )
        return chosen
    if request.param == "triton":
        absent = [n for n in request.module.OPS if ops.implementation(n, "cpu") != "triton"]
        if absent:
            pytest.skip(f"no Triton kernel of {', '.join(absent)}")
        monkeypatch.setattr(ops, "BACKEND", "")  # float64 truths come from the reference
        return Backend("triton")
    if request.param == "native":
        reason = native_absent(request.module.OPS)
        if reason:
            pytest.skip(reason)
        return Backend("native")
    chosen = Backend("reference")
    monkeypatch.setattr(ops, "overload", lambda name, *tensors: chosen.op(name))
    return chosen


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN (integers: their maximum).

    It reaches the compiled library, whose tensors come from the same allocator; see
    test_determinism.py for the rest of its memory.
    """
    was = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(was, warn_only=warn_only)


@pytest.fixture
def run_python() -> Callable[..., str]:
    """`run_python(code, **env)`: what a fresh interpreter prints; it can import the tests."""

    def run(code: str, **env: str) -> str:
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **env},
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    return run
