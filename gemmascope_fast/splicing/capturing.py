"""`gsf.capture`: what dictionaries read in a model, and their sparse activations of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hook_points import Place
from .dictionaries import Dictionary, is_dictionary
from .sites import Attached, Dictionaries, Key, Site, sites_of

OP = "capture"


class Reading:
    """What one dictionary saw in the last sequences that the model ran.

    Attributes:
        key: its key in the mapping that was given, or the hook point that it reads.
        module: the dictionary.
    """

    def __init__(self, site: Site) -> None:
        self.key, self.module = site.key, site.module
        self._site = site
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self._x, self._target = _Stack(self._site.inputs), _Stack(self._site.outputs)
        self._acts: Any = None

    def cut(self, batch: int, start: int) -> None:
        """Forget what a pass that starts at column `start` takes the place of."""
        self._acts = None
        for stack in (self._x, self._target):
            stack.cut(batch, start)

    def add(self, layer: int, start: int, *, x: Tensor | None = None, y: Any = None) -> None:
        """Keep what the pass that starts at column `start` read and wrote at a layer."""
        self._acts = None
        for stack, t in ((self._x, x), (self._target, y)):
            if t is not None:
                stack.parts[layer].setdefault(start, t)  # a pass that gradients rerun is there

    @property
    def x(self) -> Tensor:
        """`[batch, tokens, d_in]`, or `[batch, tokens, L, d]` of an artefact of L layers."""
        return self._x.joined()

    @property
    def target(self) -> Tensor:
        """What is to be reconstructed: of an SAE x itself."""
        return self.x if self._site.in_place else self._target.joined()

    @property
    def acts(self) -> Any:
        """`module.encode(x)`: `SparseActs`, or a list of L; made when first asked for."""
        if self._acts is None:
            self._acts = self.module.encode(self.x)
        return self._acts


class _Stack:
    """Activations at the places of a site: of each layer, by their first column."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self.parts: list[dict[int, Tensor]] = [{} for _ in places]

    def cut(self, batch: int, stop: int) -> None:
        """Keep the columns in front of `stop`; none if they are not what it follows."""
        for parts in self.parts:
            kept = {at: t[:, : stop - at] for at, t in parts.items() if at < stop}
            parts.clear()
            if kept and max(at + t.shape[1] for at, t in kept.items()) == stop:
                parts |= {at: t for at, t in kept.items() if t.shape[0] == batch}

    def joined(self) -> Tensor:
        for parts, place in zip(self.parts, self.places, strict=True):
            if not parts:
                raise RuntimeError(f"{OP}: no forward pass has reached {place} yet")
        layers = [torch.cat(list(parts.values()), 1) for parts in self.parts]
        return layers[0] if len(layers) == 1 else torch.stack(layers, 2)


class Captured(Attached):
    """The readings of `capture`: by dictionary, by key, or by place in the order given."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__(OP, model, sites)
        self._readings = [Reading(site) for site in sites]

    def __getitem__(self, key: Dictionary | Key | int) -> Reading:
        if isinstance(key, int):
            return self._readings[key]
        by_module = is_dictionary(key)
        found = [r for r in self._readings if (r.module is key if by_module else r.key == key)]
        if len(found) != 1:
            raise KeyError(
                f"{OP}: {type(key).__name__ if by_module else key} names {len(found)} of "
                f"{[r.key for r in self._readings]}"
            )
        return found[0]

    def __len__(self) -> int:
        return len(self._readings)

    def __iter__(self) -> Iterator[Reading]:
        return iter(self._readings)

    def start(self) -> None:
        """Forget earlier sequences when others are run, and tokens that were taken back."""
        at = self.passes.current()
        for reading in self._readings:
            reading.cut(at.shape[0], at.start if at.continued else 0)

    def read(self, index: int, layer: int, x: Tensor) -> None:
        """Keep x."""
        self._readings[index].add(layer, self.passes.current().start, x=x)

    def write(self, index: int, layer: int, y: Tensor) -> None:
        """Keep a transcoder's target."""
        if not self.sites[index].in_place:
            self._readings[index].add(layer, self.passes.current().start, y=y)


def capture(model: nn.Module, saes: Dictionaries) -> Captured:
    """Keep what dictionaries read in a model, to be encoded sparsely when it is asked for.

        with gsf.capture(model, sae) as captured, torch.no_grad():
            model(input_ids)
        captured[sae].acts                                  # SparseActs [batch, tokens, d_sae]

    A pass without a cache, or with another one, begins anew; passes with one cache are joined along
    the tokens, without those that were taken back from it (assisted generation does so). Beam
    search reorders a cache, not what is held: run the sequences it returns to read theirs. In a
    loop over batches each is read after its call, and only the last is held: `n * d_in` numbers per
    hook point. Tensors keep their autograd history where gradients are enabled. Under `splice`, a
    capture that is entered later sees what the splice wrote, one entered earlier what it read.

    Args:
        model: a `transformers` model, called with `input_ids` or `inputs_embeds`.
        saes: one dictionary or several whose `metadata` name their hook points, or
            `{hook point: dictionary}`, with the pair `(in, out)` for a transcoder.

    Returns:
        A context manager; `captured[...]` takes a dictionary, a key or a number.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a hook point is missing, or names nothing in the model.
        RuntimeError: in the forward pass, when it does not reach a hook point.
    """
    return Captured(model, sites_of(OP, model, saes))
