"""The version: pyproject.toml states it, and an installed package's metadata repeats it."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

NAME = "gemmascope-fast"


def _version() -> str:
    """Read it from the checkout, if this is one, whatever else may be installed."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        stated = tomllib.loads(project.read_text())["project"]
        if stated["name"] == NAME:
            return str(stated["version"])
    return metadata.version(NAME)


__version__ = _version()
