"""A host library's own tests, run as they come and with the backend installed, and our snippets.

Its folder is named by an environment variable: hosts whose tests are in no package have them in
their repositories. Both runs are processes of their own, in a copy of the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import peer  # noqa: F401  (the environment of the hosts)
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
BACKEND = "from gemmascope_fast.integrations import {host}\n\n{host}.install()\n"


@dataclass(frozen=True)
class Suite:
    """Tests of one host.

    Attributes:
        host: module of `gemmascope_fast.integrations`.
        folder: a copy of the folder that holds them, where they run.
        tests: paths in it.
    """

    host: str
    folder: Path
    tests: Sequence[str]

    def passed(self, plugin: str = "") -> set[str]:
        """Tests that pass; `plugin` is the text of a module that pytest loads first."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            *self.tests,
            "-rA",
            "-q",
            "-p",
            "no:cacheprovider",
        ]
        if plugin:
            (self.folder / "backend_plugin.py").write_text(plugin)
            command += ["-p", "backend_plugin"]
        path = os.pathsep.join([str(self.folder), *sys.path])
        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
        print(f"{self.host}: {done.stdout.strip().splitlines()[-1]}")
        return set(re.findall(r"^PASSED (\S.*?)(?: - |$)", done.stdout, re.M))

    def check(self, fewest: int, before: str = "", after: str = "") -> None:
        """What passes without the backend passes with it.

        Args:
            fewest: of the tests that pass without.
            before: text of a plugin for both runs.
            after: what to do once the backend is installed.
        """
        without = self.passed(before)
        found = self.passed(before + BACKEND.format(host=self.host) + after)
        assert len(without) >= fewest
        assert without <= found, f"fail with the backend: {sorted(without - found)}"


def suite_of(
    host: str,
    variable: str,
    into: Path,
    tests: Sequence[str],
    edits: Mapping[str, str] | None = None,
) -> Suite:
    """A copy of the folder that an environment variable names, its tests edited.

    Skips where the variable is not set.
    """
    source = os.environ.get(variable)
    if source is None:
        pytest.skip(f"{variable} does not name a folder with {host}'s own tests")
    shutil.copytree(Path(source) / "tests", into / "tests")
    for path in (into / "tests").rglob("*.py") if edits else ():
        text = path.read_text()
        for old, new in (edits or {}).items():
            text = text.replace(old, new)
        path.write_text(text)
    return Suite(host, into, tests)


def run_snippet(heading: str) -> None:
    """Execute what docs/integrations.md shows under a heading."""
    sections = PAGE.read_text().split("\n## ")
    (section,) = (s for s in sections if s.startswith(heading))
    (code,) = re.findall(r"```py\n(.*?)```", section, re.S)
    exec(compile(code, f"{PAGE.name}: {heading}", "exec"), {"__name__": "snippet"})
