"""`module.screen()`: int8 codes of an encoder that trains on CUDA, of its weights as they are.

Codes remember which weights they were made of: the tensor, where its memory is, and the version
that autograd counts up with every write. An encoder takes them when all of that still holds; else
all latents are quantised again first, in place, without waiting for the device. `gsf.optim.Adam`
knows which rows it moved and has those quantised right behind its update, on the same stream; codes
that were not current before it stay so. A step of any other optimizer makes them old, because fused
ones of torch leave the version as it was. Source: docs/design.md, Screening.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from . import ops
from .packing import PackedEncoder, checksums, pack, packable

_lock = threading.Lock()
_screens: weakref.WeakSet[Screen] = weakref.WeakSet()
"""All that have codes, for optimizers to find; behind `_lock`."""


class Screen:
    """The codes of one `W_enc`, and which state of it they are of.

    Args:
        center: `[d_in]` a typical x, or None.
        check: keep a checksum per latent and compare it in every call.

    Attributes:
        weights: returns the `W_enc` that has codes, while it lives.
    """

    def __init__(self, center: Tensor | None = None, check: bool = False) -> None:
        self._center, self._check = center, check
        self._codes: Tensor | None = None
        self._checksums: Tensor | None = None
        self.weights: Callable[[], Tensor | None] = lambda: None
        self._place: tuple[Any, ...] = ()
        self._version = -1
        self._written: Any = None
        self._threshold: tuple[Tensor, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module makes codes of its own."""
        return type(self), (self._center, self._check)

    def encoder(self, W_enc: Tensor) -> Tensor | PackedEncoder:
        """`W_enc` with codes of what it holds now; alone where nothing would use them."""
        if torch.compiler.is_compiling() or not served(W_enc):
            return W_enc
        if self._codes is None or not self._of(W_enc):
            self._pack(W_enc)
        elif self._version != W_enc._version:
            repack(self._codes, W_enc)
            self._note(W_enc, checksums(W_enc) if self._check else None)
        if self._codes is None:
            return W_enc
        if self._written is not None:
            torch.cuda.current_stream(W_enc.device).wait_event(self._written)
        return PackedEncoder(W_enc, self._codes, self._checksums)

    def guess(self) -> float | None:
        """The threshold of the last batch that a BatchTopK encoded; waits for nothing later."""
        if self._threshold is None:
            return None
        threshold, copied = self._threshold
        if copied is not None:
            copied.synchronize()
        return float(threshold)

    def learn(self, threshold: Tensor) -> None:
        """Have this scalar copied to the host, to be the guess of the next batch."""
        held = threshold.detach().to("cpu", non_blocking=True)
        stream = torch.cuda.current_stream(threshold.device) if threshold.is_cuda else None
        self._threshold = held, None if stream is None else stream.record_event()

    def current(self, W_enc: Tensor) -> bool:
        """Whether the codes are those of what `W_enc` holds, as far as its version tells."""
        made = self._codes is not None and self._of(W_enc)
        return made and self._version == W_enc._version

    def forget(self) -> None:
        """Have all latents quantised again before the codes are used."""
        self._version = -1

    def drop(self) -> None:
        """Let go of codes and weights, which are about to be replaced."""
        self._codes, self._checksums, self.weights = None, None, lambda: None

    def follow(self, W_enc: Tensor, touched_at: Tensor, step: int, tail: int) -> None:
        """Quantise the latents again that a step of Adam has moved.

        Args:
            W_enc: whose codes were current before.
            touched_at: `[d_sae]` the last step in which each latent had a gradient.
            step: this one.
            tail: steps after a gradient in which a latent moves.
        """
        if self._codes is None or not served(W_enc):
            return
        repack(self._codes, W_enc, touched_at, step, tail)
        kept = self._checksums
        if kept is not None:  # those of other latents stay, so that edits of them are found
            moved = (touched_at > 0) & (step - touched_at <= tail)
            kept = torch.where(moved, checksums(W_enc), kept)
        self._note(W_enc, kept)

    def _of(self, W_enc: Tensor) -> bool:
        return self.weights() is W_enc and self._place == place(W_enc)

    def _pack(self, W_enc: Tensor) -> None:
        center = None if self._center is None else self._center.to(W_enc.device)
        self._codes = None  # before there are others
        _listen()
        packed = pack(W_enc, center=center, check=self._check, precision="screened")
        self._codes, self.weights, self._place = packed.codes, weakref.ref(W_enc), place(W_enc)
        self._note(W_enc, packed.checksums)
        with _lock:
            _screens.add(self)

    def _note(self, W_enc: Tensor, sums: Tensor | None) -> None:
        self._version, self._checksums = W_enc._version, sums
        if W_enc.is_cuda:
            self._written = torch.cuda.current_stream(W_enc.device).record_event()


def repack(codes: Tensor, W_enc: Tensor, *moved: Any) -> None:
    """Quantise all latents again, or those that `touched_at, step, tail` say have moved."""
    getattr(torch.ops, ops.NAMESPACE).repack_encoder_(codes, W_enc.detach(), *moved)


def place(W_enc: Tensor) -> tuple[Any, ...]:
    """What a write does not change, and other memory under the same tensor does.

    A storage that was freed keeps its identity: another one may have got its address.
    """
    storage = StorageWeakRef(W_enc.untyped_storage())  # type: ignore[no-untyped-call]
    return storage, W_enc.data_ptr(), W_enc.dtype, W_enc.shape, W_enc.stride()


def served(W_enc: Tensor) -> bool:
    """Whether codes might be used here and now: not in a CUDA graph, which cannot wait for them."""
    if type(W_enc) not in (Tensor, nn.Parameter) or W_enc.is_inference() or not W_enc.is_cuda:
        return False
    return packable(W_enc, "screened") and not torch.cuda.is_current_stream_capturing()


def current_screens(moved: Sequence[Tensor]) -> list[tuple[int, Screen]]:
    """Those that are current of the parameters that are about to be moved, with their places there.

    Not where one shares memory with another: its own step does not tell then which rows do.
    """
    found = []
    for screen, W_enc in _living():
        at = next((i for i, p in enumerate(moved) if p is W_enc), None)
        if at is not None and screen.current(W_enc) and _memory(moved)[_storage(W_enc)] == 1:
            found.append((at, screen))
    return found


def _living() -> list[tuple[Screen, Tensor]]:
    with _lock:
        screens = list(_screens)
    found = [(screen, screen.weights()) for screen in screens]
    return [(screen, W_enc) for screen, W_enc in found if W_enc is not None]


def _memory(parameters: Iterable[Tensor]) -> Counter[int]:
    return Counter(_storage(p) for p in parameters if p.layout is torch.strided)


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


@functools.cache
def _listen() -> None:
    hook = torch.compiler.disable(_forget)  # type: ignore[no-untyped-call]  # imports a lot: here
    register_optimizer_step_post_hook(hook)


def _forget(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """What an optimizer has moved is quantised again, but by one that sees to it itself."""
    if getattr(optimizer, "quantises", False):
        return
    living = _living()
    moved = _memory(p for group in optimizer.param_groups for p in group["params"] if living)
    for screen, W_enc in living:
        if _storage(W_enc) in moved:
            screen.forget()
