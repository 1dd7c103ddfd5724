"""`python -m gemmascope_fast encode`: sparse activations of a file of activations.

The file holds x `[*batch, d_in]`, or `[*batch, L, d]` for a crosscoder or a CLT. The result holds
offsets, indices, values and shape (`gemmascope_fast.load_acts` reads it). A run that was stopped,
at whatever moment, goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artefacts import acts_files, load
from ..sparse import SparseActs
from ..training.progress import bar
from . import DTYPES, guarded, size
from .spool import partial, spool
from .tokens import TokenFile, width_of

RUN = "run"  # metadata of the result: what made it
SAMPLE = 64  # tokens that tell whether a run goes on with the same dictionary


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="gemmascope_fast encode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("activations", type=Path, help=".safetensors file with x")
    add("--sae", required=True, help="whatever gemmascope_fast.load reads")
    add("-o", "--out", type=Path, required=True, help=".safetensors file to write")
    add("--key", default="x", help="name of the tensor in the file; default x")
    add("--block", type=int, default=4096, help="tokens at a time; default 4096")
    add("--dtype", choices=DTYPES, help="of the matrices; default those of the files")
    add("--device", help="such as cuda:0; default CUDA where there is one")
    add("--streamed", action="store_true", help="leave the weights in their files")
    add("--restart", action="store_true", help="begin anew where another run was stopped")
    add("--progress", action=argparse.BooleanOptionalAction, default=True)
    return made


def main(argv: Sequence[str]) -> int:
    """Encode; 0 on success, 2 where an argument or a file cannot be used."""
    args = parser().parse_args(argv)
    return guarded(lambda: _encode(args))


@torch.no_grad()
def _encode(args: argparse.Namespace) -> int:
    if args.block < 1:
        raise ValueError(f"encode: --block must be >= 1, got {args.block}")
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise ValueError(f"encode: --out must be a file in an existing folder, got {args.out}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": DTYPES.get(args.dtype or ""), "device": device}
    module: Any = load(args.sae, streamed=args.streamed, **options)
    x = TokenFile(args.activations, args.key, width_of(module))
    work = Work(module, x, args.block, device)
    run = work.described()
    text = json.dumps(run, sort_keys=True)
    if not partial(args.out).exists() and acts_files.metadata(args.out).get(RUN) == text:
        print(f"{args.out}: complete already")
        return 0
    with spool(args.out, run, work.layers, restart=args.restart) as state:
        if state.tokens > x.n:
            raise ValueError(f"encode: {state.folder} is damaged: remove it")
        if state.tokens:
            print(f"encode: {state.tokens:,} tokens are there already", file=sys.stderr)
        with bar(x.n, args.progress, name="encode: token") as shown:
            shown(state.tokens, "")
            for block in x.blocks(args.block, state.tokens):
                state.append(work.encode(block))
                shown(state.tokens, f"L0 {sum(state.entries) / state.tokens:.1f}")
        shapes = [(*x.batch, module.d_sae)] * len(work.layers)
        state.finish(args.out, shapes, {RUN: text, "sae": args.sae, "format": "pt"})
    total = sum(state.entries)
    print(
        f"{args.out}: {x.n:,} tokens, {total:,} entries, L0 {total / max(x.n, 1):.1f}, "
        f"{size(args.out.stat().st_size)}"
    )
    return 0


class Work:
    """What is encoded by what."""

    def __init__(self, module: Any, x: TokenFile, block: int, device: str) -> None:
        self.module, self.x, self.block, self.device = module, x, block, device
        layers = getattr(module, "n_layers", None)
        self.layers: list[int | None] = [None] if layers is None else list(range(layers))

    def encode(self, block: Tensor) -> list[SparseActs]:
        """Activations of some tokens, by layer."""
        acts = self.module.encode(block.to(self.device))
        return [acts] if self.layers == [None] else list(acts)

    def described(self) -> dict[str, Any]:
        """What the result depends on: runs that agree on it write the same file.

        The dictionary is known by its `b_dec` and by what it makes of the first tokens.
        """
        sample = self.encode(self.x.rows(0, min(self.x.n, SAMPLE)))
        digest = hashlib.sha256()
        for t in (self.module.b_dec, *(t for a in sample for t in (a.indices, a.values))):
            digest.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        found = self.x.path.stat()
        return {
            "sae": digest.hexdigest(),
            "type": type(self.module).__name__.removeprefix("Streamed"),
            "d_sae": self.module.d_sae,
            "x": [self.x.name, found.st_size, found.st_mtime_ns, *self.x.batch],
            "block": self.block,
            "device": self.device,
            "values": str(sample[0].dtype).removeprefix("torch."),
        }
