"""`gsf.splice`: a model that runs on the reconstructions of its dictionaries.

With acts = encode(x), edited = edit(acts), and y what the dictionary reconstructs (x for an SAE):

    "detach", "grad":  y + (decode(edited) - decode(acts))     the error y - decode(acts) stays
    "none":            decode(edited)

In this form nothing rounds where nothing is edited: the difference is 0, and y passes bit for bit
(computed as y - (decode(acts) - decode(edited)): y - 0 keeps the sign of a zero, y + 0 does not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..sparse import SparseActs
from .dictionaries import Dictionary, check_causal, decode_layer, encode_layer
from .positions import Positions, check_positions, chosen
from .sites import Attached, Dictionaries, Key, Site, sites_of

OP = "splice"
ErrorTerm = Literal["detach", "grad", "none"]


@dataclass(frozen=True)
class SpliceContext:
    """Which activations an edit is given.

    Attributes:
        key: the dictionary's key in the mapping that was given, or the hook point that it reads.
        module: the dictionary.
        layer: the layer of an artefact of several, counted from 0; else 0.
        x: `[*batch, d_in]` that was encoded.
        sequences: `[*batch]` int64, each token's sequence in the batch.
        positions: `[*batch]` int64, its position in the sequence, -1 for padding.

    `*batch` is `acts.shape[:-1]`: `[batch, length]` of the pass, or `[chosen tokens]` where
    `positions` choose.
    """

    key: Key
    module: Dictionary
    layer: int
    x: Tensor
    sequences: Tensor
    positions: Tensor


Edit = Callable[[SparseActs, SpliceContext], SparseActs]


class Splice(Attached):
    """Reconstructions in place of activations while the context lasts."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        edit: Edit | None,
        positions: Positions,
        error: ErrorTerm,
    ) -> None:
        super().__init__(OP, model, sites)
        self._edit, self._positions, self._error = edit, positions, error
        self._chosen: Tensor | None = None
        self._codes = [_Codes() for _ in sites]

    def start(self) -> None:
        """Choose the tokens of a pass."""
        several = any(len(site.layers) > 1 for site in self.sites)
        if several and torch.is_grad_enabled() and _reruns(self.model):
            raise RuntimeError(
                f"{OP}: an artefact of several layers needs gradient checkpointing off: each "
                "segment would rerun without the gradients of the others"
            )
        self._chosen = chosen(OP, self._positions, self.passes.current())
        self.end()  # a pass that failed left something

    def end(self) -> None:
        """Let go of the activations."""
        for codes in self._codes:
            codes.clear()

    def read(self, index: int, layer: int, x: Tensor) -> None:
        """Encode the chosen tokens and edit them."""
        codes, site = self._codes[index], self.sites[index]
        codes.x[layer] = x = self._pick(x)
        if x.shape[0] == 0 or not self._needed():
            return
        codes.acts[layer] = codes.edited[layer] = acts = encode_layer(site.module, layer, x)
        if self._edit is not None:
            context = SpliceContext(site.key, site.module, layer, x, *self._tokens())
            codes.edited[layer] = _checked(self._edit(acts, context), acts)

    def write(self, index: int, layer: int, y: Tensor) -> Tensor | None:
        """Replace the chosen tokens."""
        codes, module = self._codes[index], self.sites[index].module
        if layer not in codes.edited:
            return None
        part = self._replaced(module, layer, codes, self._pick(y))
        if part is None or self._chosen is None:
            return part
        return y.index_put(self._chosen.nonzero(as_tuple=True), part)

    def _replaced(self, module: Dictionary, layer: int, codes: _Codes, y: Tensor) -> Tensor | None:
        x, wide = codes.x[layer], torch.promote_types(y.dtype, torch.float32)
        same = all(codes.edited[i] is acts for i, acts in codes.acts.items())
        if same and self._error != "none" and not torch.is_grad_enabled():
            return None
        recon = decode_layer(module, layer, codes.edited, x, wide)
        if self._error == "none":
            return recon.to(y.dtype)
        before = recon if same else decode_layer(module, layer, codes.acts, x, wide)
        if self._error == "detach":
            y, before = y.detach(), before.detach()
        return (y.to(wide) - (before - recon)).to(y.dtype)

    def _needed(self) -> bool:
        """Whether the result can differ from what is replaced, in value or in gradient."""
        if self._edit is not None or self._error == "none":
            return True
        return self._error == "detach" and torch.is_grad_enabled()

    def _pick(self, t: Tensor) -> Tensor:
        return t if self._chosen is None else t[self._chosen]

    def _tokens(self) -> tuple[Tensor, Tensor]:
        """`(sequences, positions)` of the chosen tokens."""
        at = self.passes.current()
        sequences = torch.arange(at.shape[0], device=at.positions.device)[:, None].expand(at.shape)
        return self._pick(sequences), self._pick(at.positions)


class _Codes:
    """What one pass has read so far at one site, by layer."""

    def __init__(self) -> None:
        self.x: dict[int, Tensor] = {}
        self.acts: dict[int, SparseActs] = {}
        self.edited: dict[int, SparseActs] = {}

    def clear(self) -> None:
        for held in (self.x, self.acts, self.edited):
            held.clear()


def _reruns(model: nn.Module) -> bool:
    """Whether layers run a second time for their gradients."""
    return any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules())


def _checked(edited: Any, acts: SparseActs) -> SparseActs:
    if not isinstance(edited, SparseActs):
        raise TypeError(f"{OP}: edit must return SparseActs, got {type(edited).__name__}")
    if edited.shape != acts.shape or edited.device != acts.device:
        raise ValueError(
            f"{OP}: edit must return SparseActs of shape {acts.shape} on {acts.device}, got "
            f"{edited.shape} on {edited.device}"
        )
    return edited


def splice(
    model: nn.Module,
    saes: Dictionaries,
    edit: Edit | None = None,
    *,
    positions: Positions = None,
    error: ErrorTerm = "detach",
) -> Splice:
    """Replace activations of a model by what dictionaries reconstruct, edited.

        def steer(acts, context):
            return acts.set([3124], 200.0)                  # latent 3124 on, at every token

        with gsf.splice(model, sae, steer, positions=slice(1, None)):
            model.generate(**inputs)

    `out = y + (decode(edited) - decode(acts))`, y being what is reconstructed: x, or a
    transcoder's target. Tokens whose entries the edit leaves alone pass bit for bit, unless
    `error="none"`. `n x d_sae` is never formed. Contexts nest: an inner one works on what the outer
    one wrote; hooks leave with the context, after an exception too, and one thread at a time runs
    the model meanwhile. What `output_hidden_states` returns for a spliced layer may be from before
    the splice. An artefact of several layers writes each layer from the latents of those before it,
    as edited.

    Args:
        model: a `transformers` model, called with `input_ids` or `inputs_embeds`, `generate` and
            its caches included.
        saes: as for `capture`.
        edit: `edit(acts, context) -> SparseActs` of the same shape, for every dictionary (and layer
            of one) in each pass that chooses a token: `acts.set`, `scale` and `ablate` make them.
            None edits nothing.
        positions: tokens that are spliced; the others pass untouched. An int, a slice or a list
            counts each sequence's own tokens from 0, so that it means the same however the batch is
            padded and goes on into what is generated; negative ones count from the end of the
            prompt, the last pass that was more than one token behind a cache (so from the end of
            every pass where there is no cache, and of every chunk of a prompt fed in chunks;
            assisted generation feeds guesses with the prompt, so count from 0 there). A
            bool mask `[batch, columns]` counts like `input_ids`, padding included. None is all
            tokens, the BOS among them, which published dictionaries were not trained on.
        error: what becomes of `y - decode(acts)`. "detach": it stays and is a constant, so that
            gradients reach what comes before through the latents only. "grad": it stays with its
            gradient, which makes an unedited splice the identity in the backward pass too. "none":
            it is left out.

    Returns:
        A context manager.

    Raises:
        TypeError: an argument is of the wrong type; in the forward pass, `edit` returns something
            else than `SparseActs`, or a hook point is no tensor.
        ValueError: a hook point is missing or names nothing in the model, positions do not fit, or
            an artefact writes to earlier layers; in the forward pass, shapes or devices disagree.
        RuntimeError: in the forward pass, when it does not reach a hook point.
    """
    if edit is not None and not callable(edit):
        raise TypeError(f"{OP}: edit must be a function or None, got {type(edit).__name__}")
    if error not in get_args(ErrorTerm):
        raise ValueError(f"{OP}: error must be one of {get_args(ErrorTerm)}, got {error!r}")
    sites = sites_of(OP, model, saes)
    for site in sites:
        check_causal(OP, site.module)
    return Splice(model, sites, edit, check_positions(OP, positions), error)
