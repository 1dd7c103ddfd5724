"""The targets a run is held to, and the verdict on each: met, missed, or not measured here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import chunked

DEFAULT_L0 = 64
OURS_ADAM, DENSE_ADAM = "ours, with Adam(fused=True)", "dense eager, with fused torch Adam"
OURS_CAPPED = f"{OURS_ADAM}, fixed capacity"
OURS_SCREENED = "ours, screened, with Adam(fused=True)"
"""Contenders that update the weights too."""
MOMENTUM_CAPPED = "ours, fixed capacity"
"""Of part `momentum`, where every contender but the matmul updates the weights."""
OURS_ROWS = "ours, row-sparse"
"""Gradients of the touched latents alone."""
SPARSIFY = "sparsify"


@dataclass(frozen=True)
class Target:
    """One promise about the rows of a part.

    Attributes:
        part: whose rows; of `sparsify` with the kind of row.
        text: what is promised, without the number.
        goal: the number.
        found: reads the measured number off a row; None when the row cannot tell.
        d_sae: latents of the rows it speaks of; empty for all.
        firing: distribution it speaks of; empty for all.
        at_most: whether the goal is an upper bound.
    """

    part: str
    text: str
    goal: float
    found: Callable[[dict[str, Any]], float | None]
    d_sae: tuple[int, ...] = ()
    firing: str = ""
    at_most: bool = False

    def speaks_of(self, part: str, shape: dict[str, Any]) -> bool:
        return (
            part == self.part
            and shape["l0"] == DEFAULT_L0
            and (not self.d_sae or shape["d_sae"] in self.d_sae)
            and self.firing in ("", shape["firing"])
        )


def ratio(contender: str) -> Callable[[dict[str, Any]], float | None]:
    """How many times faster than a contender."""
    return lambda row: row["ratios"].get(contender)


def between(ours: str, theirs: str) -> Callable[[dict[str, Any]], float | None]:
    """How many times faster than `theirs` another contender of ours is."""

    def found(row: dict[str, Any]) -> float | None:
        mine, other = row["ratios"].get(ours), row["ratios"].get(theirs)
        return other / mine if mine and other else None

    return found


def _over_matmul(row: dict[str, Any]) -> float | None:
    faster = row["ratios"].get("matmul")
    return None if faster is None else 1 / faster


def _memory_share(row: dict[str, Any]) -> float | None:
    extra = row["times"]["gemmascope_fast"].get("peak_extra_bytes")
    return None if extra is None else extra / row["dense_matrix_bytes"]


def _of_floor(row: dict[str, Any]) -> float | None:
    return row["of_floor"]


def _over_library(row: dict[str, Any]) -> float | None:
    return chunked.fastest(row["ratios"])


def _with_optimizer(*names: str) -> Callable[[dict[str, Any]], float | None]:
    """How many times faster than the dense step the fastest of ours is, all with their update."""

    def found(row: dict[str, Any]) -> float | None:
        ratios = {"gemmascope_fast": 1.0, **row["ratios"]}
        ours = [ratios[name] for name in names if name in ratios]
        theirs = ratios.get(DENSE_ADAM)
        return theirs / min(ours) if ours and theirs else None

    return found


PLAIN = (OURS_ADAM, OURS_CAPPED)
MOMENTUM = ("gemmascope_fast", MOMENTUM_CAPPED)
K16, K65, K262, M1 = 2**14, 2**16, 2**18, 2**20
TARGETS = [
    Target("encode", "time over the plain matmul", 1.07, _over_matmul, at_most=True),
    Target("encode", "extra memory over n*F*2 bytes", 0.02, _memory_share, at_most=True),
    Target("encode", "x the library's product and a compaction", 1.0, _over_library),
    Target("screened", "x the plain matmul", 1.5, ratio("matmul"), (K262, M1)),
    Target("screened", "recall of audited entries", 1 - 1e-6, lambda row: row["recall"]),
    Target("topk", "x linear + ReLU + torch.topk", 1.75, ratio("torch.topk")),
    Target("decode", "x dense matmul", 1.2, ratio("dense eager"), (K16,), "uniform"),
    Target("decode", "x dense matmul", 2.5, ratio("dense eager"), (K16,), "log-normal"),
    Target("decode", "x dense matmul", 70, ratio("dense eager"), (M1,)),
    Target("decode", "of copy bandwidth", 0.85, _of_floor),
    Target("backward", "x dense backward", 1.5, ratio("dense eager"), (K16,), "uniform"),
    Target("backward", "x dense backward", 3.0, ratio("dense eager"), (K16,), "log-normal"),
    Target("backward", "x dense backward", 40, ratio("dense eager"), (M1,)),
    Target("backward", "of copy bandwidth", 0.80, _of_floor),
    Target("backward", "x dense, row-sparse", 60, between(OURS_ROWS, "dense eager"), (M1,)),
    Target("step", "x dense step, with optimizer", 3.5, _with_optimizer(*PLAIN), (K65,)),
    Target("step", "x dense step, with optimizer", 5.0, _with_optimizer(*PLAIN), (K262,)),
    Target("step", "x the same, screened", 5.0, _with_optimizer(OURS_SCREENED), (K262,)),
    Target("momentum", "x dense step, with optimizer", 2.5, _with_optimizer(*MOMENTUM), (K65,)),
    Target("momentum", "x dense step, with optimizer", 3.3, _with_optimizer(*MOMENTUM), (K262,)),
    Target("sparsify decode", "x sparsify's decoder", 1.2, ratio(SPARSIFY), (M1,)),
    Target("sparsify gradients", "x sparsify's gradients", 4.0, ratio(SPARSIFY), (M1,)),
    Target(
        *("train_1m", "GB peak of 1M x 5376 training", 80.0, lambda row: row["peak_gb"]),
        **{"d_sae": (M1,), "at_most": True},
    ),
]
"""Those that speak of L0 = 64; the training run is judged whatever its L0."""


def unmeasured(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What the targets ask and none of these rows tells of."""
    held = any(
        row["part"] == "sparsify" and SPARSIFY in row.get("ratios", ()) for row in rows.values()
    )
    told = "decode and gradients against sparsify's kernels: part sparsify, where it is installed"
    return [] if held else [told]


def verdicts(part: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """`{"text", "goal", "at_most", "found", "met"}` of every target that speaks of this row."""
    shape = dict(row["shape"])
    if part == "train_1m":
        shape["l0"] = DEFAULT_L0
    told = []
    for target in TARGETS:
        if not target.speaks_of(part, shape):
            continue
        found = target.found(row)
        met = None
        if found is not None:
            met = found <= target.goal if target.at_most else found >= target.goal
        told.append(
            {
                **{"text": target.text, "goal": target.goal, "at_most": target.at_most},
                **{"found": found, "met": met},
            }
        )
    return told
