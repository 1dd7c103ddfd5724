"""Training steps of sparsify and dictionary_learning, their own and on this library's ops.

    python bench/integrations_topk.py sparsify [--feature step|auxk|multi_topk|gradients|signum]
    python bench/integrations_topk.py dictionary_learning [--feature topk|batchtopk]
        [--n 1024 --d 1152 --d-sae 65536 --k 64 --repeats 3] [--no-peak] [--json FILE]

Needs the host (`make peers` installs them into `.venv-peers`). Both contenders of a feature are one
module, one optimizer and the same batches; the backend is switched on for the second alone, and its
loss of the same state must agree before anything is timed. "step" is what sparsify's trainer does
to one coder: forward, backward, the projection of W_dec's gradient, the optimizer, the decoder's
norms; with `torch.optim.Adam(fused=True)`, or with sparsify's default optimizer ("signum").
"gradients" is the same without projection, optimizer and norms. dictionary_learning's is
`trainer.update`, geometric median excluded. Timing and peak memory are those of bench_step.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from against_dense import keep_freed_memory
from bench_step import Step, batches, interleaved, peak_mebibytes, print_peak

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its CPU path
os.environ.setdefault("WANDB_MODE", "disabled")

SIZES = ("n", "d", "d_sae", "k", "feature")
STOCK, OURS = "stock", "ours"
TOLERANCE = 1e-4
"""Of the loss, relative."""

Switch = Callable[[], AbstractContextManager[Any]]


def sparsify_step(args: argparse.Namespace, x: torch.Tensor) -> tuple[Step, Switch]:
    """One step of sparsify's trainer on one coder, and what switches the backend on."""
    import sparsify
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    from gemmascope_fast.integrations import sparsify as backend

    options = {"num_latents": args.d_sae, "k": args.k, "multi_topk": args.feature == "multi_topk"}
    coder = sparsify.SparseCoder(args.d, sparsify.SparseCoderConfig(**options))
    dead = torch.arange(args.d_sae) % 4 == 0 if args.feature == "auxk" else None
    optimizer: Any = None
    if args.feature == "signum":
        optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=1e-4), momentum=0.95)
        optimizer.train()
    elif args.feature != "gradients":
        optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)
    following = batches(x)

    def step() -> float:
        if optimizer is not None:
            coder.set_decoder_norm_to_unit_norm()
        out = coder(following(), dead_mask=dead)
        loss = out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8
        loss.backward()
        if optimizer is not None:
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
        coder.zero_grad()
        return float(loss.detach())

    return step, backend.install


def dictionary_learning_step(args: argparse.Namespace, x: torch.Tensor) -> tuple[Step, Switch]:
    """One update of a trainer, and what switches the backend on."""
    from dictionary_learning import trainers

    from gemmascope_fast.integrations import dictionary_learning as backend

    cls = {"topk": trainers.TopKTrainer, "batchtopk": trainers.BatchTopKTrainer}[args.feature]
    run = {"steps": 10**6, "warmup_steps": 10, "layer": 0, "lm_name": "none", "device": "cpu"}
    trainer = cls(activation_dim=args.d, dict_size=args.d_sae, k=args.k, lr=1e-4, **run)
    following, count = batches(x), 0

    def step() -> float:
        nonlocal count
        count += 1
        return float(trainer.update(count, following()))

    return step, backend.install


FEATURES = {
    "sparsify": ("step", "signum", "gradients", "auxk", "multi_topk"),
    "dictionary_learning": ("topk", "batchtopk"),
}
HOSTS = {
    "sparsify": ("eai-sparsify", sparsify_step),
    "dictionary_learning": ("dictionary-learning", dictionary_learning_step),
}


def contenders(host: str, args: argparse.Namespace) -> dict[str, Step]:
    """The host's own step and the same with the backend, over one state."""
    torch.manual_seed(0)
    step, install = HOSTS[host][1](args, torch.randn(args.n, args.d))

    def ours() -> float:
        with install():
            return step()

    return {STOCK: step, OURS: ours}


def agree(host: str, args: argparse.Namespace) -> float:
    """The relative difference of the two losses of a first step from one state."""
    small = argparse.Namespace(**{**vars(args), "d_sae": min(args.d_sae, 4096)})
    first = {name: contenders(host, small)[name]() for name in (STOCK, OURS)}
    off = abs(first[OURS] / first[STOCK] - 1)
    assert off <= TOLERANCE, f"losses differ: {first}"
    return off


def measure(host: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times, losses and peaks of both."""
    off = agree(host, args)
    print(f"same loss within {off:.1g} (allowed {TOLERANCE:.0g})", flush=True)
    _, times = interleaved(contenders(host, args), args.repeats)
    found = {name: median(each) for name, each in times.items()}
    result: dict[str, Any] = {
        **{name: getattr(args, name) for name in SIZES},
        "host": f"{HOSTS[host][0]} {version(HOSTS[host][0])}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "milliseconds": times,
        "speedup": found[STOCK] / found[OURS],
        "loss_agrees_within": off,
    }
    if args.peak:
        result["peak_mebibytes"] = {
            name: peak_mebibytes(__file__, name, args, SIZES, [host, "--no-peak"]) for name in found
        }
    return result


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("host", choices=HOSTS)
    options.add_argument("--feature")
    for name, value in (("n", 1024), ("d", 1152), ("d-sae", 65536), ("k", 64), ("repeats", 3)):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--peak", action=argparse.BooleanOptionalAction, default=True)
    options.add_argument("--peak-of", choices=(STOCK, OURS))
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    args.feature = args.feature or FEATURES[args.host][0]
    if args.feature not in FEATURES[args.host]:
        options.error(f"--feature of {args.host} is one of {', '.join(FEATURES[args.host])}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if args.peak_of:
        print_peak(contenders(args.host, args)[args.peak_of])
        return
    keep_freed_memory()
    result = measure(args.host, args)
    print(json.dumps(result, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
