"""Ranks that read one source together: every batch is that of one process, cut without loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_sources import numbered, sequences, tiny_gemma

from gemmascope_fast.sources import ModelSource, ShardSource, Source, TensorSource, write_shards
from gemmascope_fast.training import shards
from gemmascope_fast.training.sources import Stream


def made(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    if kind == "tensor":
        return TensorSource(numbered(50), mask=torch.arange(50) % 7 != 0)
    if kind == "model":
        ids, mask = sequences()
        options: dict[str, Any] = {"block_sequences": 4, "batch_sequences": 1}
        return ModelSource(
            tiny_gemma(), ids, "model.layers.1.output", attention_mask=mask, **options
        )
    monkeypatch.setattr(shards, "CHUNK", 4)
    parts = [
        {"x": part, "tokens": part[:, 0].long() % 5, "target": part.repeat(1, 2)}
        for part in numbered(200).split((70, 90, 40))  # type: ignore[no-untyped-call]
    ]
    write_shards(folder, parts, special_tokens=[2])
    return ShardSource(folder, block_rows=72)


def lines(batch: Any) -> list[tuple[float, ...]]:
    """Rows of x beside their targets, in an order of their own."""
    return sorted(tuple(row) for row in torch.cat([t for t in batch if t is not None], 1).tolist())


@pytest.mark.parametrize("kind", ["tensor", "shards", "model"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_batches_are_those_of_one_process(
    kind: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(kind, tmp_path, monkeypatch)
    alone = Stream(source, 5)
    together = [Stream(source, 5, share=(rank, ranks)) for rank in range(ranks)]
    sizes = []
    for _ in range(12):
        expected, parts = alone.next(17), [stream.next(17) for stream in together]
        assert lines(expected) == sorted(line for part in parts for line in lines(part))
        assert {stream.position for stream in together} == {alone.position}
        sizes.append([len(x) for x, _ in parts])
    assert all(sum(of) > 0 for of in zip(*sizes, strict=True))
    if kind == "tensor":
        assert max(max(of) - min(of) for of in sizes) <= 2  # a batch may cross into another pass


@pytest.mark.parametrize("kind", ["tensor", "shards", "model"])
def test_another_number_of_ranks_goes_on_anywhere(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(kind, tmp_path, monkeypatch)
    two = [Stream(source, 5, share=(rank, 2)) for rank in range(2)]
    for stream in two:
        stream.next(31)
    three = [Stream(source, 5, two[0].position, (rank, 3)) for rank in range(3)]
    for _ in range(4):
        before = sorted(line for stream in two for line in lines(stream.next(9)))
        assert before == sorted(line for stream in three for line in lines(stream.next(9)))


def test_ranks_read_and_compute_their_own_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made("shards", tmp_path, monkeypatch)
    whole, parts = source.block(0, 0), [source.part(0, 0, rank, 2) for rank in range(2)]
    assert [len(part.x) for part in parts] == [36, 36] and len(whole.x) == 72
    live, passes = made("model", tmp_path, monkeypatch), []
    assert isinstance(live, ModelSource)
    forward = live._forward
    monkeypatch.setattr(live, "_forward", lambda rows: passes.append(rows) or forward(rows))
    live.part(0, 0, 1, 2)
    assert len(passes) == 2
    live.part(0, 0, 1, 5)  # four passes for five ranks: every rank makes the block
    assert len(passes) == 6
