"""`gsf.train`: checks, resumes, trains, saves and exports one run."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..modules import SAE
from ..multilayer import MultiLayer
from . import checkpoint
from .given import Rows, as_source, place_of, sizes_of
from .memory import estimate
from .preset import Preset, find_preset
from .progress import Shown, bar
from .results import CHECKPOINTS, asked, check_out, finish
from .settings import OP, Settings, prefixes
from .sources import Source
from .starting import check_start
from .trainer import Trainer
from .trainer_layers import trainer_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LONGEST = 1000
"""Steps between checkpoints unless asked otherwise; a tenth of shorter runs."""
NOTE_SECONDS = 0.5

OnMetrics = Callable[[dict[str, float]], object]


def train(
    source: Rows,
    *,
    d_sae: int,
    activation: str = "jumprelu",
    target_l0: float | None = None,
    k: float | None = None,
    steps: int,
    batch_size: int = 4096,
    preset: str | Preset = "gemma_scope_2",
    rows: str = "exact",
    moments: str = "fp32",
    fused: bool = True,
    init_l0: float | None = None,
    matryoshka: Sequence[int] | None = None,
    kind: str = "sae",
    affine: bool = False,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    checkpoint_every: int | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    precision: str = "exact",
    device: torch.device | str | None = None,
    on_metrics: OnMetrics | None = None,
    progress: bool = True,
    metadata: Mapping[str, Any] | None = None,
    start: SAE | MultiLayer | None = None,
    mesh: DeviceMesh | None = None,
) -> SAE | MultiLayer:
    """Train a sparse autoencoder, transcoder, crosscoder or cross-layer transcoder on activations.

    `loss = mean_i |recon_i - target_i|^2 + sparsity terms` of the preset, on activations scaled to
    unit mean squared norm (each layer by itself); the scales are folded into the weights that are
    returned.

    Args:
        source: `[N, d_in]` tensor or numpy array; a pair `([N, d_in], [N, d_out])` for a
            transcoder; `[N, L, d]` for a crosscoder, a pair of them for a CLT; a folder of shards
            (`write_shards`); or a `Source`.
        d_sae: number of latents, >= 1; of each layer.
        activation: "jumprelu", "topk" or "batchtopk".
        target_l0: active latents per token that jumprelu is pulled to, summed over the layers, in
            (0, d_sae), or (0, L * d_sae). A run ends below it where target_l0 / d_sae is not far
            below the preset's `frequency_scale`, 1 %, whose penalty then pulls as hard the other
            way, and where few steps of a small lr leave thresholds behind (docs/quickstart.md).
        k: active latents per token and layer, of topk (int) and batchtopk, in (0, d_sae]: layers
            do not compete.
        steps: of the run, >= 1.
        batch_size: tokens per step, >= 1.
        preset: "gemma_scope_2" (calibrated start), "gemma_scope_2_literal", or a `Preset`.
        rows: "exact" updates every latent that Adam would move; "live" leaves those whose momentum
            has decayed below rounding. With beta1 = 0 (both presets) they are the same.
        moments: "fp32" or "8bit" second moments.
        fused: update inside the backward pass, without buffers of the matrices' gradients.
        init_l0: active latents per token that thresholds are calibrated to at the start; default
            twice the target.
        matryoshka: ascending prefix sizes that each reconstruct, the last one d_sae; of one layer.
        kind: "sae", "transcoder", "crosscoder" or "clt".
        affine: whether the transcoder or CLT has an affine skip connection.
        seed: of weights and data order.
        out: folder for checkpoints and the result; None keeps the run in memory.
        resume: continue from the newest checkpoint in `out`; False removes those it finds.
        checkpoint_every: steps between checkpoints; default 1,000, or a tenth of a shorter run.
        dtype: of the matrices; default float32.
        autocast: dtype in which the products run; None leaves the matrices' own.
        precision: "screened" lets the encoder of one layer miss 1 entry in 10^6 for speed, where
            `SAE.screen` does: on CUDA, without autocast, on one device. The result encodes exactly.
        device: default that of a tensor source, else CUDA where there is one, else the CPU.
        on_metrics: called after every step with a dict of floats: step, tokens, loss, its terms,
            fvu, l0, density, fired (latents in this batch), dead, lr, seconds.
        progress: print the memory estimate and show progress on the standard error: a bar where
            rich or tqdm is installed, a line now and then elsewhere and off a terminal.
        metadata: of the saved result: model_name, hf_hook_point_in, hf_hook_point_out, ...
        start: begin with the weights of this module, thresholds included, and calibrate nothing: of
            the class, the sizes and the activation that are trained, for raw activations, as `load`
            and `Crosscoder.from_layers` return it. It is copied; its bandwidth and k are not used,
            and neither is it when a checkpoint is resumed. Decoder rows get unit norm, encoders and
            thresholds that norm; with topk or batchtopk the rows must have one norm. On one device.
        mesh: of dims ("dp", "tp") over all ranks of `torchrun`, each of which makes this call:
            latents are cut over "tp", the rows of every batch over "dp" (docs/distributed.md);
            for SAEs and transcoders. `on_metrics` and `progress` are rank 0's, `device` the mesh's.

    Returns:
        The module, for raw activations, in evaluation mode: batchtopk encodes with its running
        threshold, one per layer. Layers share one bandwidth: its scale is the geometric mean of
        theirs. With `out`, the folder is an artefact that `load` reads (batchtopk as the JumpReLU
        of that threshold), in Gemma Scope 2's format; a topk SAE in SAELens', a topk transcoder of
        one width in sparsify's. Of other topk (two widths, several layers, a mesh) it holds the
        checkpoints only, because no format has them: this call again returns the module. With
        `mesh` the module is a `ShardedSAE` or `ShardedTranscoder`.

    Raises:
        NonFiniteError: a loss or weight is NaN or infinite; the last checkpoint stays.
        OSError: a file cannot be read or written; the last checkpoint stays.
        RankError: with `mesh`, another rank failed, died or stood still; the last checkpoint stays.
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, arguments do not fit together, or `out` holds
            another run.

    Source: Gemma Scope 2's technical paper; arXiv 2408.05147; arXiv 2407.14435.
    """
    rows_of = as_source(source, kind)
    place = place_of(source, device)
    settings = Settings(
        d_sae=d_sae,
        steps=steps,
        preset=find_preset(preset),
        activation=activation,
        target_l0=target_l0,
        k=k,
        batch_size=batch_size,
        rows=rows,
        moments=moments,
        fused=fused,
        init_l0=init_l0,
        matryoshka=prefixes(OP, matryoshka),
        kind=kind,
        affine=affine,
        seed=seed,
        dtype=torch.float32 if dtype is None else dtype,
        autocast=autocast,
        precision=precision,
        checkpoint_every=checkpoint_every,
        **sizes_of(rows_of),
    )
    check_start(start, settings, mesh)
    folder, extra = asked(out, metadata, on_metrics, resume=resume, progress=progress)
    if mesh is not None:
        said = {"resume": resume, "on_metrics": on_metrics, "progress": progress}
        return _on_mesh(mesh, rows_of, settings, folder, metadata=extra, **said)
    check_out(folder, settings, rows_of.metadata() | extra)
    if progress:
        held = rows_of.held_bytes(place)
        found = estimate(settings, place, held, resume=resume and folder is not None)
        each = "" if settings.layers is None else f"{settings.layers} x "
        print(f"train: {each}{d_sae:,} latents, {steps:,} steps; {found}", file=sys.stderr)
    with _recording(), nullcontext() if folder is None else checkpoint.held(folder / CHECKPOINTS):
        trainer = _start(rows_of, settings, place, folder, resume, start)
        with bar(steps, progress, batch_size, done=trainer.taken) as shown:
            run_steps(trainer, folder, on_metrics, shown)
        return finish(trainer, folder, extra)


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd at work, whatever a notebook has switched off for good."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _on_mesh(mesh: DeviceMesh, source: Source, settings: Settings, *to: Any, **options: Any) -> SAE:
    from ..distributed.running import train_on

    if settings.layers is not None:
        raise ValueError(f"{OP}: kind={settings.kind!r} is for one device: drop mesh")
    if settings.precision != "exact":
        raise ValueError(f"{OP}: precision={settings.precision!r} is for one device: drop mesh")
    with _recording():
        return cast("SAE", train_on(mesh, source, settings, *to, **options))


def _start(
    source: Source,
    settings: Settings,
    device: torch.device,
    folder: Path | None,
    resume: bool,
    start: SAE | MultiLayer | None,
) -> Trainer:
    """The run from its beginning, or from the newest checkpoint that can be read."""
    saved = [] if folder is None else checkpoint.found(folder / CHECKPOINTS)
    if folder is not None and resume:
        checkpoint.refuse_shards(folder / CHECKPOINTS)
    if not resume:
        for _, path in saved:
            path.unlink()
        saved = []
    unreadable: list[str] = []
    for _, path in reversed(saved):
        try:
            checkpoint.load_record(path)
        except ValueError as error:
            unreadable.append(str(error))
            continue
        for text in unreadable:
            warnings.warn(f"{text}; resuming from {path.name}", stacklevel=3)
        made: Trainer = trainer_of(settings).resumed(source, settings, device, path)
        for old in checkpoint.superseded(saved, path):
            old.unlink(missing_ok=True)
        return made
    if unreadable:
        raise ValueError(f"{unreadable[0]}; resume=False starts anew")
    return trainer_of(settings)(source, settings, device, start)


def run_steps(
    trainer: Trainer, folder: Path | None, on_metrics: OnMetrics | None, shown: Shown
) -> None:
    """Take the steps that are left; a KeyboardInterrupt says where it came."""
    try:
        _steps(trainer, folder, on_metrics, shown)
    except KeyboardInterrupt as stop:
        saved = [] if folder is None else sorted((folder / CHECKPOINTS).glob("step-*"))
        left = f"the same command goes on from {saved[-1]}" if saved else "there is no checkpoint"
        at = f"{OP}: stopped after step {trainer.taken:,} of {trainer.settings.steps:,}; {left}"
        stop.args = stop.args or (at,)
        raise


def _steps(
    trainer: Trainer, folder: Path | None, on_metrics: OnMetrics | None, shown: Shown
) -> None:
    settings, noted = trainer.settings, -math.inf
    every = settings.checkpoint_every or min(LONGEST, -(-settings.steps // 10))
    while trainer.taken < settings.steps:
        began = time.perf_counter()
        metrics = trainer.step()
        last = trainer.taken == settings.steps
        if folder is not None and (last or trainer.taken % every == 0):
            trainer.save(folder / CHECKPOINTS)
        if on_metrics is not None or last or began - noted > NOTE_SECONDS:
            noted = began
            plain = _plain(metrics, trainer, began)
            loss, fvu, l0 = (plain[name] for name in ("loss", "fvu", "l0"))
            shown(trainer.taken, f"loss {loss:.4g}, FVU {fvu:.4g}, L0 {l0:.1f}")
            if on_metrics is not None:
                on_metrics(plain)


def _plain(metrics: Mapping[str, Any], trainer: Trainer, began: float) -> dict[str, float]:
    """Metrics as floats, brought from the device at once."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    values = torch.stack([value.double() for value in tensors.values()]).tolist()
    plain = {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
    return {
        "step": trainer.taken,
        "tokens": trainer.taken * trainer.settings.batch_size,
        **dict(zip(tensors, values, strict=True)),
        **plain,
        "dead": trainer.dead(),
        "seconds": time.perf_counter() - began,
    }
