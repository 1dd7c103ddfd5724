"""Which files belong together when an artefact has one per layer.

A save writes the layers under temporary names that carry its token, as their headers do, and gives
layer 0 its name first. That rename makes the artefact the folder's: of any other layer, the file
with layer 0's token counts, whether it has its own name yet or still the temporary one. So whenever
a save stops, the folder holds the old artefact or the new one, and files of two saves never mix.
Published files have no token and belong together.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from . import files, folders
from .gemma_scope_2 import SafetensorsFile

SAVE_KEY = "save"
_LAYER = re.compile(r"params_layer_(0|[1-9]\d{0,3})\.safetensors")


def layer_name(index: int) -> str:
    """Name of the file of a layer."""
    return f"params_layer_{index}.safetensors"


def layers_of(folder: Path) -> list[int]:
    """The layers that have a file under its own name, ascending."""
    found = (_LAYER.fullmatch(name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in found if match)


def open_layer(folder: Path, index: int, save: str | None) -> SafetensorsFile:
    """The file of layer `index` that belongs to the save which layer 0 names (None: published).

    Raises:
        FileNotFoundError: the layer has no file.
        ValueError: its file belongs to another save, or is damaged.
    """
    name, found = layer_name(index), False
    names = [name]
    if save is not None and folders.TOKEN.fullmatch(save):  # it becomes part of a file's name
        names.append(folders.temporary_name(name, save))
    for candidate in (*names, *names):  # twice: a writer may rename from the second to the first
        with suppress(FileNotFoundError):
            path = files.member(folder, candidate)
            if path is None:
                continue
            file, found = SafetensorsFile(path), True
            if file.metadata.get(SAVE_KEY) == save:
                return file
            file.close()
    if found:
        raise ValueError(
            f"load: {folder / name} belongs to another save than {layer_name(0)}: save it again"
        )
    raise FileNotFoundError(f"load: {folder / name} is missing")


def complete(folder: Path) -> None:
    """Give the files of a save that stopped halfway their names; only while `folder` is held."""
    try:
        with SafetensorsFile(folder / layer_name(0)) as file:
            save = file.metadata.get(SAVE_KEY, "")
    except (OSError, ValueError):  # none, or not one that a save wrote
        return
    for name in os.listdir(folder):
        layer = folders.temporary_of(name, save)
        if layer is not None and _LAYER.fullmatch(layer):
            os.replace(folder / name, folder / layer)
