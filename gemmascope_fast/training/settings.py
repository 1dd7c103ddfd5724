"""What one run is: sizes, activation, recipe; every argument is checked here, before anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, asdict, dataclass
from typing import Any

import torch

from ..activations import parts
from ..arguments import check_count, check_flag, check_number, plain, plain_fields
from ..checks import check_float_dtype
from ..modules import SAE, Activation, BatchTopK, JumpReLU, TopK, Transcoder
from ..multilayer import Crosscoder, CrossLayerTranscoder, MultiLayer
from ..semantics import Semantics
from .preset import Preset
from .sources import generator

ACTIVATIONS = ("jumprelu", "topk", "batchtopk")
LAYERED = ("crosscoder", "clt")
KINDS = ("sae", "transcoder", *LAYERED)
MAPPING = ("transcoder", "clt")
"""Kinds that map x to a target of its own."""
ROWS = ("exact", "live")
MOMENTS = ("fp32", "8bit")
PRECISIONS = ("exact", "screened")
OP = "train"


@dataclass(frozen=True)
class Settings:
    """One run; `gsf.train` documents the fields that are its arguments.

    Args:
        d_in: width of x, of each layer.
        d_out: width of the target, of each layer.
        layers: of a crosscoder or CLT; None for the others.
        op: whose arguments they are, for messages.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two do not fit together.
    """

    d_in: int
    d_out: int
    d_sae: int
    steps: int
    preset: Preset
    activation: str = "jumprelu"
    target_l0: float | None = None
    k: float | None = None
    batch_size: int = 4096
    rows: str = "exact"
    moments: str = "fp32"
    fused: bool = True
    init_l0: float | None = None
    matryoshka: tuple[int, ...] | None = None
    kind: str = "sae"
    affine: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    precision: str = "exact"
    checkpoint_every: int | None = None
    layers: int | None = None
    op: InitVar[str] = OP

    def __post_init__(self, op: str) -> None:
        plain_fields(self)
        for name in ("d_sae", "steps", "batch_size", "d_in", "d_out"):
            if check_count(op, name, getattr(self, name)) < 1:
                raise ValueError(f"{op}: {name} must be >= 1, got {getattr(self, name)}")
        check_count(op, "seed", self.seed)
        if (
            self.checkpoint_every is not None
            and check_count(op, "checkpoint_every", self.checkpoint_every) < 1
        ):
            raise ValueError(f"{op}: checkpoint_every must be >= 1, got {self.checkpoint_every}")
        for name, choices in (
            ("activation", ACTIVATIONS),
            ("rows", ROWS),
            ("moments", MOMENTS),
            ("kind", KINDS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{op}: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("fused", "affine"):
            check_flag(op, name, getattr(self, name))
        self._check_layers(op)
        self._check_dtypes(op)
        self._check_sparsity(op)
        self._check_matryoshka(op)
        self._check_kind(op)

    def _check_dtypes(self, op: str) -> None:
        for name in ("dtype", "autocast"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, torch.dtype):
                raise TypeError(f"{op}: {name} must be a torch.dtype, got {value!r}")
            if value is not None:
                check_float_dtype(op, name, value)
        if self.dtype == torch.float16:
            raise TypeError(f"{op}: dtype must not be float16, which has no room for the updates")
        if self.dtype == torch.float64 and self.moments == "8bit":
            raise ValueError(f'{op}: moments="8bit" is for float32 and bfloat16, got dtype float64')

    def _check_sparsity(self, op: str) -> None:
        if self.activation == "jumprelu":
            if self.target_l0 is None or self.k is not None:
                raise ValueError(f"{op}: jumprelu needs target_l0 (active latents per token), no k")
            for name in ("target_l0", "init_l0"):
                value = getattr(self, name)
                if value is None or check_number(op, name, value, positive=True) < self.latents:
                    continue
                most = f"d_sae={self.d_sae}"
                if self.layers is not None:
                    most = f"layers * d_sae = {self.layers} * {self.d_sae}"
                raise ValueError(f"{op}: {name} must be below {most}, got {value}")
            return
        if self.k is None or self.target_l0 is not None or self.init_l0 is not None:
            raise ValueError(f"{op}: {self.activation} needs k, and neither target_l0 nor init_l0")
        if self.activation == "topk":
            check_count(op, "k", self.k, self.d_sae, "d_sae")
        if not 0 < check_number(op, "k", self.k, positive=True) <= self.d_sae:
            raise ValueError(f"{op}: k must be in (0, d_sae={self.d_sae}], got {self.k}")

    def _check_matryoshka(self, op: str) -> None:
        sizes = self.matryoshka
        if sizes is None:
            return
        for size in sizes:
            check_count(op, "matryoshka", size, self.d_sae, "d_sae")
        if not sizes or sizes[0] < 1 or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
            raise ValueError(f"{op}: matryoshka must be ascending sizes >= 1, got {list(sizes)}")
        if sizes[-1] != self.d_sae:
            raise ValueError(f"{op}: matryoshka must end with d_sae={self.d_sae}, got {sizes[-1]}")

    def _check_kind(self, op: str) -> None:
        if self.affine and self.kind not in MAPPING:
            raise ValueError(f"{op}: affine=True needs kind='transcoder' or kind='clt'")
        if self.kind != "transcoder" and self.d_in != self.d_out:
            named = {"sae": "an SAE", "crosscoder": "a crosscoder", "clt": "a CLT"}[self.kind]
            raise ValueError(
                f"{op}: {named}'s target must be as wide as x, {self.d_in}, got {self.d_out}"
            )

    def _check_layers(self, op: str) -> None:
        if self.kind not in LAYERED:
            if self.layers is not None:
                raise ValueError(
                    f"{op}: layers is for kind='crosscoder' and kind='clt', got layers="
                    f"{self.layers} and kind={self.kind!r}"
                )
            return
        if self.layers is None:
            raise ValueError(f"{op}: kind={self.kind!r} needs layers, their number")
        if check_count(op, "layers", self.layers) < 1:
            raise ValueError(f"{op}: layers must be >= 1, got {self.layers}")
        for name, only in (("matryoshka", None), ("precision", "exact")):
            if getattr(self, name) != only:
                raise ValueError(
                    f"{op}: {name}={getattr(self, name)!r} is for kind='sae' and "
                    f"kind='transcoder', got kind={self.kind!r}"
                )

    @property
    def latents(self) -> int:
        """Latents of the whole dictionary."""
        return self.d_sae * (self.layers or 1)

    @property
    def start_l0(self) -> float | None:
        """L0 that thresholds are calibrated to; None where they start at one value."""
        if self.target_l0 is None or not (self.preset.calibrated or self.init_l0 is not None):
            return None
        if self.init_l0 is not None:
            return self.init_l0
        return min(2 * (self.preset.target_l0_start or self.target_l0), self.latents / 2)

    @property
    def k_aux(self) -> int:
        """Dead latents of a layer that reconstruct a token's residual: half the width.

        Source: arXiv 2406.04093, appendix A.2.
        """
        return max(self.d_in // 2, 1)

    def record(self) -> dict[str, Any]:
        """As JSON, without what may differ between two runs that are the same."""
        read = asdict(self) | {"dtype": str(self.dtype), "autocast": str(self.autocast)}
        del read["checkpoint_every"]
        if self.precision == "exact":  # checkpoints from before there was a choice say nothing
            del read["precision"]
        if self.layers is None:  # nor from before there were any
            del read["layers"]
        return read

    def make(self, device: torch.device, latents: slice | None = None) -> SAE | MultiLayer:
        """The module with its initial weights, the same on every device; or some of its latents.

        Args:
            device: of the weights.
            latents: of an SAE or transcoder.
        """
        if self.layers is not None:
            return self._make_layers(self.layers).to(device)
        sizes: dict[str, Any] = {"d_out": self.d_out, "dtype": self.dtype, "device": "cpu"}
        if self.activation == "batchtopk":
            sizes["semantics"] = Semantics(ema_decay=self.preset.threshold_decay)
        if self.kind == "transcoder":
            sizes["affine"] = self.affine
        kind = Transcoder if self.kind == "transcoder" else SAE
        here = latents or slice(0, self.d_sae)
        sizes["generator"] = generator(self.seed, "weights")
        with parts():
            module = kind(self.d_in, here.stop - here.start, self._function(), **sizes)
        if latents is not None:
            draw = generator(self.seed, "weights")
            around = {"before": here.start, "after": self.d_sae - here.stop}
            module.reset_parameters(draw, **around)
        return module.to(device)

    def _make_layers(self, layers: int) -> MultiLayer:
        options: dict[str, Any] = {"dtype": self.dtype, "device": "cpu"}
        if self.activation == "batchtopk":
            options["ema_decay"] = self.preset.threshold_decay
        options["generator"] = generator(self.seed, "weights")
        sizes = layers, self.d_in, self.d_sae, self._function()
        if self.kind == "crosscoder":
            return Crosscoder(*sizes, **options)
        return CrossLayerTranscoder(*sizes, affine=self.affine, **options)

    def _function(self) -> Activation:
        if self.activation == "jumprelu":
            return JumpReLU(self.preset.bandwidth, self.preset.init_threshold)
        assert self.k is not None
        return TopK(int(self.k)) if self.activation == "topk" else BatchTopK(float(self.k))


def prefixes(op: str, sizes: Any) -> tuple[int, ...] | None:
    """`matryoshka` as a tuple.

    Raises:
        TypeError: it is no sequence.
    """
    if sizes is None:
        return None
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(f"{op}: matryoshka must be a sequence of ints, got {type(sizes).__name__}")
    return tuple(plain(size) for size in sizes)
