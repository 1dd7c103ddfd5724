"""Adam whose untouched rows cost nothing, alone or fused into the backward pass of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_number
from ..modules import SAE
from ..multilayer.base import MultiLayer
from ..screening import current_screens
from .deferred import Deferred, attach
from .layers import Part
from .record import Record
from .rows import ROUNDING, as_rows, new_state, op_state, rates, requantise, rule, update

OP = "Adam"
ROWS, MOMENTS = ("touched", "exact", "live"), ("fp32", "8bit")


class Adam(torch.optim.Optimizer):
    """Adam that skips the rows (latents) whose step would be zero.

    `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`,
    `w -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)`: `torch.optim.Adam`, up to
    rounding. With beta1 = 0 (Gemma Scope's recipe) there is no first moment, and a row without
    gradient does not move: only rows with a gradient are updated, their v decayed by `beta2^k` for
    the k steps since the last one. bfloat16 weights are rounded stochastically, float32 inside.

    Args:
        params: a module, or parameters or groups as of any optimizer. Of an `SAE`, `Transcoder`,
            `Crosscoder` or `CrossLayerTranscoder`, W_dec gets a group of its own, the last one.
        lr: learning rate, finite, >= 0.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root, finite, >= 0.
        rows: "exact" is Adam on every row (with beta1 = 0 that is every touched row); "live" stops
            moving a row when its momentum since the last gradient has decayed below rounding
            (`beta1^k < 2^-24` for float32 weights); "touched" is "exact" and insists on beta1 = 0.
        moments: v of matrices in float32, or in 8-bit codes ("8bit": one exponent per 128 columns,
            stochastically rounded; 1.01 bytes per weight). The first moment stays in float32.
        remove_parallel: take the component along each row of W_dec out of its gradient first.
        unit_norm: scale every updated row of W_dec to unit norm; of several layers, a row is all
            that a latent writes. Both act on each matrix of the group when params is no dictionary.
        fused: params is a dictionary: `backward` leaves the gradients of W_enc and W_dec
            uncomputed, and `step` computes them row by row while it updates, without gradient
            buffers. A second `backward` before `step` or `zero_grad` raises, and so does decoding
            activations other than those that `module.encode` returned. Gradients that are dense all
            the same (`module.loss` in several blocks; encode and decode of several layers) are
            applied as without fused. Needs the default `Semantics`.
        seed: of the stochastic rounding; the same bits for any number of threads.

    Raises:
        TypeError: an argument has the wrong type, or a parameter's dtype is not float32, bfloat16
            or float64.
        ValueError: an argument is out of range, or does not fit the module.

    Source: Kingma and Ba 2015, arXiv 1412.6980; its use here, arXiv 2408.05147, section 3.2.
    """

    quantises = True  # the rows it moves, of a module that keeps codes (screening.py)

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        *,
        rows: str = "exact",
        moments: str = "fp32",
        remove_parallel: bool = False,
        unit_norm: bool = False,
        fused: bool = False,
        seed: int = 0,
    ) -> None:
        decoder = {"remove_parallel": bool(remove_parallel), "unit_norm": bool(unit_norm)}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "rows": rows, "moments": moments}
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"{OP}: seed must be an int, got {type(seed).__name__}")
        self._seed = seed
        self._deferred: list[Deferred] = []
        if isinstance(params, (SAE, MultiLayer)):
            _check_leaves(params)
            plain = dict.fromkeys(decoder, False)
            rows_of = [params.W_dec] if isinstance(params, SAE) else list(params.W_dec)
            apart = {id(p) for p in rows_of}
            others = [p for p in params.parameters() if id(p) not in apart and p.requires_grad]
            groups: list[dict[str, Any]] = [{"params": others} | plain, {"params": rows_of}]
            super().__init__(groups, defaults | decoder)
        else:
            if fused:
                raise ValueError(
                    f"{OP}: fused=True needs an SAE, a Transcoder, a Crosscoder or a "
                    "CrossLayerTranscoder as params"
                )
            listed = params.parameters() if isinstance(params, nn.Module) else params
            super().__init__(listed, defaults | decoder)
        if fused:
            assert isinstance(params, (SAE, MultiLayer))
            self._deferred = attach(params, self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; everything is checked first."""
        given = param_group["params"]
        listed = [given] if isinstance(given, Tensor) else list(given)
        checked = {**param_group, "params": listed}
        unnamed = [p[1] if isinstance(p, tuple) else p for p in listed]
        check_group({**self.defaults, **checked}, unnamed)
        super().add_param_group(checked)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A GradScaler then tells `step` of itself instead of unscaling by its own."""
        return bool(self._deferred)

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the state of every parameter now, not at its first step: to be loaded into, say."""
        for group in self.param_groups:
            for p in group["params"]:
                self._state(p, group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, those that a fused step would have computed too."""
        for deferred in self._deferred:
            deferred.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, then return what `closure` returned.

        Raises:
            TypeError: a gradient is sparse.
            RuntimeError: a fused gradient and a dense one of the same weights are both pending,
                the weights changed since the fused forward pass, the other gradients since
                `backward` (clipped, say), W_enc or W_dec is another parameter than a fused
                optimizer was made with, or a GradScaler calls. Nothing has been updated then.
        """
        self._check_fused()
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        held = [(p, group) for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            check_group(group, [])
        for p, _ in held:
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise TypeError(
                    f"{OP}: gradients must be dense, got layout {p.grad.layout}: use "
                    'grad_format="dense", or torch.optim.SparseAdam'
                )
        screens = current_screens([p for p, _ in held])
        extra: dict[Tensor, Tensor] = {}
        groups = {p: group for p, group in held}
        pending = [d for d in self._deferred if d.pending is not None]
        for deferred, record in [(d, d.checked()) for d in pending]:
            extra |= self._fused_step(deferred.module, record, groups)
        for deferred in self._deferred:
            deferred.clear()
        for p, group in held:
            gradient = extra.get(p, p.grad)
            if gradient is not None:
                if p in extra and p.grad is not None:
                    gradient = gradient + p.grad
                update(p, gradient, self._state(p, group), group)
        for at, screen in screens:
            p, group = held[at]
            requantise(p, screen, self.state[p], group)
        return result

    def _check_fused(self) -> None:
        """Raise where something has happened that a fused step would not see."""
        held = [vars(self).pop(name, None) for name in ("grad_scale", "found_inf")]
        if any(value is not None for value in held):  # a GradScaler's, for the length of a step
            raise RuntimeError(
                f"{OP}(fused=True): torch.amp.GradScaler unscales and checks gradients, and those "
                "of W_enc and W_dec are never formed: use bfloat16, or fused=False"
            )
        name = next((name for d in self._deferred if (name := d.replaced())), None)
        if name is not None:
            raise RuntimeError(
                f"{OP}(fused=True): {name} was replaced after the optimizer was made, by "
                "load_state_dict(assign=True), say: make another optimizer"
            )

    def _fused_step(
        self, module: Part, record: Record, groups: dict[Tensor, dict[str, Any]]
    ) -> dict[Tensor, Tensor]:
        """Update W_enc and W_dec; return the gradients of b_enc and the threshold."""
        weights = (module.W_enc, module.W_dec)
        states = [self._state(p, groups[p]) for p in weights]
        for state in states:
            state["step"] += 1
        rules = [
            rule(p, groups[p], s["step"], s["seed"]) for p, s in zip(weights, states, strict=True)
        ]
        packed = [op_state(p, s) for p, s in zip(weights, states, strict=True)]
        found = record.run(module, packed, [rates(groups[p]) for p in weights], rules)
        targets = (module.b_enc, module.threshold)
        return {  # float64 where x is, whatever the parameters are
            p: g.to(p.dtype)
            for p, g in zip(targets, found, strict=True)
            if p is not None and p.requires_grad and p in groups and g.numel() == p.numel()
        }

    def _state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state.update(new_state(p, float(group["betas"][0]), group["moments"]))
            order = [q for g in self.param_groups for q in g["params"]]
            at = next(i for i, q in enumerate(order) if q is p)
            state["seed"] = (self._seed * 0x9E3779B97F4A7C15 + at) % 2**63
        if float(group["betas"][0]) > 0 and "exp_avg" not in state:
            raise ValueError(
                f"{OP}: beta1 was 0 when the state of a parameter began; it is now > 0"
            )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_seed": 0, "_deferred": []} | self.__dict__ | state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; moments keep their dtype whatever the weights' is."""
        numbers = {
            i: {name: value for name, value in held.items() if not isinstance(value, Tensor)}
            for i, held in state_dict["state"].items()
        }  # torch would make a copy of every moment in the dtype of its parameter
        super().load_state_dict({**state_dict, "state": numbers})
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, mine, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    kept = torch.empty_strided(
                        value.shape, value.stride(), dtype=value.dtype, device=p.device
                    ).copy_(value)
                    if name.startswith("exp_avg"):  # along the rows of memory of p
                        kept = as_rows(as_rows(kept, p).contiguous(), p).view(p.shape)
                    value = kept
                self.state[p][name] = value


def _check_leaves(module: SAE | MultiLayer) -> None:
    """The matrices are parameters, not computed from others."""
    for name in ("W_enc", "W_dec"):
        held = getattr(module, name)
        if not all(
            isinstance(p, nn.Parameter) for p in ([held] if torch.is_tensor(held) else held)
        ):
            raise ValueError(
                f"{OP}: {name} of the module is computed from other parameters, by a "
                "parametrization, say: pass module.parameters()"
            )


def check_group(group: dict[str, Any], parameters: list[Tensor]) -> None:
    """Options of one group, and the dtypes of its parameters."""
    lr = group["lr"]
    check_number(OP, "lr", lr.item() if hasattr(lr, "item") else lr)  # of torch, of numpy
    check_number(OP, "eps", group["eps"])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{OP}: betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        if not check_number(OP, f"betas[{i}]", beta) < 1:
            raise ValueError(f"{OP}: betas[{i}] must be in [0, 1), got {beta}")
    for name, known in (("rows", ROWS), ("moments", MOMENTS)):
        if group[name] not in known:
            raise ValueError(f"{OP}: {name} must be one of {known}, got {group[name]!r}")
    if group["rows"] == "touched" and betas[0] > 0:
        raise ValueError(
            f'{OP}: rows="touched" is Adam only with betas[0] = 0, got {betas[0]}: momentum moves '
            'rows without gradient too; use rows="exact" or "live"'
        )
    for p in parameters:
        if p.dtype not in ROUNDING:
            raise TypeError(
                f"{OP}: parameters must be float32, bfloat16 or float64, got {p.dtype}: float16 "
                "has no room for the updates"
            )
        if group["moments"] == "8bit" and p.dtype == torch.float64:
            raise ValueError(f'{OP}: moments="8bit" is for float32 and bfloat16 parameters')
