"""Evaluate a published SAE on the demo's text: hidden states, FVU, L0, latents, the same page.

`--sae` names a folder in Gemma Scope 2's format, or `owner/repository/folder` on the Hugging Face
Hub, such as `google/gemma-scope-2-1b-pt/resid_post/layer_17_width_16k_l0_small`. Model and layer
come from the SAE's own config unless `--model` and `--layer` say otherwise.
"""

from __future__ import annotations

import argparse
import re
import time
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import evaluate
from .activations import MINILM_NAME, Activations, collect
from .latents import choose, describe
from .report import histogram_section, latents_section, page, table_section
from .terminal import LATENTS_SHOWN, print_table, track

COLUMNS = ("FVU", "L0", "never fired", "tokens/s (encode and decode)")
ROWS = 1024  # tokens per block


def locate(name: str) -> Path:
    """Return the folder of `name`, fetched from the Hub when there is no such local folder.

    Only the config and the weights are fetched, never `examples.safetensors`.

    Raises:
        OSError: the Hub lacks it, or cannot be reached.
        ValueError: `name` is neither a local folder nor owner/repository/folder.
    """
    if Path(name).exists():
        return Path(name)
    parts = name.strip("/").split("/")
    if len(parts) < 3:
        raise ValueError(
            f"demo: --sae must be a local folder or owner/repository/folder on the Hub, got {name}"
        )
    repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "demo: huggingface_hub is not installed; run `pip install huggingface_hub`"
        ) from error
    wanted = [f"{folder}/config.json", f"{folder}/params.safetensors"]
    try:
        root = Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # the Hub client has a dozen unrelated kinds of failure
        raise OSError(f"demo: cannot fetch {repository} from the Hub: {error}") from error
    if not (root / folder / "params.safetensors").exists():
        raise OSError(f"demo: {repository} has no {folder}/params.safetensors")
    return root / folder


def residual_layer(hook: str | None) -> int:
    """Return the block that `hook_point_in` names, like 17 for `model.layers.17.output`.

    Raises:
        ValueError: it is not the output of a block.
    """
    found = re.search(r"\.layers?\.(\d+)\.output$", f".{hook or ''}")
    if found is None:
        raise ValueError(
            f"demo: the SAE reads {hook or 'an unknown place'}; the demo hooks outputs of blocks "
            "only; pass --layer if that is what it reads"
        )
    return int(found.group(1))


@torch.no_grad()
def measure(sae: Any, x: Tensor) -> tuple[float, float, float]:
    """`(FVU, L0, tokens per second)` of encoding and decoding `x [n, d]`."""
    mean, error, active, seconds = x.mean(0), 0.0, 0.0, 0.0
    for part in torch.split(x, ROWS):
        started = time.perf_counter()
        acts = sae.encode(part)
        recon = sae.decode(acts)
        seconds += time.perf_counter() - started
        error += float((recon - part).square().sum(dtype=torch.float64))
        active += float(acts.l0().sum(dtype=torch.float64))
    total = float((x - mean).square().sum(dtype=torch.float64))
    return error / total, active / x.shape[0], x.shape[0] / seconds


def evaluate_published(args: argparse.Namespace, console: Any) -> int:
    """Load `args.sae`, run its model over the text, print the table and write the page."""
    import gemmascope_fast as gsf

    sae: Any = gsf.load(locate(args.sae))
    known = sae.metadata
    named = args.model or known.get("model_name")
    model = None if named in (None, MINILM_NAME) else named
    layer = residual_layer(known.get("hf_hook_point_in")) if args.layer is None else args.layer
    limit = 8_000 if args.quick else None
    with track(console, "Activations of the transformer") as update:
        source, _ = collect(args.out / "work", model, layer, limit, update)
    if source.x.shape[1] != sae.W_enc.shape[0]:
        raise ValueError(
            f"demo: the SAE reads width {sae.W_enc.shape[0]}, {named} has {source.x.shape[1]}"
        )
    error, l0, speed = measure(sae, source.x)
    with track(console, "Firings of all latents") as update:
        found = evaluate.firings(sae, source.x, update)
    dead = int((found.counts == 0).sum())
    row = [Path(args.sae).name, f"{error:.4f}", f"{l0:.1f}", f"{dead:,}", f"{speed:,.0f}"]
    print_table(console, [row], COLUMNS)
    where = args.out / "report.html"
    where.write_text(_page(f"{args.sae} on {named}", row, found, source), encoding="utf-8")
    console.print(f"Report: {where}")
    return 0


def _page(title: str, row: list[str], found: evaluate.Firings, source: Activations) -> str:
    """Return the page: table, histogram, latents."""
    cards = [describe(found, source, latent) for latent in choose(found, LATENTS_SHOWN, 0)]
    counts: list[int] = found.counts.tolist()
    return page(
        title,
        [
            f"<h1>{escape(title)}</h1><p class='soft'>{found.n:,} tokens</p>",
            table_section([row], COLUMNS),
            "<h2>How often latents fire</h2>"
            + histogram_section([(row[0], "ours", counts)], found.n),
            "<h2>What latents stand for</h2>" + latents_section(cards),
        ],
    )
