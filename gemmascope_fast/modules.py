"""`SAE` and `Transcoder`: weights, an activation, and the ops that join them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from .activations import Activation, BatchTopK, JumpReLU, TopK, check_activation
from .arguments import check_size, present_device
from .checks import check_float_dtype, skip_input
from .effective import decoded, encoded, folded
from .freezing import Frozen
from .initial import unit_rows_
from .pretrained import Pretrained
from .semantics import Semantics, as_semantics
from .sparse import SparseActs
from .training.losses import DEFAULT_TERMS, LossTerm

__all__ = ["SAE", "Activation", "BatchTopK", "JumpReLU", "TopK", "Transcoder"]


class SAE(Pretrained, Frozen):
    """Sparse autoencoder: `recon = act(x @ W_enc + b_enc) @ W_dec + b_dec`.

    Args:
        d_in: width of x.
        d_sae: number of latents.
        activation: `JumpReLU`, `TopK` or `BatchTopK`; the attribute may be assigned.
        d_out: width of the reconstruction; default `d_in`.
        device: of the parameters.
        dtype: of `W_enc` and `W_dec`; biases and threshold are float32 (float64 if this is).
        generator: source of the initial weights.
        semantics: `Semantics`, or the name of a preset; default Gemma Scope 2's.

    Attributes:
        W_enc: `[d_in, d_sae]`, one contiguous row of memory per latent (`W_enc.t()` contiguous).
        b_enc: `[d_sae]`.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`.
        threshold: `[d_sae]` for `JumpReLU`, else None; its logarithm under some semantics.
        ema_threshold: running threshold (float64 scalar buffer) of a BatchTopK whose semantics have
            one, else None; negative before the first batch where it starts with that.
        metadata: what `load` found beyond the weights; `save_pretrained` writes it.

    W_dec starts He-uniform with unit rows, W_enc as its transpose (when the widths agree), the
    biases at 0: Gemma Scope's recipe, arXiv 2408.05147, section 3.2.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: nn.Parameter | None
    ema_threshold: Tensor | None
    centred = True
    deferred: Any = None  # a fused optimizer's: backward leaves its work to step

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation | None = None,
        *,
        d_out: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        semantics: Semantics | str = "gemma_scope_2",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        d_in, d_sae = check_size(op, "d_in", d_in), check_size(op, "d_sae", d_sae)
        d_out = d_in if d_out is None else check_size(op, "d_out", d_out)
        activation = check_activation(op, JumpReLU() if activation is None else activation, d_sae)
        check_float_dtype(op, "dtype", dtype)
        device = None if device is None else present_device(op, device)
        self.metadata = {}
        self.semantics = as_semantics(op, semantics)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in, device=device, dtype=dtype).t())
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out, device=device, dtype=dtype))
        self.b_enc = nn.Parameter(torch.empty(d_sae, device=device, dtype=wide))
        self.b_dec = nn.Parameter(torch.empty(d_out, device=device, dtype=wide))
        self.activation = activation
        if isinstance(self.activation, JumpReLU):
            self.threshold = nn.Parameter(torch.empty(d_sae, device=device, dtype=wide))
        else:
            self.register_parameter("threshold", None)
        running = isinstance(self.activation, BatchTopK) and self.semantics.ema_decay is not None
        start = -1.0 if self.semantics.ema_start == "first" else 0.0
        ema = torch.tensor(start, dtype=torch.float64, device=device) if running else None
        self.register_buffer("ema_threshold", ema)
        self.reset_parameters(generator)

    @property
    def d_in(self) -> int:
        """Width of x."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.W_dec.shape[1]

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator | None = None, *, before: int = 0, after: int = 0
    ) -> None:
        """Draw the initial weights; those of a slice of latents have some `before` and `after`."""
        self.unfreeze()
        unit_rows_(self.W_dec, generator, before, after)
        if self.d_in == self.d_out:
            self.W_enc.copy_(self.W_dec.t())
        else:
            unit_rows_(self.W_enc.t(), generator, before, after)
        self.b_enc.zero_()
        self.b_dec.zero_()
        if isinstance(self.activation, JumpReLU) and self.threshold is not None:
            self.threshold.fill_(self.semantics.stored(self.activation.init_threshold))

    def theta(self) -> Tensor:
        """`[d_sae]` thresholds of a `JumpReLU` in units of `pre`, differentiable.

        Raises:
            ValueError: the activation has no thresholds.
        """
        if self.threshold is None:
            raise ValueError(f"theta: {self.activation} has no thresholds")
        return self.threshold if self.semantics.threshold == "direct" else self.threshold.exp()

    @torch.no_grad()
    def observe(self, smallest: Tensor | None) -> None:
        """Move the running threshold towards a batch's smallest active value, if it is finite."""
        if self.ema_threshold is None or smallest is None:
            return
        moved = self.semantics.moved(self.ema_threshold, smallest)
        if torch.compiler.is_compiling():  # which loses writes to a float64 scalar on a CPU
            self.ema_threshold = moved
        else:
            self.ema_threshold.copy_(moved)

    def to_jumprelu(self, *, bandwidth: float = 0.001) -> Self:
        """A JumpReLU of Gemma Scope's semantics that encodes and decodes as this evaluates.

        Centring, decoder norms and the parametrisation of the threshold are folded into the
        weights; a BatchTopK becomes a JumpReLU at its running threshold. Weights are copies.

        Args:
            bandwidth: of the new module's straight-through window.

        Raises:
            ValueError: the module is a TopK, or a BatchTopK without a running threshold.
        """
        return cast("Self", folded(self, bandwidth))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Serve `to`, `half`, ...; biases and threshold are never rounded to 16 bits."""

        def keep_vectors(t: Tensor) -> Tensor:
            moved = fn(t)
            if t.dim() == 0:
                return moved if moved.dtype == t.dtype else t.to(moved.device)
            rounded = t.dim() == 1 and moved.dtype in (torch.bfloat16, torch.float16)
            kept = torch.float32 if t.dtype == torch.float64 else t.dtype
            return t.to(moved.device, kept) if rounded else moved

        return super()._apply(keep_vectors, recurse)

    def encode(self, x: Tensor, *, max_nnz: int | None = None) -> SparseActs:
        """Sparse activations of `x [*batch, d_in]`.

        Raises:
            ValueError: x has the wrong width, or `max_nnz` is given for TopK.
            CapacityError: more than `max_nnz` entries.
        """
        if isinstance(self.activation, TopK) and max_nnz is not None:
            raise ValueError("encode: TopK always stores k entries per token; drop max_nnz")
        return encoded(self, x, max_nnz)

    def decode(self, acts: SparseActs, *, dtype: torch.dtype | None = None) -> Tensor:
        """Reconstruction `[*batch, d_out]`; `dtype` defaults to that of `W_dec`."""
        return decoded(self, acts, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `[*batch, d_out]` in the dtype of x."""
        return self.decode(self.encode(x), dtype=x.dtype)

    def loss(
        self, x: Tensor, target: Tensor | None = None, terms: Sequence[LossTerm] = DEFAULT_TERMS
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, differentiable, in blocks of rows: memory is bounded at any density.

        `loss = sum over terms of mean over tokens`; equal up to rounding to encode, decode and the
        terms under autograd, which hold every entry at once. The gradients are computed with the
        value, unless gradients are disabled; `backward` hands them out (scaled, when it must, which
        copies them: prefer the terms' coefficients). Second derivatives raise. The same bits every
        run; BLAS may round differently under another number of threads.

        JumpReLU blocks whose measured density makes a dense product cheaper are evaluated densely,
        in tiles of 64 MiB. TopK blocks are sparse; BatchTopK selects over the whole batch and is
        one sparse block. An empty batch has loss 0 and zero gradients.

        Args:
            x: `[*batch, d_in]` floating point.
            target: `[*batch, d_out]` floating point; default x, needed by a `Transcoder`.
            terms: of `gemmascope_fast.training`, named differently; default `Reconstruction()`.

        Returns:
            The loss, a float32 scalar (float64 if x or a weight is), and detached scalars: each
            term's share of it under the term's `name`; `fvu`, squared error over the squared
            deviation of the target from its batch mean; `l0`, mean active latents per token;
            `density`, l0 / d_sae; `blocks`, and `dense_blocks` among them.

        Raises:
            TypeError: a tensor is not floating point, or `terms` is not a sequence of terms.
            ValueError: shapes or devices disagree, target is missing, terms are empty or share a
                name, k is out of range, or bandwidth is 0 while `threshold` requires grad.
        """
        from .training import blocked  # which needs this module

        return cast("tuple[Tensor, dict[str, Tensor]]", blocked.sae_loss(self, x, target, terms))

    def count_latents(self, x: Tensor) -> tuple[Tensor, int]:
        """Tokens of x on which each latent is active, `[d_sae]` int64, and tokens, in blocks."""
        from .training import blocked

        return cast("tuple[Tensor, int]", blocked.count_latents(self, x))

    def extra_repr(self) -> str:
        """Shapes and activation, for `repr`."""
        return f"d_in={self.d_in}, d_sae={self.d_sae}, d_out={self.d_out}, {self.activation}"


class Transcoder(SAE):
    """Sparse map from one activation to another, with an optional affine skip connection.

    `recon = act(x @ W_enc + b_enc) @ W_dec + b_dec (+ x @ W_skip)`, `W_skip [d_in, d_out]`, the
    orientation of Gemma Scope 2's `affine_skip_connection`.

    Args:
        d_in: width of the input activation x.
        d_sae: number of latents.
        activation: `JumpReLU`, `TopK` or `BatchTopK`.
        d_out: width of the output activation; default `d_in`.
        affine: whether there is a skip connection, initially 0.
        device: of the parameters.
        dtype: of the weights.
        generator: source of the initial weights.
        semantics: as for an `SAE`.
    """

    W_skip: nn.Parameter | None
    centred = False

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation | None = None,
        *,
        d_out: int | None = None,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        semantics: Semantics | str = "gemma_scope_2",
    ) -> None:
        options = {"device": device, "dtype": dtype, "generator": generator, "semantics": semantics}
        super().__init__(d_in, d_sae, activation, d_out=d_out, **options)  # type: ignore[arg-type]
        if affine:
            self.W_skip = nn.Parameter(torch.zeros(d_in, self.d_out, device=device, dtype=dtype))
        else:
            self.register_parameter("W_skip", None)

    def decode(
        self, acts: SparseActs, x: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Reconstruction `[*batch, d_out]`; with `x [*batch, d_in]` the skip is added.

        Raises:
            ValueError: there is a skip connection, and x is missing or of another shape.
        """
        if self.W_skip is None:
            return super().decode(acts, dtype=dtype)
        x = skip_input("decode", x, acts, self.W_skip)
        recon = super().decode(acts, dtype=dtype)
        return recon + (x.to(self.W_skip.dtype) @ self.W_skip).to(recon.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `[*batch, d_out]` in the dtype of x."""
        return self.decode(self.encode(x), x, dtype=x.dtype)
