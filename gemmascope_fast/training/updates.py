"""The optimizer of a run, and its state for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..multilayer import MultiLayer
from ..optim import Adam
from .settings import Settings

PREFIX = "optimizer."


class Updates:
    """Adam with the preset's betas over a module, its decoder rows kept at unit norm.

    Args:
        module: of any kind; its parameters are updated.
        settings: of the run.
    """

    def __init__(self, module: Any, settings: Settings) -> None:
        self._module = module
        self.optimizer = Adam(
            module,
            settings.preset.lr,
            (settings.preset.beta1, settings.preset.beta2),
            settings.preset.eps,
            rows=settings.rows,
            moments=settings.moments,
            remove_parallel=True,
            unit_norm=True,
            fused=settings.fused,
            seed=settings.seed,
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def fired(self, active: Sequence[Tensor] = ()) -> Tensor:
        """`[d_sae]` bool: latents that were active in the batch whose gradients are held.

        Of several layers `[L * d_sae]`, one after the other.

        Args:
            active: what the loss found, where gradients do not tell: AuxK's are of dead latents.
        """
        if active:
            return torch.cat(list(active))
        module = self._module
        if not isinstance(module, MultiLayer):
            return _fired(module.deferred, module.b_enc)
        owners: Any = module.deferred or [None] * module.n_layers
        return torch.cat([_fired(*of) for of in zip(owners, module.b_enc, strict=True)])

    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def release(self) -> None:
        """Let go of the module: it is an ordinary one again."""
        self.zero_grad()
        self._module.deferred = () if isinstance(self._module, MultiLayer) else None

    def tensors(self) -> dict[str, Tensor]:
        """State tensors under names of their own."""
        return _flatten(self.optimizer.state_dict())[0]

    def record(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        return _flatten(self.optimizer.state_dict())[1]

    def load(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Restore what `tensors` and `record` returned."""
        state: dict[int, dict[str, Any]] = {}
        for parameter, name, value in record["numbers"]:
            state.setdefault(parameter, {})[name] = value
        for key, tensor in tensors.items():
            parameter, name = key.removeprefix(PREFIX).split(".", 1)
            state.setdefault(int(parameter), {})[name] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": record["groups"]})


def _fired(deferred: Any, b_enc: Tensor) -> Tensor:
    """`[d_sae]` bool of the latents of one encoder."""
    if deferred is not None and deferred.pending is not None:
        fired: Tensor = deferred.pending.acts.fired()
        return fired
    assert b_enc.grad is not None
    return b_enc.grad != 0


def _flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, numbers = {}, []
    for parameter, held in state["state"].items():
        for name, value in held.items():
            if isinstance(value, Tensor):
                tensors[f"{PREFIX}{parameter}.{name}"] = value
            else:
                numbers.append([parameter, name, value])
    return tensors, {"numbers": numbers, "groups": state["param_groups"]}
