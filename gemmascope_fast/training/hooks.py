"""Activations read live from a `transformers` model by forward hooks.

Hook points are those of `hook_points`, of one layer or several. Special tokens are left out before
anything sees the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_count
from ..hook_points import Place, resolve
from .layer_points import layer_points
from .sources import Block, Source, generator

OP = "train"
SPECIAL = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id"),
    *("image_token_id", "image_token_index", "boi_token_id", "boi_token_index", "eoi_token_id"),
    *("eoi_token_index", "audio_token_id", "video_token_id"),
)
"""Config entries that name tokens which stand for no text."""


class _Reached(Exception):
    """Raised by the last hook: what comes after it need not run."""


def capture(model: nn.Module, hook_points: Sequence[str], **inputs: Tensor) -> list[Tensor]:
    """Activations at `hook_points`, each `[sequences, length, d]`, of one forward pass.

    The pass ends as soon as all of them were seen.

    Raises:
        RuntimeError: a hook was not reached.
        ValueError: as `resolve`.
    """
    return _captured(model, [resolve(OP, model, point) for point in hook_points], inputs)


@torch.no_grad()
def _captured(
    model: nn.Module, places: Sequence[Place], inputs: Mapping[str, Tensor]
) -> list[Tensor]:
    caught: dict[int, Tensor] = {}

    def keep(at: int, value: Tensor) -> None:
        caught[at] = value
        if len(caught) == len(places):
            raise _Reached

    handles = [place.attach(OP, partial(keep, at)) for at, place in enumerate(places)]
    try:
        model(**inputs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if len(caught) < len(places):
        missing = [str(place) for at, place in enumerate(places) if at not in caught]
        raise RuntimeError(f"train: the forward pass did not reach {', '.join(missing)}")
    return [caught[at] for at in range(len(places))]


def special_token_ids(model: nn.Module, tokenizer: Any = None) -> set[int]:
    """Ids of BOS, EOS, PAD, image and similar tokens that model and tokenizer know.

    Args:
        model: a `transformers` model.
        tokenizer: its tokenizer; its special tokens other than UNK count too.
    """
    config: Any = getattr(model, "config", None)
    configs = [config, getattr(model, "generation_config", None)]
    if hasattr(config, "get_text_config"):
        configs.append(config.get_text_config())
    found: set[Any] = set()
    for held in configs:
        for name in SPECIAL:
            value = getattr(held, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [value])
    if tokenizer is not None:
        unknown = getattr(tokenizer, "unk_token_id", None)
        found.update(id for id in tokenizer.all_special_ids if id != unknown)
    return {id for id in found if id is not None}


def left_out(op: str, model: nn.Module, tokenizer: Any, chosen: Iterable[int] | None) -> Tensor:
    """Ids to leave out, int64 on the CPU: `chosen`, or those that model and tokenizer know.

    Raises:
        TypeError: `chosen` is not of integers.
    """
    found: Any = special_token_ids(model, tokenizer) if chosen is None else chosen
    found = found.tolist() if isinstance(found, Tensor) else found
    ids: list[Any] = list(found) if isinstance(found, Iterable) else [None]
    if not all(isinstance(id, Integral) and not isinstance(id, bool) for id in ids):
        raise TypeError(f"{op}: special_tokens must be integers, got {chosen!r:.80}")
    return torch.tensor(sorted(map(int, ids)), dtype=torch.int64, device="cpu")


class ModelSource(Source):
    """Activations made when they are needed, through a shuffle buffer of whole sequences.

    Each pass shuffles the sequences; a block is the next `block_sequences` of them, run through the
    model, without special tokens, shuffled token by token. On the model's device, in its dtype.

    Args:
        model: a `transformers` model; put into evaluation mode for each block.
        input_ids: `[S, L]` integer token ids.
        hook_point: where x is read, such as `model.layers.17.output`; of several layers
            `model.layers.{5,9,12,15}.output`, `model.layers.{0,...}.output`, or a sequence of
            hook points, in whose order a row holds them.
        target_hook_point: where a transcoder's target is read; as many layers as `hook_point`.
        attention_mask: `[S, L]`, 0 at padding; None where there is none.
        tokenizer: whose special tokens are left out, beside those that the model's config names.
        special_tokens: ids to leave out instead of those of model and tokenizer.
        block_sequences: sequences in the buffer, >= 1.
        batch_sequences: sequences of one forward pass, >= 1.

    Raises:
        TypeError: `input_ids` or a count is not of integers, or a hook point no string.
        ValueError: shapes disagree, a hook point is not found, layers differ in number or width,
            or every token is special.
    """

    repeatable = False  # devices may round the model's products differently

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        hook_point: str | Sequence[str],
        *,
        target_hook_point: str | Sequence[str] | None = None,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
        special_tokens: Iterable[int] | None = None,
        block_sequences: int = 256,
        batch_sequences: int = 16,
    ) -> None:
        for name, value in (("block_", block_sequences), ("batch_", batch_sequences)):
            if check_count("train", f"{name}sequences", value) < 1:
                raise ValueError(f"train: {name}sequences must be >= 1, got {value}")
        _check_ids(input_ids, attention_mask)
        self.model, self._ids, self._mask = model, input_ids.cpu().long(), attention_mask
        self._points = layer_points(model, hook_point, target_hook_point)
        self.layers = self._points.layers
        self._special = left_out("train", model, tokenizer, special_tokens)
        self._keep = ~torch.isin(self._ids, self._special)
        if attention_mask is not None:
            self._keep &= attention_mask.cpu() != 0
        if not bool(self._keep.any()):
            raise ValueError("train: every token of input_ids is special or padding")
        self._per_block, self._per_batch = block_sequences, batch_sequences
        widths = [part.shape[-1] for part in self._forward(torch.tensor([0], device="cpu"))]
        self.d_in, self.d_out = widths[0], widths[1] if len(widths) > 1 else None

    def block(self, seed: int, index: int) -> Block:
        """Activations of the next sequences of a shuffled pass, shuffled."""
        return self._made(seed, index, self._chosen(seed, index), 0, 1)

    def part(self, seed: int, index: int, rank: int, ranks: int) -> Block:
        """Every `ranks`-th forward pass of the block runs on this rank.

        A block of less than one pass per rank is made by every rank.
        """
        passes = self._chosen(seed, index)
        if len(passes) < ranks:
            return super().part(seed, index, rank, ranks)
        return self._made(seed, index, passes, rank, ranks)

    def _chosen(self, seed: int, index: int) -> list[Tensor]:
        """The sequences of the block, forward pass by forward pass."""
        per_pass = -(-len(self._ids) // self._per_block)
        passes, part = divmod(index, per_pass)
        order = torch.randperm(
            len(self._ids), generator=generator(seed, "pass", passes), device="cpu"
        )
        chosen = order[part * self._per_block : (part + 1) * self._per_block]
        return list(torch.split(chosen, self._per_batch))

    def _made(self, seed: int, index: int, passes: list[Tensor], rank: int, ranks: int) -> Block:
        parts: list[list[Tensor]] = [[] for _ in self._points.sides]
        places, at = [], 0
        for number, rows in enumerate(passes):
            keep = self._keep[rows]
            count = int(keep.sum())
            if number % ranks != rank:
                places.append(torch.full((count,), -1, device="cpu"))
                continue
            for held, found in zip(parts, self._forward(rows), strict=True):
                held.append(found[keep.to(found.device)])
            places.append(torch.arange(at, at + count, device="cpu"))
            at += count
        made, order = [torch.cat(held) for held in parts], torch.cat(places)
        shuffle = torch.randperm(
            len(order), generator=generator(seed, "block", index), device="cpu"
        )
        return Block(made[0], made[1] if len(made) > 1 else None, order[shuffle])

    def identity(self) -> dict[str, Any]:
        """Hook points, sizes of the buffer, and a digest of the tokens that are read."""
        digest = hashlib.sha256(self._ids.numpy().tobytes())
        digest.update(self._keep.numpy().tobytes())
        name = getattr(getattr(self.model, "config", None), "name_or_path", "")
        return {
            "kind": "model",
            "model": f"{type(self.model).__name__} {name}".strip(),
            "hook_points": self._points.every,
            "block": [self._per_block, self._per_batch],
            "digest": digest.hexdigest(),
        } | ({} if self.layers is None else {"layers": self.layers})

    def metadata(self) -> dict[str, Any]:
        """Name of the model and hook points, as Gemma Scope 2's configs write them.

        Hook points that braces cannot say are left out.
        """
        name = getattr(getattr(self.model, "config", None), "name_or_path", "")
        names = self._points.names
        found = {"model_name": name, "hf_hook_point_in": names[0], "hf_hook_point_out": names[-1]}
        return {key: value for key, value in found.items() if value}

    def held_bytes(self, device: torch.device) -> int:
        """One block and the parts it is put together from."""
        rows = min(self._per_block, len(self._ids)) * self._ids.shape[1]
        return 2 * rows * 4 * (self.d_in + (self.d_out or 0))

    def _forward(self, rows: Tensor) -> list[Tensor]:
        """`[sequences, length, L * d]` of x and of the target, of the sequences `rows`."""
        place = next(self.model.parameters()).device
        inputs = {"input_ids": self._ids[rows].to(place)}
        if self._mask is not None:
            inputs["attention_mask"] = self._mask[rows.to(self._mask.device)].to(place)
        training = self.model.training
        self.model.eval()
        try:
            found = [part.detach() for part in _captured(self.model, self._points.places, inputs)]
        finally:
            self.model.train(training)
        return self._points.rows(found)


def _check_ids(input_ids: Any, attention_mask: Tensor | None) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        raise TypeError("train: input_ids must be a tensor of integers")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"train: input_ids must have shape [S, L], got {tuple(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"train: attention_mask must have the shape of input_ids, "
            f"{tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
