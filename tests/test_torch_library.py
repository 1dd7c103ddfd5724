"""Registration with torch: schemas, opcheck, and which backend serves.

Changed a schema on purpose? `python tests/test_torch_library.py` rewrites `schemas.txt`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from samples import problem, samples
from torch import Tensor
from torch.testing._internal.optests import aot_autograd_check

import gemmascope_fast
from gemmascope_fast import ops

OPS = tuple(ops.TABLE)
ENCODERS = ("jumprelu_encode", "topk_encode", "batchtopk_encode")
SNAPSHOT = Path(__file__).with_name("schemas.txt")
PACKAGE = Path(gemmascope_fast.__file__).resolve().parent


def schemas(namespace: str) -> str:
    overloads = (getattr(getattr(torch.ops, namespace), name).default for name in ops.TABLE)
    return "".join(f"{op._schema}\n".replace(f"{namespace}::", "") for op in overloads)


@pytest.mark.parametrize("namespace", [ops.NAMESPACE, ops.REFERENCE])
def test_schemas_are_the_committed_ones(namespace: str) -> None:
    """A changed schema breaks saved programs and other languages' callers."""
    assert schemas(namespace) == SNAPSHOT.read_text()


# ---- opcheck


def prepared(name: str, args: list[Any]) -> tuple[Any, ...]:
    """Copies of a sample; floating-point inputs of differentiable forward ops require gradients."""
    wanted = ops.TABLE[name].differentiable and not name.endswith("_backward")
    copies = pytree.tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, args)
    for i, a in enumerate(copies):
        without_window = name == "jumprelu_encode" and i == 3 and args[4] == 0
        if isinstance(a, Tensor) and a.is_floating_point() and wanted and not without_window:
            a.requires_grad_()
    return tuple(copies)


def floats_first(op: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """The op with its floating-point outputs in front.

    opcheck adds up the sums of all outputs in place, starting with the first: an int64 one fails.
    """
    return lambda *args: sorted(op(*args), key=lambda t: not t.is_floating_point())


SAMPLES = [(name, i) for name, cases in samples().items() for i in range(len(cases))]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(("name", "at"), SAMPLES)
@pytest.mark.parametrize(
    ("backend", "dtypes"),
    [("reference", "float32"), ("native", "float32"), ("native", "mixed")],
    indirect=["backend"],
)
def test_opcheck(backend: Any, name: str, at: int, dtypes: str) -> None:
    if dtypes == "mixed":
        p = problem(x_dtype=torch.bfloat16, w_dtype=torch.float16)
    else:
        p = problem()
    op, args = backend.op(name), prepared(name, samples(p)[name][at])
    if name in ENCODERS:
        torch.library.opcheck(op, args, test_utils=CHECKS)
        aot_autograd_check(floats_first(op), args, {}, dynamic=True)
    else:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", [n for n in OPS if n.endswith("_backward")])
def test_second_derivatives_are_refused(backend: Any, name: str) -> None:
    args = samples()[name][0]
    leaves = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    ]
    with pytest.raises(RuntimeError, match=f"{name} is not differentiable: second derivatives"):
        sum(t.sum() for t in backend.op(name)(*leaves)).backward()


# ---- which backend serves; each in a process of its own

SERVED = """
import torch
from gemmascope_fast import ops
print(sorted({ops.implementation(name, "cpu") for name in ops.TABLE}))
"""
REFUSED = """
try:
    import gemmascope_fast
except ImportError as error:
    print(type(error).__name__, error)
"""
needs_native = pytest.mark.skipif(bool(ops.NATIVE_MISSING), reason=ops.NATIVE_MISSING)


def test_forced_reference_serves_every_op(run_python: Callable[..., str]) -> None:
    assert run_python(SERVED, GEMMASCOPE_FAST_BACKEND="reference") == "['reference']"


@pytest.mark.parametrize(
    ("forced", "text"),
    [
        (
            "Native",
            "GEMMASCOPE_FAST_BACKEND='Native' is unknown: expected one of reference, triton, "
            "native, or unset",
        ),
    ],
)
def test_a_backend_that_does_not_exist_is_refused(
    forced: str, text: str, run_python: Callable[..., str]
) -> None:
    assert run_python(REFUSED, GEMMASCOPE_FAST_BACKEND=forced) == f"ImportError {text}"


NO_TRITON = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
"""


def test_triton_is_refused_where_it_is_not_installed(run_python: Callable[..., str]) -> None:
    text = "ImportError GEMMASCOPE_FAST_BACKEND=triton: triton is not installed"
    assert run_python(NO_TRITON + REFUSED, GEMMASCOPE_FAST_BACKEND="triton") == text
    code = (
        NO_TRITON + "from gemmascope_fast import ops; print(ops.implementation('decode', 'cuda'))"
    )
    compiled = ops._has_kernel("decode", "CUDA") and ("decode", "CUDA") not in ops._triton
    assert run_python(code) == ("native" if compiled else "reference")


GPU_SERVED = """
import sys
from gemmascope_fast import ops
print({ops.implementation(name, 'cuda') for name in ops.TABLE}, 'triton' in sys.modules)
print(ops.implementation('decode', 'cpu'))
"""


def test_triton_serves_gpus_and_is_imported_at_the_first_call(
    run_python: Callable[..., str],
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    forced = run_python(GPU_SERVED, GEMMASCOPE_FAST_BACKEND="triton", TRITON_INTERPRET="")
    assert forced == "{'triton'} False\nnone"
    served = run_python(GPU_SERVED).splitlines()[0]
    assert served in ("{'native'} False", "{'triton'} False"), "compiled where built, all or none"
    interpreted = run_python(GPU_SERVED, GEMMASCOPE_FAST_BACKEND="triton", TRITON_INTERPRET="1")
    assert interpreted == "{'triton'} False\ntriton"


@needs_native
def test_forced_native_never_falls_back(run_python: Callable[..., str]) -> None:
    code = """
import gemmascope_fast as gsf
x, W, b = torch.ones(2, 3), torch.ones(3, 4), torch.zeros(4)
print(gsf.topk_encode(x, W, b, 1).values.tolist())
try:
    gsf.topk_encode(x.double(), W.double(), b.double(), 1)
except TypeError as error:
    print(error)
"""
    out = run_python(SERVED + code, GEMMASCOPE_FAST_BACKEND="native").splitlines()
    served, values, refusal = out
    assert (served, values) == ("['native']", "[3.0, 3.0]")
    assert refusal == (
        "topk_encode: float64 is served by the reference only, and "
        "GEMMASCOPE_FAST_BACKEND=native forbids it"
    )


# ---- calls


def test_autograd_is_passed_by_where_no_gradient_can_be_wanted() -> None:
    """And nowhere else: a tensor whose graph a transform hides does not say that it has one."""
    key = torch._C.DispatchKey.AutogradFunctionality

    def skipped() -> bool:
        return torch._C._dispatch_tls_is_dispatch_key_excluded(key)

    with torch.no_grad():
        assert ops.call(skipped) and not skipped()
    with torch.inference_mode():
        assert ops.call(skipped)
    assert not ops.call(skipped)

    def hidden(x: Tensor) -> Tensor:
        values = torch.func.vmap(lambda row: gemmascope_fast.topk_encode(row, W, b, 2).values)(x)
        return values.sum()

    x, W, b = torch.randn(3, 1, 8), torch.randn(8, 16), torch.zeros(16)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(hidden)(x)


def copied_package(folder: Path) -> Path:
    """The package's Python files in `folder`, without what was built."""
    ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "demo")
    shutil.copy(PACKAGE.parent / "pyproject.toml", folder)  # its version, where it is not installed
    copied = folder / "gemmascope_fast"
    return shutil.copytree(PACKAGE, copied, ignore=ignored, ignore_dangling_symlinks=True)


def run_in(folder: Path, code: str, backend: str = "") -> str:
    env = {**os.environ, "GEMMASCOPE_FAST_BACKEND": backend, "PYTHONPATH": str(folder)}
    # the finder of an editable installation would add the modules that are missing here
    alone = (
        "import sys; kept = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
        "sys.meta_path[:] = kept\n"
    )
    command = [sys.executable, "-c", alone + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_the_compiled_library_the_reference_serves(tmp_path: Path) -> None:
    package = copied_package(tmp_path)
    code = SERVED + "print(ops.NATIVE_MISSING, ops.__file__)"
    served, reason = run_in(tmp_path, code).splitlines()
    assert served == "['reference']"
    assert reason == f"the compiled library is not built (run `make build`) {package / 'ops.py'}"
    assert run_in(tmp_path, REFUSED, "native") == (
        "ImportError GEMMASCOPE_FAST_BACKEND=native: the compiled library is not built "
        "(run `make build`)"
    )


def test_a_broken_compiled_library_is_an_error(tmp_path: Path) -> None:
    (copied_package(tmp_path) / "_C.abi3.so").write_bytes(b"\x7fELF, but no more of it")
    assert re.match(r"ImportError .*_C\.abi3\.so", run_in(tmp_path, REFUSED))
    assert run_in(tmp_path, SERVED, "reference") == "['reference']"


def test_a_compiled_library_that_misses_a_module_is_an_error(tmp_path: Path) -> None:
    """Only the absence of `_C` itself means "not built"."""
    (copied_package(tmp_path) / "_C.py").write_text("import a_module_that_is_absent")
    expected = "ModuleNotFoundError No module named 'a_module_that_is_absent'"
    assert run_in(tmp_path, REFUSED) == expected


if __name__ == "__main__":
    SNAPSHOT.write_text(schemas(ops.NAMESPACE))
