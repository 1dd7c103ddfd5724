"""`pack`: the int8 codes that screen an encoder's entries, made once for weights that stay.

    H w_j = r_j p_j + error_j      H block Hadamard transform, p_j int8 codes, r_j a scale

The codes only propose entries, with a margin for their error; the weights decide. On a CPU the
margin covers every error. On CUDA it is statistical, so codes are made only where
`precision="screened"` asks for them. Source: docs/design.md, Screening.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import ops
from .checks import check_float, check_vector

NATIVE = "pack_encoder"
Precision = Literal["exact", "screened"]


@dataclass(frozen=True, eq=False)
class PackedEncoder:
    """`W_enc` with its codes; the encoders take it in place of `W_enc`.

    Attributes:
        W_enc: `[d_in, d_sae]`, the tensor that was packed, which must not change.
        codes: uint8, or None where nothing would use them (a GPU unless `precision="screened"`,
            float64, no compiled library).
        checksums: `[d_sae]` int64, or None when packed without `check`.
    """

    W_enc: Tensor
    codes: Tensor | None
    checksums: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """`(d_in, d_sae)`."""
        return self.W_enc.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, beside the weights."""
        return 0 if self.codes is None else self.codes.nbytes

    def verify(self) -> None:
        """Compare the weights with what was packed, if `check` was asked for.

        Raises:
            RuntimeError: a latent's weights have changed.
        """
        if self.checksums is None:
            return
        changed = (checksums(self.W_enc) != self.checksums).nonzero()
        if changed.numel() > 0:
            raise RuntimeError(
                f"pack: the weights of {changed.numel()} latents changed after packing, the first "
                f"being {int(changed[0])}; pack again"
            )


def pack(
    W_enc: Tensor,
    *,
    center: Tensor | None = None,
    check: bool = False,
    precision: Precision = "exact",
) -> PackedEncoder:
    """Prepare an encoder whose weights will not change for repeated use.

    The encoders take the result in place of `W_enc`. Changing `W_enc` afterwards, `.data` edits
    included, makes results wrong; `check=True` finds that out, at the price of reading the weights
    in every call. `explain` says whether codes were used.

    On a CPU all three encoders return the same bits, faster: their int8 codes need not be made in
    every call, and few tokens read one byte per weight. A processor without int8 dot products does
    not use the codes.

    On CUDA nothing happens unless `precision="screened"`, which serves the three encoders on
    compute capability 9.0: int8 products choose candidates, and float32 sums of the weights as they
    are decide. A margin of five standard deviations of the codes' error lets an entry be missed
    with a chance below 1e-6 (`audit` counts misses); what is stored is exact. A call waits for the
    device, JumpReLU and BatchTopK once more than usual and with `max_nnz` too, so that a CUDA graph
    gets the plain encoder, as do calls with too many candidates, TopK and BatchTopK of up to 16
    tokens, and other devices. Rows of TopK and batches of BatchTopK that the codes leave undecided
    get the plain encoder too, as does a batch of BatchTopK with a token that is not finite.

    Args:
        W_enc: `[d_in, d_sae]` float32, bfloat16, float16 or float64, any strides; on CUDA
            `W_enc.t()` has contiguous rows of a multiple of 8 elements.
        center: `[d_in]` a typical x, the mean of some say; speeds up encoding where x has a large
            common part, and changes no result (CUDA: no more than `precision` does). Its norm is
            0 or in 2^-30 .. 2^30.
        check: keep a checksum per latent and compare it in every call.
        precision: "exact", or "screened" to allow results that lack 1 entry in 10^6.

    Returns:
        A `PackedEncoder` of 1 byte per weight, `d_in` rounded up to a multiple of 64 (CUDA: 128),
        and 12 (8) bytes per latent, on a CPU also 4 per 256 to 511 elements of it, or so.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices disagree, or `precision` is neither.
        RuntimeError: `center` is not finite or out of range (CPU).
    """
    check_float("pack", "W_enc", W_enc)
    if W_enc.dim() != 2:
        raise ValueError(f"pack: W_enc must have shape [d_in, d_sae], got {tuple(W_enc.shape)}")
    if precision not in ("exact", "screened"):
        raise ValueError(f'pack: precision must be "exact" or "screened", got {precision!r}')
    if center is not None:
        check_vector("pack", "center", center, W_enc.shape[0], W_enc)
        center = center.detach().float()
    codes = None
    if packable(W_enc, precision):
        with torch.no_grad():
            codes = getattr(torch.ops, ops.NAMESPACE).pack_encoder(W_enc.detach(), center)
        codes = codes if codes.numel() > 0 else None
    return PackedEncoder(W_enc, codes, checksums(W_enc) if check else None)


def packed_bytes(d_in: int, d_sae: int, center: bool = False) -> int:
    """Bytes of the codes of a `[d_in, d_sae]` encoder."""
    width, latents = -(-d_in // 64) * 64, -(-d_sae // 48) * 48
    block = math.gcd(width, 256)
    chunks = (chunk for chunk in range(block, width, block) if chunk >= 256 and width % chunk == 0)
    scales = width // next(chunks, width) if width else 0
    return 64 + (-(-d_in * 4 // 64) * 64 if center else 0) + latents * (width + 12 + 4 * scales)


def screened_width(d_in: int) -> int:
    """Codes of a latent on CUDA."""
    return -(-d_in // 128) * 128


def unpacked(W_enc: Tensor | PackedEncoder) -> tuple[Tensor, Tensor | None]:
    """The weights and, where they were packed, their codes; checked if that was asked for."""
    if not isinstance(W_enc, PackedEncoder):
        return W_enc, None
    W_enc.verify()
    return W_enc.W_enc, W_enc.codes


def packable(W_enc: Tensor, precision: Precision = "exact") -> bool:
    """Whether an encoder on these weights might use codes."""
    if ops.NATIVE_MISSING or W_enc.dtype == torch.float64:
        return False
    if W_enc.device.type == "cuda":
        encoder = ops.implementation("jumprelu_encode", "cuda")
        return precision == "screened" and encoder == "native"
    return W_enc.device.type == "cpu"


@torch.no_grad()
def checksums(W_enc: Tensor) -> Tensor:
    """`[d_sae]` sums of the bits of a latent's weights, each times an odd number of its place."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[W_enc.element_size()]
    rows = W_enc.detach().t()
    place = 2 * torch.arange(W_enc.shape[0], device=W_enc.device) + 1
    result = torch.empty(rows.shape[0], dtype=torch.int64, device=W_enc.device)
    for begin in range(0, rows.shape[0], 1024):
        part = rows[begin : begin + 1024].contiguous().view(bits).to(torch.int64)
        result[begin : begin + 1024] = (part * place).sum(1)
    return result
