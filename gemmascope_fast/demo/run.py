"""Train a JumpReLU SAE on a real transformer, sparse beside dense, compare, write a report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..training.sources import TensorSource
from ..training.trainer import Trainer
from . import evaluate, frontier, gemma_27b
from .activations import MINILM_LAYER, MINILM_NAME, Activations, collect
from .latents import choose, describe
from .recipe import run
from .report import COLUMNS, Results, render, table
from .settings import FULL, QUICK, Job
from .terminal import LATENTS_SHOWN, print_table, track
from .turns import History, train_in_turns

CPU = torch.device("cpu")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="gemmascope_fast demo", description=__doc__)
    made.add_argument("--quick", action="store_true", help="a smaller run that ends in a minute")
    made.add_argument("--out", type=Path, default=Path("demo"), help="output folder; default demo")
    made.add_argument("--model", help="a model of the Hugging Face Hub; default: packaged MiniLM")
    made.add_argument("--layer", type=int, help="block whose output is read, counted from 0")
    made.add_argument("--sae", help="evaluate this SAE (folder or Hub path) instead of training")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when all its claims hold, 1 when one fails, 2 when it could not run."""
    args = parser().parse_args(argv)
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print("demo: rich is not installed; run `pip install rich`", file=sys.stderr)
        return 2
    console = Console()
    try:
        if args.sae is not None:
            from .published import evaluate_published

            return evaluate_published(args, console)
        return train(args, console)
    except (ModuleNotFoundError, OSError, RuntimeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def train(args: argparse.Namespace, console: Any) -> int:
    """Train both runs, evaluate, write the page."""
    started = time.perf_counter()
    settings = QUICK if args.quick else FULL
    layer = MINILM_LAYER if args.layer is None else args.layer
    work = args.out / "work"
    with track(console, "Activations of the transformer") as update:
        source, file = collect(work, args.model, layer, settings.max_tokens, update)
    n, width = source.x.shape
    console.print(f"{n:,} tokens, width {width}, {int(source.held_out.sum()):,} held out")
    job = Job(settings, str(file.resolve()), *origin(args.model, layer))
    histories = _train_runs(source, job, work, console)
    results, sae_note = _evaluate(args, source, job, histories, console)
    page = args.out / "report.html"
    page.write_text(render(results), encoding="utf-8")
    _save_numbers(results, args.out / "results.json")
    print_table(console, table(results), COLUMNS)
    print_table(console, frontier.rows(results.frontier), frontier.COLUMNS)
    console.print(sae_note)
    for check in results.checks:
        console.print(("[green]holds[/]  " if check.holds else "[red]FAILS[/]  ") + check.text)
    if torch.cuda.is_available():
        shapes_of_27b(torch.device("cuda"), console)
    seconds = time.perf_counter() - started
    console.print(f"Report: {page} ({seconds:.0f} s in all)")
    if args.quick:
        console.print("This was a quick run: its numbers say only that everything works.")
        return 0
    return 0 if all(check.holds for check in results.checks) else 1


def shapes_of_27b(device: torch.device, console: Any) -> None:
    """Measure a step at Gemma 3 27B's width on a GPU, and print it."""
    shape = gemma_27b.Shape()
    console.print(
        f"Gemma 3 27B: n = {shape.n:,}, d = {shape.d:,}, {shape.d_sae:,} latents, L0 {shape.l0:.0f}"
    )
    try:
        print_table(console, gemma_27b.rows(device, shape), gemma_27b.COLUMNS)
    except torch.OutOfMemoryError as error:
        console.print(f"left out, this device is too small: {error}")


def initial(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights a run starts from and its scaling, for the dense one."""
    start = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    start["W_enc_t"] = start.pop("W_enc").t().contiguous()
    place = trainer.maps[0]
    return start | {"mean": place.mean, "scale": torch.tensor(place.scale, dtype=torch.float64)}


def _train_runs(source: Activations, job: Job, work: Path, console: Any) -> dict[str, History]:
    """Write what the workers read, and train them in turns."""
    settings = job.settings
    x = TensorSource(source.x[~source.held_out])
    save_file(initial(Trainer(x, run(x.d_in, settings), CPU)), work / "initial.safetensors")
    job.save(work)
    kinds = ("dense", "sparse")
    done = dict.fromkeys(kinds, 0)
    with track(console, "Training, sparse and dense in turns") as update:

        def report(kind: str, history: History) -> None:
            done[kind] = len(history.steps)
            note = f"{kind} FVU {history.held_out[-1]['fvu']:.3f}"
            update(sum(done.values()), 2 * settings.steps, note)

        trained = train_in_turns(kinds, work, settings.steps, settings.turn, report)
    return {"sparse": trained["sparse"], "dense": trained["dense"]}


def _evaluate(
    args: argparse.Namespace,
    source: Activations,
    job: Job,
    histories: dict[str, History],
    console: Any,
) -> tuple[Results, str]:
    """Reload the saved SAE, compare, and read its latents on raw hidden states."""
    import gemmascope_fast as gsf

    folder = args.out / "sae"
    sae = gsf.load(folder)
    with torch.no_grad():
        acts = sae.encode(source.x[source.held_out])
    before = load_file(args.out / "work" / "encoded.safetensors")
    identical = all(torch.equal(value, getattr(acts, name)) for name, value in before.items())
    note = (
        f"Saved in Gemma Scope 2's format: {folder}; reloaded, it encodes "
        f"{int(source.held_out.sum()):,} held-out tokens "
        + ("bit-identically" if identical else "DIFFERENTLY")
    )
    with track(console, "Firings of all latents") as update:
        found = evaluate.firings(sae, source.x, update)
    chosen = choose(found, LATENTS_SHOWN, job.settings.seed)
    with track(console, "FVU against L0") as update:
        points = frontier.frontier(source, job.settings, sae, update)
    results = Results(
        settings=job.settings,
        quick=args.quick,
        model=f"{job.hook} of {job.model_name} over Python's language reference",
        tokens=source.x.shape[0],
        width=source.x.shape[1],
        histories=histories,
        baselines=baselines(source, round(histories["sparse"].final["l0"])),
        checks=evaluate.checks(histories["dense"], histories["sparse"], identical),
        frontier=points,
        latents=[describe(found, source, latent) for latent in chosen],
    )
    return results, note


def origin(model: str | None, layer: int) -> tuple[str, str]:
    """Return `(model name, hook point)` as Gemma Scope 2's configs write them."""
    if model is None:
        return MINILM_NAME, f"encoder.layer.{layer}.output"
    return model, f"model.layers.{layer}.output"


def baselines(source: Activations, rank: int) -> dict[str, float]:
    """Held-out FVU of PCA with `rank` directions, of token means, of the mean."""
    held = source.held_out
    train, test = source.x[~held], source.x[held]
    return {
        f"PCA of rank {rank}": evaluate.pca_fvu(train, test, rank),
        "token mean": evaluate.token_mean_fvu(
            train, source.tokens[~held], test, source.tokens[held]
        ),
        "mean": evaluate.fvu(test, train.mean(0), train.mean(0)),
    }


def _save_numbers(results: Results, path: Path) -> None:
    """Write the numbers behind the page as JSON."""
    kept = replace(results, latents=[])
    data = asdict(kept) | {"table": table(results)}
    path.write_text(json.dumps(data, indent=1))
