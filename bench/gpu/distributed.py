"""Part `distributed`: latents on several devices, against one process and against the cost model.

The functions that the tests run on gloo ranks (`tests/test_distributed*.py`), here on devices: over
NCCL where there are several. On a single device one rank runs over NCCL, and two that share it over
gloo, which copies their tensors through the CPU: that checks where tensors lie and what the kernels
make of a part, not what NCCL does between devices.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gemmascope_fast.distributed import Rates, communication, estimate
from gemmascope_fast.distributed.estimate import GATHERED, Traffic
from gemmascope_fast.distributed.updates import BUFFER_BYTES

from .context import ROOT, Context, Skip

SECONDS = 120.0
"""Of a run on a GPU: kernels are compiled in it."""
STEPS = 10
DRIFT = 1e-4
"""Of weights after `STEPS` updates with sums in another order, relative to the largest."""
REPETITIONS = 9


@dataclass(frozen=True)
class Way:
    """How the ranks of a run talk, and where they compute."""

    backend: str
    device: str
    world: int

    @property
    def meshes(self) -> list[tuple[int, int]]:
        """All ranks as one copy, and as two where that leaves whole ones."""
        found = [(1, self.world)]
        return found + [(2, self.world // 2)] if self.world % 2 == 0 else found


def way_of(device: str, devices: int) -> Way:
    """NCCL where two ranks have a device each, at most four of them."""
    if device == "cpu" or devices < 2:
        return Way("gloo", device, 2)
    return Way("nccl", device, min(devices, 4))


def distributed(ctx: Context) -> None:
    """Values, training, resharding and export on every mesh; then the collectives of a step."""
    cpu = ctx.settings.device == "cpu"
    way = way_of(ctx.settings.device, 0 if cpu else torch.cuda.device_count())
    if not cpu and way.backend != "nccl":
        ctx.row("several ranks, nccl", _no_nccl)
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from ranks import Ranks

        seconds, backend = (60.0, "gloo") if cpu else (SECONDS, "nccl")
        with closing(Ranks(seconds, backend, way.device)) as alone:
            ctx.row(f"one rank, {backend}", lambda: _plain(lambda: _one_rank(alone)), seconds / 8)
        with closing(Ranks(seconds, way.backend, way.device)) as ranks:
            for name, measure in rows(ctx, way, ranks):
                run = lambda measure=measure: _plain(measure)  # noqa: E731
                ctx.row(f"{name}, {way.backend}", run, seconds / 8)
    finally:
        sys.path.remove(str(ROOT / "tests"))


def rows(ctx: Context, way: Way, ranks: Any) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and measurement of every row."""
    for dp, tp in way.meshes:
        mesh = f"dp {dp} x tp {tp}"
        yield f"values {mesh}", lambda dp=dp, tp=tp: _values(ranks, dp, tp)
        yield f"training {mesh}", lambda dp=dp, tp=tp: _training(ranks, dp, tp)
        yield f"export {mesh}", lambda dp=dp, tp=tp: _export(ranks, dp, tp)
    yield "resharding", lambda: _resharding(ranks, way)
    for link in ("tp", "dp"):
        yield f"collectives {link} {way.world}", lambda link=link: _link(ctx, way, ranks, link)


def _no_nccl() -> dict[str, Any]:
    raise Skip("one CUDA device, and NCCL needs one for each rank")


def _plain(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a rank said last goes first: `ranks` reports with tracebacks."""
    try:
        return run()
    except AssertionError as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise RuntimeError("\n".join([lines[-1], *lines[-18:]])) from error


# ---- what the tests assert


def _one_rank(ranks: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        drift = ranks.run(1, resumed, folder)[0]
    assert drift < DRIFT, f"relative to the largest: {drift}"
    return {"drift": drift, "line": f"trained, saved and read again within {drift:.1e}"}


def resumed(folder: str) -> float:
    """On the only rank: a run with checkpoints, read again, against one without a mesh."""
    import ranks
    from test_distributed_training import given, on_mesh, options_of, trained

    changes = {"steps": STEPS, "out": folder, "checkpoint_every": 4}
    on_mesh(1, 1, changes)
    _, weights = on_mesh(1, 1, changes)  # from the last checkpoint
    _, alone = trained(given("sae"), None, device=ranks.device, **options_of({"steps": STEPS}))
    return max(relative(weights[name], p) for name, p in alone.named_parameters())


def _values(ranks: Any, dp: int, tp: int) -> dict[str, Any]:
    import test_distributed as values
    import test_distributed_communication as selections
    import test_distributed_loss as losses

    for body in (values.every_kind, selections.with_ties, selections.layers, losses.every_path):
        ranks.run(dp * tp, body, dp, tp)
    told = "encode, TopK, BatchTopK, decode, loss, gradients; layers; ties"
    return {"line": f"as one process: {told}"}


def _training(ranks: Any, dp: int, tp: int) -> dict[str, Any]:
    worst = ranks.run(dp * tp, drifts, dp, tp)[0]
    bad = {name: drift for name, drift in worst.items() if not drift < DRIFT}
    assert not bad, f"after {STEPS} steps, relative to the largest: {bad}"
    return {
        "drifts": worst,
        "line": f"{STEPS} steps within {max(worst.values()):.1e} of one process",
    }


def drifts(dp: int, tp: int) -> dict[str, float]:
    """On a rank: how far losses and weights of a run on the mesh are from those of one process."""
    import ranks
    from test_distributed_training import RUNS, given, on_mesh, options_of, trained

    found: dict[str, float] = {}
    for name in ("jumprelu", "dead topk", "batchtopk", "transcoder"):
        changes = RUNS[name] | {"steps": STEPS}
        options = options_of(changes)
        source = given(options.get("kind", "sae"))
        losses, alone = trained(source, None, device=ranks.device, **options)
        seen, weights = on_mesh(dp, tp, changes)
        pairs = [(weights[key], p) for key, p in alone.named_parameters()]
        if seen:  # rank 0's
            pairs.append((torch.tensor(seen), torch.tensor(losses)))
        found[name] = max(relative(mine, theirs) for mine, theirs in pairs)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest element; NaN where one is."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def _export(ranks: Any, dp: int, tp: int) -> dict[str, Any]:
    from sharded import sae
    from test_distributed_training import exported

    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        torch.manual_seed(0)  # as in every rank
        module = sae()
        module.metadata["model_name"] = "m"
        module.save_pretrained(whole, dtype=torch.bfloat16, l0=7)
        said = ranks.run(dp * tp, exported, dp, tp, "sae", str(parts))
        assert set(said) == {""}, said
        for path in whole.iterdir():
            assert path.read_bytes() == (parts / path.name).read_bytes(), path.name
    return {"line": "the file of one process, byte for byte"}


def _resharding(ranks: Any, way: Way) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        worst = ranks.run(way.world, moved, way.meshes[::-1], folder)[0]
    assert worst < DRIFT, f"relative to the largest: {worst}"
    meshes = " to ".join(f"{dp} x {tp}" for dp, tp in way.meshes[::-1])
    return {"drift": worst, "line": f"{meshes} within {worst:.1e} of a run that stayed"}


def moved(meshes: list[tuple[int, int]], folder: str) -> float:
    """On a rank: a run that goes on on another mesh, against one on the first."""
    from test_distributed_training import stretch

    for at, (dp, tp) in enumerate(meshes, 1):
        found = stretch(dp, tp, f"{folder}/moved", 8 * at, {})
    expected = stretch(*meshes[0], f"{folder}/stayed", 8 * len(meshes), {})
    assert found[2] == expected[2], "the data position"
    return max(relative(found[1][name], p) for name, p in expected[1].items())


# ---- collectives beside the cost model


def _link(ctx: Context, way: Way, ranks: Any, link: str) -> dict[str, Any]:
    if way.device == "cuda" and way.backend != "nccl":
        raise Skip("one CUDA device: gloo tells nothing about links")
    s = ctx.settings
    step = {"d_in": s.d, "d_sae": s.latents[-1], "batch_size": s.n, "l0": s.l0s[0]}
    made = estimate(**step, **{link: way.world}, dtype=torch.bfloat16, moments="8bit")
    payload = dict(made.tp.payload if link == "tp" else made.dp.payload)
    if link == "dp":
        payload["rows"] = min(payload["rows"], BUFFER_BYTES)  # so many travel at a time
    seconds, rates = ranks.run(way.world, timed, payload)[0], Rates()
    found = []
    for name, size in payload.items():
        sent = Traffic(way.world, {name: size}, 1).sent
        row = {"name": name, "bytes": size, "sent": sent, "median_s": seconds[name]}
        found.append({**row, "model_s": sent / rates.tp + rates.collective})  # one machine's link
    took, said = (1e3 * sum(row[key] for row in found) for key in ("median_s", "model_s"))
    largest = max(found, key=lambda row: row["bytes"])
    least = 1e6 * min(row["median_s"] for row in found)
    told = f"{took:.3f} ms, {said:.3f} ms by the model with an H200's rates; {largest['name']} "
    told += f"{largest['sent'] / largest['median_s'] / 1e9:.3g} GB/s, the shortest {least:.0f} us"
    return {"collectives": found, "line": told}


def timed(payload: dict[str, int]) -> dict[str, float]:
    """On a rank: median seconds of a collective of so many bytes, as `Traffic` counts them."""
    import ranks

    group, world = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    found = {}
    for name, size in payload.items():
        share = max(size // world, 1) if name in GATHERED else max(size, 1)
        t = torch.zeros(share, dtype=torch.uint8, device=ranks.device)
        if share % 4 == 0:
            t = t.view(torch.float32)
        call = communication.all_gather if name in GATHERED else communication.all_reduce
        found[name] = statistics.median(_seconds(call, t, group) for _ in range(REPETITIONS))
    return found


def _seconds(call: Callable[..., Any], t: Tensor, group: Any) -> float:
    """Of one collective that all ranks begin together."""
    communication.all_reduce(torch.zeros(1, device=t.device), group)
    _synchronize(t.device)
    began = time.perf_counter()
    call(t, group)
    _synchronize(t.device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
