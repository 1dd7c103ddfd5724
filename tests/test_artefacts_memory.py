"""Peak resident memory of `load` and `save_pretrained`, in a process of their own."""

import subprocess
import sys

import pytest
from attacks import arrays
from attacks.published import scope_1, scope_2

PEAK = """
import sys, torch, gemmascope_fast as gsf

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(key))

source, small, dtype, save = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4]
gsf.load(small).save_pretrained(save)  # code, thread pools
if save != small:
    module = gsf.load(source)
before = status("VmRSS")
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak restarts here
except OSError:
    pass  # then the result can only be too high
if save != small:
    module.save_pretrained(save)
else:
    module = gsf.load(source, dtype=getattr(torch, dtype))
print((status("VmHWM") - before) / sum(p.nbytes for p in module.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """201 MB in both formats."""
    folder = tmp_path_factory.mktemp("large")
    tensors = arrays(768, 32768)
    scope_2(folder / "two", tensors)
    scope_1(folder / "one" / "params.npz", tensors)
    scope_2(folder / "small", arrays())
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "source, dtype, saves, limit",
    [
        ("two", "float32", False, 1.25),
        ("two", "bfloat16", False, 1.4),
        ("one", "float32", False, 1.25),
        ("two", "float32", True, 0.25),
    ],
)
def test_peak_memory(source, dtype, saves, limit, large, tmp_path):
    """Both add a few blocks of 8 MiB: of 201 MB, of 101 MB as bfloat16."""
    small = str(large / "small")
    target = str(tmp_path) if saves else small
    command = [sys.executable, "-c", PEAK, str(large / source), small, dtype, target]
    # The kernel unmaps read pages late when the machine is busy: the code's own peak is the lowest.
    peaks: list[float] = []
    while len(peaks) < 3 and (not peaks or min(peaks) > limit):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
    print(f"peak over the weights: {peaks}")
    assert min(peaks) <= limit
    assert min(peaks) >= (0.0 if saves else 0.95)
