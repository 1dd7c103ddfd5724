"""The demo: train a sparse autoencoder on a real transformer, beside the same one in dense PyTorch.

    text -> transformer, hook on one block -> x [N, d]          activations.py
    same initial weights, same batches -> two processes,
    alternating turns: dense.py and this library's ops          recipe.py, worker.py, turns.py
    held-out FVU and L0, baselines, top contexts                evaluate.py
    demo/report.html                                            charts.py, latents.py, report.py

`python -m gemmascope_fast demo` calls `main`; nothing heavy is imported before that.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with command-line arguments `argv`; returns the exit code."""
    from .run import main as run

    return run(argv)
