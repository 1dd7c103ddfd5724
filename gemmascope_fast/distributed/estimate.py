"""`gsf.distributed.estimate`: memory, traffic and least time of a training step on a mesh.

    step = products / rate + bytes of touched rows / memory rate + tp + dp

one after the other. A ring moves `2 (p - 1) / p` of what p ranks all-reduce through every rank's
link, `(p - 1) / p` of what they gather. The payloads are those of `MeshTrainer`, collective by
collective (a test counts them). Time is a floor, not a forecast: every row of memory counts once a
pass, and the default rates are the best of the hardware, which kernels and collectives stay below.
On a mesh `gsf.train` trains SAEs and transcoders; for crosscoders and CLTs the same step is meant,
by autograd and `gsf.optim.Adam`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..arguments import check_count, check_number
from ..checks import check_float_dtype
from ..costs import COSTS
from ..training.memory import estimate_memory
from ..training.settings import MOMENTS
from .layout import part
from .step_share import KINDS, StepShare

OP = "distributed.estimate"
TERMS = 3
"""Of the default recipe: reconstruction, L0, frequency."""
GATHERED = ("counts",)


@dataclass(frozen=True)
class Rates:
    """What a device and its links do per second; the defaults are an H200's in an NVLink node.

    The defaults are what the hardware does at best, and make a lower bound of the time. Rates that
    your own kernels and links reach bring it closer to a forecast.

    Args:
        products: floating-point operations of the encoder's dense 16-bit products, per second.
        memory: bytes of device memory, per second.
        tp: bytes that a rank sends to the others of "tp", per second.
        dp: bytes that a rank sends to the others of "dp", per second.
        collective: seconds that every collective takes at least.
    """

    products: float = 8.0e14
    memory: float = 4.3e12
    tp: float = 4.5e11
    dp: float = 5.0e10
    collective: float = 2e-5


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step over one dim of the mesh.

    Attributes:
        ranks: of the dim.
        payload: bytes of each kind of tensor that is reduced or gathered, as every rank sees it.
        collectives: their number.
    """

    ranks: int
    payload: dict[str, int] = field(default_factory=dict)
    collectives: int = 0

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a step, by rings."""
        share = (self.ranks - 1) / self.ranks
        return sum(
            size * share * (1 if name in GATHERED else 2) for name, size in self.payload.items()
        )


@dataclass(frozen=True)
class MeshEstimate:
    """What a step takes on each rank: memory and bytes as expected, seconds at least.

    Attributes:
        memory: bytes held at the peak, part by part.
        tp: collectives between the slices of the latents.
        dp: collectives between the parts of the batch.
        tokens: of a step, on all ranks.
        seconds: least of products, gathers, tp and dp, at the given rates.
    """

    memory: dict[str, int]
    tp: Traffic
    dp: Traffic
    tokens: int
    seconds: dict[str, float]

    @property
    def peak_bytes(self) -> int:
        """Memory of a rank."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """Least time of a step, nothing overlapping."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Most tokens of all ranks per second."""
        return self.tokens / self.step_seconds

    def __str__(self) -> str:
        return (
            f"{self.peak_bytes / 2**30:.1f} GiB per rank; a step takes at least "
            f"{self.step_seconds * 1e3:.1f} ms, at most {self.tokens_per_second:,.0f} tokens/s; "
            f"sent per rank and step: tp {self.tp.sent / 1e6:.1f} MB, "
            f"dp {self.dp.sent / 1e6:.1f} MB (estimates)"
        )


def estimate(
    *,
    d_in: int,
    d_sae: int,
    dp: int = 1,
    tp: int = 1,
    kind: str = "sae",
    d_out: int | None = None,
    n_layers: int = 1,
    batch_size: int = 8192,
    l0: float = 100.0,
    touched: int | None = None,
    blocks: int | None = None,
    dtype: torch.dtype = torch.float32,
    moments: str = "fp32",
    rates: Rates | None = None,
) -> MeshEstimate:
    """Memory, traffic and least time of a JumpReLU's training step on (dp, tp) ranks.

    Args:
        d_in: width of x (of each layer).
        d_sae: latents of the whole (of each source layer).
        dp: ranks that share the rows of a batch.
        tp: ranks that share the latents.
        kind: "sae", "transcoder", "crosscoder" or "clt".
        d_out: width of a transcoder's target; default `d_in`.
        n_layers: layers of a crosscoder or CLT, whose decoders are packed.
        batch_size: rows per step of all ranks.
        l0: active latents per token, of all layers together.
        touched: latents of a rank that fire in a batch; default what uniform firing makes.
        blocks: row blocks of a rank's loss, which meet in a reconstruction each; default one per
            256 MiB of entries.
        dtype: of the matrices.
        moments: "fp32" or "8bit".
        rates: of device and links.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or a rank would have no latents.
    """
    out = d_in if d_out is None else d_out
    sizes = {"d_in": d_in, "d_sae": d_sae, "dp": dp, "tp": tp, "d_out": out, "n_layers": n_layers}
    _check_sizes({**sizes, "batch_size": batch_size, "blocks": 1 if blocks is None else blocks})
    check_float_dtype(OP, "dtype", dtype)
    for name, value, known in (("kind", kind, KINDS), ("moments", moments, MOMENTS)):
        if value not in known:
            raise ValueError(f"{OP}: {name} must be one of {', '.join(known)}, got {value!r}")
    if n_layers > 1 and kind not in KINDS[2:]:
        raise ValueError(f"{OP}: n_layers is for crosscoders and CLTs, got {n_layers}")
    if part(d_sae, tp, tp - 1).start >= d_sae:
        raise ValueError(f"{OP}: d_sae={d_sae} over tp={tp} leaves a rank without latents")
    if check_number(OP, "l0", l0, positive=True) > d_sae * n_layers:
        raise ValueError(f"{OP}: l0 must be at most the {d_sae * n_layers} latents, got {l0}")
    if touched is not None:
        check_count(OP, "touched", touched, -(-d_sae // tp), "latents of a rank")
    if not isinstance(rates, (Rates, type(None))):
        raise TypeError(f"{OP}: rates must be Rates or None, got {type(rates).__name__}")
    step = StepShare(
        *(kind, d_in, d_sae, dp, tp, n_layers, dtype, moments, out),
        rows=-(-batch_size // dp),
        size=-(-d_sae // tp),
        l0=l0,
    )
    rows = step.touched if touched is None else touched
    links = _tp(step, step.blocks if blocks is None else blocks), _dp(step, rows)
    seconds = _seconds(step, rates or Rates(), *links)
    return MeshEstimate(_memory(step), *links, batch_size, seconds)


def _check_sizes(sizes: dict[str, Any]) -> None:
    for name, value in sizes.items():
        if check_count(OP, name, value) < 1:
            raise ValueError(f"{OP}: {name} must be >= 1, got {value}")


def _tp(s: StepShare, blocks: int) -> Traffic:
    if s.tp == 1:
        return Traffic(1)
    from ..training.planning import DEFAULT_LIMITS

    spans = -(-s.rows // DEFAULT_LIMITS.span_rows)
    payload = {
        "reconstruction": 4 * s.rows * s.width,
        "l0": 4 * s.rows * s.n_layers,
        "counts": 8 * s.size * s.tp * s.n_layers,
        "blocks": 8 * spans,
        "fired, dead": 16,
    }
    return Traffic(s.tp, payload, 2 * blocks + 3)


def _dp(s: StepShare, touched: int) -> Traffic:
    if s.dp == 1:
        return Traffic(1)
    latents = s.size * s.n_layers
    all_touched = touched == s.size and s.dtype.itemsize >= 4
    payload = {
        "tokens": 8,
        "mean": 4 * (s.width + 1),
        "deviation": 8,
        "sums": 8 * (TERMS + 2),
        "counts over rows": 8 * latents,
        "fired": latents,
        "touched": latents,
        "vectors": 4 * (2 * latents + s.width),
        "rows": 4 * touched * s.columns,
    }
    from .updates import BUFFER_BYTES

    width = sum(s.sources[0])
    pieces = 2 if all_touched else -(-touched // max(BUFFER_BYTES // (4 * width), 1))
    return Traffic(s.dp, payload, 8 + pieces * s.n_layers)


def _memory(s: StepShare) -> dict[str, int]:
    if s.kind in KINDS[:2]:
        run: dict[str, Any] = {"d_in": s.d_in, "d_out": s.d_out, "d_sae": s.size, "kind": s.kind}
        run |= {"batch_size": s.rows, "dtype": s.dtype, "moments": s.moments, "device": "cuda"}
        run |= {"target_l0": min(s.l0 / s.tp, s.size / 2), "fused": s.dp == 1}
        found = estimate_memory(**run)
        return {"one process": found.peak_bytes} | _exchanged(s)
    wide = max(s.dtype.itemsize, 4)
    matrices = s.size * s.columns
    held = {
        "weights": matrices * s.dtype.itemsize,
        "moments": matrices * (1 if s.moments == "8bit" else wide),
        "gradients": matrices * s.dtype.itemsize,
        "batch": 5 * wide * s.rows * s.width,
        "entries": 40 * s.entries * s.n_layers,
    }
    return held | _exchanged(s)


def _exchanged(s: StepShare) -> dict[str, int]:
    """Counts of the whole and the buffer of travelling rows."""
    from .updates import BUFFER_BYTES

    counts = 4 * 8 * s.d_sae * s.n_layers if s.tp * s.dp > 1 else 0
    return {"counts": counts, "buffer": 2 * BUFFER_BYTES if s.dp > 1 else 0}


def _seconds(s: StepShare, rates: Rates, tp: Traffic, dp: Traffic) -> dict[str, float]:
    encoder = {"n": s.rows, "d": s.d_in, "d_sae": s.size, "nnz": s.entries}
    flops = COSTS["jumprelu_encode"](**encoder).flops * len(s.sources)
    return {
        "products": flops / rates.products,
        "gathers": s.moved / rates.memory,
        "tp": tp.sent / rates.tp + tp.collectives * rates.collective,
        "dp": dp.sent / rates.dp + dp.collectives * rates.collective,
    }
