"""Write an SAE or a transcoder as a Gemma Scope 2 folder, atomically.

Both files are written under temporary names in the folder and synced; then `params.safetensors`
is renamed, then `config.json`. The header of `params.safetensors` holds the config too, and the
digest of the `config.json` that the save replaces: a crash between the two renames leaves a
config that `load` recognises as stale, so at every moment the folder holds the old artefact or
the new one, whole. A writer holds the folder from before it reads the old config until its last
rename, so two saves cannot mix, and temporary files found at the start belong to dead writers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..modules import SAE, JumpReLU, Transcoder
from . import config as configs
from . import files, folders
from .files import CONFIG, CONFIG_LIMIT
from .gemma_scope_2 import CONFIG_KEY, DTYPES, PARAMS, REPLACES_KEY, digest
from .validate import (
    MATRICES,
    PARAMETERS,
    SKIP,
    Spec,
    check_dtype,
    check_tensors,
    finite,
    rows_per_block,
)

OP = "save_pretrained"
CODES = {dtype: code for code, dtype in DTYPES.items()}


def save(
    module: SAE,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None,
    metadata: Mapping[str, Any],
) -> None:
    """Write `module` to the folder `path`; `SAE.save_pretrained` says the rest.

    Args:
        module: the weights.
        path: folder, made if it is missing; other files in it stay.
        dtype: of the matrices in the file; None keeps the module's.
        metadata: config values that take precedence over `module.metadata`; None is "not given".
    """
    check_dtype(OP, dtype)
    folder = files.as_path(OP, "path", path)
    files.check_utf8(OP, folder)
    tensors = _tensors(module)
    text = _config(module, metadata)
    specs = _specs(tensors, dtype)
    _check_place(folder)
    with folders.written(OP, folder):
        folders.remove_temporaries(folder)
        header = {CONFIG_KEY: text.decode(), "format": "pt"}
        old = _old_config(folder)
        if old is not None:
            header[REPLACES_KEY] = digest(old)
        _replace_both(
            folder,
            lambda file: _write_tensors(file, tensors, specs, header),
            lambda file: file.write(text),
        )


def _tensors(module: SAE) -> dict[str, Tensor]:
    """The parameters under their names in the file.

    Raises:
        ValueError: the module cannot be expressed in the format.
    """
    if not isinstance(module.activation, JumpReLU):
        raise ValueError(
            f"{OP}: Gemma Scope 2's files hold JumpReLU only, got {module.activation}; keep "
            "module.state_dict() with torch.save instead"
        )
    if not module.semantics.plain_forward:
        raise ValueError(
            f"{OP}: Gemma Scope 2's files have no place for {module.semantics}: save "
            "module.to_jumprelu() instead, which folds it into the weights"
        )
    found = {name: getattr(module, attribute, None) for name, attribute in PARAMETERS.items()}
    if found[SKIP] is not None and not isinstance(module, Transcoder):
        raise ValueError(
            f"{OP}: W_skip must be None in a {type(module).__name__}, whose forward ignores it: "
            "delete it, or make a Transcoder(..., affine=True)"
        )
    tensors = {name: t.detach() for name, t in found.items() if t is not None}
    for name, t in tensors.items():
        if t.is_meta:
            raise ValueError(f"{OP}: {PARAMETERS[name]} is on the meta device and has no values")
    check_tensors(OP, {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()})
    return tensors


def _config(module: SAE, metadata: Mapping[str, Any]) -> bytes:
    """The text of `config.json`.

    Raises:
        TypeError: `module.metadata` is no dict, or a value has no JSON form.
        ValueError: the text would not be read back.
    """
    affine = isinstance(module, Transcoder) and module.W_skip is not None
    if not isinstance(module.metadata, Mapping):
        raise TypeError(
            f"{OP}: module.metadata must be a dict, got {type(module.metadata).__name__}"
        )
    given = {key: value for key, value in metadata.items() if value is not None}
    weights = {
        "type": "transcoder" if isinstance(module, Transcoder) else "sae",
        "architecture": "jump_relu",
        "width": module.d_sae,
        "affine_connection": affine,
    }
    return configs.to_json({**module.metadata, **given, **weights}, OP)


def _specs(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Spec]:
    """What is written, in the library's order: wide dtypes first, then by name."""
    specs = {}
    for name, t in tensors.items():
        stored = t.dtype if dtype is None else dtype
        if name not in MATRICES:
            stored = torch.float64 if stored == torch.float64 else torch.float32
        specs[name] = Spec(tuple(t.shape), stored)
    order = sorted(specs, key=lambda name: (-_itemsize(specs[name]), name))
    return {name: specs[name] for name in order}


def _write_tensors(
    file: IO[bytes],
    tensors: Mapping[str, Tensor],
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
) -> None:
    """The safetensors format by blocks of rows.

    The library's writer wants every tensor whole and row-major, a second copy of W_enc; the tests
    compare the bytes with its own.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + torch.Size(spec.shape).numel() * _itemsize(spec)
        code = CODES[spec.dtype]  # type: ignore[index]
        header[name] = {"dtype": code, "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, spec in specs.items():
        step = rows_per_block(spec.shape, _itemsize(spec))
        for start in range(0, spec.shape[0], step):
            assert isinstance(spec.dtype, torch.dtype)
            rows = tensors[name][start : start + step]
            if rows.dim() == 2 and rows.stride(0) == 1:  # a transpose: 5x faster in two steps
                rows = rows.t().contiguous().t()
            block = finite(OP, PARAMETERS[name], rows.cpu(), spec.dtype).contiguous()
            file.write(block.view(torch.uint8).numpy().data)


def _itemsize(spec: Spec) -> int:
    assert isinstance(spec.dtype, torch.dtype)
    return spec.dtype.itemsize


Writer = Callable[[IO[bytes]], object]


def _replace_both(folder: Path, params: Writer, config: Writer) -> None:
    """Write both files under temporary names, then rename; nothing stays behind on failure."""
    temporary = {name: folders.temporary(folder, name) for name in (PARAMS, CONFIG)}
    try:
        for name, writer in ((PARAMS, params), (CONFIG, config)):
            with open(temporary[name], "xb") as file:
                writer(file)
                file.flush()
                os.fsync(file.fileno())
        for name in (PARAMS, CONFIG):  # this order: see the header of this file
            os.replace(temporary[name], folder / name)
            _sync_folder(folder)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_place(folder: Path) -> None:
    """Nothing that the files cannot replace is in their way."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{OP}: path must be a folder, and {folder} is a file")
    for name in (PARAMS, CONFIG):
        if (folder / name).is_dir():
            raise ValueError(f"{OP}: {folder / name} is a folder: remove it or choose another path")


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
