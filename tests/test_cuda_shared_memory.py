"""What launches ask of shared memory, on each architecture that the library is built for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cuda_host import CSRC, build, missing, output

if missing():
    pytest.skip(missing(), allow_module_level=True)

KIB = 1024
DEVICES = {  # shared memory of a block and of a multiprocessor, bytes
    80: (163 * KIB, 164 * KIB),
    86: (99 * KIB, 100 * KIB),
    89: (99 * KIB, 100 * KIB),
    90: (227 * KIB, 228 * KIB),
    100: (227 * KIB, 228 * KIB),
    120: (99 * KIB, 100 * KIB),
}
SMALL = {capability for capability, (block, _) in DEVICES.items() if block < 100 * KIB}
STATIC = 2 * KIB  # more than any kernel but the feature pass has of its own, tests/cuda_budget.json

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include "cuda/adam_row.cuh"
#include "cuda/encode_few_kernel.cuh"
#include "cuda/encode_tile_kernel.cuh"
#include "cuda/fused_sparse_step_kernel.cuh"
using namespace gemmascope_fast;

FeaturePass pass(int64_t cols, int dtype, bool decoder, bool encoder) {
  FeaturePass p = {};
  p.decoder = p.dots = decoder;
  p.encoder = encoder;
  p.W_dec.cols = p.g.cols = p.x.cols = cols;
  p.W_dec.dtype = p.g.dtype = p.x.dtype = dtype;
  p.W_dec.wide = p.g.wide = p.x.wide = 1;
  return p;
}

int main(int, char** argv) {
  const int capability = atoi(argv[1]), block = atoi(argv[2]), processor = atoi(argv[3]);
  std::printf("large %d\nsmall %d\nfew %d\nadam %d\n", LargeTile::kShared, SmallTile::kShared,
              kFewShared, static_cast<int>(adam_row_bytes(kAdamLargestRow)));
  const int64_t own = int64_t(sizeof(FeatureShared)) + kFinishShared;
  for (const int64_t cols : {64, 640, 1152, 2048, 2304, 3840, 5376, 8192, 8200}) {
    for (const int dtype : {kBFloat16, kFloat32}) {
      for (const int parts : {1, 2, 3}) {
        for (const bool adam : {false, true}) {
          const FeaturePass p = pass(cols, dtype, parts & 1, parts & 2);
          const FeatureShape s = feature_shape(p, block, processor,
                                               adam ? &AdamFinish::blocks : &feature_blocks,
                                               capability);
          std::printf("pass %d %d %d %d %d %d %d %d\n", int(cols), int(dtype == kFloat32), parts,
                      int(adam), s.K, s.threads, s.stages, int(s.bytes + own));
        }
      }
    }
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    emulation = "testing/cuda_fibers.cpp", "testing/cuda_stacks.cpp"
    return build(tmp_path_factory.mktemp("shared"), PROGRAM, *emulation)


def asked(program: Path, capability: int) -> list[list[str]]:
    """What each launch asks for there, a line each."""
    sizes = [str(bytes) for bytes in DEVICES[capability]]
    lines = [line.split() for line in output(program, str(capability), *sizes).splitlines()]
    assert len(lines) == 4 + 9 * 2 * 3 * 2
    return lines


def passes(program: Path, capability: int) -> dict[tuple[int, ...], tuple[int, ...]]:
    """(columns, float32, parts, Adam) to (K, threads, stages, bytes); K is 0 where none fits."""
    rows = [tuple(map(int, line[1:])) for line in asked(program, capability)[4:]]
    return {row[:4]: row[4:] for row in rows}


@pytest.mark.parametrize("capability", DEVICES)
def test_every_launch_fits_into_a_block(program: Path, capability: int) -> None:
    most, _ = DEVICES[capability]
    for name, bytes in asked(program, capability)[:4]:
        # The large tile has nothing of its own, and all that 8.6 has.
        assert int(bytes) + (0 if name == "large" else STATIC) <= most, name
    for (columns, *_), (K, threads, stages, bytes) in passes(program, capability).items():
        if K > 0:
            assert bytes <= most and stages >= 1 and K * threads * 8 >= columns


@pytest.mark.parametrize("capability", DEVICES)
def test_rows_that_do_not_fit_are_those_that_slabs_take(program: Path, capability: int) -> None:
    found = passes(program, capability)
    without = {key for key, (K, *_) in found.items() if K == 0}
    too_long = {key for key in found if key[0] > 8192}
    # Of 8,192 columns in float32 both rows and W_dec are 96 KiB: one part at a time is a slab's.
    large = {(8192, 1, 3, adam) for adam in (0, 1)} if capability in SMALL else set()
    assert without == too_long | large


def test_a_pass_keeps_the_blocks_that_registers_allow(program: Path) -> None:
    # 5,376 columns of bfloat16, both parts: K, threads, stages. Adam has three blocks on 9.0, two
    # on 10.0.
    chosen = {c: [passes(program, c)[5376, 0, 3, adam][:3] for adam in (0, 1)] for c in DEVICES}
    assert chosen[90] == [(3, 224, 4), (3, 224, 2)]
    assert chosen[100] == [(3, 224, 4), (3, 224, 4)]
    assert chosen[80] == [(3, 224, 3), (3, 224, 2)]
    assert all(chosen[capability] == [(3, 224, 2), (3, 224, 2)] for capability in SMALL)


def test_no_launch_lowers_the_limit_of_one_in_another_thread() -> None:
    # A kernel has one limit on a device: it is the most there is, or a constant of the kernel's.
    constant = re.compile(r"(\w+::)?k[A-Z]\w*|shared_bytes_")
    found = {
        (path.name, limit)
        for path in (CSRC / "cuda").iterdir()
        for limit in re.findall(
            r"cudaFuncAttributeMaxDynamicSharedMemorySize,\s*([^;]*?)\)", path.read_text()
        )
    }
    assert ("shared_limit.h", "per_block - own") in found and len(found) == 4
    assert all(constant.fullmatch(limit) for name, limit in found if name != "shared_limit.h")
