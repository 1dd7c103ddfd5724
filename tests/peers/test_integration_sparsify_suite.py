"""sparsify's own tests, with the backend installed: what passes without it passes with it.

They are in its sdist. `SPARSIFY_SDIST` names the unpacked folder:

    pip download --no-deps --no-binary :all: eai-sparsify==1.3.3 && tar xf eai_sparsify-1.3.3.tar.gz

Without a GPU they run on the CPU, the one large problem among them made smaller.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from host_suite import run_snippet, suite_of

pytest.importorskip("sparsify", reason="eai-sparsify is not installed: see `make peers`")

ON_THE_CPU = {
    '"cuda"': '"cpu"',
    "torch.cuda.synchronize()": "None",
    "8192, 1024, 131_072": "512, 256, 8192",
}


def test_its_own_tests(tmp_path: Path) -> None:
    edits = None if torch.cuda.is_available() else ON_THE_CPU
    suite_of("sparsify", "SPARSIFY_SDIST", tmp_path, ["tests"], edits).check(fewest=9)


def test_the_snippet_of_the_documentation() -> None:
    run_snippet("sparsify")
