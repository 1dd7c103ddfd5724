"""Read and write published dictionaries: Gemma Scope 2 folders and Gemma Scope 1 `params.npz`.

`load` finds the format, validates everything a file declares before memory is allocated for it,
and streams the weights in blocks into their final layout. Nothing in a file names another file:
the names that are opened are constants, and links may not leave the folder (`files.member`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch

from ..arguments import as_path, check_flag, present_device
from . import config as configs
from . import files, folders, hub
from .building import Module, build
from .opening import Artefact, open_artefact
from .serving import check_backend
from .streaming import Streamed, StreamedLayers, StreamedSAE, stream
from .validate import check_dtype, latent_range, weights_dtype

__all__ = ["StreamedLayers", "StreamedSAE", "load"]

TRIES = 3  # before writers are kept out of the folder for the time of one load
Source = str | os.PathLike[str]
Loaded = TypeVar("Loaded", bound=Module | Streamed)


@overload
def load(
    source: Source,
    subfolder: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    latents: slice | None = None,
    backend: str | None = None,
    revision: str | None = None,
    streamed: Literal[False] = False,
) -> Module: ...
@overload
def load(
    source: Source,
    subfolder: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    latents: slice | None = None,
    backend: str | None = None,
    revision: str | None = None,
    streamed: Literal[True],
) -> Streamed: ...
def load(
    source: Source,
    subfolder: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    latents: slice | None = None,
    backend: str | None = None,
    revision: str | None = None,
    streamed: bool = False,
) -> Module | Streamed:
    """Load a published SAE, transcoder, crosscoder or cross-layer transcoder (CLT).

    The weights arrive bit for bit in the fast layout (`W_enc.t()` and `W_dec` contiguous), the
    causal triangle of a crosscoder's or CLT's decoders packed where what is left out is exactly 0.
    Beside them a few blocks of about 2 MiB are resident, so the peak is close to the final size.
    The width of the straight-through window is not in the files: `JumpReLU()`'s default is used;
    assign `module.activation` to change it.

    Args:
        source: a Gemma Scope 2 folder (`params.safetensors`, or `params_layer_{i}.safetensors` of
            every layer, normally beside a `config.json`; without one the kind and the hook points
            are inferred from tensors and path), a `params.safetensors`, a Gemma Scope 1
            `params.npz`, or a folder that holds one. Or a folder of SAELens or of sparsify
            (`cfg.json` and their tensors), whose semantics the module has. Or an id on the Hub, as
            `google/gemma-scope-2-27b-it/resid_post/layer_31_width_262k_l0_medium`, for which a
            local folder of that name is taken where there is one.
        subfolder: what comes after the folder or `owner/name` of `source`.
        dtype: of `W_enc`, `W_dec` and `W_skip`: float32, bfloat16, float16 or float64. None keeps
            the file's (a float64 `.npz` becomes float32). Biases and threshold are float32
            (float64 if the weights are) whatever this is.
        device: of the parameters; None is the default device.
        latents: `slice(start, stop)` of the latents (of those of each source layer) to load; of a
            safetensors file nothing else is read. A prefix of a Matryoshka SAE is a smaller SAE.
        backend: "reference", "triton" or "native": raise if another one serves the module's ops.
        revision: branch, tag or commit on the Hub; pin a commit for the same weights tomorrow.
        streamed: return an object that encodes and decodes straight from the file, for
            dictionaries larger than memory.

    Returns:
        A `Transcoder`, `SAE`, `Crosscoder` or `CrossLayerTranscoder` with `JumpReLU`, or with
        `streamed` a `StreamedSAE` or `StreamedLayers`; its `metadata` holds what the config says
        beyond the shapes (`l0`, `model_name`, `hf_hook_point_in`, ...), and `latents` as
        [start, stop] where only some were loaded.

    Raises:
        ConnectionError: the Hub refuses.
        FileNotFoundError: there is nothing to load at `source`, or one of several layers is
            missing.
        ImportError: `source` is on the Hub and `huggingface_hub` is not installed.
        PermissionError: a file cannot be read, or a repository is gated.
        TypeError: an argument has the wrong type.
        ValueError: the artefact is damaged, inconsistent, not finite or of an unknown kind, its
            layers do not belong together, or an argument is out of range.
    """
    check_dtype("load", dtype)
    check_flag("load", "streamed", streamed)
    target = _device(device)
    make: Callable[..., Module | Streamed] = stream if streamed else build
    path = _located(source, subfolder, revision)
    read = partial(_read, path, make, latents, dtype, target, backend)
    for _ in range(TRIES):
        with suppress(files.Changed):  # a save renamed its files in between: read those
            return read()
    with folders.read("load", path if path.is_dir() else path.parent):  # saves are quicker than us
        return read()


def _read(
    path: Path,
    make: Callable[[Artefact, slice, torch.dtype, torch.device], Loaded],
    latents: slice | None,
    dtype: torch.dtype | None,
    device: torch.device,
    backend: str | None,
) -> Loaded:
    """What `make` makes of the artefact at `path`.

    Raises:
        Changed: another one took its place meanwhile.
    """
    with ExitStack() as opened:
        artefact = opened.enter_context(closing(open_artefact(path)))
        chosen = latent_range(latents, artefact.sizes.d_sae)
        dtype = weights_dtype(artefact.files, dtype)
        check_backend(backend, dtype, device)
        module = make(artefact, chosen, dtype, device)
        if isinstance(module, Streamed):
            opened.pop_all()  # it reads on
    module.metadata = configs.metadata(artefact.config, chosen, artefact.sizes.d_sae)
    return module


def _located(source: Any, subfolder: str | None, revision: str | None) -> Path:
    """`source` as a path that exists, downloaded if need be."""
    path = as_path("load", "source", source)
    for name, value in (("subfolder", subfolder), ("revision", revision)):
        if value is not None and (not isinstance(value, str) or not value):
            raise TypeError(f"load: {name} must be a non-empty str or None, got {value!r:.80}")
    if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise ValueError(f"load: subfolder must be below source, got {subfolder!r:.80}")
    on_hub = hub.split(source, subfolder) if isinstance(source, str) else None
    if on_hub and not _exists(path) and not Path(on_hub[0]).is_dir():
        return hub.fetch(*on_hub, revision)
    if revision is not None:
        raise ValueError(f"load: revision is for the Hugging Face Hub, and {path} is a local path")
    path = path if subfolder is None else path / subfolder
    if not _exists(path):
        raise FileNotFoundError(
            f"load: source {path} does not exist: expected a local folder or file, or an artefact "
            "of the Hugging Face Hub as owner/name/folder"
        )
    return path


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as error:
        raise PermissionError(f"load: source {path} cannot be reached: no permission") from error
    except OSError as error:  # too long, a loop of links
        raise ValueError(
            f"load: source {str(path):.80} must be a path: {error.strerror}"
        ) from error
    return True


def _device(device: torch.device | str | None) -> torch.device:
    return torch.get_default_device() if device is None else present_device("load", device)


def open_source(
    source: Source, subfolder: str | None = None, revision: str | None = None
) -> Artefact:
    """What `load` would read, open: its tensors by blocks, its config.

    Raises:
        Exception: as `load`.
    """
    return open_artefact(_located(source, subfolder, revision))
