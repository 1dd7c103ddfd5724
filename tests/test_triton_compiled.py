"""Every Triton kernel compiled ahead of time: resources, width of addresses, tensor cores."""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from compiling import (
    BUDGET,
    LIMITED,
    TARGETS,
    Report,
    compile_launches,
    measured,
    narrow_products,
    reports,
)
from compiling import specimens as all_specimens

from gemmascope_fast import ops
from gemmascope_fast.kernels import launching
from gemmascope_fast.kernels.latent_backward import latent_backward
from gemmascope_fast.kernels.latent_order import LatentOrder

if launching.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

SPECIMENS = all_specimens()
SLACK = 1.05
"""Instructions may grow by this factor: compiler releases schedule differently."""


class Compiled(dict[tuple[str, str], Future[list[Report]]]):
    """Reports by specimen and target."""

    def of(self, target: str) -> dict[str, list[Report]]:
        """Reports of every specimen on one target."""
        return {specimen: self[specimen, target].result() for specimen in SPECIMENS}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """Every specimen, compiled by two processes for the targets that the selected tests name."""
    items = [i for i in request.session.items if "compiled" in getattr(i, "fixturenames", ())]
    targets = sorted({i.callspec.params["target"] for i in items})
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        work = [(s, t) for t in targets for s in SPECIMENS]
        yield Compiled({at: pool.submit(reports, *at) for at in work})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("specimen", SPECIMENS)
def test_compiles_within_its_budget(compiled, specimen: str, target: str) -> None:
    found = compiled[specimen, target].result()
    budget = json.loads(BUDGET.read_text())[specimen][target]
    assert [r.kernel for r in found] == [b["kernel"] for b in budget]
    for report, limits in zip(found, budget, strict=True):
        got = measured(report)
        over = {
            key: (got[key], limits[key])
            for key in LIMITED
            if got[key] > limits[key] * (SLACK if key == "instructions" else 1)
        }
        assert not over, f"{report.kernel}: (now, budget) {over}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("specimen", SPECIMENS)
def test_no_32_bit_product_reaches_an_address(compiled, specimen: str, target: str) -> None:
    for report in compiled[specimen, target].result():
        assert report.narrow == [], report.kernel


@pytest.mark.parametrize("target", TARGETS)
def test_encoders_of_16_bit_weights_use_tensor_cores(compiled, target: str) -> None:
    encoders = {
        specimen: report.tensor_cores
        for specimen, found in compiled.of(target).items()
        for report in found
        if report.kernel == "_encode_tiles_kernel"
        and "fp32" not in specimen
        and specimen != "bf16 x, fp16 W"  # no common 16-bit format: products in float32
    }
    assert len(encoders) > 5 and all(encoders.values()), encoders


SPILLING = "_fused_sparse_step_kernel"
"""At d = 5376 in 16 bits it keeps two programs on a multiprocessor, as `sae_backward`, and spills:
within its budget."""


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_nothing_else_spills(compiled, target: str) -> None:
    spilling = {
        f"{report.kernel} ({specimen})": report.spills
        for specimen, found in compiled.of(target).items()
        for report in found
        if report.spills and not (report.kernel == SPILLING and report.registers == 128)
    }
    assert spilling == {}


ROUNDED = {
    *("_latent_backward_kernel", "_fused_sparse_step_kernel"),
    *("_adam_step_kernel", "_adam_slabs_kernel"),
}
"""Whose bits other kernels and other backends share."""


@pytest.mark.parametrize("target", TARGETS)
def test_the_optimizer_rounds_every_operation(compiled, target: str) -> None:
    loose = {r.kernel: r.loose for found in compiled.of(target).values() for r in found}
    dividing = set() if target.startswith("sm") else ROUNDED - {"_latent_backward_kernel"}
    assert {name: loose[name] for name in ROUNDED - dividing} == dict.fromkeys(
        ROUNDED - dividing, []
    )
    assert any(loose.values()), "the other kernels use fma"


TWINS = [
    ("step fused float32", "backward fused float32"),
    ("step fused bfloat16 8-bit", "backward fused bfloat16"),
    ("step fused bfloat16 8-bit momentum d=640", "backward fused bfloat16 d=640"),
]


@pytest.mark.parametrize("target", TARGETS)
def test_the_fused_step_sums_in_the_order_of_the_backward(compiled, target: str) -> None:
    for step, backward in TWINS:
        reports = compiled[step, target].result() + compiled[backward, target].result()
        sums = {r.kernel: r.sums[:3] for r in reports if r.kernel in ROUNDED}
        assert set(sums) == {"_latent_backward_kernel", "_fused_sparse_step_kernel"}
        walks = [r.sums[:3] for r in reports if r.kernel in ROUNDED]
        assert len(walks) == 4 and len(walks[0]) == 3
        assert all(walk == walks[0] for walk in walks), step


@pytest.mark.parametrize("target", TARGETS[:1])
def test_every_kernel_of_the_package_is_compiled(compiled, target: str) -> None:
    launched = {r.kernel for found in compiled.of(target).values() for r in found}
    assert launched == kernel_names()


def kernel_names() -> set[str]:
    """Names of all `@triton.jit` functions that are launched: they end in `_kernel`."""
    folder = Path(ops.__file__).parent / "kernels"
    sources = [p.read_text() for p in folder.glob("*.py")]
    return {name for text in sources for name in re.findall(r"^def (_\w+_kernel)\(", text, re.M)}


def test_the_scan_for_narrow_products_finds_one() -> None:
    ttir = """
    %c = arith.constant dense<3> : tensor<4xi32> loc(#loc)
    %p = tt.get_program_id x : i32 loc(#loc1)
    %a = arith.muli %p, %q : i32 loc(#loc2)
    %b = arith.extsi %a : i32 to i64 loc(#loc2)
    %r = tt.addptr %base, %b : !tt.ptr<f32>, i64 loc(#loc2)
    """
    assert narrow_products(ttir) == ["arith.muli %p, %q : i32"]
    assert narrow_products(ttir.replace("i32 loc(#loc2)", "i64 loc(#loc2)")) == []


def test_one_warp_cannot_overwrite_a_gradient_that_another_has_yet_to_read(monkeypatch) -> None:
    # 32 columns are summed inside each warp, so that no reduction makes the warps wait.
    config = {"BLOCK_E": 1, "SEGMENT": 256, "STAGES": 1, "num_warps": 8}
    monkeypatch.setattr(launching, "OVERRIDE", lambda name, shape, chosen: config)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n, latents, d_in, d_out, capacity = 64, 128, 1024, 32, 256
    tokens = new(capacity, dtype=torch.int32)
    order = LatentOrder(new(latents + 1, dtype=torch.int64), tokens, tokens, tokens, new(4, 256), n)
    matrices = new(latents, d_out), new(n, d_out), new(n, d_in), new(latents, d_in)
    found = compile_launches(
        "sm_90", lambda: latent_backward(order, *matrices, new(latents, d_out))
    )
    lines = found[0].assembly.splitlines()
    stores = [i for i, line in enumerate(lines) if "STG" in line]
    loads = [i for i, line in enumerate(lines) if "LDG" in line and i < stores[0]]
    between = lines[loads[-1] : stores[0]]
    assert any("BAR.SYNC" in line for line in between)
