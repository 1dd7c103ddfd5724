"""Activation sources: blocks that repeat, special tokens left out, shards, hooks into models."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.hook_points import resolve
from gemmascope_fast.sources import (
    Block,
    ModelSource,
    ShardSource,
    Source,
    TensorSource,
    capture,
    write_shards,
)
from gemmascope_fast.training import shards
from gemmascope_fast.training.hooks import special_token_ids
from gemmascope_fast.training.sources import EMPTY_BLOCKS, Stream


def numbered(n: int, d: int = 3) -> Tensor:
    """Row i holds i in every column."""
    return torch.arange(n, dtype=torch.float32)[:, None].expand(n, d).contiguous()


def rows_of(block: Block) -> list[int]:
    return [int(v) for v in block.take(0, len(block))[0][:, 0]]


def test_arrays_of_numpy_are_sources(tmp_path: Path) -> None:
    x = numbered(300, 12)
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    options: dict[str, Any] = {"d_sae": 32, "k": 3, "activation": "topk", "steps": 2}
    options |= {"batch_size": 64, "progress": False}
    expected = gsf.train(x, **options)
    for source in (mapped, write_shards(tmp_path / "a", [mapped]), TensorSource(x.numpy())):
        made = gsf.train(source, **options)
        assert made.W_dec.shape == expected.W_dec.shape
        assert isinstance(source, ShardSource) or torch.equal(made.W_dec, expected.W_dec)
    shards = write_shards(tmp_path / "b", [{"x": x.numpy(), "tokens": np.arange(300)}])
    assert rows_of(shards.block(0, 0)) == rows_of(write_shards(tmp_path / "c", [x]).block(0, 0))
    with pytest.raises(TypeError, match="x of part 0 must be a tensor or a numpy array, got list"):
        write_shards(tmp_path / "d", [[[1.0]]])  # type: ignore[list-item]


def test_rows_that_are_not_finite_are_named_as_in_the_source(tmp_path: Path) -> None:
    """Of a tensor with rows left out, of a target, of shards in small blocks and of a rank's."""
    x = numbered(9000)
    bad = x.clone()
    bad[8611] = float("nan")
    write_shards(tmp_path, [bad[:7000], bad[7000:]])
    cases: list[tuple[Source, str, int]] = [
        (
            TensorSource(bad, mask=torch.arange(9000) >= 200),
            "x is not finite in row 8611 of the",
            1,
        ),
        (TensorSource(x, bad), "target is not finite in row 8611 of the source", 1),
        (ShardSource(tmp_path, block_rows=2048), "row 1611 of shard-00001.safetensors of", 1),
        (ShardSource(tmp_path), "x is not finite in row 1611 of shard-00001.safetensors", 2),
    ]
    for source, text, ranks in cases:
        said = set()
        for rank in range(ranks):
            stream = Stream(source, 0, share=(rank, ranks))
            for _ in range(7):
                x, target = stream.next(1300)
                said.add(stream.blame(x=x, target=target))
        said.remove("the activations are finite, the weights have diverged")
        assert len(said) == 1 and text in said.pop()


# ---- in memory


def test_a_pass_holds_every_kept_row_once_and_repeats() -> None:
    mask = torch.arange(50) % 5 != 0
    source = TensorSource(numbered(50), mask=mask)
    first, second = rows_of(source.block(7, 0)), rows_of(source.block(7, 1))
    assert sorted(first) == sorted(second) == [i for i in range(50) if i % 5]
    assert first != second and first != rows_of(source.block(8, 0))
    assert first == rows_of(TensorSource(numbered(50), mask=mask).block(7, 0))


def test_pairs_stay_together() -> None:
    source = TensorSource(numbered(20), 10 * numbered(20, 4))
    x, target = source.block(0, 3).take(4, 11)
    assert target is not None and torch.equal(10 * x[:, 0], target[:, 0]) and len(x) == 7


def test_a_stream_continues_anywhere_with_the_same_rows() -> None:
    source = TensorSource(numbered(10))
    stream, seen, places = Stream(source, 1), [], []
    for _ in range(9):
        places.append(stream.position)
        seen.append(stream.next(7)[0])
    assert torch.equal(torch.cat(seen)[:10, 0].sort().values, torch.arange(10.0))
    for place, expected in zip(places, seen, strict=True):
        assert torch.equal(Stream(source, 1, place).next(7)[0], expected)
    assert torch.equal(Stream(source, 1).peek(2, 6)[0], seen[0][2:6])
    assert len(Stream(source, 1, (0, 8)).peek(1, 9)[0]) == 1


def test_identity_tells_contents_apart() -> None:
    x = numbered(100)
    other = x.clone()
    other[0, 0] = 5
    assert TensorSource(x).identity() == TensorSource(x.clone()).identity()
    assert TensorSource(x).identity() != TensorSource(other).identity()


class Dry(Source):
    d_in, d_out = 3, None

    def block(self, seed: int, index: int) -> Block:
        return Block(numbered(0), None, torch.arange(0))

    def identity(self) -> dict[str, Any]:
        return {}


def test_a_source_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match=f"{EMPTY_BLOCKS} blocks of the source have no rows"):
        Stream(Dry(), 0).next(1)


class Wide(Dry):
    def block(self, seed: int, index: int) -> Block:
        return Block(numbered(4, 5), None, torch.arange(4))


def test_a_block_of_another_width_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"block 0 must have x \[m, 3\], got \(4, 5\)"):
        Stream(Wide(), 0)


@pytest.mark.parametrize(
    "args, error, text",
    [
        ((torch.zeros(3),), ValueError, r"x must have shape \[N >= 1, d >= 1\]"),
        ((torch.zeros(0, 3),), ValueError, r"x must have shape \[N >= 1, d >= 1\]"),
        ((torch.zeros(3, 2).int(),), TypeError, "x must be float32"),
        ((numbered(3), numbered(4)), ValueError, "target must have as many rows as x, 3, got 4"),
        ((numbered(3), None, torch.zeros(3)), TypeError, "mask must be a tensor of bool"),
        ((numbered(3), None, torch.ones(4).int()), ValueError, r"mask must have shape \[3\]"),
        ((numbered(3), None, torch.zeros(3).bool()), ValueError, "at least one row"),
    ],
)
def test_tensors_that_do_not_fit(args: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        TensorSource(*args)


# ---- shards


def test_shards_give_every_row_once_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK", 4)
    x = numbered(41)
    tokens = torch.arange(41) % 10
    parts = [{"x": x[a:b], "tokens": tokens[a:b]} for a, b in ((0, 13), (13, 13), (13, 41))]
    write_shards(tmp_path, parts, special_tokens=[3, 9])
    source = ShardSource(tmp_path, block_rows=12)
    kept = [i for i in range(41) if i % 10 not in (3, 9)]
    blocks = [rows_of(source.block(5, at)) for at in range(8)]
    assert sorted(sum(blocks[:4], [])) == sorted(sum(blocks[4:], [])) == kept
    assert all(block != sorted(block) for block in blocks if len(block) > 4)
    assert (
        blocks[:4] != blocks[4:]
        and rows_of(ShardSource(tmp_path, block_rows=12).block(5, 2)) == blocks[2]
    )


def test_shards_of_pairs_in_bfloat16(tmp_path: Path) -> None:
    x = numbered(30).bfloat16()
    mask = torch.arange(30) >= 6
    source = write_shards(tmp_path, [{"x": x, "target": 2 * numbered(30, 5), "mask": mask}])
    assert (source.d_in, source.d_out) == (3, 5)
    got, target = source.block(0, 0).take(0, 24)
    assert got.dtype == torch.bfloat16 and target is not None
    assert torch.equal(target[:, 0], 2 * got[:, 0].float()) and float(got.min()) == 6


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_shards(tmp_path, [numbered(4)])
    with pytest.raises(FileExistsError, match=r"manifest\.json exists"):
        write_shards(tmp_path, [numbered(4)])


@pytest.mark.parametrize(
    "parts, text",
    [
        ([], "at least one part"),
        ([numbered(3), numbered(3, 4)], "part 1 must be like part 0"),
        ([{"y": numbered(3)}], "must have a floating-point x"),
        ([{"x": numbered(3), "mask": torch.ones(2)}], "mask of part 0 must have 3 rows"),
        ([{"x": numbered(3), "z": torch.ones(3)}], r"unknown keys \['z'\]"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, parts: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        write_shards(tmp_path, parts)
    assert not (tmp_path / "manifest.json").exists()


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"format": "other"}, "must have format 'activation-shards'"),
        ({"version": 2}, "version 1"),
        ({"d_in": 4}, r"x of .* must have shape \[8, 4\], got \[8, 3\]"),
        ({"d_in": "3"}, "must have d_in"),
        ({"d_out": 7}, "lacks target"),
        ({"shards": []}, "lists no rows"),
        ({"shards": [{"file": "shard-00000.safetensors", "rows": 9}]}, r"must have shape \[9, 3\]"),
        ({"shards": [{"file": "../shard-00000.safetensors", "rows": 8}]}, "a name in the folder"),
        ({"shards": [{"file": "absent", "rows": 8}]}, "must be a regular file"),
        ({"special_tokens": [1.5]}, "special_tokens"),
    ],
)
def test_manifests_are_checked_before_anything_is_read(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    write_shards(tmp_path, [numbered(8)])
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=text):
        ShardSource(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, [numbered(8)])
    (tmp_path / "shard-00000.safetensors").write_bytes(b"\x01" * 40)
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is not a safetensors file"):
        ShardSource(tmp_path)
    save_file({"x": torch.zeros(8, 3).int()}, tmp_path / "shard-00000.safetensors")
    with pytest.raises(ValueError, match=r"x of .* must be floating point"):
        ShardSource(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is not JSON"):
        ShardSource(tmp_path)


# ---- live from a model


def tiny_gemma() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "head_dim": 8}
    config = transformers.Gemma3TextConfig(
        vocab_size=64,
        num_hidden_layers=3,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        **sizes,
    )
    return transformers.Gemma3ForCausalLM(config).eval()


def tiny_multimodal() -> Any:
    transformers = pytest.importorskip("transformers")
    text = tiny_gemma().config
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {"num_hidden_layers": 3, "image_size": 28, "patch_size": 14, **sizes}
    config = transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config={"model_type": "siglip_vision_model", **vision},
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [tiny_gemma, tiny_multimodal])
def test_hook_points_of_the_published_configs_are_found(make: Any) -> None:
    model = make()
    for tail in (
        *("", ".self_attn.o_proj", ".post_feedforward_layernorm"),
        ".pre_feedforward_layernorm",
    ):
        place = resolve("train", model, f"model.layers.1{tail}.input")
        assert place.side == "input" and place.name.endswith(f"layers.1{tail}")
        assert model.get_submodule(place.name) is place.module and "vision" not in place.name
    assert (
        resolve("train", model, "model.language_model.layers.2.output").module
        is resolve("train", model, "layers.2.output").module
    )


@pytest.mark.parametrize(
    "point, text",
    [
        ("model.layers.1", "must be a module's name and .input or .output"),
        ("model.layers.9.output", "and names none"),
        ("output", "must be a module's name"),
    ],
)
def test_hook_points_that_name_nothing(point: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        resolve("train", tiny_gemma(), point)


@pytest.mark.parametrize("make", [tiny_gemma, tiny_multimodal])
def test_captured_activations_are_those_of_a_plain_pass(make: Any) -> None:
    model, ids = make(), torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    got = capture(model, ["model.layers.1.input", "model.layers.1.output"], input_ids=ids)
    assert torch.equal(got[0], expected[1]) and torch.equal(got[1], expected[2])
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert before == after


def test_special_tokens_of_configs_and_tokenizers() -> None:
    class Tokenizer:
        all_special_ids, unk_token_id = [7, 8, 9], 8

    assert special_token_ids(tiny_multimodal(), Tokenizer()) >= {0, 1, 2, 60, 61, 62, 7, 9}
    assert 8 not in special_token_ids(tiny_gemma(), Tokenizer())
    assert special_token_ids(tiny_gemma()) == {0, 1, 2}


def sequences() -> tuple[Tensor, Tensor]:
    """12 sequences that start with BOS (2), three of them padded at the end."""
    ids = torch.randint(3, 60, (12, 9), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 2
    mask = torch.ones_like(ids)
    mask[4:7, 6:] = 0  # what stands there looks like text
    return ids, mask


def test_blocks_hold_the_text_tokens_of_whole_sequences() -> None:
    model, (ids, mask) = tiny_gemma(), sequences()
    source = ModelSource(
        model, ids, "model.layers.1.output", attention_mask=mask, block_sequences=5,
        batch_sequences=2,
    )  # fmt: skip
    blocks = [source.block(3, at) for at in range(6)]
    again = source.block(3, 1)
    assert torch.equal(again.take(0, 99)[0], blocks[1].take(0, 99)[0])
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    keep = (mask != 0) & (ids != 2)
    expected = hidden.hidden_states[2][keep]
    for first in (0, 3):
        got = torch.cat([b.take(0, len(b))[0] for b in blocks[first : first + 3]])
        assert got.shape == expected.shape == (12 * 8 - 9, 16)
        got, wanted = got[got[:, 0].argsort()], expected[expected[:, 0].argsort()]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_a_transcoder_reads_two_places() -> None:
    ids, _ = sequences()
    points = [f"model.layers.0.{n}_feedforward_layernorm.output" for n in ("pre", "post")]
    model = tiny_gemma()
    source = ModelSource(model, ids, points[0], target_hook_point=points[1])
    assert (source.d_in, source.d_out) == (16, 16)
    block = source.block(0, 0)
    x, target = block.take(0, len(block))
    layer = model.model.layers[0]
    with torch.no_grad():
        expected = layer.post_feedforward_layernorm(layer.mlp(x))
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-4)
    assert source.metadata()["hf_hook_point_out"] == points[1]


def test_model_sources_that_do_not_fit() -> None:
    model, (ids, mask) = tiny_gemma(), sequences()
    point = "model.layers.0.output"
    for args, options, text in (
        ((ids[0], point), {}, r"input_ids must have shape \[S, L\]"),
        ((ids, point), {"attention_mask": mask[:2]}, "attention_mask must have the shape"),
        ((ids, point), {"block_sequences": 0}, "block_sequences must be >= 1"),
        ((torch.full((2, 3), 2), point), {}, "every token of input_ids is special"),
    ):
        with pytest.raises(ValueError, match=text):
            ModelSource(model, *args, **options)
    with pytest.raises(TypeError, match="input_ids must be a tensor of integers"):
        ModelSource(model, ids.float(), point)


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    for folder in tmp_path, tmp_path / "nowhere":
        with pytest.raises(FileNotFoundError, match=f"train: source must be a folder .*{folder}"):
            ShardSource(folder)


def test_a_full_disk_leaves_no_manifest(tmp_path: Path) -> None:
    """Nothing reads what was not written to its end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(
            OSError, match=r"^write_shards: .*shard-00001.* was not written: .*large"
        ):
            write_shards(tmp_path, [numbered(4), numbered(4000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(FileNotFoundError):
        gsf.train(tmp_path, d_sae=4, target_l0=1, steps=1, progress=False)
    assert len(write_shards(tmp_path, [numbered(4)]).block(0, 0)) == 4
