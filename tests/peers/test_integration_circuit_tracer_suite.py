"""circuit-tracer's own tests of its transcoders, with the backend installed.

`CIRCUIT_TRACER_TESTS` names a checkout of its repository; the others download models.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from host_suite import run_snippet, suite_of

pytest.importorskip(
    "circuit_tracer.transcoder.cross_layer_transcoder",
    reason="circuit-tracer is on no index: needs a checkout on PYTHONPATH",
)

TESTS = [
    "tests/transcoder",
    "tests/test_cross_layer_transcoder.py",
    "tests/test_single_layer_transcoder.py",
]
ALWAYS = """
from gemmascope_fast.integrations import circuit_tracer_host

circuit_tracer_host.CROSSOVER = {"cpu": 2.0, "cuda": 2.0}  # their batches are dense
"""


@pytest.mark.parametrize("after", ["", ALWAYS], ids=["as it chooses", "always"])
def test_its_own_tests(tmp_path: Path, after: str) -> None:
    suite = suite_of("circuit_tracer", "CIRCUIT_TRACER_TESTS", tmp_path, TESTS)
    suite.check(fewest=10, after=after)


def test_the_snippet_of_the_documentation() -> None:
    run_snippet("circuit-tracer")
