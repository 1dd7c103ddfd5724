"""`Trainer` on a mesh: a slice of the latents and a part of the rows on every rank.

Losses, metrics and updates are those of one process on the whole batch, up to the rounding of sums
in another order. Every rank keeps when its own latents fired last; AuxK is the whole dictionary's,
with the k largest of all dead latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..modules import SAE
from ..training.blocked import sae_loss
from ..training.recipe import terms
from ..training.settings import Settings
from ..training.sources import Source, Stream
from ..training.trainer import NonFiniteError, Trainer, check_same
from . import saving
from .communication import all_reduce, gather_parts
from .debugging import debug_mode
from .exchange import everyone
from .layout import Layout, part
from .peers import Peers
from .sharding import assembled
from .updates import MeshUpdates

OP = "train"


class MeshTrainer(Trainer):
    """One run on the ranks of a mesh; every method is called by all of them.

    Args:
        source: the same on every rank; the rows of each batch are cut over "dp".
        settings: of the run; `batch_size` counts the rows of all ranks.
        mesh: of dims ("dp", "tp") or ("tp",).

    Attributes:
        sharded: what `module`, this rank's slice, is a part of.
        layout: the mesh and the latents on it.
    """

    updates: MeshUpdates

    def __init__(self, source: Source, settings: Settings, mesh: DeviceMesh) -> None:
        self._attach(settings, mesh)
        super().__init__(source, settings, self.device)

    @classmethod
    def continued(cls, source: Source, settings: Settings, mesh: DeviceMesh, path: Path) -> Any:
        """The run that wrote the checkpoint `path`, on any mesh.

        Raises:
            ValueError: the checkpoint is of a run with other settings or another source.
        """
        record = saving.load_record(path)
        check_same(path, record, source, settings)
        made = cls.__new__(cls)
        made._attach(settings, mesh)
        made.source, made.settings = source, settings
        made._begin(record)
        saving.load(path, made)
        made.stream = made._stream(tuple(record["position"]))
        return made

    def dead(self) -> int:
        """Latents of the whole dictionary that are silent, as of the last step."""
        return int(self._dead)

    def not_finite(self) -> str | None:
        """The first parameter with a NaN or infinity, on any rank."""
        found = everyone(super().not_finite(), self.layout)
        return next((name for name in found if name is not None), None)

    def finish(self) -> SAE:
        """The slice itself, turned into one that reads raw activations; `sharded` has it too."""
        module: SAE = super().finish()
        self.sharded.activation = module.activation
        return module

    def save(self, folder: Path) -> Path:
        """Write a checkpoint; every rank writes its slice.

        Raises:
            NonFiniteError: a weight is not finite; nothing was written.
            OSError: the file system refuses; the last checkpoint stays.
        """
        bad = self.not_finite()
        if bad is not None:
            raise NonFiniteError(
                f"{OP}: {bad} is not finite after step {self.taken}; no checkpoint was made",
                *(self.taken, self.stream.position),
            )
        return saving.save(folder, self)

    def _attach(self, settings: Settings, mesh: DeviceMesh) -> None:
        self.layout = Layout(mesh, settings.d_sae, debug_mode())
        self.device = self.layout.device
        self.peers = Peers(self.layout)

    def _begin(self, record: Mapping[str, Any] | None = None) -> None:
        super()._begin(record)
        self._dead = torch.zeros((), dtype=torch.int64)

    def _make(self) -> SAE:
        def make(latents: slice) -> SAE:
            return cast(SAE, self.settings.make(self.device, latents))

        layout = self.layout
        self.sharded = assembled(OP, layout.mesh, layout.d_sae, make, layout.debug)
        return self.sharded.local  # type: ignore[no-any-return]

    def _updates(self) -> MeshUpdates:
        return MeshUpdates(self.module, self.settings, self.layout)

    def _stream(self, position: tuple[int, int]) -> Stream:
        """The rows of this rank of "dp"."""
        group = self.layout.dp_group
        share = (0, 1) if group is None else (group.rank(), group.size())
        return Stream(self.source, self.settings.seed, position, share)

    def _loss(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        dead = self.silent()
        if self.settings.activation != "jumprelu":  # AuxK names latents of the whole
            bytes_ = gather_parts(dead.to(torch.uint8), self.layout.d_sae, self.layout.tp_group)
            dead = bytes_.bool()
        found = terms(self.settings, self.taken, dead)
        self._active = []
        return sae_loss(  # type: ignore[no-any-return]
            self.module, x, target, found, whole=self.peers, active=self._active
        )

    def _fired(self, fired: Tensor) -> Tensor:
        counts = torch.stack([fired.sum(), self.silent().sum()])
        counts = all_reduce(counts, self.layout.tp_group)
        self._dead = counts[1]
        return counts[0]

    def _batch(self) -> tuple[Tensor, Tensor | None]:
        x, target = super()._batch()
        if not self.source.repeatable:
            for t in (x, target):
                if t is not None and self.layout.tp > 1:
                    dist.broadcast(t, group=self.layout.tp_group, group_src=0)
        return x, target

    def _calibrate(self, start: Any = None) -> None:
        """Every rank reads the first block whole, once, then its own part of it."""
        super()._calibrate(start)
        own = [self.module.b_enc, self.module.threshold]
        self._agree([p.detach() for p in own if p is not None], self.layout.dp_group)
        shared = [self.module.b_dec.detach(), *(place.mean for place in self.maps)]
        scales = torch.tensor([place.scale for place in self.maps], dtype=torch.float64)
        scales = scales.to(self.device)
        for group in (self.layout.dp_group, self.layout.tp_group):
            self._agree([*shared, scales], group)
        source, target = self.maps
        self.maps = (
            type(source)(source.mean, float(scales[0])),
            type(target)(target.mean, float(scales[1])),
        )
        self.stream = self._stream((0, 0))

    def _agree(self, tensors: list[Tensor], group: Any) -> None:
        """Take the values of the first rank: those of a source that is not repeatable differ."""
        if group is not None and group.size() > 1:
            for t in tensors:
                dist.broadcast(t, group=group, group_src=0)


def check_slices(settings: Settings, layout: Layout) -> None:
    """Every rank has a latent, and the batch a row for every rank of "dp".

    Raises:
        ValueError: otherwise.
    """
    last = part(settings.d_sae, layout.tp, layout.tp - 1)
    if last.start >= last.stop:
        raise ValueError(
            f"{OP}: d_sae={settings.d_sae} cut over tp={layout.tp} leaves a rank without latents: "
            "choose a smaller tp"
        )
    if settings.batch_size < layout.dp:
        raise ValueError(
            f"{OP}: batch_size must be at least dp={layout.dp}, got {settings.batch_size}"
        )
