"""Encoding in forked workers, and in several Python threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from conftest import native_absent
from oracle import assert_same
from torch import Tensor

import gemmascope_fast as gsf

OPS = ("jumprelu_encode", "topk_encode", "batchtopk_encode", "decode")
ABSENT = native_absent(OPS)
native = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)

FORKED = """
import os, torch
import gemmascope_fast as gsf
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(2)
torch.manual_seed(0)
sae, x = gsf.SAE(64, 2048, gsf.JumpReLU(0.2, 2.0)), torch.randn(8, 128, 64)

@torch.no_grad()
def run(rows):
    acts = sae.encode(rows)
    return torch.tensor([acts.nnz, float(acts.values.sum()), float(sae.decode(acts).sum())])

class Rows(Dataset):
    def __len__(self):
        return len(x)

    def __getitem__(self, at):
        return run(x[at])

expected = torch.stack([run(rows) for rows in x])  # the pool of threads is there when it forks
loader = DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
assert torch.equal(torch.cat(list(loader)), expected) and bool(expected.all())
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # two would wait for threads that the fork has not copied
    os._exit(0 if torch.equal(run(x[0]), expected[0]) else 1)
assert os.waitpid(child, 0)[1] == 0
print("the same bits")
"""


@native
def test_forked_workers_encode_the_same_bits(run_python: Callable[..., str]) -> None:
    assert run_python(FORKED) == "the same bits"


@native
def test_threads_that_train_at_once_get_the_bits_of_one() -> None:
    """Each its own module, and all of them one that is frozen; torch's pool serves them in turn."""
    shared = gsf.SAE(64, 1024, gsf.TopK(8)).freeze()

    def run(seed: int, found: list[Tensor]) -> None:
        g = torch.Generator().manual_seed(seed)
        sae = gsf.SAE(64, 1024, gsf.JumpReLU(0.2, 2.0), generator=g)
        optimizer = gsf.optim.Adam(sae, 1e-2, fused=True)
        for _ in range(5):
            x = torch.randn(64, 64, generator=g)
            optimizer.zero_grad()
            sae.loss(x)[0].backward()
            optimizer.step()
            found += [shared.encode(x).values, sae.W_enc.detach().clone()]

    alone: list[list[Tensor]] = [[] for _ in range(4)]
    together: list[list[Tensor]] = [[] for _ in range(4)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for seed, found in enumerate(alone):
            run(seed, found)
        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(together)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    for mine, others in zip(together, alone, strict=True):
        assert len(mine) == len(others) == 10
        for ours, theirs in zip(mine, others, strict=True):
            assert_same(ours, theirs)
