"""Turns measured times into a row: rates, fraction of the floor, ratios, memory, verdicts."""

from __future__ import annotations

from typing import Any

from .context import Shape
from .targets import DENSE_ADAM, OURS_ADAM, verdicts

OURS = "gemmascope_fast"
__all__ = ["DENSE_ADAM", "OURS", "OURS_ADAM"]


def encode_flops(shape: Shape) -> int:
    return 2 * shape.n * shape.d * shape.d_sae


def decode_bytes(shape: Shape, nnz: int, touched: int) -> dict[str, int]:
    """Traffic of a decode in 16-bit weights: one row per entry, and with perfect reuse."""
    fixed = 2 * shape.n * shape.d + 8 * nnz
    return {
        "gathered": 2 * shape.d * nnz + fixed,
        "compulsory": 2 * shape.d * touched + fixed,
    }


def backward_bytes(shape: Shape, nnz: int, touched: int) -> dict[str, int]:
    """Traffic of all weight gradients: per entry a row of d_recon and one of x, per touched latent
    its decoder row, and both dense 16-bit gradients written once."""
    fixed = 2 * shape.d * touched + 4 * shape.d * shape.d_sae + 20 * nnz
    return {
        "gathered": 4 * shape.d * nnz + fixed,
        "compulsory": 4 * shape.d * shape.n + fixed,
    }


def compose(
    part: str,
    shape: Shape,
    times: dict[str, dict[str, Any]],
    *,
    floor_s: float | None,
    floor: str,
    flops: int = 0,
    traffic: dict[str, int] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The stored form of one comparison.

    Args:
        part: whose targets apply.
        shape: of the problem.
        times: of `timing.compare`; ours under `OURS`.
        floor_s: seconds no implementation can beat, measured in this run.
        floor: what that is.
        flops: of our op.
        traffic: bytes of our op, `gathered` and `compulsory`.
        more: stored as it is (nnz, error, ...).
    """
    ours = times[OURS]
    if "unavailable" in ours:
        raise RuntimeError(f"{OURS}: {ours['unavailable']}")
    seconds = ours["median_s"]
    others = {k: t for k, t in times.items() if k != OURS and "median_s" in t}
    row: dict[str, Any] = {
        **{"shape": shape.json(), "times": times, "floor": floor, "floor_s": floor_s},
        "of_floor": floor_s / seconds if floor_s else None,
        "tflops": flops / seconds / 1e12 if flops else None,
        "gb_per_s": traffic["gathered"] / seconds / 1e9 if traffic else None,
        "traffic": traffic,
        "ratios": {name: taken["median_s"] / seconds for name, taken in others.items()},
        "dense_matrix_bytes": 2 * shape.n * shape.d_sae,
        **more,
    }
    row["targets"] = verdicts(part, row)
    row["line"] = line(row)
    return row


def line(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    ours = row["times"][OURS]
    words = [f"{1e3 * ours['median_s']:.3f} ms"]
    if row["tflops"]:
        words.append(f"{row['tflops']:.1f} TFLOP/s")
    if row["gb_per_s"]:
        words.append(f"{row['gb_per_s']:.0f} GB/s")
    if row["of_floor"]:
        words.append(f"{100 * row['of_floor']:.0f} % of {row['floor']}")
    words += [f"{ratio:.2f}x {name}" for name, ratio in row["ratios"].items()]
    words += [
        f"{name}: {taken['unavailable']}"
        for name, taken in row["times"].items()
        if "unavailable" in taken
    ]
    if ours["peak_extra_bytes"] is not None:
        words.append(f"+{ours['peak_extra_bytes'] / 2**20:.0f} MiB")
    words += [
        f"{v['text']}: {'met' if v['met'] else 'MISSED'}"
        for v in row["targets"]
        if v["met"] is not None
    ]
    return ", ".join(words)
