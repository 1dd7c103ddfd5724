"""`python -m gemmascope_fast convert`: an artefact in another format, dtype or width."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..artefacts import load
from ..artefacts.writing import FORMATS
from ..modules import SAE, JumpReLU
from . import DTYPES, guarded, size


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="gemmascope_fast convert", description=__doc__)
    made.add_argument("source", help="whatever gemmascope_fast.load reads: a folder, a file")
    made.add_argument("target", type=Path, help="folder to write")
    made.add_argument("--to", choices=FORMATS, default="gemma_scope_2", help="format to write")
    made.add_argument("--dtype", choices=DTYPES, help="of the matrices; default: the source's")
    made.add_argument("--latents", type=latents, help="start:stop, for a part of the dictionary")
    told = "write into a folder that holds files; an artefact of the same format is replaced"
    made.add_argument("--overwrite", action="store_true", help=told)
    return made


def latents(text: str) -> slice:
    """A range like `0:16384`.

    Raises:
        ArgumentTypeError: it is none.
    """
    start, colon, stop = text.partition(":")
    if not colon or not stop.isdecimal() or not (start or "0").isdecimal():
        raise argparse.ArgumentTypeError(f"must be start:stop, like 0:16384, got {text!r}")
    return slice(int(start or 0), int(stop))


def main(argv: Sequence[str]) -> int:
    """Convert; 0 on success, 2 where the source cannot be read or the format cannot hold it."""
    args = parser().parse_args(argv)
    return guarded(lambda: _convert(**vars(args)))


def _convert(
    source: str,
    target: Path,
    to: str,
    dtype: str | None,
    latents: slice | None,
    overwrite: bool,
) -> int:
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"convert: {target} holds files: name another folder or --overwrite")
    module: Any = load(source, dtype=DTYPES.get(dtype or ""), latents=latents)
    notes = ""
    if to == "gemma_scope_2" and _folds(module):
        module, notes = module.to_jumprelu(), ", what its semantics add folded into the weights"
    module.save_pretrained(target, format=to)
    total = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    print(f"{target}: {type(module).__name__} as {to}, {size(total)}{notes}")
    return 0


def _folds(module: Any) -> bool:
    """Whether the module is a JumpReLU that Gemma Scope's files hold once it is folded."""
    jumps = isinstance(module, SAE) and isinstance(module.activation, JumpReLU)
    return jumps and not module.semantics.plain_forward
