"""sparsify (`eai-sparsify` 1.3): its coders encode and decode by the ops of this library.

    from gemmascope_fast.integrations import sparsify
    sparsify.install()                        # every coder of the process
    with sparsify.accelerate(coder): ...      # one, for the length of the block

`fused_encoder` and `decoder_impl` are replaced in every module of the package that holds them,
under whatever name, and so is the coder's projection of its decoder's gradient on the CPU. The
replacements pass on to sparsify's own for coders that are not served, so that a module that
imported one meanwhile keeps working after `uninstall`. Its "groupmax" selector stays its own.
`install` also takes its trainer's optimizers through memory in fewer passes: the same updates.

Numerically, beyond the order of sums:
  - selected latents whose ReLU is 0 pass no gradient, and AuxK and Multi-TopK reach the encoder, as
    autograd would have it; `strict_compat=True` restores sparsify's gradients;
  - ties go to the smaller latent, also among zeros; `torch.topk` leaves them open;
  - under autocast a selection sees float32 sums of rounded products, not their rounded values.
The top entries are in the order of `torch.topk(sorted=False)`: descending on a CPU; on a GPU by
latent, with the smallest entry last.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .patching import Changes, fusing, require
from .sparsify_ops import decode, encode, remove_parallel_
from .sparsify_optim import replacement

PACKAGE, DISTRIBUTION = "sparsify", "eai-sparsify"
PROJECTION = "remove_gradient_parallel_to_decoder_directions"


class _Served:
    """Who is served: the coders named, or all; the value is `strict_compat`."""

    def __init__(self) -> None:
        self.all: bool | None = None
        self.coders: MutableMapping[Any, bool] = WeakKeyDictionary()

    def __bool__(self) -> bool:
        return self.all is not None or len(self.coders) > 0

    def strict(self, holds: Callable[[Any], bool]) -> bool | None:
        """`strict_compat` for the coder of which `holds` is true; None where it is not served."""
        found = (strict for coder, strict in list(self.coders.items()) if holds(coder))
        return next(found, self.all)


_lock = threading.RLock()
_served = _Served()
_installed: list[Changes] = []
_stock: dict[str, Callable[..., Any]] = {}
"""sparsify's own functions while ours stand in their place."""


def install(*, strict_compat: bool = False, fused_optimizers: bool = True) -> Changes:
    """Serve every coder of the process, until `uninstall` or the end of the block.

    Args:
        strict_compat: give the gradients of sparsify's own encoder: none from AuxK and Multi-TopK,
            some through selected latents whose activation is 0.
        fused_optimizers: whether its default optimizer updates block by block, which gives the same
            bits, and the Adam of trainers made from now on is `torch.optim.Adam(fused=True)`.

    Returns:
        A context manager; leaving it restores what was there before.

    Raises:
        ImportError: sparsify is not installed, or of another version than 1.3; or `schedulefree`,
            of which its optimizer is made, is missing.
    """
    host = require(PACKAGE, DISTRIBUTION, at_least="1.3", below="1.4")
    if fused_optimizers:  # before anything changes: either may be missing
        wrapper = importlib.import_module("schedulefree").ScheduleFreeWrapper
        sign_sgd = importlib.import_module(f"{PACKAGE}.sign_sgd").SignSGD
    with _lock:
        _hook(host)
        changes = Changes(lambda: _undone(changes))
        changes.attribute(_served, "all", bool(strict_compat))
        if fused_optimizers:
            changes.attribute(wrapper, "step", replacement(wrapper.step, sign_sgd))
            changes.attribute(host.Trainer, "__init__", fusing(host.Trainer.__init__))
        _installed.append(changes)
        return changes


def uninstall() -> None:
    """Undo every `install`; coders under `accelerate` stay served."""
    with _lock:
        while _installed:
            _installed.pop().undo()


def _undone(changes: Changes) -> None:
    if changes in _installed:
        _installed.remove(changes)
    _unhook_if_idle()


def accelerate(coder: Any, *, strict_compat: bool = False) -> Changes:
    """Serve one `SparseCoder`, until the end of the block or `undo()` of what is returned.

    Args:
        coder: the coder; its parameters may be moved, converted and replaced meanwhile.
        strict_compat: as for `install`; for this coder it counts more than that of `install`.

    Returns:
        A context manager; leaving it restores what was there before.

    Raises:
        TypeError: `coder` is not a `SparseCoder`.
        ImportError: sparsify is not installed, or of another version than 1.3.
    """
    host = require(PACKAGE, DISTRIBUTION, at_least="1.3", below="1.4")
    if not isinstance(coder, host.SparseCoder):
        raise TypeError(
            f"accelerate: coder must be a sparsify.SparseCoder, got {type(coder).__name__}"
        )
    with _lock:
        _hook(host)
        changes = Changes(_unhook_if_idle)
        changes.entry(_served.coders, coder, bool(strict_compat))
        return changes


def fused_encoder(
    input: Tensor, weight: Tensor, bias: Tensor | None, k: int, activation: str
) -> Any:
    """Stands for `sparsify.fused_encoder.fused_encoder`."""
    strict = _served.strict(lambda coder: coder.encoder.weight is weight)
    if strict is None or activation != "topk":
        return _own("fused_encoder")(input, weight, bias, k, activation)
    host = sys.modules[f"{PACKAGE}.fused_encoder"]
    return host.EncoderOutput(*encode(input, weight, bias, k, strict=strict))


def decoder_impl(top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
    """Stands for `sparsify.utils.decoder_impl`."""
    rows = W_dec.mT
    if _served.strict(lambda coder: _same(coder.W_dec, rows)) is None:
        return _own("decoder_impl")(top_indices, top_acts, W_dec)  # type: ignore[no-any-return]
    return decode(top_indices, top_acts, rows)


@torch.no_grad()
def _remove_parallel(coder: Any) -> None:
    """Stands for the method of `SparseCoder` that projects its decoder's gradient."""
    W_dec = coder.W_dec
    if W_dec is None or W_dec.grad is None or W_dec.device.type != "cpu" or not _serves(coder):
        return _own(PROJECTION)(coder)  # type: ignore[no-any-return]
    remove_parallel_(W_dec.grad, W_dec)


OURS: dict[str, Callable[..., Any]] = {
    "fused_encoder": fused_encoder,
    "decoder_impl": decoder_impl,
    PROJECTION: _remove_parallel,
}


def _serves(coder: nn.Module) -> bool:
    return _served.strict(lambda other: other is coder) is not None


def _same(parameter: Tensor | None, view: Tensor) -> bool:
    """Whether `view` shows the parameter as it is."""
    return (
        parameter is not None
        and parameter.data_ptr() == view.data_ptr()
        and (parameter.shape, parameter.stride()) == (view.shape, view.stride())
    )


def _own(name: str) -> Callable[..., Any]:
    """sparsify's own function, also for whoever kept one of ours."""
    return _stock.get(name) or _found(sys.modules[PACKAGE])[name]


def _found(host: ModuleType) -> dict[str, Callable[..., Any]]:
    """What stands under each name where sparsify defines it."""
    return {
        "fused_encoder": sys.modules[f"{PACKAGE}.fused_encoder"].fused_encoder,
        "decoder_impl": sys.modules[f"{PACKAGE}.utils"].decoder_impl,
        PROJECTION: vars(host.SparseCoder)[PROJECTION],
    }


def _hook(host: ModuleType) -> None:
    if not _stock:
        _stock.update(_found(host))
        for name, ours in OURS.items():
            _exchange(host, _stock[name], ours)


def _unhook_if_idle() -> None:
    if _stock and not _served:
        for name, ours in OURS.items():
            _exchange(sys.modules[PACKAGE], ours, _stock[name])
        _stock.clear()


def _exchange(host: ModuleType, old: Any, new: Any) -> None:
    """Put `new` wherever the package holds `old`."""
    for namespace in (*_package_modules(), host.SparseCoder):
        for name, value in list(vars(namespace).items()):
            if value is old:
                setattr(namespace, name, new)


def _package_modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == PACKAGE and isinstance(module, ModuleType):
            yield module
