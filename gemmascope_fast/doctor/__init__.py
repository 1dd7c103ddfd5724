"""`python -m gemmascope_fast doctor`: what serves each op on this machine, why, and what to do."""

from __future__ import annotations

import json
from typing import Any

from .. import ops
from . import machine, serving
from .advice import Advice, advise, failures
from .self_testing import self_test
from .text import as_text

__all__ = ["Advice", "advise", "as_text", "failures", "main", "report", "self_test"]


def main(as_json: bool = False) -> int:
    """Print the report as text or as one JSON object.

    Returns:
        1 when something is wrong (a self-test failed, the library is missing, not of this version
        or without code for a GPU that is here), else 0, whatever could be faster.
    """
    found = report()
    print(json.dumps(found, indent=2) if as_json else as_text(found))
    return 1 if any(a["level"] == "problem" for a in found["advice"]) else 0


def report() -> dict[str, Any]:
    """Everything `doctor` knows, in JSON types; `advice` follows from the rest alone."""
    found: dict[str, Any] = {
        "versions": machine.versions(),
        "install": machine.install(),
        "cpu": machine.cpu(),
        "gpu": machine.gpu(),
        "build": machine.build_info(),
        "environment": machine.environment(),
        "thread_settings": machine.thread_settings(),
        "ops": {
            name: {device: serving.served(name, device) for device in serving.DEVICES}
            for name in ops.TABLE
        },
    }
    return found | {"advice": [a.to_json() for a in advise(found)]}
