"""Dictionaries and the places of a model that they read and write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..hook_points import Place, expand, resolve
from .dictionaries import Dictionary, is_dictionary, layers_of, maps, widths
from .passes import Passes

Key = str | tuple[str, str]
"""A hook point, or those that a transcoder reads and writes."""
Dictionaries = Dictionary | Sequence[Dictionary] | Mapping[Key, Dictionary]
"""One, several with hook points in their `metadata`, or `{hook point: dictionary}`."""

KINDS = "an SAE, a Transcoder, a sequence of them, or {hook point: SAE}"
METADATA = ("hf_hook_point_in", "hf_hook_point_out")


@dataclass(frozen=True)
class Site:
    """A dictionary in a model.

    Attributes:
        key: what the caller calls it: its key in the mapping, or the hook point that it reads.
        module: the dictionary.
        inputs: where x is read, one place per layer.
        outputs: where the target is, likewise; the same places for an SAE.
    """

    key: Key
    module: Dictionary
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]

    @property
    def layers(self) -> range:
        """Layers of the artefact, counted from 0: one unless it spans several."""
        return range(len(self.inputs))

    @property
    def in_place(self) -> bool:
        """Whether it reads what it writes."""
        return self.inputs == self.outputs

    def check(self, op: str, place: Place, t: Tensor, passes: Passes) -> None:
        """`t [batch, length, d]` at `place` fits the pass that runs and the dictionary.

        Raises:
            ValueError: shape or device disagree.
        """
        d_in, d_out = widths(self.module)
        width = d_in if place in self.inputs else d_out
        expected = (*passes.current().shape, width)
        kind = type(self.module).__name__
        if tuple(t.shape) != expected:
            raise ValueError(
                f"{op}: {place} must have shape {expected} ([batch, length, width of the {kind}]), "
                f"got {tuple(t.shape)}"
            )
        own = next(self.module.parameters()).device
        if t.device != own:
            raise ValueError(f"{op}: {place} is on {t.device}, its {kind} on {own}: move it there")


def sites_of(op: str, model: Any, saes: Any) -> list[Site]:
    """The sites that `saes` stands for.

    Raises:
        TypeError: `model` is no module, or `saes` no dictionaries.
        ValueError: a hook point is missing or names nothing in the model, or there is no SAE.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    sites = [_site(op, model, key, module) for key, module in _pairs(op, saes)]
    if not sites:
        raise ValueError(f"{op}: saes must hold at least one SAE")
    return sites


def _pairs(op: str, saes: Any) -> Iterator[tuple[Key | None, Dictionary]]:
    if is_dictionary(saes):
        pairs = [(None, saes)]
    elif isinstance(saes, Mapping):
        pairs = list(saes.items())
    elif isinstance(saes, Sequence) and not isinstance(saes, str):
        pairs = [(None, module) for module in saes]
    else:
        raise TypeError(f"{op}: saes must be {KINDS}, got {type(saes).__name__}")
    for key, module in pairs:
        if not is_dictionary(module):
            raise TypeError(f"{op}: saes must be {KINDS}, got a {type(module).__name__} in it")
        yield key, module


def _site(op: str, model: nn.Module, key: Key | None, module: Dictionary) -> Site:
    kind = type(module).__name__
    if key is None:
        point_in, point_out = (module.metadata.get(name) for name in METADATA)
        if point_out is None and not maps(module):
            point_out = point_in
        if point_in is None or point_out is None:
            missing = METADATA[0] if point_in is None else METADATA[1]
            raise ValueError(
                f"{op}: saes must say where they belong: the metadata of this {kind} have no "
                f"{missing}; pass {{hook point: SAE}}, or {{(in, out): Transcoder}}"
            )
    elif isinstance(key, tuple) and len(key) == 2:
        point_in, point_out = key
    elif maps(module):
        raise ValueError(
            f"{op}: saes must give a {kind} the pair (hook point in, hook point out), got {key!r}"
        )
    else:
        point_in = point_out = key
    inputs, outputs = (_places(op, model, point, module) for point in (point_in, point_out))
    return Site(point_in if key is None else key, module, inputs, outputs)


def _places(op: str, model: nn.Module, point: Any, module: Dictionary) -> tuple[Place, ...]:
    places = tuple(resolve(op, model, each) for each in expand(op, model, point))
    if len(places) != layers_of(module):
        raise ValueError(
            f"{op}: hook point {point!r} must name the {layers_of(module)} layers of its "
            f"{type(module).__name__}, and names {len(places)}"
        )
    return places


class _Eagerly(AbstractContextManager[None]):
    """What `torch.compile` made runs eagerly until the last such context is left.

    The stance belongs to the process, whatever thread sets it; so it is set and given back once,
    in whatever order contexts are left.
    """

    _lock, _inside, _stance = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not _Eagerly._inside:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            _Eagerly._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            _Eagerly._inside -= 1
            if not _Eagerly._inside:
                self._stance.close()


class Attached(AbstractContextManager["Attached"]):
    """Hooks that are on a model while the context lasts.

    What `torch.compile` made meanwhile runs eagerly: a graph compiled before has no hooks in it.
    """

    def __init__(self, op: str, model: nn.Module, sites: Sequence[Site]) -> None:
        self.op, self.model, self.sites = op, model, sites
        self.passes = Passes(op, model)
        self._stack: ExitStack | None = None
        self._reached: set[Place] = set()

    def read(self, index: int, layer: int, x: Tensor) -> None:
        """Take note of what site `index` reads at a layer."""

    def write(self, index: int, layer: int, y: Tensor) -> Tensor | None:
        """Take note of what site `index` is to reconstruct, or return what replaces it."""
        return None

    def start(self) -> None:
        """Prepare for a forward pass, `self.passes.last`."""

    def end(self) -> None:
        """Let go of what only this pass needed."""

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise RuntimeError(f"{self.op}: this context is entered already")
        with ExitStack() as stack:
            stack.enter_context(_Eagerly())
            for handle in self.passes.attach(self._start, self._end):
                stack.callback(handle.remove)
            for index, site in enumerate(self.sites):
                for layer in site.layers:
                    self._attach(stack, index, site, layer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def _attach(self, stack: ExitStack, index: int, site: Site, layer: int) -> None:
        place_in, place_out = site.inputs[layer], site.outputs[layer]

        def reading(x: Tensor) -> None:
            site.check(self.op, place_in, x, self.passes)
            self.read(index, layer, x)

        def writing(y: Tensor) -> Tensor | None:
            if site.in_place:
                reading(y)
            else:
                site.check(self.op, place_out, y, self.passes)
            self._reached.add(place_out)
            return self.write(index, layer, y)

        if not site.in_place:
            stack.callback(place_in.attach(self.op, reading).remove)
        stack.callback(place_out.attach(self.op, writing).remove)

    def _start(self) -> None:
        self._reached.clear()
        self.start()

    def _end(self) -> None:
        self.end()
        missing = [str(p) for s in self.sites for p in s.outputs if p not in self._reached]
        if missing:
            raise RuntimeError(f"{self.op}: the forward pass did not reach {', '.join(missing)}")
