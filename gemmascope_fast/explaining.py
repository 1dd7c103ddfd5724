"""`explain`: which path the last encoder took, on a CPU or with codes on CUDA, why, what to do."""

from __future__ import annotations

import json
import textwrap
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import ops

WIDTH = 100
DENSE = 0.05
"""Share of the entries of a screened call that are candidates, from which a centre is worth a try.

Gaussian data at L0 64 have 0.005 (JumpReLU) and 0.03 (TopK; bench/results/cpu_encode.json)."""


@dataclass(frozen=True)
class Explanation:
    """What the calling thread's last encoder did, where the compiled library or float64 served.

    Encoders on CUDA without `pack`ed codes are not recorded; of torch.compile's graphs those are
    that the compiled library served. `print(gsf.explain())` shows `advice` too.

    Attributes:
        op: name of the op; empty when there was none.
        path: "screened" (int8 candidates, float32 decisions), "direct" (the plain product) or
            "reference" (plain PyTorch).
        reason: why the path is not "screened"; empty when it is.
        target: instruction set of the kernels: "generic", "avx2", "avx2_vnni", "avx512",
            "avx512_amx", "neon" or "cuda sm_90a".
        int8: whether the processor multiplies int8 faster than float32.
        layout: of W_enc on a CPU: "feature-major" (`W_enc.t()` has contiguous rows), "row-major"
            (W_enc has) or "strided".
        packed: whether the weights' codes came from `pack`.
        centered: whether a common part of x was taken out of the products.
        cast: dtype that autocast converted W_enc to in this call; empty when it did not.
        n, d_in, d_sae: sizes of the call.
        screened_blocks: blocks of latents whose entries were screened.
        direct_blocks: blocks computed directly, in a screened call because too many entries passed.
        candidates: entries that the int8 products let through.
        rescored: those that the second int8 stage let through to the float32 dot product; on CUDA
            there is one stage.
    """

    op: str = ""
    path: str = "none"
    reason: str = "no encoder of the compiled library has run in this thread"
    target: str = ""
    int8: bool = False
    layout: str = ""
    packed: bool = False
    centered: bool = False
    cast: str = ""
    n: int = 0
    d_in: int = 0
    d_sae: int = 0
    screened_blocks: int = 0
    direct_blocks: int = 0
    candidates: int = 0
    rescored: int = 0

    @property
    def advice(self) -> tuple[str, ...]:
        """What would make the same call faster; empty when nothing here is known to."""
        if not self.op:
            return ()
        if self.path == "reference":
            return ("pass float32, bfloat16 or float16: only those have compiled kernels",)
        return tuple(text for holds, text in self._hints() if holds)

    def _hints(self) -> list[tuple[bool, str]]:
        blocks = self.screened_blocks + self.direct_blocks
        dense = self.path == "screened" and (
            self.direct_blocks > blocks / 2 or self.candidates > DENSE * self.n * self.d_sae
        )
        few = self.reason.startswith("few rows")
        return [
            (
                bool(self.cast),
                f"autocast converts W_enc to {self.cast} in every call, and packed codes do not "
                "serve it: convert the weights once, or encode outside autocast",
            ),
            (
                few and not self.cast,
                "if the weights stay, gsf.pack(W_enc) once (a module: freeze()): from then on one "
                "byte per weight is read",
            ),
            (
                self.reason == "GEMMASCOPE_FAST_SCREEN=never",
                "unset GEMMASCOPE_FAST_SCREEN: the results are the same bits",
            ),
            (
                self.layout in ("row-major", "strided"),
                f"W_enc is {self.layout}: store its transpose, W = W_enc.t().contiguous(), and "
                "pass W.t()",
            ),
            (
                dense and self.packed and not self.centered,
                "many entries pass the int8 products: if x has a large common part, "
                "gsf.pack(W_enc, center=x.mean(0)) takes it out",
            ),
        ]

    def __str__(self) -> str:
        """Path and reason or counts, and the advice: lines for people."""
        advice = [
            textwrap.fill(text, WIDTH, initial_indent="-> ", subsequent_indent="   ")
            for text in self.advice
        ]
        return "\n".join([*self._lines(), *advice])

    def _lines(self) -> list[str]:
        if not self.op:
            return [self.reason]
        shape = f"{self.op} of [{self.n}, {self.d_in}] x [{self.d_in}, {self.d_sae}]"
        if self.path == "reference":
            return [f"{shape}: plain PyTorch", f"   {self.reason}"]
        if self.path == "direct":
            return [f"{shape}: direct ({self.target})", f"   {self.reason}"]
        weights = "packed codes" if self.packed else "codes made here"
        per_token = [f"{count / max(self.n, 1):.0f}" for count in (self.candidates, self.rescored)]
        passed = f"{per_token[0]} candidates per token, {per_token[1]} rescored"
        where = f"{self.screened_blocks} blocks screened, {self.direct_blocks} direct"
        center = ", centred" if self.centered else ""
        screened = f"{shape}: screened int8 ({self.target}, {weights}{center})"
        return [screened, f"   {passed}; {where}"]


def explain() -> Explanation:
    """Say which path this thread's last encoder took, on a CPU or with codes on CUDA, and why."""
    if ops.NATIVE_MISSING:
        return Explanation(reason=ops.NATIVE_MISSING)
    text = getattr(torch.ops, ops.NAMESPACE).encode_report(torch.empty(0, device="cpu"))
    report: dict[str, Any] = json.loads(bytes(text.tolist()).decode())
    last = Explanation(**{k: v for k, v in report.items() if k != "at"})
    noted: _Note | None = getattr(_thread, "note", None)
    if noted is None or noted.at < report.get("at", 0):
        return last
    return replace(last, cast=noted.cast) if noted.cast else noted.reference


@dataclass(frozen=True)
class _Note:
    """A call of which the compiled library's report tells nothing, or not all."""

    at: int
    cast: str
    reference: Explanation


_thread = threading.local()


def note_encode(op: str, serve: Any, x: Tensor, W_enc: Tensor, given: Tensor) -> None:
    """Remember an encode that float64 sent to the reference, or whose weights autocast converted.

    Args:
        op: name of the encoder, which has just run.
        serve: the overload that ran.
        x: `[n, d_in]`.
        W_enc: `[d_in, d_sae]`, what the op got.
        given: what the caller passed.
    """
    float64 = getattr(serve, "namespace", "") == ops.REFERENCE
    if not float64 and W_enc is given:
        return
    sizes = (*x.shape, W_enc.shape[1])
    if not all(type(size) is int for size in sizes):
        return  # symbols of a trace
    n, d_in, d_sae = sizes
    reason = "float64 is served by the reference"
    told = Explanation(op, "reference", reason, n=n, d_in=d_in, d_sae=d_sae)
    cast = "" if W_enc is given else str(W_enc.dtype).removeprefix("torch.")
    _thread.note = _Note(time.monotonic_ns(), cast, told)
