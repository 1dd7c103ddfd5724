"""SAELens' own tests, with the backend installed: what passes without it passes with it.

No package has them. `SAELENS_TESTS` names a checkout of its repository. Those of 6.18 run too,
with the field of `TrainStepInput` that has come since. Tests that download models fail in both
runs where the Hub cannot be reached.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from host_suite import run_snippet, suite_of

pytest.importorskip("sae_lens", reason="sae-lens is not installed: see `make peers`")

TESTS = [
    *("tests/saes", "tests/training/test_sae_trainer.py"),
    *("tests/refactor_compatibility", "tests/test_registry.py"),
]
NEW_FIELD = """
from sae_lens.saes.sae import TrainStepInput

TrainStepInput.__init__.__defaults__ = (False,)
"""
ALWAYS = """
from gemmascope_fast.integrations import saelens_host

saelens_host.CROSSOVER = {"cpu": 2.0, "cuda": 2.0}  # their batches are dense
"""


@pytest.mark.parametrize("after", ["", ALWAYS], ids=["as it chooses", "always"])
def test_its_own_tests(tmp_path: Path, after: str) -> None:
    suite_of("saelens", "SAELENS_TESTS", tmp_path, TESTS).check(200, NEW_FIELD, after)


def test_the_snippet_of_the_documentation() -> None:
    run_snippet("SAELens")
