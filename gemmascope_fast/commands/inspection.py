"""`python -m gemmascope_fast inspect`: what an artefact holds, and whether it looks right.

The weights are read in blocks. With --activations they are loaded (--streamed: they are not), and
x of that file is encoded and decoded. The exit code is 1 when a check failed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..artefacts import configs, load, open_source
from ..artefacts.files import Changed
from . import checks, guarded, layout
from .measuring import Measured, measure
from .statistics import layers


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="gemmascope_fast inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("artefact", help="whatever gemmascope_fast.load reads: a folder, a file")
    add("--activations", type=Path, help=".safetensors with x, and target for a transcoder or CLT")
    add("--streamed", action="store_true", help="leave the weights in their files")
    add("--device", help="such as cuda:0, for --activations; default the CPU")
    add("--json", action="store_true", help="print one JSON object")
    return made


def main(argv: Sequence[str]) -> int:
    """Inspect; 0 on success, 1 when a check failed, 2 where something cannot be used."""
    args = parser().parse_args(argv)
    return guarded(lambda: _inspect(args))


def _inspect(args: argparse.Namespace) -> int:
    try:
        found = describe(args.artefact)
    except Changed:
        raise
    except ValueError as error:  # there is something, and it is damaged
        found = {"path": args.artefact, "checks": [checks.failed("readable", str(error))]}
    if "layers" in found:
        measured = None
        sound = all(not layer["not_finite"] for layer in found["layers"])
        if args.activations is not None and sound:
            measured = _measured(args, found["type"])
            found["measured"] = asdict(measured)
        found["checks"] = checks.of(found, measured)
    print(json.dumps(_plain(found), indent=2) if args.json else layout.text(found))
    return 1 if any(check["verdict"] == "fail" for check in found["checks"]) else 0


def describe(source: str) -> dict[str, Any]:
    """What can be said without encoding anything, in JSON types."""
    with closing(open_source(source)) as artefact:
        sizes = artefact.sizes
        return {
            "path": str(artefact.path),
            "type": artefact.config["type"],
            "n_layers": sizes.n_layers,
            "d_in": sizes.d_in,
            "d_sae": sizes.d_sae,
            "d_out": sizes.d_out,
            "affine": sizes.affine,
            "files": [
                {"name": file.path.name, "bytes": file.path.stat().st_size}
                for file in artefact.files
            ],
            "tensors": {
                name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
                for name, spec in artefact.files[0].specs.items()
            },
            "metadata": {k: v for k, v in artefact.config.items() if k not in configs.STRUCTURE},
            "layers": [asdict(layer) for layer in layers(artefact)],
        }


def _measured(args: argparse.Namespace, kind: str) -> Measured:
    module: Any = load(args.artefact, device=args.device or "cpu", streamed=args.streamed)
    return measure(module, kind, args.activations)


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
