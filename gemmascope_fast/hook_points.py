"""Places in a model, as Gemma Scope's configs name them, and hooks that read or replace them.

A hook point is the name of a module and the side of it that is meant: `model.layers.17.output`,
`model.layers.17.self_attn.o_proj.input`; artefacts of several layers write
`model.layers.{5,9,12,15}.output` or `{0,...}`. Multimodal models keep the same modules below a
`language_model`: a hook point is matched by its tail, outside of vision and audio towers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

SIDES = ("input", "output")
OTHER_MODALITIES = ("vision", "audio", "image", "multi_modal")
WRAPPERS = (
    *("model", "language_model", "transformer", "text_model"),
    *("base_model", "_orig_mod"),  # PEFT's and torch.compile's
)
BRACES = re.compile(r"\{([^{}]*)\}")
REST = "..."

Visit = Callable[[Tensor], Tensor | None]
"""What a hook calls with the activation; a tensor that it returns takes the activation's place."""


@dataclass(frozen=True)
class Place:
    """One side of one module; its activation is a tensor, or the first of a tuple."""

    name: str
    module: nn.Module
    side: str

    def __str__(self) -> str:
        return f"{self.name}.{self.side}"

    def attach(self, op: str, visit: Visit) -> RemovableHandle:
        """Call `visit` with the activation in every forward pass, until the handle is removed.

        A copy of the module has the hook too, for good; there it does nothing.

        Raises (in the forward pass):
            TypeError: what is there is not a tensor, nor a tuple or list that starts with one.
        """

        def visited(values: Any) -> Any:
            if not isinstance(values, (tuple, list)):
                return visit(self._tensor(op, values))
            new = visit(self._tensor(op, values[0] if values else None))
            return None if new is None else type(values)((new, *values[1:]))

        def after(module: nn.Module, _args: Any, output: Any) -> Any:
            return visited(output) if module is self.module else None

        if self.side == "output":
            return self.module.register_forward_hook(after)
        own = next(iter(inspect.signature(self.module.forward).parameters), "")

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if module is not self.module:
                return None
            if args:
                return None if (new := visited(args)) is None else (new, kwargs)
            new = visited(kwargs.get(own))
            return None if new is None else (args, {**kwargs, own: new})

        return self.module.register_forward_pre_hook(before, with_kwargs=True)

    def _tensor(self, op: str, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value
        raise TypeError(
            f"{op}: {self} must be a tensor or a tuple that starts with one, got a "
            f"{type(value).__name__}"
        )


def resolve(op: str, model: nn.Module, hook_point: str) -> Place:
    """The place that `hook_point` names.

    Raises:
        TypeError: the hook point is not a string.
        ValueError: the model has no such module, or more than one.
    """
    path, side = _parts(op, hook_point)
    found = dict(_matches(model, path))
    if len(found) != 1:
        raise ValueError(
            f"{op}: hook point {hook_point!r} must name one module of {type(model).__name__}, "
            f"and names {f'{len(found)}: ' + ', '.join(found) if found else 'none'}"
        )
    ((name, module),) = found.items()
    return Place(name, module, side)


def expand(op: str, model: nn.Module, hook_point: str) -> list[str]:
    """One hook point per layer: `{5,9}` stands for 5 and 9, `...` for all up to the next number.

    After the last number `...` goes on to the model's last layer.

    Raises:
        TypeError: the hook point is not a string.
        ValueError: what stands between the braces is not a list of ascending layers.
    """
    path, _ = _parts(op, hook_point)
    found = BRACES.findall(path)
    if not found:
        return [hook_point]
    entries = [entry.strip() for entry in found[0].split(",")]
    numbers = [int(entry) for entry in entries if entry.isascii() and entry.isdigit()]
    known = len(numbers) + entries.count(REST) == len(entries) and entries[0] != REST
    if len(found) > 1 or not known or sorted(set(numbers)) != numbers:
        raise ValueError(
            f"{op}: hook point {hook_point!r} must list ascending layers in one pair of braces, "
            "like {5,9,12,15} or {0,...}"
        )
    layers: list[int] = []
    for entry, following in zip(entries, [*entries[1:], ""], strict=True):
        if entry != REST:
            layers.append(int(entry))
        elif following:
            layers += range(layers[-1] + 1, int(following))
        else:
            layers += _layers_after(model, path, layers[-1])
    return [BRACES.sub(str(layer), hook_point) for layer in layers]


def collapse(hook_points: Sequence[str]) -> str | None:
    """The one hook point that `expand` takes apart into these; None where there is none."""
    names = [point.split(".") for point in hook_points]
    if len({len(parts) for parts in names}) != 1:
        return None
    columns = list(zip(*names, strict=True))
    differing = [at for at, column in enumerate(columns) if len(set(column)) > 1]
    if len(differing) != 1:
        return hook_points[0] if len(hook_points) == 1 else None
    layers = columns[differing[0]]
    numbers = [int(layer) for layer in layers if layer.isascii() and layer.isdigit()]
    if [str(number) for number in sorted(set(numbers))] != list(layers):
        return None
    parts = [column[0] for column in columns]
    parts[differing[0]] = "{" + ",".join(layers) + "}"
    return ".".join(parts)


def _layers_after(model: nn.Module, path: str, last: int) -> Iterator[int]:
    """Layers behind `last` that the model has."""
    while any(_matches(model, BRACES.sub(str(last := last + 1), path))):
        yield last


def _parts(op: str, hook_point: Any) -> tuple[str, str]:
    """Path of the module, and "input" or "output"."""
    if not isinstance(hook_point, str):
        raise TypeError(f"{op}: hook point must be a string, got {type(hook_point).__name__}")
    path, _, side = hook_point.rpartition(".")
    if side not in SIDES or not path:
        raise ValueError(
            f"{op}: hook point must be a module's name and .input or .output, got {hook_point!r}"
        )
    return path, side


def _matches(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules outside of other modalities whose name is `path`, wrappers aside."""
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in WRAPPERS:
        parts = parts[1:]
    for name, module in model.named_modules():
        own = name.split(".")
        if own[-len(parts) :] != parts or any(p not in WRAPPERS for p in own[: -len(parts)]):
            continue
        if not any(other in part for part in own for other in OTHER_MODALITIES):
            yield name, module
