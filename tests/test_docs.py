"""Every Python snippet of the README and of docs/ runs as printed, and what the pages name exists.

A page is one session, from its first block to its last, in an empty folder. What a `python` block
prints stands behind its `print`, as `# ...`, or in a `text` block right behind it. A `py` block
needs a GPU, a hub or another library: it is compiled, not run.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

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
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
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


def documented() -> dict[str, bool]:
    """Objects that the API's pages name, and whether their members are shown."""
    found = {}
    for path in (DOCS / "api").glob("*.md"):
        for name, options in re.findall(r"^::: (\S+)\n((?: +.*\n)*)", path.read_text(), re.M):
            found[name] = "show_root_heading: false" in options
    return found


PUBLIC = ["gemmascope_fast", "gemmascope_fast.training", "gemmascope_fast.losses"]
PUBLIC += [f"gemmascope_fast.{name}" for name in ("optim", "queries", "sources", "reference")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    found = documented()
    if not found.get(name):
        names = {f"{name}.{member}" for member in importlib.import_module(name).__all__}
        modules = {n for n in names if n in PUBLIC}
        assert names - modules <= found.keys()


@pytest.mark.parametrize("name", documented())
def test_what_is_documented_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == name or error.name is None or not error.name.startswith(name), error
        owner = importlib.import_module(module)
        assert getattr(owner, attribute).__doc__


def test_examples_named_by_the_page_are_all_of_them() -> None:
    text = (DOCS / "examples.md").read_text()
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")} - {"opening.py"}
    assert {name for name in scripts if f"`examples/{name}`" in text} == scripts
    for name in scripts:
        source = (ROOT / "examples" / name).read_text()
        assert "\n# %%" in f"\n{source}" and ast.get_docstring(ast.parse(source))
