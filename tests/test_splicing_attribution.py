"""examples/attribution.py against dense autograd, and as a script."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gemmas
import pytest
import torch
from gemmas import MLP_IN, MLP_OUT, RESID, dense_acts, dense_recon, dense_splice, dictionary
from oracle import assert_same
from torch import Tensor

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "attribution.py"
STEPS = 8


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("attribution", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Problem:
    """Two prompts, a dictionary, and the metric of dense activations in the model."""

    def __init__(self, transcoder: bool) -> None:
        self.model = gemmas.gemma()
        self.sae = dictionary(transcoder=transcoder, affine=True) if transcoder else dictionary()
        self.points = (MLP_IN, MLP_OUT) if transcoder else (RESID, RESID)
        self.saes = {self.points if transcoder else RESID: self.sae}
        self.clean = gemmas.prompts(2)
        self.other = self.clean.clone()
        self.other[:, 5] = 44
        self.seen: list[Tensor] = []
        with torch.no_grad():
            for ids in (self.clean, self.other):
                with dense_splice(self.model, *self.points, self._see):
                    self.model(ids)
        self.start, self.end = self.seen

    def _see(self, x: Tensor, y: Tensor) -> Tensor:
        self.seen.append(dense_acts(self.sae, x))
        return y

    @staticmethod
    def metric(logits: Tensor) -> Tensor:
        return (logits[:, -1, 7] - logits[:, -1, 9]).sum()

    def of(self, acts: Tensor) -> Tensor:
        """The metric at the clean prompt with `acts [2, 9, 96]` and the clean error."""

        def replace(x: Tensor, y: Tensor) -> Tensor:
            left = y - dense_recon(self.sae, self.start, x)
            return dense_recon(self.sae, acts, x) + left

        with dense_splice(self.model, *self.points, replace):
            return self.metric(self.model(self.clean).logits)

    def slope(self, acts: Tensor) -> Tensor:
        leaf = acts.clone().requires_grad_()
        (found,) = torch.autograd.grad(self.of(leaf), leaf)
        return found


@pytest.fixture(params=[False, True], ids=["sae", "transcoder"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def assert_near(ours: Tensor, expected: Tensor) -> None:
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(ours, expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-3)


def test_endpoints_share_their_entries(example: Any, problem: Problem) -> None:
    start, end = example.endpoints(problem.model, problem.saes, problem.clean, problem.other)
    assert_same(start.indices, end.indices)
    assert_same(start.offsets, end.offsets)
    torch.testing.assert_close(start.to_dense(), problem.start)
    torch.testing.assert_close(end.to_dense(), problem.end)
    assert int((start.gate == 0).sum()) > 10, "latents that only the other prompt has"


def test_attribution_patching_is_the_dense_gradient_times_the_change(
    example: Any, problem: Problem
) -> None:
    arguments = (problem.model, problem.saes, problem.clean, problem.other, problem.metric)
    found = example.attribution_patching(*arguments).to_dense()
    assert_near(found, problem.slope(problem.start) * (problem.end - problem.start))


def test_integrated_gradients_are_the_dense_mean_and_complete(
    example: Any, problem: Problem
) -> None:
    arguments = (problem.model, problem.saes, problem.clean, problem.other, problem.metric)
    found = example.integrated_gradients(*arguments, STEPS).to_dense()
    change = problem.end - problem.start
    slopes = [problem.slope(problem.start + (step + 0.5) / STEPS * change) for step in range(STEPS)]
    assert_near(found, change * torch.stack(slopes).mean(0))
    with torch.no_grad():
        whole = problem.of(problem.end) - problem.of(problem.start)
    finer = example.integrated_gradients(*arguments, 4 * STEPS)
    torch.testing.assert_close(finer.values.sum(), whole, rtol=0.02, atol=0.01)


def test_activation_patching_sets_one_latent(example: Any, problem: Problem) -> None:
    change = (problem.end - problem.start).abs().sum((0, 1))
    latents = [*change.topk(3).indices.tolist(), int(change.argmin())]
    found = example.activation_patching(
        problem.model, problem.saes, problem.clean, problem.other, problem.metric, latents
    )
    expected = []
    with torch.no_grad():
        for latent in latents:
            patched = problem.start.clone()
            patched[..., latent] = problem.end[..., latent]
            expected.append(problem.of(patched) - problem.of(problem.start))
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-4, rtol=1e-3)
    assert found[-1] == 0 and float(found[:3].abs().min()) > 0


def test_the_script_prints_a_table(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    example.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["latent", "one", "gradient", "integrated", "patched"]
    assert len(lines) == 13
    patched, integrated = (float(lines[1].split()[at].strip(";")) for at in (6, 10))
    assert integrated == pytest.approx(patched, rel=0.02)
