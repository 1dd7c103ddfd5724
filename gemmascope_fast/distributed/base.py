"""`Sharded`: a module whose parameters are DTensors cut over latents, computing on its own part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import local_map
from torch.func import functional_call

from ..activations import Activation, check_activation, parts
from ..checks import check_float_dtype
from ..modules import SAE
from ..sparse import SparseActs
from .acts import ShardedActs
from .communication import leave, scatter
from .debugging import check_agreement
from .layout import Layout, part


def fused(local: nn.Module) -> Any:
    """What a fused optimizer put into a part; of several layers it serves `loss` alone."""
    return local.deferred if isinstance(local, SAE) else None


class Sharded(nn.Module):
    """One rank's view of a dictionary whose latents lie on the ranks of a mesh; see its subclasses.

    Parameters have the names and global shapes of the whole module's. Those with latents are
    `Shard` over "tp", the others `Replicate`; over "dp" all are `Replicate`. A gradient is placed
    likewise, but `Partial` over "dp": each of its ranks adds what its own tokens ask for, and the
    sum (`grad.redistribute`, `grad.full_tensor`) is a collective of the caller's.

    Attributes:
        layout: the mesh and the latents on it.
    """

    _local: Any
    _call: nn.Module

    def __init__(self, local: Any, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.__dict__["_local"] = local  # no submodule: its parameters are parts of this one's
        self.__dict__["_call"] = _Call(local)
        self._bind()

    @property
    def mesh(self) -> DeviceMesh:
        """Of dims ("dp", "tp") or ("tp",)."""
        return self.layout.mesh

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that hold the parts of one copy, in ascending latents."""
        return self.layout.tp_group

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same latents; None on a mesh of "tp" alone."""
        return self.layout.dp_group

    @property
    def latents(self) -> slice:
        """This rank's latents among those of the whole (of each source layer)."""
        return self.layout.latents

    @property
    def d_sae(self) -> int:
        """Number of latents of the whole (of each source layer)."""
        return self.layout.d_sae

    @property
    def local(self) -> Any:
        """A plain module over this rank's latents; its parameters are the DTensors' local memory.

        It knows nothing of the other ranks: its `decode` is a summand with the whole `b_dec`.
        """
        for name, p in self.named_parameters():
            mine, held = self._local.get_parameter(name), _held(p)
            if mine.data_ptr() != held.data_ptr() or mine.shape != held.shape:
                mine.data = held  # a parameter was replaced: `load_state_dict(assign=True)`, say
            mine.requires_grad_(p.requires_grad)
        return self._local

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        held = dict(self.named_parameters())
        return (held["W_dec"] if "W_dec" in held else held["W_dec.0"]).dtype

    @property
    def activation(self) -> Activation:
        """That of every part; may be assigned."""
        return self._local.activation  # type: ignore[no-any-return]

    @activation.setter
    def activation(self, activation: Activation) -> None:
        check_activation(type(self).__name__, activation, self.d_sae)
        with parts():
            self._local.activation = activation

    @property
    def metadata(self) -> dict[str, Any]:
        """What `load` found beyond the weights."""
        return self._local.metadata  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module and of its part."""
        self._local.train(mode)
        return super().train(mode)

    def hand_gradients(self) -> None:
        """Add the local gradients of this module to those of `local`, and clear them here.

        For an optimizer over `local`. Nothing is communicated: over "dp" they are summands still.
        """
        local = self.local
        for name, p in self.named_parameters():
            if isinstance(p.grad, DTensor):
                mine, added = local.get_parameter(name), p.grad.to_local()
                mine.grad = added if mine.grad is None else mine.grad.add_(added)
                p.grad = None
                if (deferred := fused(local)) is not None:
                    deferred.left(mine)

    def _on_local(
        self, function: Callable[..., Any], *args: Any, **changed: Callable[[Tensor], Tensor]
    ) -> Any:
        """`function(module, *args)`, module being `local` with the parameters' local tensors.

        Differentiable in the parameters. `changed` are applied to some of them first. A part under
        a fused optimizer computes with its own parameters, whose gradients that optimizer wants.
        """
        if fused(self._local) is not None and torch.is_grad_enabled():
            return function(self.local, *args)
        names = [name for name, _ in self.named_parameters()]

        def run(*tensors: Tensor) -> _Held:
            given = dict(zip(names, tensors, strict=True))
            given |= {name: change(given[name]) for name, change in changed.items()}
            under = {f"module.{name}": t for name, t in given.items()}
            return _Held(functional_call(self._call, under, (function, *args)))

        placed = tuple(self.layout.placements(name) for name in names)
        graded = tuple(self.layout.gradient_placements(name) for name in names)
        kernels = local_map(
            run,
            out_placements=None,
            in_placements=placed,
            in_grad_placements=graded,
            device_mesh=self.mesh,
        )
        return kernels(*self.parameters()).value

    def _bind(self) -> None:
        """Make DTensors of the local module's parameters, over the same memory."""
        for name, p in self._local.named_parameters():
            head, _, tail = name.partition(".")
            made = self._global(name, p)
            if not tail:
                self.register_parameter(head, made)
            elif tail == "0":
                setattr(self, head, nn.ParameterList([made]))
            else:
                getattr(self, head).append(made)
        for name, p in self._local._parameters.items():
            if p is None:
                self.register_parameter(name, None)
        for name, t in self._local.named_buffers():
            self.register_buffer(name, t)

    def _global(self, name: str, p: nn.Parameter) -> nn.Parameter:
        placements = self.layout.placements(name)
        whole = self.layout.whole(name, p)
        made = DTensor.from_local(
            *(p.detach(), self.mesh, placements),
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        return nn.Parameter(made, requires_grad=p.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Serve `to`, `cuda`, ...: the parts move, and the parameters are made of them again."""
        self.local._apply(fn, recurse)
        self._bind()
        return self

    def rows(self, n: int) -> slice:
        """The tokens of n that `decode(..., scatter_tokens=True)` returns on this rank."""
        return part(n, self.layout.tp, self.layout.rank)

    def _entries(self, op: str, acts: Any) -> SparseActs:
        """This rank's entries of `acts`, sharded or whole."""
        if isinstance(acts, ShardedActs):
            here, whole = acts.layout.latents == self.latents, acts.layout.d_sae
            if not here or whole != self.d_sae:
                raise ValueError(
                    f"{op}: acts are of latents {acts.latents.start}:{acts.latents.stop} of "
                    f"{whole}, this module has {self.latents.start}:{self.latents.stop} of "
                    f"{self.d_sae}"
                )
            return acts.local
        if not isinstance(acts, SparseActs):
            kind = type(acts).__name__
            raise TypeError(f"{op}: acts must be ShardedActs or SparseActs, got {kind}")
        if acts.d_sae != self.d_sae:
            raise ValueError(f"{op}: acts must be of d_sae={self.d_sae} latents, got {acts.d_sae}")
        return acts.latent_range(self.latents.start, self.latents.stop)

    def _summed(
        self,
        function: Callable[..., tuple[Tensor, Tensor]],
        acts: Any,
        x: Tensor | None,
        dtype: torch.dtype | None,
        scatter_tokens: bool,
    ) -> Tensor:
        """`[n, d]`, or this rank's rows of it, from the ranks' summands that `function` makes."""
        if dtype is not None:
            check_float_dtype("decode", "dtype", dtype)
        partial, whole = self._on_local(function, acts, x)
        if scatter_tokens:
            recon = scatter(partial, whole, self.tp_group)
        else:
            recon = leave(partial, self.tp_group) + whole
        return recon.to(self.dtype if dtype is None else dtype)

    def _debug(self, op: str, name: str, t: Tensor, everywhere: bool = False) -> None:
        if self.layout.debug:
            check_agreement(op, name, t, self.layout, everywhere)

    def extra_repr(self) -> str:
        """The part, for `repr`."""
        here = self.latents
        return f"latents {here.start}:{here.stop} of {self.d_sae}, {self._local.extra_repr()}"


class _Call(nn.Module):
    """`functional_call` calls a module's forward: this one's is any function of the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.module, *args)


class _Held:
    """A result of `local_map` that is none of its business: CSR arrays differ in size by rank."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _held(p: Any) -> Tensor:
    """The local memory of a parameter."""
    held: Tensor = p.detach().to_local()
    return held
