"""dictionary_learning (`dictionary-learning` 0.1): its dictionaries and trainers on sparse entries.

    from gemmascope_fast.integrations import dictionary_learning as fast
    fast.install()                                    # all of them; undone by fast.uninstall()
    with fast.accelerate(trainer): ...                # one trainer, or one dictionary
    config = {"trainer": fast.TopKTrainer, "dict_class": fast.AutoEncoderTopK, ...}

Served: AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE and JumpReluAutoEncoder, each under
its own name here as a subclass, and their trainers TopKTrainer, BatchTopKTrainer,
MatryoshkaBatchTopKTrainer and JumpReluTrainer. `encode` returns the dense tensor of its contract;
`forward` and the trainers' losses never form it. State dicts, `ae.pt` and `config.json` are the
library's own.

Numerically, beyond the order of sums: ties go to the smaller latent, also among zeros, and the
JumpReLU trainer's L0 reaches the threshold from both sides of it; `strict_compat=True` restores the
library's, which reaches it through active latents only (not its gradient of every inactive latent
whose threshold is below half the bandwidth).

A decoder kept as `decoder.weight [activation_dim, dict_size]` is laid out latent by latent in
memory, its shape and values unchanged, where a trainer or `accelerate` owns it: a decode and its
gradients then take a sixth of the time.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

from .patching import Changes, fusing, require

PACKAGE, DISTRIBUTION = "dictionary_learning", "dictionary-learning"
_lock = threading.RLock()
_installed: list[Changes] = []


def install(*, strict_compat: bool = False, fused_adam: bool = True) -> Changes:
    """Serve every dictionary and trainer of the process, until `uninstall` or the end of the block.

    Args:
        strict_compat: give JumpReLU thresholds the gradients of the library's own trainer.
        fused_adam: whether trainers made from now on use `torch.optim.Adam(fused=True)`, as our
            subclasses do: the same update, read and written once.

    Returns:
        A context manager; leaving it restores what was there before.

    Raises:
        ImportError: dictionary-learning is not installed, or of another version than 0.1.
    """
    served = _served()
    with _lock:
        changes = Changes()
        for stock, ours in served.pairs():
            for name in served.REPLACED & vars(ours).keys():
                changes.attribute(stock, name, vars(ours)[name])
            if fused_adam and "loss" in vars(ours):
                changes.attribute(stock, "__init__", fusing(stock.__init__))
            changes.attribute(stock, "strict_compat", bool(strict_compat))
        _installed.append(changes)
        return changes


def uninstall() -> None:
    """Undo every `install`; what is under `accelerate` stays served."""
    with _lock:
        while _installed:
            _installed.pop().undo()


def accelerate(obj: Any, *, strict_compat: bool = False) -> Changes:
    """Serve one dictionary, or one trainer and its dictionary, until the end of the block.

    Args:
        obj: an instance of a served class; it becomes one of the subclass of that name.
        strict_compat: as for `install`.

    Returns:
        A context manager; leaving it makes `obj` what it was.

    Raises:
        TypeError: `obj` is of another class, or of a subclass that is not ours.
        ImportError: dictionary-learning is not installed, or of another version than 0.1.
    """
    served = _served()
    found = dict(served.pairs())
    ours = found.get(type(obj))
    if ours is None:
        raise TypeError(
            f"accelerate: obj must be one of {', '.join(c.__name__ for c in found)} of "
            f"dictionary_learning, got {type(obj).__name__}"
        )
    inner = getattr(obj, "ae", None)
    changes = Changes()
    for one, cls in ((obj, ours), (inner, found.get(type(inner)))):
        if cls is not None:
            changes = _becomes(one, cls, changes)
            changes.attribute(one, "strict_compat", bool(strict_compat))
    return changes


def _becomes(obj: Any, cls: type, before: Changes) -> Changes:
    """Make `obj` an instance of `cls`; undoing also undoes what was done before."""
    was, served = type(obj), _served()
    obj.__class__ = cls
    moved = served.feature_major_(obj)

    def back() -> None:
        if type(obj) is cls:
            obj.__class__ = was
        if moved:
            served.row_major_(obj)
        before.undo()

    return Changes(back)


def _served() -> Any:
    """The module of our classes, which imports the library."""
    require(PACKAGE, DISTRIBUTION, at_least="0.1", below="0.2")
    return importlib.import_module("gemmascope_fast.integrations.dictionary_learning_trainers")


def __getattr__(name: str) -> Any:
    """Our subclasses, by the names of the library's classes."""
    if name.startswith("_") or not name[0].isupper():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for _, ours in _served().pairs():
        if ours.__name__ == name:
            return ours
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
