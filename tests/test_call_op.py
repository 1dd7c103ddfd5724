"""How compiled kernels hand an op to another namespace: arguments, results, errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from oracle import assert_same
from samples import HANDED_OVER, problem, samples
from torch import Tensor

from gemmascope_fast import ops

pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")

CUDA_SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
SCRATCH, FORWARDING = "gemmascope_fast_scratch", "gemmascope_fast_testing"
FORWARDED = ("decode", "decode_", "sae_backward", "fused_sparse_step")


@pytest.fixture(scope="module")
def scratch() -> Iterator[Any]:
    """The reference in `SCRATCH`, which the C++ ops of `FORWARDING` call."""
    libraries = [torch.library.Library(name, "FRAGMENT") for name in (SCRATCH, FORWARDING)]
    for name in FORWARDED:
        for library in libraries:
            library.define(name + ops.TABLE[name].schema)
        libraries[0].impl(name, ops.TABLE[name].reference, "CPU")
    yield libraries[0]
    for library in libraries:
        library._destroy()


def copies(args: list[Any]) -> list[Any]:
    return pytree.tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, args)


@pytest.mark.parametrize(
    ("name", "at"), [(name, at) for name in FORWARDED for at in range(len(samples()[name]))]
)
def test_a_forwarded_op_is_the_op(scratch: Any, name: str, at: int) -> None:
    args = samples(problem(integer=True))[name][at]
    ours, theirs = copies(args), copies(args)
    tensors = [t for t in pytree.tree_leaves(ours) if isinstance(t, Tensor)]
    held = [t._use_count() for t in tensors]
    results = getattr(getattr(torch.ops, FORWARDING), name)(*ours)
    wanted = ops.TABLE[name].reference(*theirs)
    assert [t._use_count() for t in tensors] == held, "references to arguments are left"
    for mine, other in zip(
        pytree.tree_leaves((results, ours)), pytree.tree_leaves((wanted, theirs)), strict=True
    ):
        if isinstance(mine, Tensor):
            assert_same(mine, other)
            assert mine.data_ptr() in {t.data_ptr() for t in tensors} or mine._use_count() == 1
        else:
            assert mine == other


def test_arguments_arrive_as_they_are(scratch: Any) -> None:
    """Absent tensors, dtypes, lists: seen by the op that is called."""
    seen: list[Any] = []

    def record(*args: Any) -> tuple[Tensor, ...]:
        seen.extend(args)
        return tuple(torch.full((1,), float(i)) for i in range(6))

    args = samples()["sae_backward"][1]
    library = torch.library.Library(SCRATCH, "IMPL")
    library.impl("sae_backward", record, "CPU", allow_override=True)
    results = getattr(torch.ops, FORWARDING).sae_backward(*args)
    library._destroy()
    scratch.impl("sae_backward", ops.TABLE["sae_backward"].reference, "CPU", allow_override=True)
    assert [float(t) for t in results] == [0, 1, 2, 3, 4, 5]
    for mine, given in zip(seen, args, strict=True):
        same = mine.data_ptr() == given.data_ptr() if isinstance(given, Tensor) else mine == given
        assert same and type(mine) is type(given)


def test_an_error_of_the_called_op_is_an_error(scratch: Any) -> None:
    args = copies(samples()["decode"][0])
    args[2] = args[2][:-1]
    with pytest.raises(RuntimeError, match="torch_call_dispatcher"):
        getattr(torch.ops, FORWARDING).decode(*args)


@pytest.mark.parametrize("name", HANDED_OVER)
def test_compiled_kernels_hand_over_their_arguments_in_order(name: str) -> None:
    """Tensors of one type could be swapped without an error."""
    source = (CUDA_SOURCES / f"{name.rstrip('_')}.cu").read_text()
    call = rf'call_op\(&{name}_cuda,\s*"{ops.TRITON}::{name}",([^;]*)\);'
    (given,) = re.findall(call, source)
    schema = getattr(torch.ops.gemmascope_fast, name).default._schema
    assert [word.strip() for word in given.split(",")] == [a.name for a in schema.arguments]
