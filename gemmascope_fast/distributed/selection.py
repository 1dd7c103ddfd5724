"""TopK and BatchTopK over latents that lie on several ranks, exactly as one process selects.

Every rank encodes its candidates, the best of its own latents, by the local op; what no local
selection would keep no global one does. Both tie rules follow from the order of the ranks, since
rank r's latents are below those of rank r + 1: ties by (rank, position) are ties by global index.

*TopK*: the k best of every rank's candidates. *BatchTopK*: the value of the last entry to keep is
found by counting: four rounds (eight for float64), one 8-bit digit of the values' bits each, of 257
summed counts, the last of them of NaN. Bits of positive floats ascend as the floats do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..entries import cumulative
from ..sparse import SparseActs
from .communication import all_gather, all_reduce
from .layout import Layout

DIGIT = 8
BINS = 1 << DIGIT


def keep_topk(
    candidates: Sequence[SparseActs], k: int, width: int, layout: Layout
) -> list[SparseActs]:
    """The entries of this rank among the k largest of every token; one all-gather.

    Args:
        candidates: per source, the entries that may be kept.
        k: entries to keep per token and source.
        width: the most candidates that any rank has for a token. Sent: `[sources * n, width]`
            values, and no indices: they follow from the places.
        layout: of the latents.
    """
    places = []
    for at, c in enumerate(candidates):
        rows = c.tokens()
        places.append((rows + at * c.n, torch.arange(c.nnz, device=c.device) - c.offsets[rows]))
    row, slot = (torch.cat(each) for each in zip(*places, strict=True))
    own = torch.cat([c.values.detach() for c in candidates])
    padded = own.new_full((candidates[0].n * len(candidates), width), -torch.inf)
    padded[row, slot] = own
    every = all_gather(padded, layout.tp_group).transpose(0, 1)  # [rows, tp, width]
    order = every.flatten(1).sort(dim=1, descending=True, stable=True)[1][:, :k]
    kept = torch.zeros_like(every, dtype=torch.bool, memory_format=torch.contiguous_format)
    kept.flatten(1).scatter_(1, order, True)
    masks = torch.split(kept[row, layout.rank, slot], [c.nnz for c in candidates])
    return [c._keep(mask) for c, mask in zip(candidates, masks, strict=True)]


def batch_count(k: float, n: int, layout: Layout, device: torch.device) -> int:
    """`int(k * tokens)` for the tokens of all ranks of "dp"; one all-reduce over them."""
    return int(k * int(all_reduce(torch.tensor(n, device=device), layout.dp_group)))


def batch_share(count: int, n: int, latents: int) -> float:
    """The k for which a local BatchTopK of n tokens keeps `count` entries, or all it has."""
    return (min(count, n * latents) + 0.5) / max(n, 1)  # int(k * n) is the count


def keep_batchtopk(
    candidates: Sequence[SparseActs], count: int, layout: Layout
) -> tuple[list[SparseActs], list[Tensor | None]]:
    """The entries of this rank among the `count` largest of the batch.

    The batch is that of all ranks of "dp", whose tokens follow each other in the order of the
    ranks. An all-reduce over "tp" and one over "dp" per digit; one all-gather over each more if
    some of several equal entries have to go.

    Args:
        candidates: per source, the `count` largest positive entries of this rank.
        count: entries to keep per source.
        layout: of the latents.

    Returns:
        The entries, with `threshold` as of one process, and per source the smallest kept value, or
        None where nothing is kept or a value is NaN.
    """
    values = [c.values.detach() for c in candidates]
    keys = [_keys(v) for v in values]
    cut = _count_down(keys, values, count, layout)
    allowed: list[Tensor] = [key == last for key, last in zip(keys, cut.last, strict=True)]
    if bool((cut.wanted < cut.ties).any()):
        allowed = _first_ties(candidates, allowed, cut.wanted, layout)
    kept, smallest = [], []
    for at, (c, key, ties) in enumerate(zip(candidates, keys, allowed, strict=True)):
        word = torch.int64 if c.dtype == torch.float64 else torch.int32
        last = cut.last[at].to(word).view(c.dtype)
        found = c._keep((key > cut.last[at]) | ties)
        found.threshold = torch.where(cut.total[at] >= count, last, 0.0)
        kept.append(found)
        known = int(cut.total[at]) > 0 and int(cut.invalid[at]) == 0
        smallest.append(last if known else None)
    return kept, smallest


@dataclass(frozen=True)
class _Cut:
    """Per source: key of the last entry to keep, and how many of its equals to keep of how many.

    `total` candidates there are, `invalid` of them NaN.
    """

    last: Tensor
    wanted: Tensor
    ties: Tensor
    total: Tensor
    invalid: Tensor


def _keys(values: Tensor) -> Tensor:
    """`[nnz]` int64 in the order of positive values, NaN largest."""
    word = torch.int64 if values.dtype == torch.float64 else torch.int32
    return values.view(word).masked_fill(values.isnan(), torch.iinfo(word).max).long()


def _count_down(keys: list[Tensor], values: list[Tensor], count: int, layout: Layout) -> _Cut:
    """The `count`-th largest key over all ranks, or the last, digit by digit from the top."""
    bits = 8 * values[0].dtype.itemsize
    invalid = torch.stack([v.isnan().sum() for v in values])
    last = ties = total = found = torch.zeros_like(invalid)
    left = torch.full_like(invalid, count)
    for shift in range(bits - DIGIT, -1, -DIGIT):
        counts = []
        for key, prefix in zip(keys, last, strict=True):
            digits = (key >> shift) & (BINS - 1)
            if shift < bits - DIGIT:
                digits = digits[(key >> (shift + DIGIT)) == prefix]
            counts.append(torch.bincount(digits, minlength=BINS))
        sums = torch.cat([torch.stack(counts), invalid[:, None]], 1)
        sums = all_reduce(all_reduce(sums, layout.tp_group), layout.dp_group)
        above = sums[:, :BINS].flip(1).cumsum(1)
        if shift == bits - DIGIT:
            total, found = above[:, -1], sums[:, BINS]
            left = left.minimum(total)
        place = (above < left[:, None].clamp_min(1)).sum(1, keepdim=True).clamp_max(BINS - 1)
        before = torch.nn.functional.pad(above, (1, 0)).gather(1, place)[:, 0]
        ties = above.gather(1, place)[:, 0] - before
        left = left - before
        last = (last << DIGIT) | (BINS - 1 - place[:, 0])
    return _Cut(last, left, ties, total, found)


def _first_ties(
    candidates: Sequence[SparseActs], ties: list[Tensor], wanted: Tensor, layout: Layout
) -> list[Tensor]:
    """Of equal entries the first `wanted` per source, by (token, latent) over all ranks."""
    rows = [c.tokens()[tie] for c, tie in zip(candidates, ties, strict=True)]
    n = candidates[0].n
    counts = torch.stack([torch.bincount(row, minlength=n) for row in rows])  # [sources, n]
    every = all_gather(counts, layout.tp_group)
    totals = all_gather(every.sum((0, 2)), layout.dp_group)  # [dp, sources]
    at = 0 if layout.dp_group is None else layout.dp_group.rank()
    earlier = totals[:at].sum(0)
    lower = every[: layout.rank].sum(0)
    found = []
    for source, (tie, row) in enumerate(zip(ties, rows, strict=True)):
        before = cumulative(every[:, source].sum(0))[:-1] + lower[source] + earlier[source]
        inside = torch.arange(row.shape[0], device=row.device)
        inside = inside - cumulative(counts[source])[:-1][row]
        chosen = torch.zeros_like(tie)
        chosen[tie] = before[row] + inside < wanted[source]
        found.append(chosen)
    return found
