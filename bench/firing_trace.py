"""Which latents of a trained dictionary fire on which tokens: recorded from the demo's.

    python bench/firing_trace.py [demo] [--out FILE] [--tokens 2048]

`make demo` leaves the dictionary in `demo/sae` and the activations in `demo/work`; held-out tokens,
evenly spread over the text, are encoded. The file holds `counts [tokens]` and
`indices [sum of counts]`, 16 bits each, a token's latents ascending, and in its metadata where they
are from. Values are not kept: no kernel's speed depends on them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import gemmascope_fast as gsf

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "bench" / "traces" / "minilm_8192.safetensors"


@dataclass(frozen=True)
class Trace:
    """Recorded firings of a dictionary with `d_sae` latents.

    Attributes:
        counts: `[tokens]` int64 active latents of each token.
        indices: `[sum of counts]` int64 latents, token by token, ascending.
        d_sae: latents of the dictionary.
    """

    counts: Tensor
    indices: Tensor
    d_sae: int

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`(counts [n], indices)` of n whole tokens in random order, as training shuffles them.

        No token comes twice before each has come once: for n beyond the recorded tokens the
        touched latents stop growing.
        """
        tokens = len(self.counts)
        passes = [torch.randperm(tokens, generator=generator) for _ in range(-(-n // tokens))]
        chosen = torch.cat(passes)[:n]
        counts = self.counts[chosen]
        first = (self.counts.cumsum(0) - self.counts)[chosen]
        shift = first - (counts.cumsum(0) - counts)
        at = torch.arange(int(counts.sum())) + shift.repeat_interleave(counts)
        return counts, self.indices[at]


@functools.cache
def recorded(path: Path = FILE) -> Trace:
    """The trace in `path`.

    Raises:
        ValueError: counts and indices do not belong together.
    """
    with safe_open(path, framework="pt") as held:
        counts, indices = (held.get_tensor(k).to(torch.int64) for k in ("counts", "indices"))
        d_sae = int(held.metadata()["d_sae"])
    if int(counts.sum()) != len(indices) or int(indices.max()) >= d_sae:
        raise ValueError(f"{path}: counts, indices and d_sae={d_sae} disagree")
    return Trace(counts, indices, d_sae)


@torch.no_grad()
def record(demo: Path, out: Path, tokens: int) -> Trace:
    """Encode held-out tokens of a finished demo and write their latents to `out`."""
    from gemmascope_fast.demo.activations import read

    found = sorted((demo / "work").glob("activations-*.safetensors"))
    if not found or not (demo / "sae").is_dir():
        raise FileNotFoundError(f"{demo} holds no finished demo: run `make demo`")
    sae = gsf.load(demo / "sae")
    data = read(max(found, key=lambda path: path.stat().st_mtime))
    held_out = data.x[data.held_out]
    spread = torch.linspace(0, len(held_out) - 1, min(tokens, len(held_out))).long()
    acts = sae.encode(held_out[spread])
    if acts.shape[-1] > 2**16:
        raise ValueError(f"indices of {acts.shape[-1]} latents do not fit 16 bits")
    counts = acts.offsets.diff()
    where = "all-MiniLM-L6-v2, block 3, Python's language reference"
    metadata = {"d_sae": str(acts.shape[-1]), "activations": where, "dictionary": "make demo"}
    metadata |= {"l0": f"{float(counts.float().mean()):.2f}", "tokens": str(len(counts))}
    narrow = {"counts": counts.to(torch.uint16), "indices": acts.indices.to(torch.uint16)}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(narrow, out, metadata)
    return recorded(out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("demo", type=Path, nargs="?", default=ROOT / "demo", help="demo's folder")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args(argv)
    trace = record(args.demo, args.out, args.tokens)
    fired, l0 = int(trace.indices.unique().numel()), float(trace.counts.float().mean())
    print(f"{args.out}, {args.out.stat().st_size / 1000:.0f} kB: {len(trace.counts):,} tokens,")
    print(f"{trace.d_sae:,} latents of which {fired:,} fire, L0 {l0:.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
