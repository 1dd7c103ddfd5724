"""Problems of the tests of `gemmascope_fast.distributed`, made alike on every rank."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.debug import CommDebugMode

import gemmascope_fast as gsf
from gemmascope_fast.distributed import communication, shard

D = 12
JUMP = gsf.JumpReLU(bandwidth=0.4, init_threshold=0.3)


@functools.cache
def mesh_of(dp: int, tp: int) -> DeviceMesh:
    """("tp",) for one copy, else ("dp", "tp")."""
    sizes = {"tp": tp} if dp == 1 else {"dp": dp, "tp": tp}
    own = {name: dist.get_backend() for name in sizes}  # or torch takes NCCL for a GPU's
    options: dict[str, Any] = {} if ranks.device == "cpu" else {"backend_override": own}
    return init_device_mesh(ranks.device, (*sizes.values(),), mesh_dim_names=(*sizes,), **options)


@torch.no_grad()
def randomised(module: Any, integer: bool = False) -> Any:
    """`module` with all parameters random; small integers make every sum exact, and ties."""
    torch.manual_seed(1)
    for name, p in module.named_parameters():
        if integer:
            p.copy_(torch.randint(-2, 3, p.shape))
        elif name.startswith("threshold"):
            p.copy_(0.1 + 0.3 * torch.rand(p.shape))
            if getattr(module, "semantics", None) and module.semantics.threshold == "log":
                p.log_()
        elif not name.startswith(("W_enc", "W_dec")):
            p.copy_(0.2 * torch.randn(p.shape))
        elif name.split(".")[0] == "W_dec" and p.shape[1] > D:
            p.add_(0.2 * torch.randn(p.shape))
    return module.to(ranks.device)


def sae(d_sae: int = 37, activation: Any = JUMP, **options: Any) -> gsf.SAE:
    return randomised(gsf.SAE(D, d_sae, activation, **options))


def transcoder(d_sae: int = 37, activation: Any = JUMP, **options: Any) -> gsf.Transcoder:
    return randomised(gsf.Transcoder(D, d_sae, activation, d_out=7, affine=True, **options))


def crosscoder(d_sae: int = 23, activation: Any = JUMP, **options: Any) -> gsf.Crosscoder:
    flags = [True, False, True]
    return randomised(gsf.Crosscoder(3, D, d_sae, activation, packed=flags, **options))


def clt(d_sae: int = 23, activation: Any = JUMP, **options: Any) -> gsf.CrossLayerTranscoder:
    made = gsf.CrossLayerTranscoder(3, D, d_sae, activation, affine=True, **options)
    return randomised(made)


def batch(n: int = 11, *inner: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(n, *inner, D).to(ranks.device, dtype)


def rows_of(mesh: DeviceMesh, n: int, first: int | None = None) -> slice:
    """This rank's tokens of n: parts of different sizes, the first of `first` tokens if given."""
    if "dp" not in (mesh.mesh_dim_names or ()):
        return slice(0, n)
    at, parts = mesh.get_group("dp").rank(), mesh.get_group("dp").size()
    if first is not None:
        return slice(0, first) if at == 0 else slice(first, n)
    ends = [n * (part + 1) // parts - (part + 1 < parts) for part in range(parts)]
    return slice(ends[at - 1] if at else 0, ends[at])


def parted(whole: Any, dp: int, tp: int, **options: Any) -> tuple[Any, DeviceMesh]:
    mesh = mesh_of(dp, tp)
    return shard(whole, mesh, **options), mesh


def close(found: Tensor, expected: Tensor, what: str, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-2)
    scale = max(float(expected.detach().abs().max()), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(
        *(found.to(expected.dtype), expected),
        rtol=tolerance,
        atol=tolerance * scale,
        msg=lambda text: f"rank {dist.get_rank()}, {what}: {text}",
    )


def same_acts(found: gsf.SparseActs, expected: gsf.SparseActs, what: str = "") -> None:
    """The same entries, to the last bit where the library's own CPU kernels compute them.

    BLAS computes float64; a GPU's kernels choose their tiles by the number of latents.
    """
    assert found.shape == expected.shape, what
    rounding = 1e-14 if found.dtype == torch.float64 else 0.0 if ranks.device == "cpu" else 1e-5
    for name in ("offsets", "indices", "values", "gate"):
        torch.testing.assert_close(
            *(getattr(found, name), getattr(expected, name)),
            rtol=rounding,
            atol=rounding,
            equal_nan=True,
            msg=lambda text, name=name: f"rank {dist.get_rank()}, {what} {name}: {text}",
        )


def whole_of(t: DTensor) -> Tensor:
    """`t.full_tensor()`; gloo takes a GPU's memory for the CPU's in it, unlike in `all_gather`."""
    if t.device.type == "cpu" or dist.get_backend() != "gloo":
        return t.full_tensor()
    return through_the_cpu(t)


def through_the_cpu(t: DTensor) -> Tensor:
    """`t.full_tensor()` by the parts of all ranks as objects."""
    found = t.to_local().cpu()
    for at, placement in enumerate(t.placements):
        every: list[Any] = [None] * t.device_mesh.size(at)
        dist.all_gather_object(every, found, group=t.device_mesh.get_group(at))
        if isinstance(placement, Shard):
            found = torch.cat(every, placement.dim)
        elif isinstance(placement, Partial):
            found = torch.stack(every).sum(0)
    return found.to(t.device)


def same_gradients(sharded: Any, whole: Any, dtype: torch.dtype = torch.float32) -> None:
    """Gradients of the parameters, summed over "dp", are those of one process."""
    for name, p in whole.named_parameters():
        mine = sharded.get_parameter(name).grad
        assert mine is not None and p.grad is not None, name
        close(whole_of(mine), p.grad, f"d_{name}", dtype)


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Our collectives inside, as (name, shape sent); nothing else may have communicated."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    places = [
        (dist, "all_reduce"),
        (communication, "_all_gather"),
        (communication, "_reduce_scatter"),
    ]
    originals = [getattr(module, name) for module, name in places]

    def watch(name: str, original: Any) -> Any:
        def run(first: Tensor, *args: Any, **options: Any) -> Any:
            sent = args[0] if args and isinstance(args[0], Tensor) else first
            seen.append((name.lstrip("_"), tuple(sent.shape)))
            return original(first, *args, **options)

        return run

    for (module, name), original in zip(places, originals, strict=True):
        setattr(module, name, watch(name, original))
    try:
        with CommDebugMode() as mode:
            yield seen
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)
    assert mode.get_total_counts() == len(seen), (mode.get_comm_counts(), seen)
