"""A training run: batches in, updates out, checkpoints on the way.

    x' = (x - mean) * scale             calibration.py, from the first block
    loss' = sum of terms(x', step)      recipe.py, evaluated by SAE.loss at bounded memory
    update, unit-norm decoder rows      updates.py
    module on raw activations           calibration.fold_

Everything random is a function of (seed, purpose, number), and the data position is (block, row):
a resumed run continues with the same bits. On the CPU that holds for equal numbers of threads.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..optim.rows import as_rows
from . import checkpoint
from .calibration import ROWS, Affine, fold_, measure, start
from .recipe import evaluate, terms
from .settings import Settings
from .sources import Source, Stream
from .starting import take
from .updates import PREFIX, Updates

VERSION = 1
DEAD_STEPS = 1000
"""Steps without firing after which a latent counts as dead; a fifth of shorter runs."""


class NonFiniteError(FloatingPointError):
    """A loss or a weight is NaN or infinite; no step was taken with it.

    Attributes:
        step: steps taken before.
        position: (block, row) at which the batch began.
    """

    def __init__(self, message: str, step: int, position: tuple[int, int]) -> None:
        super().__init__(message)
        self.step, self.position = step, position


class Trainer:
    """One run in memory: `step` it, read it, save it.

    Args:
        source: of the activations.
        settings: of the run.
        device: where it trains.
        start: checked by `check_start`; None draws the initial weights and calibrates them.

    Attributes:
        module: the weights, in units of scaled activations; `exported()` reads raw ones.
        maps: from raw to scaled activations, of x and of the target.
        taken: steps taken.
    """

    def __init__(
        self, source: Source, settings: Settings, device: torch.device, start: Any = None
    ) -> None:
        self.source, self.settings, self.device = source, settings, device
        self._begin()
        self.stream = Stream(source, settings.seed)
        self._calibrate(start)

    @classmethod
    def resumed(cls, source: Source, settings: Settings, device: torch.device, path: Path) -> Any:
        """The run that wrote the checkpoint `path`, as it was then.

        Raises:
            ValueError: the checkpoint is of a run with other settings or another source.
        """
        record = checkpoint.load_record(path)
        check_same(path, record, source, settings)
        made = cls.__new__(cls)
        made.source, made.settings, made.device = source, settings, device
        made._begin(record)
        checkpoint.load_into(path, made._tensors(), PREFIX)
        made.updates.load(checkpoint.read(path, PREFIX), record["optimizer"])
        block, row = record["position"]
        made.stream = Stream(source, settings.seed, (block, row))
        return made

    def step(self) -> dict[str, Tensor | float]:
        """Take one step; returns its metrics, tensors not yet waited for.

        Raises:
            NonFiniteError: the loss is not finite; nothing was changed.
        """
        settings, position = self.settings, self.stream.position
        x, target = self._batch()
        rate = settings.preset.learning_rate(self.taken, settings.steps)
        self.updates.zero_grad()
        with torch.autocast(
            self.device.type, settings.autocast, enabled=settings.autocast is not None
        ):
            loss, metrics = self._loss(x, target)
        if not bool(torch.isfinite(loss)):
            self.updates.zero_grad()
            raise NonFiniteError(
                f"train: the loss is {float(loss.detach())} at step {self.taken}, on the "
                f"{settings.batch_size} tokens from row {position[1]} of block {position[0]} as "
                f"shuffled: {self.stream.blame(x=x, target=target)}; the step was not taken",
                *(self.taken, position),
            )
        loss.backward()  # type: ignore[no-untyped-call]
        fired = self.updates.fired(self._active)
        self.updates.step(rate)
        self.taken += 1
        self.last_fired.masked_fill_(fired, self.taken)
        return {"loss": loss.detach(), **metrics, "fired": self._fired(fired), "lr": rate}

    def dead(self) -> int:
        """Latents of the whole dictionary that are silent."""
        return int(self.silent().sum())

    def silent(self) -> Tensor:
        """`[d_sae]` bool: latents that did not fire for `DEAD_STEPS`, or a fifth of the run."""
        patience = min(DEAD_STEPS, -(-self.settings.steps // 5))
        return self.taken - self.last_fired > patience

    def not_finite(self) -> str | None:
        """The first parameter with a NaN or infinity."""
        named = self.module.named_parameters()
        return next((name for name, p in named if not _finite(p.detach())), None)

    def scaled(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """`(x, target)` as the module sees them, in float64 only if it is; target defaults to x."""
        given = (x,) if target is None else (x, target)
        made = [place(t.to(self.device)) for place, t in zip(self.maps, given, strict=False)]
        if self.settings.dtype != torch.float64:
            made = [t.float() for t in made]
        return made[0], made[-1]

    def exported(self) -> Any:
        """A copy of the module that reads raw activations."""
        module = copy.deepcopy(self.module).requires_grad_(False)
        return self._raw(module).requires_grad_(True)

    def finish(self) -> Any:
        """The module itself, turned into one that reads raw activations; the run is over."""
        self.updates.release()
        del self.updates
        return self._raw(self.module)

    def save(self, folder: Path) -> Path:
        """Write a checkpoint.

        Raises:
            NonFiniteError: a weight is not finite; nothing was written.
            OSError: the file system refuses.
        """
        bad = self.not_finite()
        if bad is not None:
            raise NonFiniteError(
                f"train: {bad} is not finite after step {self.taken}; no checkpoint was made",
                *(self.taken, self.stream.position),
            )
        record = self._record() | {"optimizer": self.updates.record()}
        tensors = self._tensors() | self.updates.tensors()
        return checkpoint.save(folder, self.taken, tensors, record)

    def _begin(self, record: Mapping[str, Any] | None = None) -> None:
        """Make what a run has, empty where `record` is that of a checkpoint to be read."""
        self.module: Any = self._make()
        if self.settings.precision == "screened":
            self.module.screen()
        self.updates = self._updates()
        self.taken = 0 if record is None else record["step"]
        size = self.module.d_sae * (self.settings.layers or 1)
        self.last_fired = torch.zeros(size, dtype=torch.int64, device=self.device)
        if record is not None:
            s_in, s_out = record["scales"]
            d_in, d_out = self.settings.d_in, self.settings.d_out
            self.maps: tuple[Any, Any] = (self._map(d_in, s_in), self._map(d_out, s_out))

    def _map(self, width: int, scale: Any) -> Any:
        """A map of `scale`, as its record has it, whose mean is still to be read."""
        return Affine(torch.zeros(width, device=self.device), scale)

    def _make(self) -> Any:
        """The module that is trained, with its initial weights."""
        return self.settings.make(self.device)

    def _updates(self) -> Updates:
        """The optimizer of the module."""
        return Updates(self.module, self.settings)

    def _loss(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of scaled tokens and its metrics."""
        self._active: list[Tensor] = []
        found = terms(self.settings, self.taken, self.silent())
        return evaluate(self.settings, self.module, x, target, found, self._active)

    def _fired(self, fired: Tensor) -> Tensor:
        """Latents of the whole dictionary that fired in the step just taken."""
        return fired.sum()

    def _record(self) -> dict[str, Any]:
        """What a checkpoint says of the run, the optimizer apart."""
        return {
            "version": VERSION,
            "step": self.taken,
            "position": self.stream.position,
            "scales": [place.scale for place in self.maps],
            "settings": self.settings.record(),
            "source": self.source.identity(),
            "time": time.time(),
        }

    def _calibrate(self, start: Any = None) -> None:
        """Measure scale and mean, then set biases and thresholds, or all weights from `start`."""
        settings, preset = self.settings, self.settings.preset
        place = self._measure("x", 0)
        self.maps = (place, place)
        if self.source.d_out is not None:
            self.maps = (place, self._measure("target", 1))
        if start is not None:
            back = [place.inverse() for place in self.maps]
            take(self.module, start, lambda module: self._fold(module, back))
            return
        sample = self.scaled(*self.stream.peek(0, preset.calibration_tokens))
        if settings.start_l0 is not None and len(sample[0]) < 2:
            raise ValueError("train: the first block must have at least 2 rows to calibrate on")
        if preset.calibrated or settings.start_l0 is not None:
            self._start(*sample)

    def _measure(self, name: str, side: int) -> Any:
        """The map of x (0) or of the target (1)."""
        return measure(name, self._parts(side), self.settings.preset.centred, self.device)

    def _start(self, x: Tensor, target: Tensor) -> None:
        """Set biases and thresholds from scaled tokens."""
        starts = self.settings.start_l0, self.settings.preset.init_threshold
        start(self.module, x, target, *starts, d_sae=self.settings.d_sae)

    def _raw(self, module: Any) -> Any:
        """The trained `module`, turned into one that reads raw activations."""
        if self.settings.precision == "screened":
            module.unscreen()
        self._fold(module, self.maps)
        return module

    def _fold(self, module: Any, maps: Sequence[Any]) -> None:
        """Turn a module that reads what `maps` make into one that reads what they are given."""
        fold_(module, *maps)

    def _parts(self, side: int) -> Callable[[], Iterator[Tensor]]:
        """The tokens that scale and mean are estimated from: of x (0) or of the target (1)."""

        def parts() -> Iterator[Tensor]:
            for begin in range(0, self.settings.preset.statistics_tokens, ROWS):
                part = self.stream.peek(begin, begin + ROWS)[side]
                if part is None or len(part) == 0:
                    return
                yield part

        return parts

    def _batch(self) -> tuple[Tensor, Tensor | None]:
        x, target = self.stream.next(self.settings.batch_size)
        scaled = self.scaled(x, target)
        return scaled if target is not None else (scaled[0], None)

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the optimizer's state."""
        weights = {f"module.{name}": p.detach() for name, p in self.module.named_parameters()}
        buffers = {f"module.{name}": t for name, t in self.module.named_buffers()}
        means = {f"mean.{at}": place.mean for at, place in enumerate(self.maps)}
        return weights | buffers | means | {"last_fired": self.last_fired}


def _finite(weight: Tensor) -> bool:
    """All elements are finite. A sum in float64 would hold a copy of the weight in float64."""
    low, high = as_rows(weight, weight).aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_same(path: Path, record: dict[str, Any], source: Source, settings: Settings) -> None:
    """Refuse a checkpoint of another run."""
    if record.get("version") != VERSION:
        raise ValueError(
            f"train: {path} has version {record.get('version')}, this library reads {VERSION}"
        )
    for kind, now in (("settings", settings.record()), ("source", source.identity())):
        was = record[kind]
        now = checkpoint.as_json(now)
        for name in sorted({*was, *now}):
            if was.get(name) != now.get(name):
                raise ValueError(
                    f"train: {path} is of a run whose {kind} have {name}={was.get(name)}, and now "
                    f"{name}={now.get(name)}: pass resume=False or another out"
                )
