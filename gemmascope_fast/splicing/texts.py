"""Token ids in batches: which of them are text, and sums over the predictions that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CHUNK = 1 << 24
"""Logits that are float32 at a time: 64 MiB."""


@dataclass(frozen=True)
class Texts:
    """Sequences of tokens.

    Attributes:
        ids: `[S, L]` int64.
        mask: `[S, L]`, the attention mask, or None.
        text: `[S, L]` bool, tokens that are neither special nor padding.
    """

    ids: Tensor
    mask: Tensor | None
    text: Tensor

    def batches(self, size: int, device: torch.device) -> Iterator[Texts]:
        """`size` sequences at a time, on a device."""
        for at in range(0, len(self.ids), size):
            ids, text, mask = (
                None if t is None else t[at : at + size].to(device)
                for t in (self.ids, self.text, self.mask)
            )
            assert ids is not None and text is not None
            yield Texts(ids, mask, text)

    @property
    def counted(self) -> Tensor:
        """`[S, L - 1]` bool: predictions of a text token behind a text token."""
        return self.text[:, :-1] & self.text[:, 1:]

    def logits(self, op: str, model: nn.Module) -> Tensor:
        """`[S, L, vocabulary]` of one forward pass.

        Raises:
            TypeError: the model returns no logits.
        """
        given = {} if self.mask is None else {"attention_mask": self.mask}
        out = model(input_ids=self.ids, **given, use_cache=False)
        if not isinstance(getattr(out, "logits", None), Tensor):
            raise TypeError(f"{op}: model must return logits, got a {type(out).__name__}")
        return out.logits  # type: ignore[no-any-return]

    def cross_entropy(self, logits: Tensor) -> float:
        """Sum over the predictions that count, in nats."""
        return self._sum(lambda own, at: -own[0].gather(1, at[:, None]), logits)

    def divergence(self, clean: Tensor, other: Tensor) -> float:
        """Sum of KL(clean || other) likewise."""
        return self._sum(lambda own, _: own[0].exp() * (own[0] - own[1]), clean, other)

    def _sum(self, of: Callable[[list[Tensor], Tensor], Tensor], *logits: Tensor) -> float:
        """Sum of `of([log p, ...], next token)`, a chunk of predictions at a time."""
        total = 0.0
        size = max(1, CHUNK // logits[0].shape[-1])
        for at in torch.split(self.counted.nonzero(), size):
            rows, columns = at.unbind(1)
            logs = [t[rows, columns].float().log_softmax(-1) for t in logits]
            total += float(of(logs, self.ids[rows, columns + 1]).sum(dtype=torch.float64))
        return total
