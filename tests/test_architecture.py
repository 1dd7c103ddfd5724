"""The shape of the code: import arrows, one stem per op, file sizes, a silent import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemmascope_fast import ops

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gemmascope_fast"
NAME = PACKAGE.name

LAYERS = [
    (
        *("reference", "autograd", "arguments", "costs", "triton_launchers"),
        *("hook_points", "durable", "version"),
    ),
    ("fakes", "activations"),
    ("ops",),
    ("entries",),
    ("sparse",),
    ("checks",),
    ("packing", "explaining", "operands"),
    ("functional", "auditing", "screening"),
    ("losses", "semantics"),
    ("effective",),
    ("freezing", "initial"),
    ("pretrained", "training.__init__", "training.losses"),
    ("modules",),
    ("multilayer",),
    ("queries",),
    ("optim",),
    ("training",),
    ("sources",),
    ("artefacts", "integrations"),
    ("distributed",),
    ("splicing",),
    ("__init__",),
    ("doctor", "demo", "report", "commands"),
    ("cli",),
    ("__main__",),
]
"""Lowest first. A module imports layers below its own, or its own folder; longest name counts."""

LATE = {("pretrained", "artefacts"), ("modules", "training"), ("training", "distributed")}
LATE |= {("training", "artefacts"), ("multilayer", "training")}
"""Upward imports made inside a function, when it is called: the methods that wrap a package."""

LINES = 300
LONGER = {"reference.py": "the specification, read from top to bottom as one text"}


def package_files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def exists(module: str) -> bool:
    path = PACKAGE / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(source: str, module: str) -> Iterator[tuple[str, bool]]:
    """`(imported, late)`: our modules by their name in the package, others by "/top-level name".

    `late` marks an import inside a function.
    """
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    late = {id(n) for f in functions for n in ast.walk(f)}
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and _for_types(n)]
    skipped = {id(n) for branch in typing for n in ast.walk(branch)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [NAME, *module.split(".")][: -node.level or None] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            found = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for parts in found:
            yield _ours(parts[1:]) if parts[0] == NAME else f"/{parts[0]}", id(node) in late


def _for_types(branch: ast.If) -> bool:
    return isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"


def _ours(parts: list[str]) -> str:
    """The module that `gemmascope_fast.<parts>` names: trailing parts may be its members."""
    while parts and not exists(".".join(parts)):
        parts = parts[:-1]
    folder = (PACKAGE / "/".join(parts)).is_dir()
    return ".".join([*parts, "__init__"] if folder else parts)


def layer(module: str) -> int:
    """Index of the layer whose name is the longest prefix of `module`."""
    ranks = {name: i for i, names in enumerate(LAYERS) for name in names}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:length])) in ranks:
            return ranks[prefix]
    raise AssertionError(f"{module} has no layer: give it its place in LAYERS")


def wrong_arrows(source: str, module: str) -> list[str]:
    wrong = []
    for target, late in imports(source, module):
        if target.startswith("/") or target.split(".")[0] == "kernels":
            continue
        heads = (module.split(".")[0], target.split(".")[0])
        same_folder = "." in module and heads[0] == heads[1]
        below = layer(target) < layer(module)
        if not (below or same_folder or (late and heads in LATE)):
            wrong.append(target)
    return wrong


# ---- arrows


def test_the_scanner_sees_every_form_of_import() -> None:
    source = (
        "import torch, gemmascope_fast.ops\nfrom ..modules import SAE\nfrom . import config as c\n"
        "from gemmascope_fast import SparseActs\ndef f():\n    from ..demo.run import main\n"
        "if TYPE_CHECKING:\n    from ..cli import main\n"
    )
    assert list(imports(source, "artefacts.writing")) == [
        ("/torch", False),
        ("ops", False),
        ("modules", False),
        ("artefacts.config", False),
        ("__init__", False),
        ("demo.run", True),
    ]
    assert wrong_arrows(source, "artefacts.writing") == ["__init__", "demo.run"]
    assert wrong_arrows("from .modules import SAE", "functional") == ["modules"]
    assert wrong_arrows("def f():\n    from .artefacts import load", "pretrained") == []
    assert wrong_arrows("from .artefacts import load", "pretrained") == ["artefacts.__init__"]


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_imports_point_downwards(path: Path) -> None:
    assert wrong_arrows(path.read_text(), module_name(path)) == []


def test_only_the_table_knows_gradients_fakes_and_the_compiled_library() -> None:
    importers: dict[str, set[str]] = {}
    for path in package_files():
        for target, _ in imports(path.read_text(), module_name(path)):
            importers.setdefault(target, set()).add(module_name(path))
    assert importers["autograd"] == importers["fakes"] == {"ops"}
    # CapacityError and a block size are what the others take from the reference
    users = {"ops", "fakes", "entries", "functional", "optim.rows", "training.memory", "__init__"}
    assert importers["reference"] == users
    loads = {p.name for p in package_files() if re.search(r"\b_C\b(?!\._)", p.read_text())}
    assert {"ops.py"} <= loads <= {"ops.py", "doctor.py"}


def test_the_reference_imports_only_torch() -> None:
    found = {target for target, _ in imports((PACKAGE / "reference.py").read_text(), "reference")}
    assert {t[1:] for t in found} - sys.stdlib_module_names == {"torch"}


def test_kernels_never_import_the_package() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        module = "kernels." + ".".join(path.relative_to(ROOT / "kernels").with_suffix("").parts)
        targets = {target for target, _ in imports(path.read_text(), module)}
        ours = {t for t in targets if not t.startswith("/") and not t.startswith("kernels")}
        assert ours == set(), path


def test_device_code_includes_no_torch_header() -> None:
    for path in (ROOT / "csrc").rglob("*.cuh"):
        included = re.findall(r'#include\s+[<"]([^">]+)', path.read_text())
        assert [i for i in included if re.match(r"torch/|ATen/|c10/|Python\.h", i)] == [], path


def types(path: Path) -> set[str]:
    """Qualified names of the types that a C++ file defines outside of unnamed namespaces."""
    scopes: list[str | None] = []
    found = set()
    opened = re.compile(r"^(?:inline )?namespace ?(\w*) \{|^(?:struct|class|union) (\w+).*\{|^\}")
    for line in path.read_text().splitlines():
        match = opened.match(line)
        if not match:
            continue
        if line.startswith("}"):
            scopes = scopes[:-1] if "// namespace" in line else scopes
        elif match[2] is None:
            scopes.append(match[1] or None)
        elif None not in scopes:
            found.add("::".join([*map(str, scopes), match[2]]))
    return found


def test_no_two_types_of_the_library_have_one_name() -> None:
    """The linker would merge their destructors: a CUDA error path would run the CPU's."""
    where: dict[str, set[Path]] = {}
    for path in (ROOT / "csrc").rglob("*.*"):
        for name in types(path) if "testing" not in path.parts else ():
            where.setdefault(name, set()).add(path)
    assert {"gemmascope_fast::SaeInputs", "gemmascope_fast::on_cuda::SaeInputs"} <= set(where)
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


# ---- one stem per op


@pytest.mark.parametrize("name", ops.TABLE)
def test_one_stem_per_op(name: str) -> None:
    functions = {
        node.name
        for node in ast.parse((PACKAGE / "reference.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert name in functions
    stem = name.rstrip("_")  # an in-place op lives beside the op it repeats
    source = (ROOT / "csrc" / "cpu" / f"{stem}.cpp").read_text()
    assert f'"{name}"' in source, "registered at the bottom of its file"
    assert (ROOT / "tests" / f"test_{stem}.py").exists()


def test_every_row_of_the_table_is_complete() -> None:
    for op in ops.TABLE.values():
        assert op.reference.__name__ == op.name and op.fake.__name__ == f"_{op.name}"
        cost = op.cost(n=8, d=16, d_sae=64, nnz=24)
        assert cost.bytes > 0 and (cost.flops > 0 or op.name == "by_feature")
    assert set(ops.TABLE) == set(ops.SCHEMAS) == set(ops.COSTS)


# ---- sizes


def own_lines(function: ast.FunctionDef) -> int:
    """Lines of the body, without its docstring and the functions inside it."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    nested = [
        range(n.lineno, n.end_lineno + 1)
        for n in ast.walk(function)
        if isinstance(n, ast.FunctionDef) and n is not function
    ]
    lines = range(body[0].lineno, function.end_lineno + 1) if body else range(0)
    return sum(not any(line in inner for inner in nested) for line in lines)


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    if path.name not in LONGER:
        assert len(text.splitlines()) <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert own_lines(node) <= 40, f"{node.name} has {own_lines(node)} lines"


# ---- importing

QUIET = """
import sys, torch
def refuse(*args, **kwargs): raise AssertionError("importing must query no device")
for name in ("is_available", "device_count", "current_device", "get_device_capability", "init"):
    setattr(torch.cuda, name, refuse)
before = set(sys.modules)
import gemmascope_fast
assert not torch.cuda.is_initialized()
heavy = {"transformers", "matplotlib", "rich", "tqdm", "triton", "huggingface_hub", "sympy"}
assert not {m.split(".")[0] for m in set(sys.modules) - before} & heavy
assert not [m for m in sys.modules if m.startswith("gemmascope_fast.demo")]
"""


def test_importing_is_silent_and_queries_no_device() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUIET], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
