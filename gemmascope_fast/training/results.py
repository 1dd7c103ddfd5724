"""Where a run leaves what it makes: its folder before it begins, the artefact when it ends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import as_path, check_flag
from ..modules import SAE, BatchTopK, JumpReLU, TopK, Transcoder
from ..multilayer import Crosscoder, CrossLayerTranscoder, MultiLayer
from .settings import OP, Settings
from .trainer import Trainer

CHECKPOINTS = "checkpoints"
NAMED = ("l0", "model_name", "hf_hook_point_in", "hf_hook_point_out")


def asked(
    out: Any, metadata: Any, on_metrics: Any, **flags: Any
) -> tuple[Path | None, dict[str, Any]]:
    """The arguments of `train` that say where results go: its folder, if any, and metadata.

    Raises:
        TypeError: one has the wrong type, or a flag is no bool.
    """
    for name, flag in flags.items():
        check_flag(OP, name, flag)
    if on_metrics is not None and not callable(on_metrics):
        raise TypeError(f"{OP}: on_metrics must be callable, got {type(on_metrics).__name__}")
    if not isinstance(metadata, (Mapping, type(None))):
        raise TypeError(f"{OP}: metadata must be a mapping, got {type(metadata).__name__}")
    return None if out is None else as_path(OP, "out", out), dict(metadata or {})


def format_of(module: Any) -> str | None:
    """The format of files that holds a result; None where none does (a TopK of several layers)."""
    if not isinstance(module.activation, TopK):
        return "gemma_scope_2"
    if not isinstance(module, SAE) or module.d_in != module.d_out:
        return None
    return "sparsify" if isinstance(module, Transcoder) else "saelens"


def check_out(folder: Path | None, settings: Settings, metadata: Mapping[str, Any]) -> None:
    """Raise, before any work, what would end a run that writes to `folder`.

    Raises:
        PermissionError: it cannot be written.
        TypeError: metadata have no JSON form.
        ValueError: it is no folder, holds something that the result does not replace, or files
            of its names that no run left there; or the metadata would not be read back.
    """
    if folder is None:
        return
    inside = folder / CHECKPOINTS
    nearest = next(path for path in (inside, *inside.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        kind = "a file" if nearest.exists() else "a link that leads nowhere"
        raise ValueError(f"{OP}: out must be a folder, and {nearest} is {kind}")
    for path in (nearest, folder):
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"{OP}: out cannot be written: no permission for {path}")
    small = _small(settings)
    format = format_of(small)
    if format is None:
        return
    from ..artefacts import writing

    try:
        names = writing.check(folder, metadata, small, format)
    except (TypeError, ValueError) as error:
        kinds = TypeError if isinstance(error, TypeError) else ValueError
        raise kinds(f"{OP}: out could not hold the result: {error}") from error
    for name in names:
        if os.path.lexists(folder / name) and not inside.is_dir():
            raise ValueError(
                f"{OP}: out would lose its {name}, which no run left there (there are no "
                f"{CHECKPOINTS} in {folder}): choose another folder, or remove it"
            )


def _small(settings: Settings) -> SAE | MultiLayer:
    """A module whose files have the names of the result's."""
    options: dict[str, Any] = {"device": "cpu", "generator": torch.Generator()}
    activation = TopK(1) if settings.activation == "topk" else JumpReLU()
    if settings.kind == "transcoder":
        d_out = 1 if settings.d_in == settings.d_out else 2
        return Transcoder(1, 1, activation, d_out=d_out, **options)
    if settings.layers is None:
        return SAE(1, 1, activation, **options)
    kind = Crosscoder if settings.kind == "crosscoder" else CrossLayerTranscoder
    return kind(settings.layers, 1, 1, activation, **options)


def finish(trainer: Trainer, folder: Path | None, metadata: Mapping[str, Any]) -> SAE | MultiLayer:
    """The module for raw activations, saved where there is a folder and a format for it."""
    x, _ = trainer.stream.next(trainer.settings.batch_size)
    x = x.to(trainer.device)
    module: SAE | MultiLayer = trainer.finish().eval()
    with torch.no_grad():
        l0 = _l0(module, x)
    module.metadata = {"l0": l0, **trainer.source.metadata(), **metadata}
    format = format_of(module)
    if folder is not None and format is not None:
        named: dict[str, Any] = {name: module.metadata.get(name) for name in NAMED}
        batch = isinstance(module.activation, BatchTopK)
        plain = module.to_jumprelu() if batch else module
        plain.save_pretrained(folder, format=format, **named)
    return module


def _l0(module: SAE | MultiLayer, x: Tensor) -> float:
    """Mean active latents per token of the rows of a source."""
    if isinstance(module, SAE):
        return float(module.encode(x).l0().mean())
    parts = x.view(-1, module.n_layers, module.d_model).unbind(1)
    return sum(float(module.encode_layer(at, part).l0().mean()) for at, part in enumerate(parts))
