"""sparsify's own tests, with the backend installed: what passes without it passes with it.

They are in its sdist only. `SPARSIFY_SDIST` names the unpacked folder:

    pip download --no-deps --no-binary :all: eai-sparsify==1.3.3 && tar xf eai_sparsify-1.3.3.tar.gz

Without a GPU they run on the CPU, the one large problem among them made smaller.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peer  # noqa: F401  (the environment of the host)
import pytest
import torch

pytest.importorskip("sparsify", reason="eai-sparsify is not installed: see `make peers`")

ON_THE_CPU = {
    '"cuda"': '"cpu"',
    "torch.cuda.synchronize()": "None",
    "8192, 1024, 131_072": "512, 256, 8192",
}
BACKEND = "from gemmascope_fast.integrations import sparsify\n\nsparsify.install()\n"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    sdist = os.environ.get("SPARSIFY_SDIST")
    if sdist is None:
        pytest.skip("SPARSIFY_SDIST does not name an unpacked sdist of eai-sparsify")
    shutil.copytree(Path(sdist) / "tests", tmp_path / "tests")
    for path in (tmp_path / "tests").glob("*.py"):
        text = path.read_text()
        for old, new in ON_THE_CPU.items() if not torch.cuda.is_available() else ():
            text = text.replace(old, new)
        path.write_text(text)
    (tmp_path / "backend.py").write_text(BACKEND)
    return tmp_path


def passed(suite: Path, *options: str) -> set[str]:
    command = [sys.executable, "-m", "pytest", "tests", "-rA", "-q", *options]
    path = os.pathsep.join([str(suite), *sys.path])
    done = subprocess.run(
        command, cwd=suite, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return set(re.findall(r"^PASSED (\S+)", done.stdout, re.M))


def test_its_own_tests(suite: Path) -> None:
    without, with_backend = passed(suite), passed(suite, "-p", "backend")
    assert len(without) >= 9
    assert without <= with_backend, without - with_backend
