"""`python -m gemmascope_fast train`: one run from the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..arguments import present_device
from .hooks import ModelSource
from .preset import PRESETS, find_preset
from .results import CHECKPOINTS, format_of
from .runs import train
from .settings import ACTIVATIONS, KINDS, MOMENTS, PRECISIONS, ROWS
from .sources import Source, TensorSource

OVERRIDES = ("lr", "beta1", "bandwidth")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def parser() -> argparse.ArgumentParser:
    """Return the command line; its names are those of `gsf.train`."""
    made = argparse.ArgumentParser(prog="gemmascope_fast train", description=__doc__)
    add = made.add_argument
    add("source", type=Path, help="folder of shards, .safetensors with x (and target), or a text")
    add("--out", type=Path, required=True, help="folder for checkpoints and the result")
    add("--d-sae", type=int, required=True, help="number of latents, of each layer")
    add("--steps", type=int, required=True, help="optimizer steps")
    add("--activation", choices=ACTIVATIONS, default="jumprelu", help="default jumprelu")
    add("--target-l0", type=float, help="active latents per token, of all layers (jumprelu)")
    add("--k", type=float, help="active latents per token and layer (topk, batchtopk)")
    add("--batch-size", type=int, default=4096, help="tokens per step; default 4096")
    add("--preset", choices=PRESETS, default="gemma_scope_2", help="default gemma_scope_2")
    add("--lr", type=float, help="instead of the preset's learning rate")
    add("--beta1", type=float, help="instead of the preset's momentum, 0")
    add("--bandwidth", type=float, help="instead of the preset's straight-through window")
    add("--rows", choices=ROWS, default="exact", help="live: rows with momentum left")
    add("--moments", choices=MOMENTS, default="fp32", help="second moments; default fp32")
    add("--fused", action=argparse.BooleanOptionalAction, default=True)
    add("--init-l0", type=float, help="active latents at the start; default twice the target")
    add("--matryoshka", type=int, nargs="+", help="ascending prefix sizes, the last one d_sae")
    add("--kind", choices=KINDS, default="sae", help="default sae")
    add("--affine", action="store_true", help="a transcoder's or CLT's affine skip connection")
    add("--start", help="artefact to begin with, as gsf.load reads it; of the kind and the sizes")
    add("--seed", type=int, default=0, help="default 0")
    add("--resume", action=argparse.BooleanOptionalAction, default=True)
    add("--checkpoint-every", type=int, help="default 1000, or a tenth of a shorter run")
    add("--dtype", choices=DTYPES, help="of the matrices; default float32")
    add("--autocast", choices=DTYPES, help="of the products; default that of the matrices")
    add("--precision", choices=PRECISIONS, default="exact", help="screened: int8 candidates (CUDA)")
    add("--device", help="such as cuda:0; default CUDA where there is one")
    add("--metrics", type=Path, help="append each step's metrics to this file, one JSON a line")
    several = made.add_argument_group("several processes, started by torchrun")
    several.add_argument("--tp", type=int, help="ranks that share the latents; default all")
    several.add_argument("--timeout", type=float, help="seconds that a rank may stand still")
    live = made.add_argument_group("live activations of a transformers model; source is a text")
    live.add_argument("--model", help="folder, or name on the Hugging Face Hub")
    live.add_argument("--hook", help="where x is read: model.layers.17.output, {5,9}, {0,...}")
    live.add_argument("--target-hook", help="where a transcoder's or CLT's target is read")
    live.add_argument("--context", type=int, default=1024, help="tokens per sequence; default 1024")
    return made


def main(argv: Sequence[str]) -> int:
    """Train; 0 on success, 130 when interrupted, 2 with a message on the standard error else."""
    args = vars(parser().parse_args(argv))
    preset = find_preset(args.pop("preset"))
    changes = {name: value for name in OVERRIDES if (value := args.pop(name)) is not None}
    dtypes: dict[str, Any] = {name: DTYPES.get(args.pop(name)) for name in ("dtype", "autocast")}
    live = {name: args.pop(name) for name in ("model", "hook", "target_hook", "context")}
    ranks = {name: args.pop(name) for name in ("tp", "timeout")}
    if args["activation"] == "topk" and args["k"] is not None and args["k"].is_integer():
        args["k"] = int(args["k"])
    try:
        args["preset"] = replace(preset, **changes)
        args["on_metrics"] = _writer(args.pop("metrics"))
        device = args["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
        with _ranks(args["device"], **ranks) as mesh:
            own = device if mesh is None else mesh.device_type  # of several GPUs the current one
            source = _source(args.pop("source"), own, **live)
            start = _started(args.pop("start"))
            module = train(source, mesh=mesh, start=start, **args, **dtypes)
            if os.environ.get("RANK", "0") == "0":
                print(_written(args["out"], module))
    except _told() as error:
        return _said(error)
    return 0


def _said(error: BaseException) -> int:
    """Print what ended a run, on one line, and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print(error if error.args else "train: stopped before the first step", file=sys.stderr)
        return 130
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 2


def _written(out: Path, module: Any) -> str:
    """What a run that has ended leaves in `out`."""
    format = format_of(module)
    said = f"{module}, L0 {module.metadata['l0']:.1f}"
    if format is not None:
        return f"{out}: {said}; an artefact in the format {format}, which gsf.load reads"
    return (
        f"{out / CHECKPOINTS}: {said}; NO ARTEFACT was written, since no format holds it: the same "
        "call of gsf.train in Python returns the module from the last checkpoint"
    )


def _told() -> tuple[type[BaseException], ...]:
    """Errors of the user's or of the machine's: a line says all of them."""
    errors = (
        KeyboardInterrupt,
        FloatingPointError,
        ModuleNotFoundError,
        OSError,
        TypeError,
        ValueError,
    )
    if "WORLD_SIZE" not in os.environ:
        return errors
    import torch.distributed as dist

    from ..distributed.failure import RankError

    return (*errors, RankError, dist.DistError)


@contextmanager
def _ranks(device: str | None, tp: int | None, timeout: float | None) -> Iterator[Any]:
    """The mesh of the ranks that torchrun started, or None; their process group ends with it."""
    if tp is None and "WORLD_SIZE" not in os.environ:
        yield None
        return
    import torch.distributed as dist

    from ..distributed.launch import TIMEOUT, mesh_of_torchrun

    kind = None if device is None else torch.device(device).type
    limit, own, done = TIMEOUT if timeout is None else timeout, not dist.is_initialized(), False
    try:
        yield mesh_of_torchrun(tp, timeout=limit, device_type=kind)
        done = True
    finally:
        # after an error NCCL would wait here for ranks that still wait in a collective
        if own and dist.is_initialized() and (done or dist.get_backend() != "nccl"):
            dist.destroy_process_group()


def _started(path: str | None) -> Any:
    from ..artefacts import load

    return None if path is None else load(path)


def _writer(path: Path | None) -> Callable[[dict[str, float]], None] | None:
    if path is None:
        return None

    first = True

    def write(metrics: dict[str, float]) -> None:
        nonlocal first
        if first and metrics["step"] > 1 and path.exists():
            _cut(path, metrics["step"])
        first = False
        with open(path, "a") as file:
            file.write(json.dumps(metrics) + "\n")

    return write


def _cut(path: Path, step: float) -> None:
    """Take from the end of a file of metrics the steps from `step` on, which are taken again."""
    end = kept = 0
    with open(path, "r+b") as file:
        for line in file:
            end += len(line)
            try:
                read = json.loads(line)
            except ValueError:  # the process was killed while it wrote
                continue
            if not (isinstance(read, dict) and read.get("step", 0) >= step):
                kept = end
        file.truncate(kept)


def _source(
    path: Path, device: str, model: str | None, hook: str | None, **live: Any
) -> Path | Source:
    if model is not None:
        if hook is None:
            raise ValueError("train: --model needs --hook, where its activations are read")
        return _live(path, device, model, hook, **live)
    if path.suffix != ".safetensors":
        return path
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"train: {path} is not a safetensors file: {error}") from error
    if "x" not in tensors:
        raise ValueError(
            f"train: {path} must hold x [N, d_in], or [N, L, d] of several layers, has "
            f"{', '.join(sorted(tensors))}"
        )
    return TensorSource(tensors["x"], tensors.get("target"), tensors.get("mask"))


def _live(
    path: Path, device: str, model: str, hook: str, target_hook: str | None, context: int
) -> ModelSource:
    """Activations of `model` over the text in `path`, in sequences of `context` tokens."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "train: transformers is not installed; run `pip install transformers`"
        ) from error
    present_device("train", device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModel.from_pretrained(model).to(device).eval()
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    width = context - len(first)
    whole = len(ids["input_ids"]) // max(width, 1) * width
    if width < 1 or whole < 1:
        raise ValueError(f"train: {path} must hold at least one sequence of {context} tokens")
    rows = torch.tensor(ids["input_ids"][:whole], device="cpu").view(-1, width)
    rows = torch.cat(
        [torch.tensor(first, dtype=rows.dtype, device="cpu").expand(len(rows), -1), rows], 1
    )
    return ModelSource(network, rows, hook, target_hook_point=target_hook, tokenizer=tokenizer)
