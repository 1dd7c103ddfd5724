"""Lines of `bench/gpu_check.py` that only a GPU reaches, on stand-ins for `torch.cuda`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from gpu import (  # noqa: E402
    dense,
    encoders,
    machine,
    steps,
    streams,
    suite,
    supervise,
    timing,
    train,
)
from gpu.context import COMMIT, Context, Fatal, Settings, Shape, commit  # noqa: E402
from gpu.problem import problem  # noqa: E402
from gpu.state import Results  # noqa: E402

CUDA = torch.device("cuda")


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)

    def synchronize(self) -> None:
        self.waited.append("synchronize")


class Event:
    """Counts what was recorded; a call takes 3 ms."""

    log: list[str] = []

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.log.append("event")

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 3.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`torch.cuda` of an H100 whose tensors live on the CPU."""
    properties = SimpleNamespace(
        **{"L2_cache_size": 64, "total_memory": 80 << 30, "name": "NVIDIA H100 80GB HBM3"},
        **{"major": 9, "minor": 0, "multi_processor_count": 132},
    )
    state = SimpleNamespace(
        allocated=1000, peak=1500, broken=False, emptied=0, properties=properties
    )

    def synchronize(device: Any = None) -> None:
        if state.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def empty_cache() -> None:
        state.emptied += 1

    fakes: dict[str, Any] = {
        "get_device_properties": lambda device=None: properties,
        "is_available": lambda: True,
        "synchronize": synchronize,
        "empty_cache": empty_cache,
        "memory_allocated": lambda device=None: state.allocated,
        "max_memory_allocated": lambda device=None: state.peak,
        "max_memory_reserved": lambda device=None: state.peak,
        "reset_peak_memory_stats": lambda device=None: None,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "_sleep": lambda cycles: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph: contextlib.nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: empty(*a, **{n: v for n, v in k.items() if n != "device"})
    )
    monkeypatch.setattr(encoders, "copy_bytes", lambda ctx: 1 << 16)
    return state


def on_cpu(path: Path) -> Context:
    return Context("smoke", Settings("cpu", quick=True), Results(path / "r.json"), 100)


def test_a_call_lies_between_two_events_behind_the_flush(gpu: Any) -> None:
    Event.log.clear()
    watch = timing.Stopwatch(CUDA)
    assert watch._flush.nbytes == 128, "twice the cache"
    watch._flush = SimpleNamespace(fill_=lambda value: Event.log.append("flush"))  # type: ignore
    assert watch.seconds(lambda: Event.log.append("call")) == 0.003
    assert Event.log == ["flush"] * timing.LEAD_FILLS + ["event", "call", "event"]
    assert watch.peak_extra_bytes(lambda: None) == 500


def test_memory_is_given_back_after_a_contender_that_did_not_fit(gpu: Any) -> None:
    def large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB")

    found = timing.compare({"ours": lambda: None, "large": large}, CUDA, 0.01)
    assert found["large"] == {"unavailable": "does not fit"} and gpu.emptied == 1
    assert found["ours"]["median_s"] == 0.003 and found["ours"]["peak_extra_bytes"] == 500


def test_a_context_that_is_broken_stops_everything(gpu: Any) -> None:
    def break_it() -> None:
        gpu.broken = True
        raise RuntimeError("CUDA error")

    with pytest.raises(Fatal, match="illegal memory access"):
        timing.compare({"ours": break_it}, CUDA, 0.01)


def test_contenders_known_to_be_too_large_are_not_tried(gpu: Any) -> None:
    shape = Shape(8192, 5376, 2**20, 64)
    assert dense.fits(shape, CUDA, 4, 4) == "does not fit: needs 106 GiB"
    assert dense.fits(shape, CUDA, 2, 1) == ""


@pytest.mark.parametrize("check", [streams.side_stream, streams.two_streams])
def test_stream_checks_run_and_catch_other_bits(
    check: Any, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_cuda_only", lambda device: None)
    assert check(on_cpu(tmp_path))
    step = streams.sparse_step
    calls: list[int] = []

    def other_later(p: Any) -> Any:
        calls.append(1)
        recon, found, grads = step(p)
        return (
            recon + (len(calls) > 2 or check is streams.side_stream and len(calls) > 1),
            found,
            grads,
        )

    monkeypatch.setattr(streams, "sparse_step", other_later)
    with pytest.raises(AssertionError, match="stream"):
        check(on_cpu(tmp_path))


def test_a_graph_is_captured_and_its_replays_compared(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's replay does nothing: the comparison must notice."""
    monkeypatch.setattr(streams, "_cuda_only", lambda device: None)
    with pytest.raises(AssertionError, match="replay 0 differs"):
        streams.captured_graph(on_cpu(tmp_path))
    compared: list[int] = []
    monkeypatch.setattr(streams, "same", lambda a, b: compared.append(len(a)) or len(a) == len(b))
    assert streams.captured_graph(on_cpu(tmp_path)) == "3 replays equal to eager calls"
    assert compared == [6, 6, 6]


def test_the_device_is_described(gpu: Any, tmp_path: Path, monkeypatch: Any) -> None:
    told = {"name": "NVIDIA H100 80GB HBM3", "compute_cap": "9.0", "clocks.sm": "1980 MHz"}
    monkeypatch.setattr(machine, "smi", lambda *fields: {f: told.get(f, "") for f in fields})
    ctx = Context("environment", Settings("cuda"), Results(tmp_path / "r.json"), 100)
    about = machine._device(ctx)["device"]
    assert (about["name"], about["capability"], about["processors"]) == (told["name"], "9.0", 132)
    assert about["query"]["clocks.sm"] == "1980 MHz"
    assert machine.slug("cuda") == "h100_80gb_hbm3"


def test_without_a_device_the_program_says_so(monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "smi", lambda *fields: {})
    monkeypatch.setattr(machine, "output", lambda *args: "")
    with pytest.raises(SystemExit, match="no CUDA device here"):
        machine.slug("cuda")


def test_a_build_names_the_architecture_and_shows_what_failed(monkeypatch: Any) -> None:
    ran: list[Any] = []

    def run(command: list[str], env: dict[str, str], **options: Any) -> Any:
        ran.append((command[1:], env["CUDAARCHS"], env["CUDACXX"]))
        return SimpleNamespace(returncode=len(ran) - 1, stdout="one\n", stderr="error: no\n")

    monkeypatch.setattr(machine, "smi", lambda *fields: {"compute_cap": "9.0"})
    monkeypatch.setattr(machine, "tool", lambda name: f"/opt/cuda/bin/{name}")
    monkeypatch.setattr(machine, "subprocess", SimpleNamespace(run=run))
    assert machine._run_build(9)["architectures"] == "90a-real"
    assert ran == [(["setup.py", "-q", "build_ext", "--inplace"], "90a-real", "/opt/cuda/bin/nvcc")]
    with pytest.raises(RuntimeError, match="ended with 1\none\nerror: no"):
        machine._run_build(9)


def test_the_sanitizer_is_called_without_the_caching_allocator(
    tmp_path: Path, monkeypatch: Any
) -> None:
    seen: list[Any] = []

    def run(command: list[str], env: dict[str, str], limit_s: float) -> tuple[int, str]:
        seen.append((command, env["PYTORCH_NO_CUDA_MEMORY_CACHING"], limit_s))
        return 0, "========= ERROR SUMMARY: 0 errors"

    monkeypatch.setattr(suite, "tool", lambda name: f"/opt/{name}")
    monkeypatch.setattr(suite, "run", run)
    ctx = Context("sanitizer", Settings("cuda"), Results(tmp_path / "r.json"), 400)
    suite.sanitizer(ctx)
    assert [c[:3] for c, _, _ in seen] == [
        ["/opt/compute-sanitizer", "--tool", name] for name in suite.SANITIZER_TOOLS
    ]
    assert {caching for _, caching, _ in seen} == {"1"}
    assert 90 < seen[0][2] < 100 and 380 < seen[3][2] < 400, "a share each, the last what is left"
    assert ctx.results.verdict("sanitizer") == "done"


def test_a_dense_start_that_does_not_fit_is_a_finding(tmp_path: Path, monkeypatch: Any) -> None:
    def no_memory(*args: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "_loss_seconds", no_memory)
    shape = Shape(8, 16, 64, 32)
    found = train._dense_start(on_cpu(tmp_path), shape)
    assert found == {"status": "skipped", "reason": "does not fit"}


def test_no_other_contender_writes_to_weights_that_have_codes(monkeypatch: Any) -> None:
    """A step of torch's Adam makes codes old of whatever shares memory with its parameters."""
    p = problem(Shape(8, 16, 64, 4), torch.device("cpu"))
    modules: list[Any] = []
    adam_step = steps.adam_step
    monkeypatch.setattr(steps, "adam_step", lambda sae, x: modules.append(sae) or adam_step(sae, x))
    assert steps.screened_step(p) == "nothing on this machine would use the codes"
    (sae,) = modules
    assert sae.screened is not None and sae.W_dec.data_ptr() == p.W_dec.data_ptr()
    assert sae.W_enc.data_ptr() != p.W_enc.data_ptr()
    assert torch.equal(sae.W_enc, p.W_enc) and sae.W_enc.stride() == p.W_enc.stride()


def test_clocks_are_read_while_the_device_is_warm(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(supervise, "smi", lambda *fields: {"clocks.sm": "1980 MHz"})
    monkeypatch.setitem(supervise.PARTS, "ceilings", "encoders")
    monkeypatch.setattr(encoders, "ceilings", lambda ctx: None)
    supervise.work("ceilings", Settings("cuda"), tmp_path / "r.json", 9)
    assert Results(tmp_path / "r.json").data["clocks"] == {"ceilings": {"clocks.sm": "1980 MHz"}}


def test_a_copy_without_git_can_be_told_its_state(monkeypatch: Any) -> None:
    monkeypatch.setenv(COMMIT, "v1-3-gabc")
    assert commit() == "v1-3-gabc"
