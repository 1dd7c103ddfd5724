"""How `backward` leaves its work to `step`: encode and decode of a module under a fused optimizer.

`encode` returns activations whose values and gates are leaves; `decode` is a node whose backward
keeps the gradient of the reconstruction and passes none to the values. After `backward` the record
of one forward pass holds all that `fused_sparse_step` needs: x, entries, d_recon, and the gradients
of values and gates from other terms of the loss. One record at a time: a second one raises.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from ..checks import check_decoder
from ..modules import SAE, JumpReLU
from ..multilayer.base import MultiLayer
from ..operands import autocast, is_one, widen
from ..sparse import SparseActs
from .layers import Layer, Part
from .record import OP, Record

_lock = threading.Lock()
_owners: Any = WeakTensorKeyDictionary()
"""The fused optimizer's side of each parameter that has one; behind `_lock`."""


class Deferred:
    """What a fused optimizer puts into its module; `module.encode` and `decode` go through it.

    It leaves the module with the optimizer: without one nobody would apply what it keeps.

    Attributes:
        pending: the record whose backward pass has run and whose step has not, or None.
    """

    def __init__(self, module: Part, optimizer: torch.optim.Optimizer, layer: str = "") -> None:
        self._layer = layer
        self.module = module
        self._weights = {name: weakref.ref(getattr(module, name)) for name in ("W_enc", "W_dec")}
        leave = weakref.WeakMethod(self.leave)
        self._optimizer = weakref.ref(optimizer, lambda _: (gone := leave()) and gone())
        self.pending: Record | None = None
        self._records: Any = WeakTensorKeyDictionary()
        self._left: dict[Tensor, tuple[Tensor, int]] = {}  # dense gradients as backward left them
        note = _noter(weakref.ref(self))
        for p in module.parameters():
            if p.requires_grad and p is not module.W_enc and p is not module.W_dec:
                p.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
        module.deferred = self
        with _lock:
            for weight in (module.W_enc, module.W_dec):
                _owners[weight] = weakref.ref(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module has no optimizer: copied and pickled as None."""
        return type(None), ()

    def leave(self) -> None:
        """Make the module and its parameters ordinary ones again."""
        if self.module.deferred is self:
            self.module.deferred = None
        with _lock:
            for p in self._weights.values():
                _owners.pop(p(), None)

    def clear(self) -> None:
        """Forget the pending gradients."""
        self.pending = None
        self._left.clear()

    @property
    def serves(self) -> bool:
        """Whether gradients are asked for, of both matrices: not in a frozen module, say."""
        asked = (getattr(self.module, name).requires_grad for name in self._weights)
        return torch.is_grad_enabled() and all(asked)

    def replaced(self) -> str | None:
        """Which of the matrices is not the parameter any more that the optimizer has."""
        own = self._weights.items()
        found = (name for name, p in own if p() is not getattr(self.module, name))
        return next((f"{name}{self._layer}" for name in found), None)

    def left(self, p: Tensor) -> None:
        """Note the gradient of `p` that a backward pass has just left there."""
        if p.grad is not None:
            self._left[p] = (p.grad, p.grad._version)

    def checked(self) -> Record:
        """Return the pending record, if it can be applied."""
        record, module = self.pending, self.module
        assert record is not None
        for name, version in zip(("W_enc", "W_dec"), record.versions, strict=True):
            p = getattr(module, name)
            if p.grad is not None:
                raise RuntimeError(
                    f"{OP}: {name}{self._layer} has a dense gradient beside the fused one: a term "
                    "of the loss uses it outside of encode and decode; use fused=False"
                )
            if p._version != version:
                raise RuntimeError(
                    f"{OP}: {name}{self._layer} was changed between encode and step()"
                )
        for p, (grad, version) in self._left.items():
            if p.grad is not None and (p.grad is not grad or grad._version != version):
                raise RuntimeError(
                    f"{OP}: gradients were changed between backward() and step(), by "
                    "torch.nn.utils.clip_grad_norm_, say; those of W_enc and W_dec do not exist "
                    "yet and would stay as they are: use fused=False"
                )
        return record

    def encode(self, x: Tensor, acts: SparseActs) -> SparseActs:
        """`acts`, just encoded from x, with leaves as values and gates."""
        if x.requires_grad:
            raise ValueError(f"{OP}: x must not require grad: its gradient would not be computed")
        (x,) = autocast(x)
        record = Record(self, self.module, x, acts)
        leaves = {"values": acts.values.detach().requires_grad_()}
        if acts.gate.requires_grad:
            leaves["gate"] = acts.gate.detach().requires_grad_()
        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(_taker(record, f"d_{name}"))  # type: ignore[no-untyped-call]
        self._records[leaves["values"]] = record
        return acts._replace(**leaves)

    def keep(
        self,
        x: Tensor,
        entries: tuple[Tensor, Tensor, Tensor, Tensor],
        transpose: tuple[Tensor, Tensor],
        ends: tuple[int, ...],
        d_recon: Tensor,
        d_values: Tensor | None,
        d_gate: Tensor | None,
    ) -> Callable[[Tensor], None]:
        """What `module.loss` calls in its backward pass, with the gradient of the loss."""
        feature_offsets, permutation = transpose
        acts = SparseActs(
            *entries,
            shape=(x.shape[0], self.module.d_sae),
            feature_offsets=feature_offsets,
            permutation=permutation,
        )
        record = Record(self, self.module, x, acts)
        record.ends = list(ends)
        incoming = {"d_recon": d_recon, "d_values": d_values, "d_gate": d_gate}

        def receive(scale: Tensor) -> None:
            record.scale = None if is_one(scale, small=True) else scale
            for name, gradient in incoming.items():
                if gradient is not None:
                    record.receive(name, gradient)

        return receive

    def decode(self, acts: SparseActs, b_dec: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Reconstruction of activations that `encode` returned."""
        check_decoder("decode", acts, self.module.W_dec, dtype)
        dtype = dtype or self.module.W_dec.dtype
        record = self._records.get(acts.values)
        if record is None:
            raise ValueError(
                f"{OP}: decode needs the activations that this module's encode returned, unedited: "
                "decode others under torch.no_grad(), or use fused=False"
            )
        recon = _Decode.apply(acts.values, b_dec, self.module.W_dec.detach(), record, dtype)  # type: ignore[no-untyped-call]
        return recon.reshape(*acts.shape[:-1], self.module.d_out)  # type: ignore[no-any-return]


def attach(module: SAE | MultiLayer, optimizer: torch.optim.Optimizer) -> list[Deferred]:
    """Put a fused optimizer into a module, layer by layer."""
    if isinstance(module, SAE):
        check_part(module)
        return [Deferred(module, optimizer)]
    held = [old for old in module.deferred if old is not None]
    if any(old.replaced() for old in held):  # that optimizer can step no more
        for old in held:
            old.leave()
    layers = [(Layer(module, at), f"[{at}]") for at in range(module.n_layers)]
    for layer, name in layers:  # all of them first: an error leaves the module as it was
        check_part(layer, name)
    return [Deferred(layer, optimizer, name) for layer, name in layers]


def check_part(module: Part, layer: str = "") -> None:
    """Raise where a fused optimizer cannot serve, before anything is put into the module."""
    for name in ("W_enc", "W_dec"):
        p = getattr(module, name)
        rows = p.t() if name == "W_enc" else p
        if not p.requires_grad:
            raise ValueError(f"{OP}: {name}{layer} must require grad")
        if rows.shape[1] > 1 and rows.stride(1) != 1:
            raise ValueError(
                f"{OP}: {name}{layer} must have one contiguous row of memory per latent"
            )
    check_semantics(OP, module)
    old = module.deferred
    if old is not None and not (isinstance(old, Deferred) and old.replaced()):
        raise ValueError(f"{OP}: the module has a fused optimizer already: delete that first")


def check_semantics(op: str, module: Part) -> None:
    """The ops see the module's parameters as they are."""
    s = module.semantics
    if isinstance(module.activation, JumpReLU):
        plain = s.own_gradient and (s.gate, s.threshold) == ("strict", "direct")
    else:
        plain = not s.rescale and not s.zero_gradient
    if not plain or (s.centers(module.activation) and module.centred):
        raise ValueError(
            f"{op}: only the default semantics are served, got {s}: use fused=False and dense "
            "gradients"
        )


def pending_parameters(p: Tensor) -> bool:
    """Whether a fused step owes `p` a gradient."""
    with _lock:
        owner = _owners.get(p)
    deferred = None if owner is None else owner()
    return deferred is not None and deferred.pending is not None


def _noter(owner: weakref.ref[Deferred]) -> Any:
    def note(p: Tensor) -> None:
        deferred = owner()
        if deferred is not None:
            deferred.left(p)

    return note


def _taker(record: Record, name: str) -> Any:
    def take(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:  # decode passes none on
            record.receive(name, gradient)

    return take


class _Decode(torch.autograd.Function):
    """`decode` whose backward keeps d_recon and leaves the gradient of the values to the step."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, b_dec: Tensor, W_dec: Tensor, record: Record, dtype: torch.dtype
    ) -> Tensor:
        ctx.record, ctx.W_dec = record, W_dec
        acts, bias = record.acts, widen(b_dec.detach())
        (W_dec,) = autocast(W_dec)
        op = ops.overload("decode", values, W_dec, bias)
        entries = (acts.offsets, acts.indices, widen(values.detach()), W_dec, bias)
        recon: Tensor = op(*entries, *acts.by_feature(), dtype)
        return recon

    @staticmethod
    def backward(ctx: Any, d_recon: Tensor) -> tuple[Any, ...]:
        ctx.record.receive("d_recon", d_recon[None])
        acts, d_b_dec = ctx.record.acts, None
        if ctx.needs_input_grad[1]:
            op = ops.overload("decode_backward", d_recon, acts.values, ctx.W_dec)
            entries = (acts.offsets, acts.indices, widen(acts.values), ctx.W_dec)
            d_b_dec = op(d_recon, *entries, *acts.by_feature(), False, False, True)[2]
        return None, d_b_dec, None, None, None
