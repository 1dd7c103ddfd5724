"""What lies at a path: its tensor files and its config, opened and checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..activations import Activation, JumpReLU
from ..semantics import Semantics
from ..training.results import CHECKPOINTS
from . import config as configs
from . import files, reading_saelens, reading_sparsify, writing_saelens, writing_sparsify
from .gemma_scope_1 import PARAMS as NPZ
from .gemma_scope_1 import NpzFile
from .gemma_scope_2 import PARAMS, SafetensorsFile
from .layer_files import SAVE_KEY, layer_name, layers_of, open_layer
from .peers import open_peer
from .validate import Sizes, TensorFile, agree, check_alike, check_layer, check_tensors

PEERS = {
    writing_saelens.WEIGHTS: reading_saelens.read,
    writing_sparsify.WEIGHTS: reading_sparsify.read,
}
SEVERAL = f"{layer_name(0)}, {layer_name(1)}, ..."


@dataclass(frozen=True)
class Artefact:
    """An open artefact: one file, or one per source layer."""

    path: Path
    files: tuple[TensorFile, ...]
    sizes: Sizes
    config: dict[str, Any]
    activation: Activation = JumpReLU()
    semantics: Semantics = Semantics()

    def finish(self) -> None:
        """Raise unless everything read came from intact files."""
        for file in self.files:
            file.finish()

    def close(self) -> None:
        """Let go of the files."""
        for file in self.files:
            file.close()


Opened = tuple[Sequence[TensorFile], Sizes, dict[str, Any] | None]


def open_artefact(path: Path) -> Artefact:
    """The artefact at `path`, whatever its format.

    Raises:
        FileNotFoundError: a folder holds none, or lacks one of its layers.
        Changed: another one took its place meanwhile.
        ValueError: it is damaged or inconsistent.
    """
    with ExitStack() as opened:
        if path.is_dir() and (other := open_peer(path, PEERS, opened)) is not None:
            opened.pop_all()
            file, peer = other
            return Artefact(path, (file,), peer.sizes, peer.config, peer.activation, peer.semantics)
        found, sizes, config = _open_folder(path, opened) if path.is_dir() else _open(path, opened)
        config = configs.complete(config, path, sizes)
        _check_kind(path, config["type"], sizes)
        agree(f"load: {found[0].path}", config, sizes)
        opened.pop_all()
    return Artefact(path, tuple(found), sizes, config)


def _open(path: Path, opened: ExitStack) -> Opened:
    """One file, and the config beside it if there is one."""
    if path.suffix == ".npz":
        return _open_npz(files.regular(path), opened)
    if path.name == PARAMS:
        return _open_params(path.parent, files.regular(path), opened)
    if path.name.startswith("params_layer_"):
        raise ValueError(f"load: {path} is one layer of several: pass its folder, {path.parent}")
    raise ValueError(f"load: source must be a folder, a {PARAMS} or an .npz file, got {path}")


def _open_folder(folder: Path, opened: ExitStack) -> Opened:
    """The tensors of a folder, and its config if it has one."""
    params, layers = files.member(folder, PARAMS), layers_of(folder)
    if params is not None and not (layers and _declared(folder) in configs.MULTI_LAYER):
        return _open_params(folder, params, opened)
    if layers:
        return _open_layers(folder, opened)
    npz = files.member(folder, NPZ)
    if npz is not None:
        return _open_npz(npz, opened)
    _declared(folder)  # a config that is wrong says more
    if (folder / CHECKPOINTS).is_dir():
        raise FileNotFoundError(
            f"load: {folder} holds {CHECKPOINTS} of gsf.train and no artefact: the run has not "
            "ended, or no format holds its result; the same call of gsf.train goes on from them "
            "and returns the module"
        )
    raise FileNotFoundError(
        f"load: {folder} must hold {PARAMS} or {SEVERAL} (Gemma Scope 2) or {NPZ} (Gemma Scope 1), "
        "and has none of them"
    )


def _open_npz(path: Path, opened: ExitStack) -> Opened:
    file = NpzFile(path)
    opened.callback(file.close)
    return [file], check_tensors(f"load: {path}", file.specs), None


def _open_params(folder: Path, path: Path, opened: ExitStack) -> Opened:
    """A single-layer artefact of Gemma Scope 2."""
    file = opened.enter_context(SafetensorsFile(path))
    config = _config(folder, [file])
    return [file], check_tensors(f"load: {path}", file.specs), config


def _open_layers(folder: Path, opened: ExitStack) -> Opened:
    """A crosscoder or CLT: as many files as its decoders have outputs."""
    path = files.member(folder, layer_name(0))
    if path is None:
        raise FileNotFoundError(f"load: {folder / layer_name(0)} is missing")
    first = opened.enter_context(SafetensorsFile(path))
    sizes = check_layer(f"load: {path}", first.specs)
    assert sizes.n_layers is not None
    found = [first]
    try:
        for layer in range(1, sizes.n_layers):
            file = open_layer(folder, layer, first.metadata.get(SAVE_KEY))
            found.append(opened.enter_context(file))
            check_layer(f"load: {file.path}", file.specs)
        check_alike(found)
        if layers_of(folder)[-1] >= sizes.n_layers:
            raise ValueError(
                f"load: {folder}: w_dec has {sizes.n_layers} output layers, so the last file must "
                f"be {layer_name(sizes.n_layers - 1)}, got {layer_name(layers_of(folder)[-1])}"
            )
    except (FileNotFoundError, ValueError):
        first.check_place()  # a save in between may be the reason
        raise
    return found, sizes, _config(folder, found)


def _config(folder: Path, found: Sequence[SafetensorsFile]) -> dict[str, Any] | None:
    """The config that belongs to these tensors, if there is one."""
    data = files.config_bytes(folder)
    for file in found:
        file.check_place()  # a save renames the tensors first: these are not newer than `data`
    if data is None or found[0].supersedes(data):
        return found[0].own_config()
    return configs.parse(data, f"load: {folder / files.CONFIG}")


def _declared(folder: Path) -> str | None:
    """The type that `config.json` or the path tells."""
    data = files.config_bytes(folder)
    config = {} if data is None else configs.parse(data, f"load: {folder / files.CONFIG}")
    kind: str | None = config.get("type") or configs.kind_of_path(folder)
    return kind


def _check_kind(path: Path, kind: str, sizes: Sizes) -> None:
    """The type goes with the files that were found."""
    several = kind in configs.MULTI_LAYER
    if several != (sizes.n_layers is not None):
        names = (PARAMS, SEVERAL)
        raise ValueError(
            f"load: {path}: type is {kind}, whose tensors are in {names[several]}, but what is "
            f"there is {names[not several]}"
        )
