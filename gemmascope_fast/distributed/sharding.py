"""`shard` and `load`: one rank's part of a dictionary, checked against the other ranks' once."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from .. import artefacts
from ..activations import parts
from ..modules import SAE, Transcoder
from ..multilayer import Crosscoder, CrossLayerTranscoder
from .base import Sharded
from .debugging import debug_mode
from .exchange import exchange
from .layout import Layout, check_mesh
from .modules import ShardedSAE, ShardedTranscoder
from .multilayer import ShardedCrosscoder, ShardedCrossLayerTranscoder
from .parts import cut, placed, widen

Module = SAE | Transcoder | Crosscoder | CrossLayerTranscoder
KINDS: dict[type, type[Sharded]] = {
    SAE: ShardedSAE,
    Transcoder: ShardedTranscoder,
    Crosscoder: ShardedCrosscoder,
    CrossLayerTranscoder: ShardedCrossLayerTranscoder,
}


def shard(
    module: Module,
    mesh: DeviceMesh,
    *,
    load: Callable[[slice], Module] | None = None,
    debug: bool | None = None,
) -> Any:
    """Cut a dictionary over its latents: every rank of "tp" gets a part, the ranks of "dp" copies.

    Called by every rank of the mesh with the same module. The parameters of what is returned are
    DTensors; `module` stays as it is. Before anything is computed the ranks compare what they hold:
    one gather of small objects over each dim of the mesh.

    Args:
        module: `SAE`, `Transcoder`, `Crosscoder` or `CrossLayerTranscoder`, of which each rank
            copies its latents to the mesh's kind of device; or one on the meta device, with `load`.
        mesh: of dims ("dp", "tp") or ("tp",).
        load: called with this rank's latents; returns a module over them, so that no rank holds
            the whole: `lambda latents: gsf.load(path, latents=latents)`. A rank without latents
            asks for the first and drops it. The activation stays that of `module`.
        debug: whether ranks compare inputs and results from now on; default
            `GEMMASCOPE_FAST_DISTRIBUTED_DEBUG`.

    Returns:
        `ShardedSAE`, `ShardedTranscoder`, `ShardedCrosscoder` or `ShardedCrossLayerTranscoder`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the mesh has other dims, or this process is not on it.
        RankError: the module is frozen, or on the meta device without `load`; the ranks' parts do
            not belong together; or one failed to make its own. Names the rank, on every rank.
    """
    check_mesh("shard", mesh)
    if type(module) not in KINDS:
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        raise TypeError(f"shard: module must be one of {kinds}, got {type(module).__name__}")
    if load is not None and not callable(load):
        raise TypeError(f"shard: load must be callable or None, got {type(load).__name__}")

    def make(latents: slice) -> Any:
        if load is None:
            return cut(module, latents)
        found = _loaded(load, latents)
        if type(found) is not type(module):
            raise TypeError(
                f"load returned a {type(found).__name__} and module is a {type(module).__name__}"
            )
        with parts():
            found.activation = module.activation
        return found

    return assembled("shard", mesh, module.d_sae, make, debug)


def load(
    source: str | os.PathLike[str],
    subfolder: str | None = None,
    *,
    mesh: DeviceMesh,
    debug: bool | None = None,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Load an artefact onto a mesh: every rank reads its latents and nothing else.

    Args:
        source: as for `gemmascope_fast.load`.
        subfolder: likewise.
        mesh: as for `shard`.
        debug: as for `shard`.
        revision: as for `gemmascope_fast.load`.
        options: its `dtype`, `device` and `backend`; the default device is the mesh's kind.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the mesh has other dims, or this process is not on it.
        RankError: a rank failed to load, or the parts do not belong together; as `shard`.
    """
    op = "distributed.load"
    check_mesh(op, mesh)
    unknown = sorted(options.keys() - {"dtype", "device", "backend"})
    if unknown:
        raise TypeError(f"{op}: {unknown[0]} is not an argument")
    options.setdefault("device", mesh.device_type)
    failure: Exception | None = None
    d_sae = 0
    try:
        with closing(artefacts.open_source(source, subfolder, revision)) as artefact:
            d_sae = artefact.sizes.d_sae
    except Exception as error:  # every rank has to hear of it
        failure = error

    def make(latents: slice) -> Any:
        if failure is not None:
            raise failure
        read = partial(artefacts.load, source, subfolder, revision=revision, **options)
        return _loaded(lambda some: read(latents=some), latents)

    return assembled(op, mesh, d_sae, make, debug)


def _loaded(load: Callable[[slice], Any], latents: slice) -> Any:
    """What `load` returns; a rank without latents has to load one to see the rest."""
    if latents.start < latents.stop:
        return load(latents)
    return cut(load(slice(0, 1)), slice(0, 0))


def assembled(
    op: str,
    mesh: DeviceMesh,
    d_sae: int,
    make: Callable[[slice], Any],
    debug: bool | None,
) -> Sharded:
    """This rank's module, once all ranks have theirs and they agree."""
    layout = Layout(mesh, d_sae, debug_mode() if debug is None else debug)
    local, failure = None, None
    try:
        local = placed(make(layout.latents), layout.device)
    except Exception as error:  # every rank has to hear of it
        failure = error
    widen(local, exchange(op, layout, local, failure))
    return KINDS[type(local)](local, layout)
