"""SAELens (`sae-lens` 6.54) on this backend; hooks, files and trainer stay SAELens'.

    from gemmascope_fast.integrations import saelens
    saelens.install()                    # every SAE of the process; saelens.uninstall() undoes it
    with saelens.install(): ...          # for the length of the block
    with saelens.accelerate(sae): ...    # one instance
    saelens.register()                   # architectures "gemmascope_fast_jumprelu", ...

`install` replaces methods on SAELens' own classes, so that objects made before, names imported
before, subclasses and pickles keep working, and `isinstance` says what it always said. A method
that somebody replaces is left in charge: the call then runs on SAELens' dense path, as it does
while a hook sits on the input, the activations or what computes them, under `torch.func`, on
weights in float64, and on batches so dense that matrix products are faster (the first steps of a
JumpReLU).

Served: `encode`, `decode` and `forward` of jumprelu, topk and the four transcoders, and those and
`training_forward_pass` of jumprelu, topk, batchtopk and matryoshka_batchtopk. `encode` returns
dense activations, as it has to; `forward` and the training step make no `[n, d_sae]` tensor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .patching import Changes, Installation, require

_installation = Installation()


def install(*, fused_adam: bool = True, capture: bool = True) -> Changes:
    """Serve every SAELens module of this process, until `uninstall` or the end of a with block.

    Args:
        fused_adam: whether trainers made from now on use `torch.optim.Adam(fused=True)`: the same
            update, read and written once; it takes most of an accelerated step otherwise.
        capture: whether `torch._dynamo.config.capture_dynamic_output_shape_ops` is set meanwhile:
            `compile_sae=True` then traces a JumpReLU's step as one graph; without it, as several.

    Returns:
        The changes, a context manager that undoes them; none where it is installed already.

    Raises:
        ImportError: sae-lens is not installed, or of another version.
    """
    _host()
    from sae_lens.training import sae_trainer
    from torch._dynamo import config

    from . import saelens_methods as methods

    def make(changes: Changes) -> None:
        captured = config.capture_dynamic_output_shape_ops
        config.capture_dynamic_output_shape_ops = captured or capture
        changes.finally_(partial(setattr, config, "capture_dynamic_output_shape_ops", captured))
        for cls, name, serve in methods.PLACES:
            method = methods.replacement(getattr(cls, name), name, serve)
            changes.attribute(cls, name, method)
        if fused_adam:
            changes.attribute(sae_trainer, "Adam", partial(sae_trainer.Adam, fused=True))

    return _installation.begin(make)


def uninstall() -> None:
    """Give SAELens its own methods back; nothing happens where `install` was not called."""
    _installation.end()


def accelerate(module: Any) -> Changes:
    """Serve one SAELens module, and not its copies.

    Args:
        module: an `SAE` or `TrainingSAE`.

    Returns:
        The changes, a context manager that undoes them.

    Raises:
        ImportError: sae-lens is not installed, or of another version.
        TypeError: the module is not SAELens', or of an architecture that is not served.
    """
    _host()
    from . import saelens_host as host
    from .saelens_methods import bound

    if not isinstance(module, host.SAE):
        raise TypeError(f"accelerate: module must be a sae_lens SAE, got {type(module).__name__}")
    if not host.known(module):
        raise TypeError(
            f"accelerate: {type(module).__name__} encodes in a way that is not served here"
        )
    changes = Changes()
    changes.methods(module, bound(module))
    return changes


def register() -> Changes:
    """Add training architectures `gemmascope_fast_jumprelu`, `_topk`, `_batchtopk` and
    `_matryoshka_batchtopk` to SAELens' registry; files that they save name SAELens' own.

    Returns:
        The changes, a context manager that undoes them.

    Raises:
        ImportError: sae-lens is not installed, or of another version.
    """
    _host()
    from . import saelens_architectures

    return saelens_architectures.register()


def _host() -> None:
    require("sae_lens", "sae-lens", at_least="6.54", below="6.55")
