"""The constants of one demo run, and what is handed to its worker processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Sizes and hyperparameters; the sources are in `recipe.py`, where they are used.

    `x` is centred and scaled so that its mean squared norm is 1: `bandwidth`, thresholds and
    penalties are in these units.
    """

    max_tokens: int | None = None
    d_sae: int = 8192
    batch: int = 512
    steps: int = 400
    turn: int = 25
    lr: float = 1e-3
    lr_warmup_steps: int = 30
    lr_decay_fraction: float = 0.3
    beta1: float = 0.0
    beta2: float = 0.999
    bandwidth: float = 0.02
    initial_l0: float = 80.0
    target_l0: float = 40.0
    other_targets: tuple[float, ...] = (20.0, 80.0)
    sparsity: float = 3e-3
    sparsity_warmup_fraction: float = 0.2
    frequency: float = 1e-3
    frequency_scale: float = 0.01
    calibration_tokens: int = 4096
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """What a worker process has to know.

    Attributes:
        settings: of the run.
        activations: file that `activations.collect` wrote.
        model_name: model the activations are of; goes into the saved SAE's config.
        hook: where they were read, like `encoder.layer.3.output`; goes there too.
    """

    settings: Settings
    activations: str
    model_name: str
    hook: str

    def save(self, folder: Path) -> None:
        """Write `folder/job.json`."""
        (folder / "job.json").write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(folder: Path) -> Job:
        """Read what `save` wrote."""
        read = json.loads((folder / "job.json").read_text())
        settings = read["settings"]
        settings["other_targets"] = tuple(settings["other_targets"])
        return Job(**read | {"settings": Settings(**settings)})


FULL = Settings()
QUICK = Settings(max_tokens=24_000, d_sae=2048, steps=100)
