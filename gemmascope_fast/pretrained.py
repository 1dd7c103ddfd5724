"""`from_pretrained` and `save_pretrained` of the modules."""

from __future__ import annotations

import os
from typing import Any, Self

import torch


class Pretrained:
    """A module that is read from, and written to, files in Gemma Scope's formats.

    Attributes:
        metadata: what a `config.json` says beyond the weights (`l0`, `model_name`,
            `hf_hook_point_in`, `hf_hook_point_out`, unknown keys); loading fills it, saving
            writes it.
    """

    metadata: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        subfolder: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        latents: slice | None = None,
        backend: str | None = None,
        revision: str | None = None,
    ) -> Self:
        """`gemmascope_fast.load`, for an artefact of this class.

        Args:
            source: folder, file or Hub id, as for `load`; so are the others.
            subfolder: below it.
            dtype: of the matrices; None keeps the file's.
            device: of the parameters.
            latents: `slice(start, stop)` of them.
            backend: that must serve the ops.
            revision: on the Hub.

        Raises:
            ValueError: the artefact is of another class; else as `load`.
        """
        from .artefacts import load  # which needs the modules

        options: dict[str, Any] = {"dtype": dtype, "device": device, "backend": backend}
        module: object = load(source, subfolder, latents=latents, revision=revision, **options)
        if type(module) is not cls:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: {source} holds a {type(module).__name__}; use "
                "its class, or gemmascope_fast.load"
            )
        return module

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        format: str = "gemma_scope_2",
        dtype: torch.dtype | None = None,
        l0: float | None = None,
        model_name: str | None = None,
        hf_hook_point_in: str | None = None,
        hf_hook_point_out: str | None = None,
    ) -> None:
        """Write the module as a folder of tensors and a config.

        "gemma_scope_2": `params.safetensors`, or one `params_layer_{i}.safetensors` per layer, and
        `config.json`; JumpReLU only. "saelens": what `sae_lens.SAE.load_from_disk` reads; JumpReLU,
        and TopK SAEs. "sparsify": what `sparsify.SparseCoder.load_from_disk` reads; TopK only. The
        last two hold single-layer modules, and are refused where that library would compute
        something else.

        Atomic: whenever the process or the machine stops, the folder holds what it held before
        or the new artefact, whole; in other libraries' formats it may be without its config.
        Threads and processes of one machine that save to one folder do so one after another, and a
        save removes the temporary files of those that were killed; `load` meanwhile reads one whole
        artefact. A save that fails removes the folders that it made. Tensors are written in blocks,
        so no second copy is made. `load` returns the same bits. The formats have no place for the
        width of the straight-through window.

        Args:
            path: folder, made if missing; its other files stay, but it may not hold an artefact of
                another kind.
            format: "gemma_scope_2", "saelens" or "sparsify".
            dtype: of the matrices in the file; None keeps the module's. Biases and threshold are
                float32 (float64 if the matrices are). In sparsify's files, of all tensors; None is
                float32 (float64 if the matrices are).
            l0: mean active latents per token. None here and below keeps `self.metadata`'s value.
            model_name: model whose activations these are.
            hf_hook_point_in: where x comes from, like `model.layers.17.output`.
            hf_hook_point_out: where the target comes from.

        Raises:
            OSError: the file system refuses; what was there stays.
            RuntimeError: a signal handler saves to the folder that its thread is saving to.
            TypeError: an argument, `metadata`, or a value of it has the wrong type.
            ValueError: the format is unknown or cannot express the activation or the semantics
                (`to_jumprelu` may make them fit), an `SAE` has a `W_skip`, a weight is not finite
                or out of the range of `dtype`, the metadata are not valid, the path is not valid
                UTF-8, or the folder holds an artefact of another kind.
        """
        from .artefacts.writing import save

        metadata = {
            "l0": l0,
            "model_name": model_name,
            "hf_hook_point_in": hf_hook_point_in,
            "hf_hook_point_out": hf_hook_point_out,
        }
        save(self, path, format=format, dtype=dtype, metadata=metadata)
