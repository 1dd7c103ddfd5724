"""Folders of other libraries, read as `load` reads Gemma Scope's.

A format says which tensors the file holds under what names, and what module computes what the
library's class computes with them: `reading_saelens`, `reading_sparsify`. `PeerFile` shows the file
under Gemma Scope 2's names and shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..semantics import Semantics
from . import config as configs
from . import files
from .gemma_scope_2 import CONFIG_KEY, PARAMS, SafetensorsFile
from .layer_files import layers_of
from .validate import SKIP, Region, Sizes, Spec, finite

CONFIG = "cfg.json"


@dataclass(frozen=True)
class Peer:
    """What a config of another library describes.

    Attributes:
        sizes: of the module.
        names: Gemma Scope 2's name of each tensor: the library's.
        transposed: those whose matrix the library holds transposed.
        zeros: tensors that the library's class does without, and that are 0 in ours.
        activation: of the module.
        semantics: of the module.
        config: type of the module, and its metadata.
    """

    sizes: Sizes
    names: Mapping[str, str]
    transposed: tuple[str, ...]
    zeros: tuple[str, ...]
    activation: Activation
    semantics: Semantics
    config: dict[str, Any]


Reader = Callable[[dict[str, Any], str], Peer]


class PeerFile:
    """A `TensorFile` over the file of another library.

    Thresholds below 0 become 0: libraries that rectify what passes the gate compute the same.

    Raises:
        ValueError: the tensors are not those that the config describes.
    """

    def __init__(self, file: SafetensorsFile, peer: Peer) -> None:
        self.path, self._file, self._peer = file.path, file, peer
        self.specs = self._checked()

    def _checked(self) -> dict[str, Spec]:
        where, sizes, peer = f"load: {self.path}", self._peer.sizes, self._peer
        shapes: dict[str, tuple[int, ...]] = {
            "w_enc": (sizes.d_in, sizes.d_sae),
            "w_dec": (sizes.d_sae, sizes.d_out),
            "b_enc": (sizes.d_sae,),
            "threshold": (sizes.d_sae,),
            "b_dec": (sizes.d_out,),
            SKIP: (sizes.d_in, sizes.d_out),
        }
        if odd := sorted(set(self._file.specs) ^ set(peer.names.values())):
            state = "unknown" if odd[0] in self._file.specs else "missing"
            expected = ", ".join(sorted(peer.names.values()))
            raise ValueError(f"{where}: must hold {expected}; {odd[0]!r:.80} is {state}")
        specs = {}
        for name, theirs in peer.names.items():
            found, shape = self._file.specs[theirs], shapes[name]
            shape = shape[::-1] if name in peer.transposed else shape
            if found.shape != shape or not isinstance(found.dtype, torch.dtype):
                raise ValueError(
                    f"{where}: {theirs} must be floating point of shape {list(shape)} as "
                    f"{CONFIG} has it, got {found.dtype} of shape {list(found.shape)}"
                )
            specs[name] = Spec(shapes[name], found.dtype)
        return specs | {name: Spec(shapes[name], specs["b_enc"].dtype) for name in peer.zeros}

    def blocks(self, name: str, region: Region) -> Iterator[tuple[Region, Tensor]]:
        """Pieces of a region: where they go in it, and their values until the next one."""
        if name in self._peer.zeros:
            shape = tuple(part.stop - part.start for part in region)
            yield tuple(slice(0, size) for size in shape), torch.zeros(shape, device="cpu")
            return
        theirs = self._peer.names[name]
        if name not in self._peer.transposed:
            for index, block in self._file.blocks(theirs, region):
                yield index, self._rectified(block) if name == "threshold" else block
            return
        for index, block in self._file.blocks(theirs, region[::-1]):
            yield index[::-1], block.t()

    def _rectified(self, thresholds: Tensor) -> Tensor:
        """Thresholds below 0 as 0; -inf is damage and must not become a number."""
        return finite(f"load: {self.path}", "threshold", thresholds, thresholds.dtype).clamp_min(0)

    def default_dtype(self) -> torch.dtype:
        """The dtype of the encoder."""
        return self._file.specs[self._peer.names["w_enc"]].dtype  # type: ignore[return-value]

    def finish(self) -> None:
        """Raise unless everything read came from one intact file."""
        self._file.finish()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def open_peer(
    folder: Path, readers: Mapping[str, Reader], opened: ExitStack
) -> tuple[PeerFile, Peer] | None:
    """What a folder of another library holds; None where it is none.

    Args:
        folder: to look into; one that holds an artefact of Gemma Scope 2 is none.
        readers: by the name of the file of tensors.
        opened: closes the file.

    Raises:
        ValueError: it is damaged, or of a kind that no module here computes.
    """
    if files.member(folder, PARAMS) is not None or layers_of(folder):
        return None
    for name, reader in readers.items():
        path = files.member(folder, name)
        if path is not None:
            file = opened.enter_context(SafetensorsFile(path))
            config, where = _config(folder, file)
            peer = reader(config, where)
            configs.check(peer.config, where, configs.METADATA)
            return PeerFile(file, peer), peer
    return None


def _config(folder: Path, file: SafetensorsFile) -> tuple[dict[str, Any], str]:
    """The config, from the header of a save that stopped before it wrote the file, and its place.

    Raises:
        FileNotFoundError: there is none.
    """
    data = None
    with suppress(FileNotFoundError):  # a save removed it just now
        if (path := files.member(folder, CONFIG)) is not None:
            with open(path, "rb") as stream:
                data = stream.read(files.CONFIG_LIMIT + 1)
    file.check_place()  # a save removes the old config first: these tensors are not older
    where = f"load: {folder / CONFIG}"
    if data is None and CONFIG_KEY in file.metadata:
        data, where = file.metadata[CONFIG_KEY].encode(), f"load: {file.path}: config"
    if data is None:
        raise FileNotFoundError(f"load: {folder / CONFIG} is missing, beside {file.path.name}")
    return configs.parse_object(data, where), where


def count(config: Mapping[str, Any], key: str, where: str, most: int = 2**31 - 1) -> int:
    """A size in a config.

    Raises:
        ValueError: it is missing or no int in [1, most].
    """
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(
            f"{where}: {key} must be an int in [1, {most}], got {configs.shown(value)}"
        )
    return value


def flag(config: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    """A switch in a config.

    Raises:
        ValueError: it is no bool.
    """
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key} must be true or false, got {configs.shown(value)}")
    return value
