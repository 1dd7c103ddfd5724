"""Write a module as a folder of tensors and a config, atomically.

Every file is written under a temporary name in the folder and synced; then the files of tensors are
renamed one by one, then the config. A crash before the first rename leaves the old artefact. In
Gemma Scope 2's format a crash after it leaves the new one: the header of the tensors holds the
config too, and the digest of the `config.json` that the save replaces, by which `load` recognises a
stale one; and layers that have not got their names yet are found by those of the save
(`layer_files`). Other libraries do not read headers: in their formats the old config is removed
before the first rename, so that a crash leaves tensors without a config, which they refuse and
`load` reads. A writer holds the folder from before it reads the old config until its last rename,
so two saves cannot mix, and temporary files found at the start belong to dead writers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from ..arguments import as_path
from ..durable import sync, sync_folder, told
from . import files, folders, layer_files, writing_gemma_scope_2, writing_saelens, writing_sparsify
from .files import CONFIG, CONFIG_LIMIT
from .gemma_scope_2 import CONFIG_KEY, PARAMS, REPLACES_KEY, digest
from .plans import OP, Plan
from .validate import check_dtype
from .writing_tensors import Stored, write_tensors

Format = Callable[[Any, torch.dtype | None, Mapping[str, Any]], Plan]
Writer = Callable[[IO[bytes], Mapping[str, Stored], Mapping[str, str]], None]
FORMATS: dict[str, Format] = {
    "gemma_scope_2": writing_gemma_scope_2.plan,
    "saelens": writing_saelens.plan,
    "sparsify": writing_sparsify.plan,
}
KINDS = {  # a folder holds one of them
    PARAMS: "a single-layer artefact of Gemma Scope 2",
    layer_files.layer_name(0): "an artefact of several layers",
    writing_saelens.WEIGHTS: "an artefact of SAELens",
    writing_sparsify.WEIGHTS: "an artefact of sparsify",
}


def save(
    module: Any,
    path: str | os.PathLike[str],
    *,
    format: str = "gemma_scope_2",
    dtype: torch.dtype | None,
    metadata: Mapping[str, Any],
) -> None:
    """Write `module` to the folder `path`; `Pretrained.save_pretrained` says the rest.

    Args:
        module: the weights.
        path: folder, made if it is missing; other files in it stay.
        format: one of `FORMATS`.
        dtype: of the matrices in the file; None keeps the module's.
        metadata: config values that take precedence over `module.metadata`; None is "not given".
    """
    check_dtype(OP, dtype)
    if format not in FORMATS:
        raise ValueError(f"{OP}: format must be one of {', '.join(FORMATS)}, got {format!r}")
    folder = as_path(OP, "path", path)
    files.check_utf8(OP, folder)
    write_plan(folder, FORMATS[format](module, dtype, metadata))


def check(folder: Path, metadata: Mapping[str, Any], module: Any, format: str) -> tuple[str, ...]:
    """Raise what `save` would raise of the folder and of the metadata.

    Args:
        folder: the path.
        metadata: as for `save`.
        module: of the kind and the number of layers of what is to be saved; its sizes don't matter.
        format: as for `save`.

    Returns:
        The names of the files that it would write.

    Raises:
        TypeError, ValueError: as `Pretrained.save_pretrained`.
    """
    files.check_utf8(OP, folder)
    plan = FORMATS[format](module, None, metadata)
    _check_place(folder, plan)
    if folder.is_dir():
        _check_kind(folder, plan)
    return (*plan.tensors, plan.config)


def write_plan(folder: Path, plan: Plan, write: Writer = write_tensors) -> None:
    """Make `folder` hold what `plan` says, or leave it as it is.

    Args:
        folder: made if it is missing.
        plan: of the files.
        write: makes one file of tensors, given its header's metadata.
    """
    _check_place(folder, plan)
    with told(OP, "path", folder), folders.written(OP, folder):
        _check_kind(folder, plan)
        layer_files.complete(folder)
        folders.remove_temporaries(folder)
        _replace(folder, plan, write)


def _replace(folder: Path, plan: Plan, write: Writer) -> None:
    """Write all files under temporary names, then rename.

    On failure before the first rename nothing stays behind, after it the layers that miss their
    names do.
    """
    token, renamed = folders.new_token(), False
    names = (*plan.tensors, plan.config)
    temporary = {name: folder / folders.temporary_name(name, token) for name in names}
    try:
        header = _header(folder, plan, token)
        for name, tensors in plan.tensors.items():
            with told(OP, "path", folder / name):
                _write(temporary[name], lambda file, t=tensors: write(file, t, header))  # type: ignore[misc]
        with told(OP, "path", folder / plan.config):
            _write(temporary[plan.config], lambda file: file.write(plan.text))
        if len(plan.tensors) > 1:
            sync_folder(folder)  # the temporary names count from the first rename on
        if plan.config != CONFIG:
            (folder / plan.config).unlink(missing_ok=True)
            sync_folder(folder)
        for name in names:  # this order: see the header of this file
            os.replace(temporary[name], folder / name)
            renamed = True
            sync_folder(folder)
    finally:
        for name, path in temporary.items():
            if name == plan.config or not renamed:
                path.unlink(missing_ok=True)


def _header(folder: Path, plan: Plan, token: str) -> dict[str, str]:
    """What each file of tensors says beside them."""
    header = {CONFIG_KEY: plan.text.decode(), "format": "pt"}
    if len(plan.tensors) > 1:
        header[layer_files.SAVE_KEY] = token
    old = _old_config(folder) if plan.config == CONFIG else None
    if old is not None:
        header[REPLACES_KEY] = digest(old)
    return header


def _write(path: Path, writer: Callable[[IO[bytes]], object]) -> None:
    """Make a file, on disk when this returns."""
    with open(path, "xb") as file:
        writer(file)
        sync(file)


def _check_place(folder: Path, plan: Plan) -> None:
    """Nothing that the files cannot replace is in their way."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{OP}: path must be a folder, and {folder} is a file")
    for name in (*plan.tensors, plan.config):
        if (folder / name).is_dir():
            raise ValueError(f"{OP}: {folder / name} is a folder: remove it or choose another path")


def _check_kind(folder: Path, plan: Plan) -> None:
    """The folder holds no artefact of another kind, which the new one would not replace."""
    for name, kind in KINDS.items():
        if name not in plan.tensors and os.path.lexists(folder / name):
            raise _occupied(folder, kind, name)
    for name in map(layer_files.layer_name, layer_files.layers_of(folder)):
        if name not in plan.tensors:
            raise _occupied(folder, "an artefact of more layers", name)


def _occupied(folder: Path, kind: str, name: str) -> ValueError:
    return ValueError(f"{OP}: {folder} holds {kind} ({name}): remove it or choose another path")


def _old_config(folder: Path) -> bytes | None:
    """What `load` reads of the `config.json` that is about to be replaced."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            return file.read(CONFIG_LIMIT + 1)
    except FileNotFoundError:  # removed just now
        return None
