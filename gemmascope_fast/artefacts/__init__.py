"""Read and write published dictionaries: Gemma Scope 2 folders and Gemma Scope 1 `params.npz`.

`load` finds the format, validates everything a file declares before memory is allocated for it,
and streams the weights in blocks into their final layout. Nothing in a file names another file:
the names that are opened are constants, and links may not leave the folder (`files.member`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..modules import SAE
from . import config as configs
from . import files, folders, gemma_scope_1, gemma_scope_2
from .validate import TensorFile, agree, build, check_dtype, check_tensors

__all__ = ["load"]

TRIES = 3  # before writers are kept out of the folder for the time of one load


def load(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """Load a published SAE or transcoder.

    The weights arrive bit for bit in the fast layout (`W_enc.t()` and `W_dec` contiguous). Beside
    them a few blocks of about 8 MiB are resident, so the peak is close to the final size.
    The width of the straight-through window is not in the files: `JumpReLU()`'s default is used;
    assign `module.activation` to change it.

    Args:
        source: a Gemma Scope 2 folder (`params.safetensors`, normally beside a `config.json`;
            without one the kind and the hook points are inferred from tensors and path), its
            `params.safetensors`, a Gemma Scope 1 `params.npz`, or a folder that holds one.
        dtype: of `W_enc`, `W_dec` and `W_skip`: float32, bfloat16, float16 or float64. None keeps
            the file's (a float64 `.npz` becomes float32). Biases and threshold are float32
            (float64 if the weights are) whatever this is.
        device: of the parameters; None is the default device.

    Returns:
        A `Transcoder` or an `SAE` with `JumpReLU`; `module.metadata` holds what the config says
        beyond the shapes (`l0`, `model_name`, `hf_hook_point_in`, ...).

    Raises:
        FileNotFoundError: there is nothing to load at `source`.
        PermissionError: a file cannot be read.
        TypeError: an argument has the wrong type.
        ValueError: the artefact is damaged, inconsistent, not finite, of an unknown kind, or
            spans several layers.
    """
    check_dtype("load", dtype)
    target = _device(device)
    path = _path(source)
    for _ in range(TRIES):
        with suppress(files.Changed):  # a save renamed its files in between: read those
            return _read(path, dtype, target)
    with folders.read("load", path if path.is_dir() else path.parent):  # saves are quicker than us
        return _read(path, dtype, target)


def _read(path: Path, dtype: torch.dtype | None, target: torch.device | None) -> SAE:
    """The artefact at `path`.

    Raises:
        Changed: another one took its place meanwhile.
    """
    file, config = _open(path)
    with file:
        sizes = check_tensors(f"load: {file.path}", file.specs)
        config = configs.complete(config, path, sizes)
        agree(f"load: {file.path}", config, sizes)
        transcoder = config["type"] == "transcoder"
        module = build(file, sizes, transcoder=transcoder, dtype=dtype, device=target)
    module.metadata = configs.metadata(config)
    return module


def _open(path: Path) -> tuple[TensorFile, dict[str, Any] | None]:
    """The tensors at `path`, and their config if there is one."""
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".npz":
        return gemma_scope_1.NpzFile(files.regular(path)), None
    if path.name == gemma_scope_2.PARAMS:
        return _open_gemma_scope_2(path.parent, files.regular(path))
    raise ValueError(
        f"load: source must be a folder, a {gemma_scope_2.PARAMS} or an .npz file, got {path}"
    )


def _open_folder(folder: Path) -> tuple[TensorFile, dict[str, Any] | None]:
    """The tensors of a folder, and its config if it has one."""
    params = files.member(folder, gemma_scope_2.PARAMS)
    if params is not None:
        return _open_gemma_scope_2(folder, params)
    npz = files.member(folder, gemma_scope_1.PARAMS)
    if npz is not None:
        return gemma_scope_1.NpzFile(npz), None
    several = files.member(folder, "params_layer_0.safetensors") is not None
    data = files.config_bytes(folder)
    if data is not None:
        configs.parse(data, f"load: {folder / files.CONFIG}")  # refuses several layers by name
    if several:
        configs.refuse_layers(
            f"load: {folder}", configs.kind_of_path(folder) or "crosscoder or clt"
        )
    raise FileNotFoundError(
        f"load: {folder} must hold {gemma_scope_2.PARAMS} (Gemma Scope 2) or "
        f"{gemma_scope_1.PARAMS} (Gemma Scope 1), and has neither"
    )


def _open_gemma_scope_2(folder: Path, params: Path) -> tuple[TensorFile, dict[str, Any] | None]:
    """The tensors of a Gemma Scope 2 folder, and the config that belongs to them."""
    file = gemma_scope_2.SafetensorsFile(params)
    try:
        data = files.config_bytes(folder)
        file.finish()  # a save renames the tensors first: these are not newer than `data`
        if data is None or file.supersedes(data):
            return file, file.own_config()
        return file, configs.parse(data, f"load: {folder / files.CONFIG}")
    except BaseException:
        file.close()
        raise


def _path(source: str | os.PathLike[str]) -> Path:
    """`source` as a path that exists."""
    path = files.as_path("load", "source", source)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"load: source {path} does not exist: expected a local folder or file (download an "
            "artefact of the Hugging Face Hub first, for example with hf download)"
        ) from error
    except PermissionError as error:
        raise PermissionError(f"load: source {path} cannot be reached: no permission") from error
    except OSError as error:  # too long, a loop of links
        raise ValueError(
            f"load: source {str(path):.80} must be a path: {error.strerror}"
        ) from error
    return path


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"load: device must name a torch device, got {device!r}") from error
