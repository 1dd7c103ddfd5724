"""Memory that one call adds: the growth of the resident set, and how many tensors of one size.

The resident set is measured under malloc as it comes, all freed memory having been returned before;
while calls are timed, glibc keeps freed blocks instead, unless asked otherwise.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Memory:
    """Bytes of resident memory that one call added: at most, and with its result still alive."""

    peak: int
    kept: int


def memory_of(call: Callable[[int], object]) -> Memory:
    """What a call adds to the resident set."""
    keep_freed_memory(False)
    gc.collect()
    LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
    before = resident("VmRSS")
    result = call(0)
    peak = resident("VmHWM") - before
    LIBC.malloc_trim(0)  # what is left is the result's
    found = Memory(peak, resident("VmRSS") - before)
    del result
    return found


def resident(entry: str) -> int:
    """Bytes that the kernel counts for this process under `VmRSS` or `VmHWM`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{entry}:")[1].split()[0])


def keep_freed_memory(keep: bool) -> None:
    """Whether glibc keeps freed blocks of every size or returns large ones at once.

    By `M_MMAP_MAX`: the threshold of `mmap` cannot exceed 32 MiB, and matrices have hundreds.
    """
    largest, threshold = (0, -1) if keep else (65_536, 128 << 10)
    if not (LIBC.mallopt(M_MMAP_MAX, largest) and LIBC.mallopt(M_TRIM_THRESHOLD, threshold)):
        raise RuntimeError("mallopt refused: page faults would be part of the timings")


def release() -> None:
    """Return what a finished case has freed."""
    gc.collect()
    LIBC.malloc_trim(0)


def most_alive(call: Callable[[int], object], numel: int) -> int:
    """Most tensors of `numel` elements alive at once among the results of operations."""

    class Watch(TorchDispatchMode):
        most = 0
        alive: dict[int, StorageWeakRef] = {}

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and t.untyped_storage().nbytes() == numel * 4:
                    self.alive[t.untyped_storage()._cdata] = StorageWeakRef(t.untyped_storage())
            self.alive = {k: ref for k, ref in self.alive.items() if not ref.expired()}
            self.most = max(self.most, len(self.alive))
            return out

    with Watch() as watch:
        call(0)
    return watch.most
