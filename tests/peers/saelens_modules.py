"""SAELens modules for the tests of the integration: small, with weights that make them sparse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peer import DEAD, D, F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

saes = pytest.importorskip("sae_lens.saes", reason="sae-lens is not installed: see `make peers`")
transcoders = pytest.importorskip("sae_lens.saes.transcoder")

BANDWIDTH = 0.25
D_OUT = 20
JUMPRELU = (saes.JumpReLUTrainingSAE, saes.JumpReLUTrainingSAEConfig)
MATRYOSHKA = (saes.MatryoshkaBatchTopKTrainingSAE, saes.MatryoshkaBatchTopKTrainingSAEConfig)
TOPK = (saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig)
BATCHTOPK = (saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig)
LEVELS: dict[str, Any] = {"k": 5.5, "matryoshka_widths": [10, 33, F]}

TRAINED: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
    "step": (JUMPRELU, {}),
    "quadratic": (JUMPRELU, {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 15.0}),
    "tanh": (JUMPRELU, {"jumprelu_sparsity_loss_mode": "tanh"}),
    "pre-act": (JUMPRELU, {"pre_act_loss_coefficient": 0.2}),
    "to input": (JUMPRELU, {"jumprelu_ste_to_input": True}),
    "tanh to input": (
        JUMPRELU,
        {
            "jumprelu_sparsity_loss_mode": "tanh",
            "pre_act_loss_coefficient": 0.2,
            "jumprelu_ste_to_input": True,
        },
    ),
    "not centred": (JUMPRELU, {"apply_b_dec_to_input": False}),
    "layer norm": (JUMPRELU, {"normalize_activations": "layer_norm"}),
    "topk": (TOPK, {"k": 5}),
    "topk not rescaled": (TOPK, {"k": 5, "rescale_acts_by_decoder_norm": False}),
    "topk coo": (TOPK, {"k": 5, "use_sparse_activations": True}),
    "batchtopk": (BATCHTOPK, {"k": 5.5}),
    "batchtopk not rescaled": (BATCHTOPK, {"k": 5.5, "rescale_acts_by_decoder_norm": False}),
    "matryoshka": (MATRYOSHKA, LEVELS),
    "matryoshka aux": (MATRYOSHKA, {**LEVELS, "use_matryoshka_aux_loss": True}),
}

INFERENCE: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
    "jumprelu": ((saes.JumpReLUSAE, saes.JumpReLUSAEConfig), {}),
    "jumprelu not centred": (
        (saes.JumpReLUSAE, saes.JumpReLUSAEConfig),
        {"apply_b_dec_to_input": False},
    ),
    "jumprelu constant norm": (
        (saes.JumpReLUSAE, saes.JumpReLUSAEConfig),
        {"normalize_activations": "constant_norm_rescale"},
    ),
    "topk": ((saes.TopKSAE, saes.TopKSAEConfig), {"k": 5}),
    "topk rescaled": (
        (saes.TopKSAE, saes.TopKSAEConfig),
        {"k": 5, "rescale_acts_by_decoder_norm": True},
    ),
    **{
        kind: (
            (getattr(transcoders, name), getattr(transcoders, f"{name}Config")),
            {"d_out": D_OUT, "apply_b_dec_to_input": False},
        )
        for kind, name in (
            ("transcoder", "Transcoder"),
            ("skip_transcoder", "SkipTranscoder"),
            ("jumprelu_transcoder", "JumpReLUTranscoder"),
            ("jumprelu_skip_transcoder", "JumpReLUSkipTranscoder"),
        )
    },
}


def make(given: tuple[tuple[Any, Any], dict[str, Any]], seed: int = 0, **options: Any) -> Any:
    """Random weights, a tenth of the latents active: negative biases where nothing else gates."""
    (cls, config), settings = given
    settings = {"jumprelu_bandwidth": BANDWIDTH} | settings if cls is JUMPRELU[0] else settings
    torch.manual_seed(seed)
    module = cls(config(d_in=D, d_sae=F, **copy.deepcopy(settings), **options))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
        if hasattr(module, "threshold"):
            module.threshold.copy_(1.6 + torch.rand(F))
        else:
            module.b_enc.sub_(1.8)
    return module


def step_input(x: Tensor, dead: str | None = None, l0: float = 0.3) -> Any:
    mask = None if dead is None else DEAD[dead]
    return saes.sae.TrainStepInput(x, {"l0": l0}, mask, 0, False)


class Largest(TorchDispatchMode):
    """Remembers the largest number of elements of a tensor that an op returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(found) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found
