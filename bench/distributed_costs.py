"""The table of docs/distributed.md: `gsf.distributed.estimate` on 1, 8 and 64 H200s.

python bench/distributed_costs.py            # print
python bench/distributed_costs.py --write    # replace the table in the docs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from gemmascope_fast.distributed.estimate import MeshEstimate, Rates, estimate

PAGE = Path(__file__).resolve().parent.parent / "docs" / "distributed.md"
BEGIN, END = "<!-- costs:begin -->\n", "<!-- costs:end -->\n"
ROWS = 8192
CARD = 141e9 * 0.95
NODE, NETWORK = 4.5e11, 5.0e10
"""Bytes that a card sends per second over NVLink and over a 400 Gbit/s network port."""
SMALL = {"dtype": torch.bfloat16, "moments": "8bit"}
GEMMA_27B = {"d_in": 5376, "l0": 100.0, **SMALL}
CLT_1B = {"kind": "clt", "d_in": 1152, "n_layers": 26, "d_sae": 20_160, "l0": 150.0, **SMALL}
MESHES = [(1, 1), (1, 8), (8, 8), (1, 64)]
HEAD = """\
| dictionary | GPUs | dp x tp | GB per GPU | fits 141 GB | sent per GPU, MB: tp | dp | \
at least, ms: products | gathers | tp | dp | tokens/s at most |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments."""
    found: list[tuple[str, dict[str, Any]]] = []
    for millions in (1, 4, 16):
        name = f"27B SAE, {millions}M latents"
        found.append((name, {**GEMMA_27B, "d_sae": millions << 20}))
    found.append(("1B CLT, 26 x 20,160 latents", CLT_1B))
    return found


def row(name: str, dp: int, tp: int, options: dict[str, Any]) -> str:
    rates = Rates(tp=NODE if tp <= 8 else NETWORK, dp=NETWORK)
    e: MeshEstimate = estimate(dp=dp, tp=tp, batch_size=ROWS * dp, rates=rates, **options)
    fits = e.peak_bytes <= CARD
    times = " | ".join(f"{1e3 * e.seconds[k]:.1f}" for k in ("products", "gathers", "tp", "dp"))
    sent = f"{e.tp.sent / 1e6:,.0f} | {e.dp.sent / 1e6:,.0f}"
    speed = f"{float(f'{e.tokens_per_second:.2g}'):,.0f}" if fits else ""
    place = f"{dp * tp} | {dp} x {tp} | {e.peak_bytes / 1e9:.1f} | {'yes' if fits else 'no'}"
    return f"| {name} | {place} | {sent} | {times} | {speed} |\n"


def table() -> str:
    """All of it, in Markdown."""
    return HEAD + "".join(
        row(name, dp, tp, options) for name, options in cases() for dp, tp in MESHES
    )


def main() -> None:
    if "--write" not in sys.argv:
        print(table(), end="")
        return
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
