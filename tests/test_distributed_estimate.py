"""The cost model beside the collectives of a real step, counted byte by byte."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from sharded import mesh_of
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import gemmascope_fast as gsf
from gemmascope_fast.distributed import Rates, estimate
from gemmascope_fast.distributed import trainer as trainers
from gemmascope_fast.distributed import updates as updating
from gemmascope_fast.distributed.estimate import GATHERED
from gemmascope_fast.training.settings import Settings
from gemmascope_fast.training.sources import TensorSource

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"d_in": 16, "d_sae": 60, "batch_size": 48}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


class Counting(TorchDispatchMode):
    """Bytes and collectives of every group: of what is reduced, and of what a gather returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = next(a for a in args if isinstance(a, torch.ScriptObject))
            name = dist.ProcessGroup.unbox(group).group_name
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.bytes.setdefault(name, []).append(size)
        return func(*args, **(kwargs or {}))


def counted(dp: int, tp: int, kind: str, d_out: int) -> dict[str, Any]:
    settings = Settings(
        *(SIZES["d_in"], d_out, SIZES["d_sae"], 20, gsf.Preset(bandwidth=0.1)),
        **{"target_l0": 6.0, "batch_size": SIZES["batch_size"], "kind": kind},  # type: ignore[arg-type]
    )
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    source = TensorSource(x, x[:, :d_out] if kind == "transcoder" else None)
    trainer = trainers.MeshTrainer(source, settings, mesh_of(dp, tp))
    travelled: list[int] = [0]
    summed = updating.sum_gradients_
    updating.sum_gradients_ = lambda *args: travelled.append(summed(*args)) or travelled[-1]
    trainer.step()
    with CommDebugMode() as comm, Counting() as mode:
        metrics = trainer.step()
    updating.sum_gradients_ = summed
    groups = {"tp": trainer.layout.tp_group, "dp": trainer.layout.dp_group}
    found = {
        link: mode.bytes.get(group.group_name, []) if group is not None else []
        for link, group in groups.items()
    }
    total = sum(map(len, found.values()))
    assert comm.get_total_counts() == total
    return {**found, "touched": travelled[-1], "blocks": int(metrics["blocks"])}


@pytest.mark.parametrize("dp, tp, kind, d_out", [
    (1, 3, "sae", 16), (2, 1, "sae", 16), (2, 2, "sae", 16), (2, 2, "transcoder", 7),
])  # fmt: skip
def test_payloads_are_those_of_a_step(
    ranks: Ranks, dp: int, tp: int, kind: str, d_out: int
) -> None:
    found = ranks.run(dp * tp, counted, dp, tp, kind, d_out)[0]
    extra = {"touched": found["touched"]} if dp > 1 else {}
    made = estimate(
        **SIZES, dp=dp, tp=tp, kind=kind, d_out=d_out, l0=6.0, blocks=found["blocks"], **extra
    )
    for link, traffic in (("tp", made.tp), ("dp", made.dp)):
        assert sum(traffic.payload.values()) == sum(found[link]), (link, traffic, found[link])
        assert traffic.collectives == len(found[link]), (link, traffic, found[link])


def test_a_ring_sends_its_share_of_the_payload() -> None:
    made = estimate(d_in=64, d_sae=4096, dp=2, tp=4)
    assert made.tp.sent == sum(
        size * 3 / 4 * (1 if name in GATHERED else 2) for name, size in made.tp.payload.items()
    )
    assert made.dp.sent == sum(made.dp.payload.values())
    alone = estimate(d_in=64, d_sae=4096)
    assert alone.tp.sent == alone.dp.sent == 0 == alone.seconds["tp"]
    s = made.seconds
    assert made.step_seconds == s["products"] + s["gathers"] + s["tp"] + s["dp"]
    assert made.tokens_per_second == pytest.approx(8192 / made.step_seconds)
    assert f"a step takes at least {made.step_seconds * 1e3:.1f} ms" in str(made)


def test_the_bytes_of_memory_are_those_of_touched_rows() -> None:
    """Every latent fires: all rows of both matrices, and x, reconstruction and its gradient."""
    sizes = {"d_in": 8, "d_out": 4, "kind": "transcoder", "d_sae": 10, "l0": 10.0}
    tokens = 1000 * (8 + 2 * 4)
    alone = estimate(**sizes, batch_size=1000, rates=Rates(memory=1.0))
    assert alone.seconds["gathers"] == 4 * (10 * 4 + 2 * 2 * 10 * 12 + tokens)
    two = estimate(**sizes, batch_size=2000, dp=2, rates=Rates(memory=1.0))
    assert two.seconds["gathers"] == 4 * (10 * 4 * 2 + (2 * 2 + 2) * 10 * 12 + tokens)
    small = estimate(**sizes, batch_size=1000, moments="8bit", rates=Rates(memory=1.0))
    assert alone.seconds["gathers"] - small.seconds["gathers"] == 2 * 3 * 10 * 12
    few = estimate(**sizes | {"l0": 0.01}, batch_size=1000, rates=Rates(memory=1.0))
    assert few.seconds["gathers"] == 4 * (7 * 4 + 2 * 2 * 7 * 12 + tokens)  # 10 (1 - 1 / e)


def test_time_is_a_floor_of_what_was_measured() -> None:
    """Steps with Adam on one H200, every latent firing alike, as the model has it."""
    rows = json.loads((ROOT / "bench/results/gpu_check_h200.json").read_text())["rows"].values()
    seen = [r for r in rows if r["part"] == "step" and r["shape"]["firing"] == "uniform"]
    assert seen
    for row in seen:
        took, shape = row["times"]["ours, with Adam(fused=True)"], row["shape"]
        sizes = {"d_in": shape["d"], "d_sae": shape["d_sae"], "batch_size": shape["n"]}
        options = {"l0": shape["l0"], "dtype": torch.bfloat16, "moments": "8bit"}
        floor = estimate(**sizes, **options).step_seconds
        # Rows that the cache holds count once, however often they are read: a small dictionary's.
        most = 2.5 if shape["d_sae"] >= 65536 else 3.5
        assert floor < took["median_s"] < most * floor, shape


def test_more_slices_take_less_memory_and_products() -> None:
    sizes = {"d_in": 1152, "n_layers": 26, "d_sae": 20_160, "kind": "clt"}
    one, eight = estimate(**sizes), estimate(**sizes, tp=8)
    columns = sum((26 - i) * 1152 + 1152 for i in range(26))
    assert one.memory["weights"] == 4 * 20_160 * columns
    assert eight.memory["weights"] * 8 == one.memory["weights"]
    assert eight.seconds["products"] * 8 == pytest.approx(one.seconds["products"])


@pytest.mark.parametrize(
    "options, text",
    [
        ({"tp": 0}, "tp must be >= 1, got 0"),
        ({"kind": "vae"}, "kind must be one of sae, transcoder, crosscoder, clt, got 'vae'"),
        ({"n_layers": 2}, "n_layers is for crosscoders and CLTs, got 2"),
        ({"d_sae": 9, "tp": 4}, "d_sae=9 over tp=4 leaves a rank without latents"),
        ({"l0": 0}, "l0 must be"),
        ({"l0": 65}, "l0 must be at most the 64 latents, got 65"),
        ({"d_in": "8"}, "d_in must be an int, got str"),
        ({"kind": "clt", "batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"dtype": "bf16"}, "dtype must be float32, bfloat16, float16 or float64, got 'bf16'"),
        ({"kind": "clt", "moments": "fp8"}, "moments must be one of fp32, 8bit, got 'fp8'"),
        ({"l0": 8, "touched": 65}, "touched must be in \\[0, latents of a rank=64\\], got 65"),
        ({"blocks": 0}, "blocks must be >= 1, got 0"),
        ({"l0": 8, "rates": 5}, "rates must be Rates or None, got int"),
    ],
)
def test_what_no_mesh_can_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"distributed.estimate: {text}"):
        estimate(**({"d_in": 8, "d_sae": 64} | options))


def test_the_table_of_the_docs_is_what_the_command_prints() -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from distributed_costs import BEGIN, END, PAGE, table
    finally:
        sys.path.pop(0)
    assert PAGE.read_text().split(BEGIN)[1].split(END)[0] == table()
