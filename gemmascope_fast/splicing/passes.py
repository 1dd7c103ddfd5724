"""Forward passes of a model: which tokens of which sequences each of them covers.

`generate` runs the prompt once and then one token at a time, with the earlier ones in a cache.
Columns count as `input_ids` does, from the first of the prompt on. Positions count a sequence's own
tokens from 0, padding left out, so that they are the same however the batch is padded.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PADDING = -1


@dataclass(frozen=True)
class Pass:
    """One forward pass over `[batch, length]` new tokens.

    Attributes:
        start: column of the first new token; 0 where nothing was cached.
        positions: `[batch, length]` int64; `PADDING` where the attention mask is 0.
        prompts: `[batch]` int64, tokens of each sequence at the end of its prompt: of the last pass
            with this cache that was not a single token behind it.
        continued: whether it goes on with the cache of the pass before it.
    """

    start: int
    positions: Tensor
    prompts: Tensor
    continued: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """`(batch, length)`."""
        return self.positions.shape[0], self.positions.shape[1]


class Passes:
    """The passes of `model` while its hooks are attached.

    Attributes:
        last: the pass that runs, or ran last.
    """

    def __init__(self, op: str, model: nn.Module) -> None:
        self._op, self._model = op, model
        self.last: Pass | None = None
        self._prompts: MutableMapping[Any, Tensor] = weakref.WeakKeyDictionary()  # by cache
        self._newest: Callable[[], Any] = lambda: None  # the last pass's cache

    def attach(
        self, started: Callable[[], None], ended: Callable[[], None]
    ) -> list[RemovableHandle]:
        """Follow the model's passes; call `started` and `ended` around each."""
        signature = inspect.signature(self._model.forward)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module is not self._model:  # a copy, which has the hooks too
                return
            given = dict(signature.bind_partial(*args, **kwargs).arguments)
            for name, parameter in signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    given |= given.pop(name, {})
            if args:  # also where a wrapper's forward takes (*args, **kwargs)
                given.setdefault("input_ids", args[0])
            self.last = self._pass(given)
            started()

        def after(module: nn.Module, _args: Any, kwargs: Any, output: Any) -> None:
            if module is not self._model:
                return
            self._remember(kwargs.values())
            made = output.values() if isinstance(output, Mapping) else output
            self._remember(made if not isinstance(made, Tensor) else ())
            ended()

        return [
            self._model.register_forward_pre_hook(before, with_kwargs=True),
            self._model.register_forward_hook(after, with_kwargs=True),
        ]

    def _remember(self, values: Iterable[Any]) -> None:
        """Which cache the last pass wrote."""
        for cache in values:
            if hasattr(cache, "get_seq_length") and self.last is not None:
                self._prompts[cache], self._newest = self.last.prompts, weakref.ref(cache)

    def current(self) -> Pass:
        """The pass that runs.

        Raises:
            RuntimeError: a module was called without the model around it.
        """
        if self.last is None:
            raise RuntimeError(
                f"{self._op}: a hooked module ran outside of a call of the "
                f"{type(self._model).__name__} that was given: give the model that is called, "
                "and call it rather than its forward"
            )
        return self.last

    def _pass(self, given: Mapping[str, Any]) -> Pass:
        """What the arguments of the model's forward say."""
        batch, length, device = self._tokens(given)
        start = self._cached(given)
        total = start + length
        valid = self._valid(given.get("attention_mask"), batch, total, device)
        positions = (valid.cumsum(1) - 1).masked_fill(~valid, PADDING)
        prompts, cache = valid.sum(1), _cache(given)
        if start and length == 1:
            known = self._prompts.get(cache) if cache is not None else None
            prompts = prompts if known is None or known.shape != prompts.shape else known
        continued = start > 0 and self._newest() is cache
        return Pass(start, positions[:, start:], prompts, continued)

    def _tokens(self, given: Mapping[str, Any]) -> tuple[int, int, torch.device]:
        for name in ("input_ids", "inputs_embeds"):
            t = given.get(name)
            if isinstance(t, Tensor) and t.dim() >= 2:
                return t.shape[0], t.shape[1], t.device
        raise TypeError(
            f"{self._op}: the model must be called with input_ids [batch, length] or inputs_embeds"
        )

    def _cached(self, given: Mapping[str, Any]) -> int:
        """Tokens in front of the new ones."""
        columns = given.get("cache_position")
        if isinstance(columns, Tensor):  # transformers 4
            return int(columns[0])
        cache = _cache(given)
        if cache is None:
            return 0
        if not hasattr(cache, "get_seq_length"):
            raise TypeError(
                f"{self._op}: the model's cache must be a transformers Cache, got a "
                f"{type(cache).__name__}"
            )
        return int(cache.get_seq_length())

    def _valid(self, mask: Any, batch: int, total: int, device: torch.device) -> Tensor:
        """`[batch, total]` bool: columns that hold a token."""
        if isinstance(mask, Mapping) and "full_attention" in mask:  # made for a static cache
            mask = mask["full_attention"]
        if mask is None:
            return torch.ones(batch, total, dtype=torch.bool, device=device)
        if isinstance(mask, Tensor) and mask.dim() == 4:  # [batch, 1, length, columns]
            mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise TypeError(
                f"{self._op}: attention_mask must be a tensor [batch, columns] or "
                f"[batch, 1, length, columns], got {getattr(mask, 'shape', type(mask).__name__)}"
            )
        if mask.shape[0] not in (1, batch) or mask.shape[1] < total:
            raise ValueError(
                f"{self._op}: attention_mask must cover {batch} sequences of {total} columns, "
                f"cached ones included, got {tuple(mask.shape)}"
            )
        return mask[:, :total].to(device).bool().expand(batch, total)


def _cache(given: Mapping[str, Any]) -> Any:
    """The cache that a pass was given, or None."""
    return given.get("cache", given.get("past_key_values"))
