"""The two files of EleutherAI's sparsify that hold its kernels, loaded without the package.

Importing the package would import what it trains with; these need torch and triton alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .context import Skip
from .timing import unavailable

FOLDER = "GPU_CHECK_SPARSIFY"
"""Environment variable that names the package's folder where it is not installed."""
FILES = ("xformers", "fused_encoder")
ABSENT = "sparsify is not installed"


def folder() -> Path:
    """Where the files are; raises `Skip`."""
    named = os.environ.get(FOLDER)
    spec = None if named else importlib.util.find_spec("sparsify")
    held = [named] if named else (spec and spec.submodule_search_locations) or []
    for path in map(Path, held):
        if all((path / f"{name}.py").is_file() for name in FILES):
            return path
    raise Skip(f"{FOLDER}={named} lacks {' or '.join(FILES)}" if named else ABSENT)


def load(name: str) -> Any:
    """One of `FILES` as a module of its own; raises `Skip` where there is none."""
    path = folder() / f"{name}.py"
    own = f"gpu_check_sparsify_{name}"
    held = sys.modules.get(own)
    if held is not None and held.__file__ == str(path):
        return held
    spec = importlib.util.spec_from_file_location(own, path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[own] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[own]
        raise Skip(f"sparsify cannot be loaded: {unavailable(error)}") from error
    return module
