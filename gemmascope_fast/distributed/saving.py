"""Checkpoints of a run on a mesh, by `torch.distributed.checkpoint`, read on any other mesh.

    folder/step-000000400/run.json                       the run, and the size of every file
    folder/step-000000400/shard-*-model-*.safetensors    its tensors, each cut as the mesh cut it

Every rank writes the latents that it has, ranks of "dp" taking turns. A checkpoint is written in a
folder of another name, synced, and renamed once every rank is done: whatever stops whichever rank,
the newest folder that has its final name is whole. Nothing in it is executed when it is read: the
files are safetensors and JSON, not the library's pickled default.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..durable import sync, sync_folder
from ..optim.rows import as_rows
from ..training.checkpoint import KEPT, as_json
from .exchange import everyone
from .layout import LATENTS, Layout

if TYPE_CHECKING:
    from .trainer import MeshTrainer

RECORD = "run.json"
NAME = re.compile(r"step-(\d{9,})")
TEMPORARY = re.compile(r"\.step-\d{9,}\.(tmp|old)")
LIMIT = 1 << 20  # bytes of a record


def save(folder: Path, trainer: MeshTrainer) -> Path:
    """Write the checkpoint of the trainer's step and remove all but the newest `KEPT`.

    Raises:
        OSError: a rank could not write; the checkpoints before stay as they are. On every rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as write

    layout, first = trainer.layout, dist.get_rank() == 0
    path = folder / f"step-{trainer.taken:09d}"
    temporary = folder / f".{path.name}.tmp"
    alike(layout, lambda: _emptied(folder, temporary) if first else None)
    tensors = _tensors(trainer)
    files = {name: at for at, name in enumerate(sorted(tensors), 1)}  # a file's bytes are held
    writer = HuggingFaceStorageWriter(
        str(temporary), fqn_to_index_mapping=files, save_distributed=True
    )
    try:
        write(tensors, storage_writer=writer)
    except CheckpointException as error:  # it is no Exception
        raise OSError(f"train: no checkpoint was made of step {trainer.taken}: {error}") from error
    record = trainer._record() | {"optimizer": _numbers(trainer)}
    alike(layout, lambda: _finish(temporary, path, record) if first else None)
    return path


def found(folder: Path) -> list[tuple[int, Path]]:
    """`(step, folder)` of every checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    named = [(NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in named if match)


def load_record(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run.

    Raises:
        ValueError: the checkpoint is not whole.
    """
    try:
        with open(path / RECORD, "rb") as file:
            read = json.loads(file.read(LIMIT))
        sizes = {name: (path / name).stat().st_size for name in read["files"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"train: {path} is not a whole checkpoint: {error}") from error
    for name, size in read["files"].items():
        if sizes[name] != size:
            raise ValueError(
                f"train: {path} is not a whole checkpoint: {name} has {sizes[name]} bytes of {size}"
            )
    return dict(read)


def load(path: Path, trainer: MeshTrainer) -> None:
    """Read a checkpoint into a trainer, each rank the latents that it has now.

    Raises:
        OSError: a file cannot be read. On every rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as read

    tensors = _tensors(trainer)
    try:
        read(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    except CheckpointException as error:
        raise OSError(f"train: {path} could not be read: {error}") from error
    numbers = load_record(path)["optimizer"]
    for name, p in trainer.module.named_parameters():
        state = trainer.updates.optimizer.state[p]
        state["step"] = numbers[name]
        if p.dim() == 1 and name in LATENTS:
            _join(state, tensors[f"optimizer.{name}.touched_at"].to_local(), trainer)  # type: ignore[attr-defined]


def remove(folder: Path) -> None:
    """Remove every checkpoint of `folder`, and what is left of those that were being written."""
    discard([path for _, path in found(folder)])
    _emptied(folder, None)


def alike(layout: Layout, action: Any) -> None:
    """Do `action` and wait for all ranks; where it fails on one, OSError on all."""
    failure: Exception | None = None
    try:
        action()
    except OSError as error:
        failure = error
    said = [text for text in everyone(failure and str(failure), layout) if text is not None]
    if said:
        raise OSError(f"train: no checkpoint was made: {'; '.join(said)}") from failure


def _join(state: dict[str, Any], touched_at: Tensor, trainer: MeshTrainer) -> None:
    """Make one row of a vector's slices, which another mesh may have touched at other steps.

    `v` decays with the steps since, whether it is touched or not.
    """
    last = touched_at.max()
    beta2 = trainer.settings.preset.beta2
    decay = torch.tensor(beta2, dtype=torch.float64, device=last.device) ** (last - touched_at)
    state["exp_avg_sq"].mul_(decay.to(state["exp_avg_sq"].dtype))
    state["touched_at"].fill_(last)


def _tensors(trainer: MeshTrainer) -> dict[str, Tensor]:
    """Everything that a checkpoint holds: views of the trainer's tensors, row by row of latents."""
    layout, found = trainer.layout, dict[str, Tensor]()
    for name, p in trainer.module.named_parameters():
        cut = name in LATENTS
        found[f"module.{name}"] = _placed(as_rows(p.detach(), p) if p.dim() > 1 else p, cut, layout)
        for key, value in trainer.updates.optimizer.state[p].items():
            if not isinstance(value, Tensor):
                continue
            rows = as_rows(value, p) if key.startswith("exp_avg") and p.dim() > 1 else value
            if key == "touched_at" and p.dim() == 1 and cut:
                rows = value.expand(p.shape[0]).clone()  # one row here, other rows elsewhere
            found[f"optimizer.{name}.{key}"] = _placed(rows, cut, layout)
    for name, t in trainer.module.named_buffers():
        found[f"module.{name}"] = _placed(t.view(-1), False, layout)
    for at, place in enumerate(trainer.maps):
        found[f"mean.{at}"] = _placed(place.mean, False, layout)
    return found | {"last_fired": _placed(trainer.last_fired, True, layout)}


def _placed(t: Tensor, cut: bool, layout: Layout) -> Tensor:
    """The DTensor whose part on this rank is `t`."""
    t = t.detach()
    assert t.is_contiguous()
    placements: list[Placement] = [
        Shard(0) if cut and dim == "tp" else Replicate() for dim in layout.mesh.mesh_dim_names or ()
    ]
    shape = torch.Size([layout.d_sae if cut else t.shape[0], *t.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    made: Tensor = DTensor.from_local(
        t, layout.mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return made


def _numbers(trainer: MeshTrainer) -> dict[str, int]:
    """Steps that the optimizer has taken with each parameter."""
    states = trainer.updates.optimizer.state
    return {name: states[p]["step"] for name, p in trainer.module.named_parameters()}


def _emptied(folder: Path, wanted: Path | None) -> None:
    """Remove what stopped saves have left; make `wanted`."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.iterdir():
        if TEMPORARY.fullmatch(leftover.name):
            shutil.rmtree(leftover)
    if wanted is not None:
        wanted.mkdir()


def _finish(temporary: Path, path: Path, record: dict[str, Any]) -> None:
    """Sync everything, give the checkpoint its name, and remove the oldest."""
    files = sorted(temporary.iterdir())
    for name in files:
        with open(name, "rb") as data:
            sync(data)
    with open(temporary / RECORD, "x") as file:
        sizes = {name.name: name.stat().st_size for name in files}
        json.dump(as_json(record) | {"files": sizes}, file)
        sync(file)
    sync_folder(temporary)
    if path.exists():
        discard([path])
    os.replace(temporary, path)
    sync_folder(path.parent)
    discard([old for _, old in found(path.parent)[:-KEPT]])


def discard(paths: list[Path]) -> None:
    """Remove checkpoints, each under a name that is none first."""
    for path in paths:
        doomed = path.with_name(f".{path.name}.old")
        if doomed.exists():
            shutil.rmtree(doomed)
        os.replace(path, doomed)
        shutil.rmtree(doomed)
