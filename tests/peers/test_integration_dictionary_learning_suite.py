"""dictionary_learning's own unit tests, with the backend installed.

No package has them. `DICTIONARY_LEARNING_TESTS` names a checkout of its repository at 0.1.0; its
other tests download models.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from host_suite import run_snippet, suite_of

pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed")


def test_its_own_tests(tmp_path: Path) -> None:
    suite = suite_of("dictionary_learning", "DICTIONARY_LEARNING_TESTS", tmp_path, ["tests/unit"])
    suite.check(fewest=9)


def test_the_snippet_of_the_documentation() -> None:
    run_snippet("dictionary_learning")
