"""Every Python snippet of the README and of docs/ runs as printed, and what the pages name exists.

A page is one session, from its first block to its last, in an empty folder. What a `python` block
prints stands behind its `print`, as `# ...`, or in a `text` block right behind it. A `py` block
needs a GPU, a hub or another library: it is compiled, not run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
NAMED = re.compile(r"`((?:gemmascope_fast|kernels|csrc|tests|bench|docs|examples)/[\w./*<>-]+)`")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    output: str | None
    """What it prints, as the page says."""


def blocks(text: str) -> Iterator[Block]:
    fences = list(FENCE.finditer(text))
    for at, fence in enumerate(fences):
        following = fences[at + 1] if at + 1 < len(fences) else None
        language, code = fence.groups()
        told = "".join(f"{line}\n" for line in re.findall(r"^print\(.*\)  # (.*)$", code, re.M))
        between = text[fence.end() : following.start()] if following else "x"
        if following and following[1] == "text" and not between.strip():
            told = following[2]
        yield Block(language, code, text[: fence.start()].count("\n") + 1, told)


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


def with_python() -> list[Path]:
    return [path for path in PAGES if "```python\n" in path.read_text()]


@pytest.mark.parametrize("path", with_python(), ids=page)
def test_a_page_runs_as_printed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(path.read_text()):
        if block.language != "python":
            continue
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * block.line + block.code, str(path), "exec"), names)
        assert printed.getvalue() == block.output, f"{page(path)}, line {block.line}"


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_what_is_not_run_compiles(path: Path) -> None:
    for block in blocks(path.read_text()):
        if block.language == "py":
            compile("\n" * block.line + block.code, str(path), "exec")


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_files_that_a_page_names_exist(path: Path) -> None:
    for name in NAMED.findall(path.read_text()):
        found = list(ROOT.glob(re.sub("<[^>]*>", "*", name)))
        assert found or name.startswith("docs/img"), f"{page(path)} names {name}"


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\n\n")[0]
    listed = re.findall(r"([\w/-]+\.md)", nav)
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


# ---- the API's pages


def documented() -> list[str]:
    """What the API's pages name: objects, or modules with all of their members."""
    pages = [path.read_text() for path in (DOCS / "api").glob("*.md")]
    return [name for text in pages for name in re.findall(r"^::: (\S+)$", text, re.M)]


def named(name: str) -> Any:
    """The module or object of that dotted name; None where there is none."""
    if importlib.util.find_spec(name.rpartition(".")[0]) is None:
        return None
    owner = importlib.import_module(name.rpartition(".")[0])
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").exists():
        return importlib.import_module(name)
    return getattr(owner, name.rpartition(".")[2], None)


PUBLIC = ["gemmascope_fast", "gemmascope_fast.training", "gemmascope_fast.losses"]
PUBLIC += [f"gemmascope_fast.{name}" for name in ("optim", "queries", "sources", "reference")]


def test_every_public_name_is_documented() -> None:
    shown = [name for name in documented() if "integrations" not in name]
    objects = [named(name) for name in shown]
    members = [getattr(o, n) for o in objects for n in getattr(o, "__all__", ())]
    known = {id(o) for o in (*objects, *members)}
    for module in map(importlib.import_module, PUBLIC):
        missing = [n for n in module.__all__ if id(getattr(module, n)) not in known]
        assert missing == [], module.__name__


@pytest.mark.parametrize("name", documented())
def test_what_is_documented_exists(name: str) -> None:
    assert named(name).__doc__


def test_examples_named_by_the_page_are_all_of_them() -> None:
    text = (DOCS / "examples.md").read_text()
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")} - {"opening.py"}
    assert {name for name in scripts if f"`examples/{name}`" in text} == scripts
    for name in scripts:
        source = (ROOT / "examples" / name).read_text()
        assert "\n# %%" in f"\n{source}" and ast.get_docstring(ast.parse(source))
