"""Which latents, tokens and gradients each rank of a mesh has.

Latents are cut as `torch.chunk` cuts them, the rule of DTensor's `Shard`: `ceil(d_sae / tp)` for
every rank until none are left, so the last ranks may have fewer, or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

LATENTS = {"W_enc": 1, "b_enc": 0, "threshold": 0, "W_dec": 0}
"""The dimension of each parameter that runs over latents; the other parameters are replicated."""


def part(size: int, parts: int, at: int) -> slice:
    """Part `at` of `range(size)` in `parts` parts, as `torch.chunk` makes them."""
    width = -(-size // parts)
    return slice(min(at * width, size), min((at + 1) * width, size))


@dataclass(frozen=True)
class Layout:
    """A mesh of dims ("dp", "tp"), or ("tp",), and `d_sae` latents on it.

    Attributes:
        mesh: latents are cut over "tp", tokens over "dp".
        d_sae: latents of the whole dictionary (of each source layer).
        debug: whether ranks compare what has to be equal on all of them (`debugging.py`).
    """

    mesh: DeviceMesh
    d_sae: int
    debug: bool = False

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that hold the parts of one copy of the dictionary, in ascending latents."""
        return self.mesh.get_group("tp")

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same latents; None where the mesh has no "dp"."""
        return self.mesh.get_group("dp") if "dp" in (self.mesh.mesh_dim_names or ()) else None

    @property
    def device(self) -> torch.device:
        """This rank's: all its tensors are there, because NCCL moves no others."""
        return device_of(self.mesh)

    @property
    def tp(self) -> int:
        """Number of parts."""
        return self.tp_group.size()

    @property
    def rank(self) -> int:
        """This rank's place among the parts."""
        return self.tp_group.rank()

    @property
    def first(self) -> int:
        """The rank, of those of the process group, that comes first on the mesh."""
        return int(self.mesh.mesh.flatten()[0])

    @property
    def dp(self) -> int:
        """Number of copies of the dictionary."""
        return 1 if self.dp_group is None else self.dp_group.size()

    @property
    def latents(self) -> slice:
        """This rank's latents."""
        return part(self.d_sae, self.tp, self.rank)

    def sizes(self) -> list[int]:
        """Number of latents of each rank."""
        parts = [part(self.d_sae, self.tp, at) for at in range(self.tp)]
        return [p.stop - p.start for p in parts]

    def placements(self, name: str) -> list[Placement]:
        """Of the parameter `name`, "W_enc" or "W_enc.3" say."""
        return [self._over_tp(name) if dim == "tp" else Replicate() for dim in self._dims()]

    def gradient_placements(self, name: str) -> list[Placement]:
        """Of its gradient: the ranks of "dp" saw other tokens, so theirs are summands."""
        return [self._over_tp(name) if dim == "tp" else Partial() for dim in self._dims()]

    def whole(self, name: str, local: Tensor) -> Tensor:
        """The whole of the parameter `name` on the meta device, in the strides of its part."""
        dim = LATENTS.get(name.split(".")[0])
        shape = list(local.shape)
        if dim is not None:
            shape[dim] = self.d_sae
        transposed = name.split(".")[0] == "W_enc"  # one row of memory per latent
        made = torch.empty(shape[::-1] if transposed else shape, dtype=local.dtype, device="meta")
        return made.t() if transposed else made

    def _over_tp(self, name: str) -> Placement:
        dim = LATENTS.get(name.split(".")[0])
        return Replicate() if dim is None else Shard(dim)

    def _dims(self) -> tuple[str, ...]:
        return self.mesh.mesh_dim_names or ()


def device_of(mesh: DeviceMesh) -> torch.device:
    """This rank's device; of several GPUs the current one, as for NCCL."""
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def check_mesh(op: str, mesh: Any) -> None:
    """A `DeviceMesh` of which this process is a part, with "tp", and with "dp" or nothing else.

    Its ranks ascend: a process group numbers them so, whatever their order on the mesh.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{op}: mesh must be a DeviceMesh, got {type(mesh).__name__}")
    names = mesh.mesh_dim_names
    if names not in (("tp",), ("dp", "tp")):
        raise ValueError(
            f'{op}: mesh must have mesh_dim_names ("dp", "tp") or ("tp",), got {names}; take such '
            "a part of a larger mesh by name"
        )
    if any(bool((mesh.mesh.diff(dim=dim) < 0).any()) for dim in range(mesh.ndim)):
        raise ValueError(f"{op}: mesh must have ascending ranks, got {mesh.mesh.tolist()}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"{op}: rank {dist.get_rank()} is not on the mesh {mesh}")
