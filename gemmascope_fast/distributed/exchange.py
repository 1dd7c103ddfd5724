"""What the ranks tell each other once, before a collective could hang or sum unlike things."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist

from .debugging import fingerprint
from .failure import RankError
from .layout import LATENTS, Layout
from .parts import decoders

Record = tuple[tuple[str, str], ...]
"""What has to be equal on all ranks, as (what, value)."""


def exchange(op: str, layout: Layout, local: Any, failure: Exception | None) -> list[int]:
    """Compare the ranks' parts; two gathers of small objects, over "tp" and over "dp".

    Returns:
        For a module of several layers the most columns that any rank's `W_dec[i]` has: where a rank
        read zeros only, its decoder is packed, and another's may not be. Else nothing.

    Raises:
        RankError: a rank failed, or holds something else than the others; on every rank.
    """
    own = f"{type(failure).__name__}: {failure}" if failure else record(local, layout)
    columns = [] if failure else [p.shape[1] for p in decoders(local)]
    found = everyone((dist.get_rank(), own, columns), layout)
    failed = {rank: said for rank, said, _ in found if isinstance(said, str)}
    if failed:
        texts = [f"rank {rank} failed: {said}" for rank, said in failed.items()]
        raise RankError(f"{op}: " + "; ".join(texts), [*failed]) from failure
    usual = Counter(said for _, said, _ in found).most_common(1)[0][0]
    wrong = {rank: _difference(rank, said, usual) for rank, said, _ in found if said != usual}
    if wrong:
        texts = [*wrong.values()]
        raise RankError(f"{op}: the parts do not belong together: {'; '.join(texts)}", [*wrong])
    return [max(of_layer) for of_layer in zip(*(widths for _, _, widths in found), strict=True)]


def record(local: Any, layout: Layout) -> Record:
    """What this rank holds, with the latents that it should have written as F."""
    here = layout.latents
    size = here.stop - here.start
    found = {
        "module": type(local).__name__,
        "d_sae": str(layout.d_sae),
        "activation": str(local.activation),
        "semantics": str(getattr(local, "semantics", None)),
        "debug": str(layout.debug),
        "mode": "training" if local.training else "evaluation",
    }
    for name, p in local.named_parameters():
        dim = LATENTS.get(name.split(".")[0])
        shape = [str(s) for s in p.shape]
        if dim is not None and p.shape[dim] == size:
            shape[dim] = "F"
        if dim is not None and name.startswith("W_dec."):
            shape[1] = "m"
        grad = ", trained" if p.requires_grad else ""
        bits = f", bits {fingerprint(p):08x}" if layout.debug and dim is None else ""
        found[name] = f"[{', '.join(shape)}] {p.dtype}{grad}{bits}"
    return tuple(found.items())


def everyone(own: Any, layout: Layout) -> list[Any]:
    """`own` of every rank of the mesh."""
    found = [own]
    for group in (layout.tp_group, layout.dp_group):
        if group is not None and group.size() > 1:
            every: list[Any] = [None] * group.size()
            dist.all_gather_object(every, found, group=group)
            found = [one for several in every for one in several]
    return found


def _difference(rank: int, said: Record, usual: Record) -> str:
    mine, others = dict(said), dict(usual)
    for name in (*others, *mine):
        if mine.get(name) != others.get(name):
            wanted = others.get(name, "nothing")
            return f"rank {rank} has {name} {mine.get(name, 'missing')}, others have {wanted}"
    return f"rank {rank} names its parameters in another order"
