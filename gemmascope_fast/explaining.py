"""`explain`: which path the last encoder took, on a CPU or with codes on CUDA, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from . import ops


@dataclass(frozen=True)
class Explanation:
    """What the calling thread's last encoder of the compiled library did.

    Encoders on CUDA without `pack`ed codes are not recorded.

    Attributes:
        op: name of the op; empty when there was none.
        path: "screened" (int8 candidates, float32 decisions) or "direct" (the plain product).
        reason: why the path is direct; empty when it is not.
        target: instruction set of the kernels: "generic", "avx2", "avx512" or "cuda sm_90a".
        int8: whether the processor multiplies int8 much faster than float32.
        packed: whether the weights' codes came from `pack`.
        centered: whether a common part of x was taken out of the products.
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
    packed: bool = False
    centered: bool = False
    n: int = 0
    d_in: int = 0
    d_sae: int = 0
    screened_blocks: int = 0
    direct_blocks: int = 0
    candidates: int = 0
    rescored: int = 0

    def __str__(self) -> str:
        """One line for people."""
        if not self.op:
            return self.reason
        shape = f"{self.op} of [{self.n}, {self.d_in}] x [{self.d_in}, {self.d_sae}]"
        if self.path == "direct":
            return f"{shape}: direct ({self.target}): {self.reason}"
        weights = "packed codes" if self.packed else "codes made in this call"
        per_token = [f"{count / max(self.n, 1):.0f}" for count in (self.candidates, self.rescored)]
        passed = f"{per_token[0]} candidates per token, {per_token[1]} rescored"
        where = f"{self.screened_blocks} blocks screened, {self.direct_blocks} direct"
        center = ", centred" if self.centered else ""
        return f"{shape}: screened int8 ({self.target}, {weights}{center}): {passed}, {where}"


def explain() -> Explanation:
    """Say which path this thread's last encoder took, on a CPU or with codes on CUDA, and why."""
    if ops.NATIVE_MISSING:
        return Explanation(reason=ops.NATIVE_MISSING)
    text = getattr(torch.ops, ops.NAMESPACE).encode_report(torch.empty(0))
    return Explanation(**json.loads(bytes(text.tolist()).decode()))
