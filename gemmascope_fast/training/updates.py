"""The optimizer of a run, with unit-norm decoder rows around it, and its state for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..modules import SAE
from .preset import Preset

PREFIX = "optimizer."


class Updates:
    """Adam with betas (0, beta2) over a module's parameters.

    Each decoder row stays on the unit sphere: the component of its gradient along the row is
    removed before the update, and its norm restored after it.

    Args:
        module: its parameters are updated.
        preset: beta2 and eps.
    """

    def __init__(self, module: SAE, preset: Preset) -> None:
        self._module = module
        self.optimizer = torch.optim.Adam(
            module.parameters(), lr=preset.lr, betas=(0.0, preset.beta2), eps=preset.eps, fused=True
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def fired(self) -> Tensor:
        """`[d_sae]` bool: latents that were active in the batch whose gradients are held."""
        grad = self._module.b_enc.grad
        assert grad is not None
        return grad != 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        W_dec = self._module.W_dec
        if W_dec.grad is not None:
            along = torch.linalg.vecdot(W_dec.grad, W_dec)
            W_dec.grad.addcmul_(W_dec, along[:, None], value=-1)
        self.optimizer.step()
        W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))

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


def _flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, numbers = {}, []
    for parameter, held in state["state"].items():
        for name, value in held.items():
            if isinstance(value, Tensor):
                tensors[f"{PREFIX}{parameter}.{name}"] = value
            else:
                numbers.append([parameter, name, value])
    return tensors, {"numbers": numbers, "groups": state["param_groups"]}
