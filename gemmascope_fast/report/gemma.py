"""Which Gemma 3 models have activations of a width, and where."""

from __future__ import annotations

from collections.abc import Iterable

RESIDUAL = {640: "270M", 1152: "1B", 2560: "4B", 3840: "12B", 5376: "27B"}
"""Width of the residual stream: of resid_post, mlp_out and transcoders."""
ATTENTION = {1024: "270M, 1B", 2048: "4B", 4096: "12B, 27B"}
"""Heads times their dimension: the width of attn_out."""


def model(d: int) -> str:
    """Models whose activations are `d` wide; empty where none are."""
    return RESIDUAL.get(d) or ATTENTION.get(d, "")


def places(widths: Iterable[int]) -> str:
    """One sentence on where each of these widths is found in Gemma 3."""
    known = [d for d in sorted(set(widths)) if model(d)]
    stream = ", ".join(f"{d:,} is {RESIDUAL[d]}" for d in known if d in RESIDUAL)
    heads = ", ".join(f"{d:,} is {ATTENTION[d]}" for d in known if d in ATTENTION)
    told = [f"{stream} (resid_post, mlp_out, transcoders)" if stream else ""]
    told += [f"{heads} (attn_out)" if heads else ""]
    return "; ".join(text for text in told if text)
