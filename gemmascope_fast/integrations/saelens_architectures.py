"""SAELens' training architectures under names of our own, for those who would rather not install.

`gemmascope_fast_<name>` builds a subclass of SAELens' class with our methods. What it saves is
SAELens': the architecture in a file is the stock one. Imports `sae_lens`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_class
from sae_lens.saes.sae import TrainingSAEConfig

from .patching import Changes
from .saelens_methods import SERVED, replacement
from .saelens_stock import original

PREFIX = "gemmascope_fast_"
NAMES = ("jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")


def register() -> Changes:
    """Add `PREFIX + name` to SAELens' registry for each name."""
    changes = Changes()
    for name in NAMES:
        cls, config = SAE_TRAINING_CLASS_REGISTRY[name]
        made = (_module(cls, name), _config(config, name))
        changes.entry(SAE_TRAINING_CLASS_REGISTRY, PREFIX + name, made)
    return changes


def _module(cls: Any, name: str) -> type:
    """The subclass that is served whether or not anything is installed."""

    def save_model(self: Any, path: str | Path) -> tuple[Path, Path]:
        weights, config = cls.save_model(self, path)
        text = json.dumps({**json.loads(config.read_text()), "architecture": name})
        config.write_text(text)
        return weights, config

    names = dict.fromkeys(method for method, _ in SERVED.values())
    served = {method: getattr(cls, method) for method in names}
    found = {method: original(own) for method, own in served.items()}
    methods = {method: replacement(own, *SERVED[own]) for method, own in found.items()}
    return type(f"GemmaScopeFast{cls.__name__}", (cls,), {**methods, "save_model": save_model})


def _config(config: Any, name: str) -> type:
    """Its configuration: SAELens' with another name, whose inference class is SAELens' too."""

    @dataclass
    class Config(config):  # type: ignore[misc]
        @classmethod
        def architecture(cls) -> str:
            return PREFIX + name

        def get_inference_config_class(self) -> Any:
            own = config.get_inference_config_class
            if own is TrainingSAEConfig.get_inference_config_class:  # by the architecture's name
                return get_sae_class(name)[1]
            return own(self)

    Config.__name__ = Config.__qualname__ = f"GemmaScopeFast{config.__name__}"
    return Config
