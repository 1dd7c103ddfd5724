"""`gsf.train(..., mesh=...)`: the run that `training.runs` makes, on all ranks of a mesh."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..activations import JumpReLU, TopK
from ..training import checkpoint
from ..training.memory import estimate
from ..training.progress import bar
from ..training.results import CHECKPOINTS, NAMED, check_out
from ..training.runs import OnMetrics, run_steps
from ..training.settings import OP, Settings
from ..training.sources import Source
from ..training.trainer import NonFiniteError
from . import saving
from .base import Sharded
from .communication import all_reduce
from .exchange import everyone
from .export import write
from .failure import RankError, guarded, limit
from .layout import Layout, check_mesh
from .trainer import MeshTrainer, check_slices


def train_on(
    mesh: DeviceMesh,
    source: Source,
    settings: Settings,
    folder: Path | None,
    *,
    resume: bool,
    on_metrics: OnMetrics | None,
    progress: bool,
    metadata: Mapping[str, Any],
) -> Sharded:
    """Train on the ranks of `mesh`; `gsf.train` documents the arguments.

    Raises:
        RankError: another rank failed, died or stood still, or ranks differ in what they are to
            train, or on what; the last checkpoint stays.
        ValueError: the mesh is not of all ranks, or too wide for the run.
    """
    check_mesh(OP, mesh)
    layout = Layout(mesh, settings.d_sae)
    limit([layout.tp_group, layout.dp_group], layout.device)
    first = dist.get_rank() == 0
    place = None if folder is None or not first else folder / CHECKPOINTS
    with guarded(OP, alike=(NonFiniteError, RankError)):
        check_run(layout, source, settings)
        check_place(layout, settings, folder, source.metadata() | dict(metadata))
        if progress and first:
            _announce(source, settings, layout)
        with nullcontext() if place is None else checkpoint.held(place):
            trainer = _start(source, settings, layout, folder, resume)
            wanted, done = progress and first, trainer.taken
            with bar(settings.steps, wanted, settings.batch_size, done=done) as shown:
                run_steps(trainer, folder, on_metrics if first else None, shown)
            return _finish(trainer, folder, dict(metadata))


def check_run(layout: Layout, source: Source, settings: Settings) -> None:
    """Compare what the ranks are about to do, before anything large is made.

    Raises:
        RankError: a rank differs; it is named, on every rank.
        ValueError: the mesh is not of all ranks, or too wide for the run.
    """
    mesh = layout.mesh
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"{OP}: mesh must hold all {dist.get_world_size()} ranks, it has {mesh.size()}"
        )
    own = {"torch": torch.__version__, "shape of the mesh": tuple(mesh.shape)}
    for kind, what in (("settings", settings.record()), ("source", source.identity())):
        own |= {f"{kind}: {name}": value for name, value in what.items()}
    said = {name: json.dumps(value) for name, value in own.items()}
    ranks = everyone((dist.get_rank(), said), layout)
    ranks.sort(key=lambda item: item[0])
    usual = ranks[0][1]
    wrong = [
        (rank, f"rank {rank} has {name} = {there.get(name)}, rank 0 has {usual.get(name)}")
        for rank, there in ranks
        for name in sorted(usual.keys() | there.keys())
        if usual.get(name) != there.get(name)
    ]
    if wrong:
        texts = "; ".join(text for _, text in wrong)
        differ = sorted({rank for rank, _ in wrong})
        raise RankError(f"{OP}: the ranks are to train different things: {texts}", differ)
    check_slices(settings, layout)


def check_place(
    layout: Layout, settings: Settings, folder: Path | None, metadata: Mapping[str, Any]
) -> None:
    """`check_out` on rank 0, which writes the result; all ranks hear of it.

    Raises:
        Exception: as `check_out`, on rank 0.
        RankError: on the others.
    """
    failure: Exception | None = None
    try:
        if dist.get_rank() == 0:
            check_out(folder, settings, metadata)
    except (OSError, TypeError, ValueError) as error:
        failure = error
    said = everyone(failure and f"{type(failure).__name__}: {failure}", layout)
    if failure is not None:
        raise failure
    for text in filter(None, said):
        raise RankError(f"{OP}: rank 0 failed: {text}", [0])


def _announce(source: Source, settings: Settings, layout: Layout) -> None:
    """Print what a rank will hold."""
    size = max(layout.sizes())
    own: dict[str, Any] = {"d_sae": size, "batch_size": -(-settings.batch_size // layout.dp)}
    own |= {"fused": settings.fused and layout.dp == 1, "matryoshka": None, "init_l0": None}
    if settings.target_l0 is not None:
        own["target_l0"] = settings.target_l0 * size / settings.d_sae
    elif settings.activation == "topk":
        own["k"] = min(int(settings.k or 1), size)
    held = source.held_bytes(layout.device)
    found = estimate(replace(settings, **own), layout.device, held, resume=True)
    ranks = f"dp {layout.dp} x tp {layout.tp}"
    print(f"train: {settings.d_sae:,} latents on {ranks}; per rank {found}", file=sys.stderr)


def _start(
    source: Source, settings: Settings, layout: Layout, folder: Path | None, resume: bool
) -> MeshTrainer:
    """The run from its beginning, or from the newest checkpoint that all ranks can read."""
    if folder is None:
        return MeshTrainer(source, settings, layout.mesh)
    place = folder / CHECKPOINTS
    if not resume:
        saving.alike(layout, lambda: _remove(place) if dist.get_rank() == 0 else None)
    elif checkpoint.found(place):
        raise ValueError(
            f"{OP}: {place} holds checkpoints of a run in one process: pass resume=False or "
            "another out"
        )
    saved, unreadable = saving.found(place), []
    for _, path in reversed(saved):
        try:
            saving.load_record(path)
            error = None
        except ValueError as caught:
            error = str(caught)
        errors = [text for text in everyone(error, layout) if text is not None]
        if errors:
            unreadable.append(errors[0])
            continue
        for text in unreadable:
            warnings.warn(f"{text}; resuming from {path.name}", stacklevel=3)
        made: MeshTrainer = MeshTrainer.continued(source, settings, layout.mesh, path)
        old = checkpoint.superseded(saved, path) if dist.get_rank() == 0 else []
        saving.alike(layout, partial(saving.discard, old))
        return made
    if unreadable:
        raise ValueError(f"{unreadable[0]}; resume=False starts anew")
    return MeshTrainer(source, settings, layout.mesh)


def _remove(place: Path) -> None:
    saving.remove(place)
    for _, path in checkpoint.found(place):
        path.unlink()


def _finish(trainer: MeshTrainer, folder: Path | None, metadata: dict[str, Any]) -> Sharded:
    """The module for raw activations, saved where there is a folder and a format for it."""
    x, _ = trainer.stream.next(trainer.settings.batch_size)
    x = x.to(trainer.device)
    scale, bandwidth = trainer.maps[0].scale, trainer.settings.preset.bandwidth
    trainer.finish()
    sharded: Sharded = trainer.sharded.eval()
    with torch.no_grad():
        l0 = sharded.encode(x).l0()  # type: ignore[operator]
        sums = torch.stack([l0.sum().double(), torch.full_like(l0.sum().double(), len(x))])
        sums = all_reduce(sums, trainer.layout.dp_group)
    found = {"l0": float(sums[0] / sums[1]), **trainer.source.metadata(), **metadata}
    sharded.local.metadata = found
    if folder is not None and not isinstance(sharded.activation, TopK):
        named: dict[str, Any] = {name: found.get(name) for name in NAMED}
        plain = sharded.local
        if not isinstance(sharded.activation, JumpReLU):
            plain = plain.to_jumprelu(bandwidth=bandwidth / scale)
        write(plain, trainer.layout, folder, None, named)
    return sharded
