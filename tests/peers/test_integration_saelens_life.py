"""What happens to accelerated SAELens modules: files, threads, odd batches, frozen parameters."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peer import D, batch, close
from saelens_modules import INFERENCE, TRAINED, make, saes, step_input
from torch import Tensor

from gemmascope_fast.integrations import saelens

ALL = INFERENCE | TRAINED
STEPS = [kind for kind in TRAINED if kind != "topk coo"]  # its backward fails on the CPU


def pair(kind: str) -> tuple[Any, Any]:
    """Two equal modules, the second one accelerated."""
    stock, ours = make(ALL[kind]), make(ALL[kind])
    saelens.accelerate(ours)
    return stock, ours


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "jumprelu_skip_transcoder"])
def test_files_are_read_without_this_library(kind: str, tmp_path: Path) -> None:
    stock, ours = pair(kind)
    ours.save_model(tmp_path)
    torch.save({"x": batch(0), "expected": stock(batch(0)).detach()}, tmp_path / "given.pt")
    program = """
import sys, torch
sys.modules["gemmascope_fast"] = None
from sae_lens import SAE
given = torch.load(f"{sys.argv[1]}/given.pt")
torch.testing.assert_close(SAE.load_from_disk(sys.argv[1])(given["x"]), given["expected"])
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ALL)
def test_without_gradients(kind: str, mode: Any) -> None:
    stock, ours = pair(kind)
    with mode():
        close(ours(batch(0, 160)), stock(batch(0, 160)), "forward")
        acts = [module.encode(batch(0)) for module in (ours, stock)]
        close(acts[0].to_dense(), acts[1].to_dense(), "encode")
        close(ours.decode(acts[0]), stock.decode(acts[1]), "decode")
        if kind in TRAINED:
            losses = [m.training_forward_pass(step_input(batch(0))).loss for m in (ours, stock)]
            close(*losses, "loss")


FROZEN = [("W_enc",), ("W_dec",), ("b_enc", "b_dec"), ("W_enc", "b_enc", "threshold")]


@pytest.mark.parametrize("names", FROZEN, ids="-".join)
@pytest.mark.parametrize("kind", STEPS)
def test_parameters_that_do_not_train(kind: str, names: tuple[str, ...]) -> None:
    modules = pair(kind)
    for module in modules:
        for name, p in module.named_parameters():
            p.requires_grad_(name not in names)
        module.training_forward_pass(step_input(batch(0, 160), "many")).loss.backward()
    stock, ours = (dict(m.named_parameters()) for m in modules)
    for name, p in stock.items():
        assert (p.grad is None) == (ours[name].grad is None), name
        if p.grad is not None:
            close(ours[name].grad, p.grad, name)


@pytest.mark.parametrize("shape", [(0, D), (3, 0, D)], ids=str)
@pytest.mark.parametrize("kind", [k for k in ALL if "batchtopk" not in k and "matry" not in k])
def test_empty_batches(kind: str, shape: tuple[int, ...]) -> None:
    stock, ours = pair(kind)
    x = torch.zeros(shape)
    assert ours(x).shape == stock(x).shape
    assert ours.encode(x).shape == stock.encode(x).shape


@pytest.mark.parametrize("kind", ALL)
def test_float64_is_saelens(kind: str) -> None:
    stock, ours = (make(ALL[kind], dtype="float64") for _ in range(2))
    saelens.accelerate(ours)
    assert torch.equal(ours(batch(0).double()), stock(batch(0).double()))


@pytest.mark.parametrize("kind", STEPS)
def test_bf16_autocast(kind: str) -> None:
    """The same dtypes; values but for roundings of pre-activations, which SAELens has."""
    stock, ours = pair(kind)
    given = step_input(batch(0, 160), "many")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, mine = (m.training_forward_pass(given) for m in (stock, ours))
    for module, output in ((stock, theirs), (ours, mine)):
        output.loss.backward()
        assert module.W_enc.grad.dtype == torch.float32
    assert (mine.loss.dtype, mine.sae_out.dtype) == (theirs.loss.dtype, theirs.sae_out.dtype)
    assert float(mine.loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=0.05)
    off = (ours.W_enc.grad - stock.W_enc.grad).norm() / stock.W_enc.grad.norm()
    assert off < 0.15


def test_hooks_come_and_go() -> None:
    stock, ours = pair("jumprelu")
    x = batch(0, 160)
    for _ in range(2):
        for module in (stock, ours):
            module.add_hook("hook_sae_acts_post", lambda t, hook: 2 * t)
        close(ours(x), stock(x), "with a hook")
        for module in (stock, ours):
            module.reset_hooks()
        close(ours(x), stock(x), "without")


def test_threads() -> None:
    """Two modules train while others install and uninstall."""
    modules = [make(TRAINED["step"], seed) for seed in range(2)]
    given = [step_input(batch(seed, 160)) for seed in range(2)]
    expected = [m.training_forward_pass(g).loss for m, g in zip(modules, given, strict=True)]
    wrong: list[Any] = []

    def train(at: int) -> None:
        for _ in range(20):
            loss: Tensor = modules[at].training_forward_pass(given[at]).loss
            loss.backward()
            if not torch.allclose(loss, expected[at], rtol=1e-5):
                wrong.append((at, loss))

    def install() -> None:
        for _ in range(20):
            saelens.install()
            saelens.uninstall()

    def caught(run: Any, *args: Any) -> None:
        try:
            run(*args)
        except Exception as error:
            wrong.append(error)

    tasks = [(train, 0), (train, 1), (install,), (install,)]
    threads = [threading.Thread(target=caught, args=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    saelens.uninstall()
    assert not wrong
    assert not hasattr(saes.JumpReLUSAE.encode, "__wrapped__")
